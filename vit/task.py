"""Former path of vit.tasks.classification. Importing from here still works in this version, but not in the next."""

from vit.tasks.classification import Classification, PredictOptions  # noqa: F401
