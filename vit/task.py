"""Former import path of `vit.tasks.classification`, which still works in this version."""

from vit.tasks.classification import Classification, PredictOptions  # noqa: F401
