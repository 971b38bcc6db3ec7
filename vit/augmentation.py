"""Former path of vit.data.augmentation. Importing from here still works in this version, but not in the next."""

from vit.data.augmentation import Augmentation  # noqa: F401
