"""Moved to detr.criterion.matcher; importable here for one version."""

from detr.criterion.matcher import MatcherOptions  # noqa: F401
