"""Former path of detr.models.detector. Importing from here still works in this version, but not in the next."""

from detr.models.detector import BoxHead, Detector, PositionOptions  # noqa: F401
