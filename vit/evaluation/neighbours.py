"""Classification by nearest neighbours among frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4).

A sample is classified by the votes of its k nearest neighbours: the samples with known classes whose features have the
highest cosine similarity to its features. Each neighbour votes for its own class, with the weight
exp(similarity / 0.07). DINO is evaluated in this way, with k = 20 (Caron et al. 2021, arXiv 2104.14294).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.errors import UserError

TEMPERATURE = 0.07  # in both papers
MAX_MATRIX_ENTRIES = 2**24  # maximum number of entries of a matrix of similarities or of votes: 64 MiB in fp32


class NeighbourClassifier:
    """Classifies samples by the k nearest of N samples with known classes.

    Args:
        features: features of the samples with known classes, (N, C) of any float type; similarities are computed on the
            device of `features`.
        labels: class indices of these samples, (N,).
        classes: number of classes K.

    Raises UserError when a feature is not finite, since one NaN would make the neighbours of every sample wrong.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        assert len(features) == len(labels) > 0, (features.shape, labels.shape)
        assert 0 <= int(labels.min()) and int(labels.max()) < classes, "a label is outside the classes"
        if not features.isfinite().all():
            raise UserError(
                "the model's features of the training samples are not finite, so no neighbours can be found; its "
                "weights are broken, or the precision is too low (try trainer.precision=fp32)."
            )
        self.features = normalize(features.float(), dim=1)
        self.labels = labels.to(features.device)
        self.classes = classes

    @torch.no_grad()
    def classify(self, features: Tensor, k: int) -> Tensor:
        """Predict the class with the largest sum of votes: features (B, C) -> int64 (B,), on the device of `features`.

        The prediction is -1 for a sample whose features are not all finite. If k is above N, all N samples vote. Of
        classes with equal sums, the one with the lowest index is predicted.
        """
        chunk = max(1, MAX_MATRIX_ENTRIES // max(len(self.labels), self.classes))
        classes = [self._classify_chunk(part, min(k, len(self.labels))) for part in features.split(chunk)]
        return torch.cat(classes).to(features.device)

    def _classify_chunk(self, features: Tensor, k: int) -> Tensor:
        features = features.to(self.features.device, torch.float32)
        with torch.autocast(features.device.type, enabled=False):  # bf16 would round similarities to steps of 1/256
            similarity = normalize(features, dim=1) @ self.features.T  # (b, N)
        nearest = similarity.topk(k, dim=1)  # values and indices (b, k)
        votes = (nearest.values / TEMPERATURE).exp()  # (b, k)
        labels = self.labels[nearest.indices]  # (b, k)
        totals = votes.new_zeros(len(features), self.classes)  # (b, K)
        for i in range(k):  # one neighbour at a time, so that the order of summation is fixed on a GPU, too
            totals.scatter_add_(1, labels[:, i : i + 1], votes[:, i : i + 1])
        return totals.argmax(1).masked_fill(~features.isfinite().all(1), -1)
