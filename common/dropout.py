"""Former path of common.nn.dropout. Importing from here still works in this version, but not in the next."""

from common.nn.dropout import Dropout  # noqa: F401
