"""Moved to vit.data.in_memory; importable here for one version."""

from vit.data.in_memory import Images, InMemory  # noqa: F401
from vit.data.in_memory import split_images as cut  # noqa: F401
