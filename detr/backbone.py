"""Moved to common.nn.resnet and common.weights.backbones; importable here for one version."""

from common.nn.resnet import Backbone, BackboneOptions  # noqa: F401
from common.weights.backbones import load_weights  # noqa: F401
