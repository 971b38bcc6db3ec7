"""Former import path of `vit.data.in_memory`, which still works in this version."""

from vit.data.in_memory import Images, InMemory  # noqa: F401
from vit.data.in_memory import split_images as cut  # noqa: F401
