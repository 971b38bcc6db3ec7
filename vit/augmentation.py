"""Moved to vit.data.augmentation; importable here for one version."""

from vit.data.augmentation import Augmentation  # noqa: F401
