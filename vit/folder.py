"""Former path of vit.data.folder. Importing from here still works in this version, but not in the next."""

from vit.data.folder import ImageFolder  # noqa: F401
