"""Former path of vit.models.classifier. Importing from here still works in this version, but not in the next."""

from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions  # noqa: F401
