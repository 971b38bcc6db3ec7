"""Former path of detr.data.coco. Importing from here still works in this version, but not in the next."""

from detr.data.coco import Coco  # noqa: F401
