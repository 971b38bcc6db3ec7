"""Former path of common.nn.attention. Importing from here still works in this version, but not in the next.

`watching` is the former name of `record_attention`.
"""

from common.nn.attention import Attention, Cache  # noqa: F401
from common.nn.attention import record_attention as watching  # noqa: F401
