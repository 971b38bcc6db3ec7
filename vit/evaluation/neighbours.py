"""Classification by the nearest neighbours of frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4).

As DINO (Caron et al. 2021, arXiv 2104.14294) evaluates with k = 20: cosine similarity, and votes of
exp(similarity / 0.07).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.errors import UserError

TEMPERATURE = 0.07  # both papers
ENTRIES = 2**24  # similarities held at once: 64 MiB in fp32


class Bank:
    """Features of samples whose classes are known, for others to look up.

    Args:
        features: (N, C) of any float type, on the device that shall do the work.
        labels: (N,) class indices.
        classes: their number.

    Raises UserError when a feature is not finite: one such sample would spoil every vote.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        assert len(features) == len(labels) > 0, (features.shape, labels.shape)
        assert 0 <= int(labels.min()) and int(labels.max()) < classes, "a label is no class"
        if not features.isfinite().all():
            raise UserError(
                "the model's features of the training samples are not finite, so they have no neighbours; its weights "
                "are broken, or the precision is too low (try trainer.precision=fp32)."
            )
        self.features = normalize(features.float(), dim=1)
        self.labels = labels.to(features.device)
        self.classes = classes

    @torch.no_grad()
    def vote(self, features: Tensor, k: int) -> Tensor:
        """The class that the k nearest vote for: (B, C) -> (B,) int64 on the device of `features`, -1 where not finite.

        With fewer than k samples in the bank, all of them vote. Of classes with equal votes the first wins.
        """
        chunk = max(1, ENTRIES // max(len(self.labels), self.classes))
        voted = [self._vote(part, min(k, len(self.labels))) for part in features.split(chunk)]
        return torch.cat(voted).to(features.device)

    def _vote(self, features: Tensor, k: int) -> Tensor:
        features = features.to(self.features.device, torch.float32)
        with torch.autocast(features.device.type, enabled=False):  # bf16 would round similarities to steps of 1/256
            similarity = normalize(features, dim=1) @ self.features.T  # (b, N)
        nearest = similarity.topk(k, dim=1)  # values and indices (b, k)
        ballots = (nearest.values / TEMPERATURE).exp()
        choices = self.labels[nearest.indices]
        votes = ballots.new_zeros(len(features), self.classes)
        for rank in range(k):  # one at a time, so that a GPU too adds up a class's votes in a fixed order
            votes.scatter_add_(1, choices[:, rank : rank + 1], ballots[:, rank : rank + 1])
        return votes.argmax(1).masked_fill(~features.isfinite().all(1), -1)
