"""Former path of detr.criterion.set_loss. Importing from here still works in this version, but not in the next."""

from detr.criterion.set_loss import LossOptions  # noqa: F401
