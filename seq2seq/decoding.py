"""Moved to common.decoding.contract and common.decoding.options; importable here for one version."""

from common.decoding.contract import Decoder, Hypothesis  # noqa: F401
from common.decoding.options import DecodingOptions  # noqa: F401
