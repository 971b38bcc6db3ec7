"""Moved to vit.data.in_memory; importable here for one version."""

from vit.data.in_memory import Images, InMemory, cut  # noqa: F401
