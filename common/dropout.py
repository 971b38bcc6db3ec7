"""Moved to common.nn.dropout; importable here for one version."""

from common.nn.dropout import Dropout  # noqa: F401
