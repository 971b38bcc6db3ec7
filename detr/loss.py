"""Moved to detr.criterion.set_loss; importable here for one version."""

from detr.criterion.set_loss import LossOptions  # noqa: F401
