"""Moved to common.nn.attention; importable here for one version."""

from common.nn.attention import Attention, Cache  # noqa: F401
from common.nn.attention import record_attention as watching  # noqa: F401
