"""Former import path of `vit.data.digits`, which still works in this version."""

from vit.data.digits import Digits  # noqa: F401
