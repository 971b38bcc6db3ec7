"""Former import path of `vit.criterion.cross_entropy`, which still works in this version."""

from vit.criterion.cross_entropy import LossOptions  # noqa: F401
