"""Former path of common.nn.resnet and common.weights.backbones.

Importing from here still works in this version, but not in the next.
"""

from common.nn.resnet import Backbone, BackboneOptions  # noqa: F401
from common.weights.backbones import load_weights  # noqa: F401
