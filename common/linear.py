"""Moved to common.nn.linear; importable here for one version."""

from common.nn.linear import Linear  # noqa: F401
