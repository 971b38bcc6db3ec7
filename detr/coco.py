"""Moved to detr.data.coco; importable here for one version."""

from detr.data.coco import Coco  # noqa: F401
