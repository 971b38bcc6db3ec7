"""Former import path of `vit.data.folder`, which still works in this version."""

from vit.data.folder import ImageFolder  # noqa: F401
