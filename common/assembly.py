"""Moved to common.train.assembly; importable here for one version."""

from common.train.assembly import load  # noqa: F401
