"""Former path of detr.criterion.matcher. Importing from here still works in this version, but not in the next."""

from detr.criterion.matcher import MatcherOptions  # noqa: F401
