"""Moved to common.decoding; importable here for one version."""

from common.decoding.contract import Decoder  # noqa: F401
