"""Distillation of detectors: a student's queries are matched to a teacher's confident predictions.

The predictions stand for objects in the Hungarian matching and in the box terms of the set loss (Carion et al. 2020,
arXiv 2005.12872, section 3.1). The class of a matched row learns from the teacher's logits (Hinton et al. 2015, arXiv
1503.02531). answers.py defines output rows and the letters in shapes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.nn.distillation import DistillationOptions, distillation_loss
from common.types import Fraction
from detr.criterion.answers import Classification, Outputs, Targets, probabilities, upcast_half
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions
from detr.criterion.terms import Comparison, Term, sigmoid_focal


@dataclass(frozen=True, kw_only=True)
class DetectionDistillationOptions(DistillationOptions):
    """Options of the distillation of detectors.

    min_score: minimum probability of the most probable class of the teacher's predictions that are targets.
    """

    min_score: Fraction


@dataclass(frozen=True)
class TeacherClass(Term):
    """The loss of the classes of the matched rows; other rows have none, since labels teach them "no object".

    "soft" is the divergence of the row's class probabilities from the teacher's, at the temperature and times its
    square: of the softmax over classes and "no object", or the sum over the sigmoids of the classes. "hard" is the
    classification loss of the labels, with the teacher's most probable class as the label.
    """

    loss: LossOptions
    options: DistillationOptions
    name = "class"
    reads = "logits"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        logits, targets = comparison.answers("logits"), comparison.targets  # (M, K')
        assert targets.logits is not None
        if self.options.kind == "hard":
            values = self._hard(logits, comparison.objects(targets.labels))
        else:
            values = self._soft(logits, comparison.objects(targets.logits))
        return comparison.per_layer(values)

    def _hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (M, K') and labels (M,) -> (M,)."""
        if self.loss.classification == "softmax":
            return F.cross_entropy(logits, labels, reduction="none")
        truth = F.one_hot(labels, logits.shape[-1]).to(logits)
        return sigmoid_focal(logits, truth, self.loss.focal_alpha, self.loss.focal_gamma).sum(-1)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits (M, K') of both -> (M,). A sigmoid is a softmax over the logit and zero."""
        if self.loss.classification == "softmax":
            return distillation_loss(self.options, student, teacher)
        pairs = (torch.stack((logits, torch.zeros_like(logits)), dim=-1) for logits in (student, teacher))
        return distillation_loss(self.options, *pairs).sum(-1)


def teacher_criterion(loss: LossOptions, matcher: MatcherOptions, options: DistillationOptions) -> Criterion:
    """Return the criterion of the answer set "teacher": the usual costs, weights and box terms, without masks."""
    criterion = Criterion(loss, matcher)
    criterion.terms[0] = TeacherClass(loss.class_weight, loss, options)
    return criterion


def confident_predictions(classification: Classification, outputs: Outputs, min_score: float) -> Targets:
    """Return the predictions of one layer (B, Q, ...) that have a class with a probability of at least `min_score`.

    They are the objects of the targets, image after image; an image may have none. Their numbers are copied to the
    host.
    """
    logits, boxes = (upcast_half(outputs[name]) for name in ("logits", "boxes_cxcywh"))
    scores, labels = probabilities(classification, logits).max(-1)  # (B, Q) each
    confident = scores >= min_score
    counts: list[int] = confident.sum(1).tolist()
    return Targets(counts, labels[confident], boxes[confident], logits=logits[confident])
