"""Former path of vit.criterion.cross_entropy. Importing from here still works in this version, but not in the next."""

from vit.criterion.cross_entropy import LossOptions  # noqa: F401
