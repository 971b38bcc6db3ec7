"""Moved to common.nn.patches; importable here for one version."""

from common.nn.patches import Form, Patches, lecun_normal_  # noqa: F401
