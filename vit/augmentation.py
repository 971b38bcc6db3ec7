"""Former import path of `vit.data.augmentation`, which still works in this version."""

from vit.data.augmentation import Augmentation  # noqa: F401
