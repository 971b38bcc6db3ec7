"""Former import path of `common.nn.patches`, which still works in this version."""

from common.nn.patches import Form, Patches, lecun_normal_  # noqa: F401
