"""Former path of common.decoding.contract and common.decoding.options.

Importing from here still works in this version, but not in the next.
"""

from common.decoding.contract import Decoder, Hypothesis  # noqa: F401
from common.decoding.options import DecodingOptions  # noqa: F401
