"""Former path of common.train.assembly. Importing from here still works in this version, but not in the next."""

from common.train.assembly import load  # noqa: F401
