"""Moved to common.decoding; importable here for one version."""

from common.decoding.decoding import Decoder  # noqa: F401
