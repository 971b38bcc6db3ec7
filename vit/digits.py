"""Former path of vit.data.digits. Importing from here still works in this version, but not in the next."""

from vit.data.digits import Digits  # noqa: F401
