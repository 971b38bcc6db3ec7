"""Former path of common.nn.linear. Importing from here still works in this version, but not in the next."""

from common.nn.linear import Linear  # noqa: F401
