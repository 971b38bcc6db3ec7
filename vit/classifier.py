"""Former import path of `vit.models.classifier`, which still works in this version."""

from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions  # noqa: F401
