"""Moved to common.nn.attention; importable here for one version."""

from common.nn.attention import Attention, Cache, watching  # noqa: F401
