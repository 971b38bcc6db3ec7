"""Moved to vit.criterion.cross_entropy; importable here for one version."""

from vit.criterion.cross_entropy import LossOptions  # noqa: F401
