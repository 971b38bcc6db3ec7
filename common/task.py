"""What the trainer and the evaluator must know about a data set and a problem: two small protocols.

Nothing here is inherited from. A wing's class fits when it has these methods. What a class may have beside stands in
`OptionalData`, `OptionalTask` and `OptionalModel`: members are looked up by name, and a class without them is complete.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from common.types import Split as Split

Batch = dict[str, Any]  # tensors and lists; "ids" names its samples
Answer = dict[str, Any]  # one sample's prediction in the user's units


class Goal(NamedTuple):
    """The number, read on `val`, that picks the best checkpoint."""

    name: str
    higher_is_better: bool

    def better(self, new: float, old: float | None) -> bool:
        """Whether `new` beats `old`; the first number always does, and any number beats one that is none."""
        if old is None or math.isnan(old):
            return old is None or not math.isnan(new)
        return new > old if self.higher_is_better else new < old


class Adopted(NamedTuple):
    """A foreign file in our own terms."""

    weights: dict[str, Tensor]  # by our names
    task_state: dict[str, Any]  # what `Task.restore` takes; empty when the file does not say
    left_out: list[str]  # the file's keys that have no place here


class Data(Protocol):
    """A data set of a wing. Its constructor opens no file."""

    batch_size: int  # samples, or padded tokens, of one optimizer step over all ranks

    def count(self, split: Split) -> int:
        """Number of samples in `split`."""

    def cost(self, split: Split) -> Sequence[int]:
        """What each sample weighs; a batch weighs its number of samples times its heaviest one."""

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One sample, augmented by `generator`; None means as it is evaluated."""

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples to one batch of padded CPU tensors with their names under "ids"."""

    def summary(self) -> list[str]:
        """Lines for the start of a run: sizes, and what was left out and why."""


class OptionalData(Protocol):
    """What a data set may have."""

    drawn: bool
    """Whether it was made to be learnt without pretrained weights; a task's `advice` then leaves out that warning."""

    def where(self, split: Split, index: int) -> str:
        """A few words on where a sample lies (its file, its line), for messages; opens nothing."""


class Metric(Protocol):
    """An accumulator over one split: every sample once, joined over ranks by sample id, computed once."""

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Take in the answers to one batch."""

    def gather(self) -> None:
        """Join the ranks' shares by sample id (a collective: all ranks call it)."""

    def compute(self) -> dict[str, float]:
        """The numbers, on every rank the same."""

    def details(self) -> Sequence[Sequence[Any]]:
        """A table of finer numbers, its header first: those of each class, say."""

    def write(self, folder: Path) -> None:
        """The predictions in the field's own file format (rank 0)."""


class Task(Protocol):
    """A problem: its loss, its answers and its numbers; never a particular model or data set."""

    goal: Goal  # of this instance
    # The keys of `model_arguments` that each model must take; read from source before anything is imported.
    handed_on: ClassVar[tuple[str, ...]]

    def model_arguments(self) -> dict[str, Any]:
        """What the data decide about the model (number of classes, vocabulary size)."""

    def state(self) -> dict[str, Any]:
        """Plain types, enough to predict without the data set."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take `state` from a checkpoint."""

    def adopt(self, tensors: dict[str, Any], folder: Path) -> Adopted:
        """Translate a foreign checkpoint; raises UserError when the layout is not known.

        `folder`: where the file lies, for programs that keep a vocabulary beside it.
        """

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """What each loss term is divided by: from targets and the task's constants, never from outputs."""

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (scalar, at least fp32) and its named parts (detached scalars).

        Both are sums over the batch divided by the normalisers of the WHOLE step, so micro-batches and ranks add up.
        `batch["seeds"]` holds a seed for each sample, for what the task draws itself.
        """

    def predict(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer per sample, in the user's units, on the CPU."""

    def read(self, input: str) -> Iterator[Batch]:
        """A user's file, folder or pipe to batches as they come."""

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterable[str]:
        """Write answers as pictures or text under `folder`; one line for the console each."""

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor | None:
        """uint8 (B, 3, H, W) of the first `count` answers for the log, or None where pictures make no sense."""

    def metric(self, split: Split) -> Metric:
        """A fresh accumulator for `split`."""

    def advice(self, pretrained: bool) -> list[str]:
        """Warnings that the data call for before the first step, one sentence each.

        `pretrained`: whether any part of the model starts from weights that were learnt.
        """

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Warnings that the newest answers on val call for, one sentence each."""


class OptionalTask(Protocol):
    """What a task may have."""

    per_micro_batch: Sequence[str]
    """Short names of what in its loss depends on how a step is cut (a divisor that depends on outputs), for the log."""

    offered: Sequence[str]
    """Keys of `model_arguments` that a model gets only if its constructor names them."""

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, for one version."""

    def inherit(self, state: dict[str, Any]) -> None:
        """Take a part of the task's state in the checkpoint that a run starts from, before the model is built."""


class OptionalModel(Protocol):
    """What a model may have."""

    decided_by_data: Sequence[str]
    """Names or prefixes of tensors that mean nothing for other classes or words: such a checkpoint's are not loaded."""

    undecayed: Sequence[str]
    """Names or prefixes of parameters without weight decay that are no vectors: tables of positions, say."""

    per_micro_batch: Sequence[str]
    """Short names of what in it depends on how a step is cut, for the log; live BatchNorm layers need none."""

    longest: int
    """The number of tokens in the longest input that it takes; a task then refuses longer ones by their names."""

    def fetch_weights(self) -> str | None:
        """Load pretrained weights in a run that starts from no checkpoint; a line for the log, None without any."""

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights in this model's sizes: positions resampled to another grid, say."""

    def layers(self) -> Sequence[tuple[str, ...]]:
        """Prefixes of its parameters' names, layer by layer from input to output, for `optimizer.layer_decay`."""

    def features(self, images: Tensor) -> Tensor:
        """What its head is given: (B, channels, H, W) -> (B, C), for the nearest neighbours among training images."""
