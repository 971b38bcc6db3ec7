"""Decoding options for tests that do not depend on most of their values."""

from common.decoding.options import DecodingOptions

BEAM = DecodingOptions(
    method="beam",
    beam=2,
    penalty="average",
    alpha=1.0,
    stop="first",
    candidates=2,
    longest_factor=0.0,
    longest_extra=5,
    at_limit="end",
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    attention=False,
)
