"""What the trainer and the evaluator must know about a data set and a problem: the protocols `Data` and `Task`.

No class inherits from a protocol; a class satisfies it by having its members. `OptionalData`, `OptionalTask` and
`OptionalModel` list members that a class may have: they are looked up by name, and a class without them is complete.
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
    """The metric on `val` that selects the best checkpoint."""

    name: str
    higher_is_better: bool
    undefined: float | None = -1.0  # stands for "no value", as in COCO's evaluation without any object; None: nothing

    def is_defined(self, value: float) -> bool:
        """Whether `value` is a number that can be compared: neither nan nor `undefined`."""
        return not math.isnan(value) and value != self.undefined

    def better(self, new: float, old: float | None) -> bool:
        """Whether `new` is better than `old`. An undefined value is better than none; any other beats an undefined."""
        if not self.is_defined(new):
            return False
        if old is None or not self.is_defined(old):
            return True
        return new > old if self.higher_is_better else new < old


class Adopted(NamedTuple):
    """A foreign file's weights and task state under our names."""

    weights: dict[str, Tensor]  # under our names
    task_state: dict[str, Any]  # for `Task.restore`; empty where the file holds none
    left_out: list[str]  # the file's keys that were not used
    notes: tuple[str, ...] = ()  # sentences for the log: how the file was read where it can mean two things


class Data(Protocol):
    """A data set with its splits. The constructor opens no file."""

    batch_size: int  # samples, or padded tokens, of one optimizer step over all ranks

    def count(self, split: Split) -> int:
        """The number of samples in `split`."""

    def cost(self, split: Split) -> Sequence[int]:
        """The cost of each sample; a batch costs its number of samples times its highest cost."""

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One sample, augmented with `generator`; without augmentation for None."""

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples to one batch of padded CPU tensors, with the samples' ids under "ids"."""

    def summary(self) -> list[str]:
        """Lines for the start summary: counts of samples, and what was left out and why."""


class OptionalData(Protocol):
    """Optional members of a data set."""

    drawn: bool
    """Whether it was made to be learnt from scratch; `Task.advice` then recommends no pretrained weights."""

    def where(self, split: Split, index: int) -> str:
        """The origin of a sample (its file, its line), for messages; opens no file."""

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Digests of what `split` holds, by name ("annotations", say); they do not depend on where the files lie.

        A run is not resumed on data with other digests (common/data/fingerprints.py computes them). Called on rank 0
        alone, after `count`. A data set without this method is recognised by the costs of its samples.
        """


class Metric(Protocol):
    """An accumulator over one split: each sample once, gathered over ranks by sample id, computed once."""

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the answers to one batch."""

    def gather(self) -> None:
        """Gather the answers of all ranks by sample id (a collective: all ranks call it)."""

    def compute(self) -> dict[str, float]:
        """The numbers, equal on all ranks."""

    def details(self) -> Sequence[Sequence[Any]]:
        """A table of finer numbers, those of each class, say; the first row is its header."""

    def write(self, folder: Path) -> None:
        """Write the predictions in the field's file format (rank 0)."""


class Task(Protocol):
    """A problem: its loss, its answers and its numbers, independent of the model and the data set."""

    goal: Goal  # an instance may have its own
    # The keys of `model_arguments` that every model must take; read from source, before any import.
    handed_on: ClassVar[tuple[str, ...]]

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the model's constructor that the data decide (number of classes, vocabulary size)."""

    def state(self) -> dict[str, Any]:
        """What prediction needs besides the model (class names, tokenizers), in plain types, for the checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Load the result of `state` from a checkpoint."""

    def adopt(self, tensors: dict[str, Any], folder: Path) -> Adopted:
        """Convert a foreign checkpoint; raises UserError when its layout is unsupported.

        `folder`: that of the file, for programs that keep a vocabulary beside it.
        """

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The divisor of each loss term, from targets and the task's constants, never from outputs."""

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss (scalar, at least fp32) and its parts by name (detached scalars).

        Both are sums over the batch, divided by the normalisers of the whole step, so that micro-batches and ranks add
        up. `batch["seeds"]` holds a seed for each sample, for randomness of the task.
        """

    def predict(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer for each sample, in the user's units, on the CPU."""

    def read(self, input: str) -> Iterator[Batch]:
        """Batches of a user's file, folder or pipe, each as soon as it is read."""

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterable[str]:
        """Write answers as pictures or text under `folder`; returns a line for the console for each."""

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor | None:
        """Pictures of the first `count` answers for the log, uint8 (B, 3, H, W); None for a task without pictures."""

    def metric(self, split: Split) -> Metric:
        """A new, empty metric for `split`."""

    def advice(self, pretrained: bool) -> list[str]:
        """Warnings about the data before the first step, one sentence each.

        `pretrained`: whether any part of the model starts from trained weights.
        """

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Warnings about the latest answers on val, one sentence each."""


class OptionalTask(Protocol):
    """Optional members of a task."""

    per_micro_batch: Sequence[str]
    """Names, for the start summary, of parts of its loss that depend on how a step is split (divisors from outputs)."""

    offered: Sequence[str]
    """Keys of `model_arguments` that are passed only to models with these arguments."""

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, for one version."""

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over part of the task state of the checkpoint that a run starts from, before the model is built."""


class OptionalModel(Protocol):
    """Optional members of a model."""

    decided_by_data: Sequence[str]
    """Names or prefixes of tensors tied to classes or words; not loaded from a checkpoint with other ones."""

    undecayed: Sequence[str]
    """Names or prefixes of matrices without weight decay: tables of positions, say."""

    per_micro_batch: Sequence[str]
    """Names, for the start summary, of parts that depend on how a step is split; BatchNorm is listed anyway."""

    longest: int
    """The maximum number of input tokens; a task refuses longer inputs by name."""

    def fetch_weights(self) -> str | None:
        """Load pretrained weights, in a run without `checkpoint`; returns a line for the log, if there are any."""

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights, converted to this model's shapes: positions resampled to another grid, say."""

    def adaptations(self, tensors: dict[str, Tensor]) -> Sequence[str]:
        """Sentences for the log on what `adapt` changes in a checkpoint's weights: the method of resampling, say."""

    def layers(self) -> Sequence[tuple[str, ...]]:
        """Prefixes of parameter names for each layer, from input to output, for `optimizer.layer_decay`."""

    def features(self, images: Tensor) -> Tensor:
        """Inputs of its head, (B, channels, H, W) -> (B, C), for the nearest neighbours among training images."""
