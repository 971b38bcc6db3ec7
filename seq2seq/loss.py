"""Moved to seq2seq.criterion.cross_entropy; importable here for one version."""

from seq2seq.criterion.cross_entropy import LossOptions  # noqa: F401
