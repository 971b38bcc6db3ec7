"""Moved to vit.data.folder; importable here for one version."""

from vit.data.folder import ImageFolder  # noqa: F401
