"""Moved to vit.data.digits; importable here for one version."""

from vit.data.digits import Digits  # noqa: F401
