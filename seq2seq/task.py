"""Moved to seq2seq.tasks.translation; importable here for one version."""

from seq2seq.tasks.translation import Translation  # noqa: F401
