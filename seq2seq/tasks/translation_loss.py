"""The loss of translation: cross-entropy with label smoothing, SimCut, and distillation from another translator.

Distillation is per word (Kim and Rush 2016, "Sequence-Level Knowledge Distillation", arXiv 1606.07947, section 3.1): at
each position of the target, the student learns the teacher's distribution over the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.distillation import DistillationOptions, distillation_loss
from common.task import Batch, Teacher
from seq2seq.criterion import cross_entropy as loss
from seq2seq.criterion.cross_entropy import LossOptions
from seq2seq.criterion.simcut import divergence
from seq2seq.data.protocol import TextData
from seq2seq.tasks.simcut import original_and_cut
from seq2seq.tokenizers.bpe import PAD

# Models that mask entries have logits of -1e9 or, in fp16, -inf there. Raised to this bound, they give no NaN.
LOWEST_LOGIT = -1e4


class TranslationLoss:
    """The part of the task of translation that trains a model; see seq2seq/tasks/translation.py."""

    data: TextData
    loss_options: LossOptions
    distillation: DistillationOptions | None = None
    teacher: Teacher | None = None

    @property
    def teacher_file(self) -> str | None:
        """The checkpoint of the teacher (`distillation.teacher`); None without distillation."""
        return self.distillation.teacher if self.distillation else None

    def set_teacher(self, teacher: Teacher) -> list[str]:
        """Store the teacher for `loss`; returns no notes.

        Raises UserError if the teacher is no translator, or has tokenizers other than this task's, since then its
        probabilities are those of other tokens.
        """
        if not isinstance(teacher.task, TranslationLoss):
            raise UserError("the teacher is no translator; give a checkpoint of one.")
        if _tokenizers(teacher.task) != _tokenizers(self):
            raise UserError(
                "the teacher has other tokenizers than this run; give a teacher that was trained on the same training "
                "split with the same data.tokenizer."
            )
        self.teacher = teacher
        return []

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The number of target tokens, including EOS and without padding, under the key "tokens"."""
        return {"tokens": float(batch["target_lengths"].sum())}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, kept in this version for subclasses that call it."""
        return self.normalisers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts in nats, each without its weight.

        - "nll": the cross-entropy without smoothing. The loss is the cross-entropy with smoothing.
        - "teacher", with a teacher: the loss of distillation (common/nn/distillation.py). It makes up the share
          `distillation.weight` of the loss, and the cross-entropy the rest.
        - "simcut", with SimCut: its divergence (seq2seq/criterion/simcut.py). The loss also contains it, weighted.

        All are summed over the target tokens of the batch, and divided by the number of target tokens of the whole
        step, so that the values of micro-batches sum to the mean over the tokens of the step.
        """
        masked_entries = bool(getattr(model, "masks_entries", False))
        targets, tokens = batch["target_out"], normalisers["tokens"]
        logits, cut_logits = self._logits(model, batch)
        smoothed, plain = loss.cross_entropy(self.loss_options, logits, targets, masked_entries=masked_entries)
        total, parts = smoothed / tokens, {"nll": plain / tokens}
        if self.distillation is not None and self.teacher is not None:
            of_teacher = self._teacher_loss(self.distillation, self.teacher, logits, batch, masked_entries) / tokens
            total = (1 - self.distillation.weight) * total + self.distillation.weight * of_teacher
            parts["teacher"] = of_teacher.detach()
        else:
            assert self.teacher_file is None, "assembly provides the teacher before the first step"
        if cut_logits is not None and self.loss_options.simcut is not None:
            of_cut = divergence(logits, cut_logits, targets, masked_entries=masked_entries) / tokens
            total = total + self.loss_options.simcut.weight * of_cut
            parts["simcut"] = of_cut.detach()
        return total, parts

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The logits (B, T, V) and, with SimCut, those with cut tokens."""
        simcut = self.loss_options.simcut
        if simcut is not None and simcut.weight:
            sizes = [tokenizer.size for tokenizer in self.data.tokenizers()]
            return original_and_cut(model, batch, simcut.cutoff, sizes)
        return model(batch["source"], batch["source_lengths"], batch["target_in"]), None

    def _teacher_loss(
        self, options: DistillationOptions, teacher: Teacher, logits: Tensor, batch: Batch, masked_entries: bool
    ) -> Tensor:
        """The loss of distillation (a scalar), summed over the tokens that are not padding."""
        with torch.no_grad():
            targets: Tensor = teacher.model(batch["source"], batch["source_lengths"], batch["target_in"])
        if masked_entries or getattr(teacher.model, "masks_entries", False):
            logits, targets = logits.clamp(min=LOWEST_LOGIT), targets.clamp(min=LOWEST_LOGIT)
        real: Tensor = batch["target_out"] != PAD  # (B, T)
        return (distillation_loss(options, logits, targets) * real).sum()


def _tokenizers(task: Any) -> list[str]:
    """The states of the tokenizers of source and target."""
    return [tokenizer.state() for tokenizer in task.data.tokenizers()]
