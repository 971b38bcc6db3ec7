"""The protocols `Data` and `Task`: what the trainer and the evaluator require of a data set and of a problem.

A class satisfies a protocol by having its members, without inheriting from it. `OptionalData`, `OptionalTask`,
`OptionalModel` and `OptionalMetric` list members that may be missing; the trainer looks them up by name.
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
    undefined: float | None = -1.0  # the number that means "no value", as in COCO, or None

    def is_defined(self, value: float) -> bool:
        """Whether `value` is a number that can be compared: neither nan nor `undefined`."""
        return not math.isnan(value) and value != self.undefined

    def better(self, new: float, old: float | None) -> bool:
        """Whether `new` beats `old`: never if `new` is undefined; otherwise always if `old` is None or undefined."""
        if not self.is_defined(new):
            return False
        if old is None or not self.is_defined(old):
            return True
        return new > old if self.higher_is_better else new < old


class Adopted(NamedTuple):
    """The weights and task state of another program's checkpoint, converted for this program."""

    weights: dict[str, Tensor]  # by the names in our model's state dict
    task_state: dict[str, Any]  # for `Task.restore`; empty if the file holds no task state
    left_out: list[str]  # the file's keys that were not used
    notes: tuple[str, ...] = ()  # sentences for the log, on how an ambiguous file was interpreted


class Data(Protocol):
    """A data set with its splits. The constructor opens no file."""

    batch_size: int  # samples, or padded tokens, of one optimizer step over all ranks

    def count(self, split: Split) -> int:
        """The number of samples in `split`."""

    def cost(self, split: Split) -> Sequence[int]:
        """The cost of each sample. The cost of a batch is its number of samples times the highest cost of a sample."""

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One sample, augmented at random with `generator`, or without augmentation if `generator` is None."""

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples into a batch of padded CPU tensors; its key "ids" holds the samples' ids."""

    def summary(self) -> list[str]:
        """Lines for the start summary: counts of samples, and what was left out and why."""


class OptionalData(Protocol):
    """Optional members of a data set."""

    drawn: bool
    """Whether the data are synthetic and need no pretrained weights; `Task.advice` then recommends none."""

    exif: str
    """Whether a user's images are turned by their EXIF tags: "auto", "apply" or "ignore"."""

    class_order: str
    """The order of classes read from folders: "string" or "natural"."""

    def root_has_files(self) -> bool:
        """Whether the files of the data are under `root`; if not, the data set draws or downloads them there.

        If a checkpoint's `root` lacks the files, it is replaced by a folder under data/, unless the command line sets
        data.root.
        """

    def class_notes(self) -> list[str]:
        """The names of the classes in order of index, and a note on their order where it may surprise."""

    def set_learnt_classes(self, classes: Sequence[str]) -> None:
        """Take the classes that the model was trained on, in the order of its outputs."""

    def split_summary(self, split: Split) -> list[str]:
        """The lines of `summary` on one split, which evaluate.py prints; opens no file of another split."""

    def advice(self, split: Split) -> list[str]:
        """Warnings about the files of one split, one sentence each; also called for a split without samples."""

    def query_advice(self, split: Split, queries: int) -> list[str]:
        """A warning if images of `split` have more objects than a detector has queries."""

    def where(self, split: Split, index: int) -> str:
        """The origin of a sample (its file, its line), for messages; opens no file."""

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Digests of the content of `split`, by name (such as "annotations"), independent of the files' paths.

        Resuming a run refuses data with other digests; common/data/fingerprints.py has functions to compute them.
        Called on rank 0 only, after `count`. Without this method, a digest of the samples' costs is compared.
        """


class Metric(Protocol):
    """Accumulates the answers on one split: `update` for each batch, then `gather` once, then `compute`."""

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the answers to one batch."""

    def gather(self) -> None:
        """Gather the answers of all ranks by sample id (a collective: all ranks call it)."""

    def compute(self) -> dict[str, float]:
        """The metric's values by name, equal on all ranks; none for a split without annotations."""

    def details(self) -> Sequence[Sequence[Any]]:
        """A table of more detailed values, such as those of each class; its first row is the header."""

    def write(self, folder: Path) -> None:
        """Write the predictions in the usual format of the task, on rank 0."""


class OptionalMetric(Protocol):
    """Optional members of a metric."""

    def restrict(self, count: int) -> None:
        """Expect only `count` samples of the split.

        Called before `update` if `trainer.eval_samples` is below the number of samples of the split; a metric without
        this method supports only whole splits.
        """


class Task(Protocol):
    """A problem: its loss, predictions and metrics, independent of the model and the data set."""

    goal: Goal  # of the class, or of an instance
    # The keys of `model_arguments` that every model must accept, as a literal tuple or (*Parent.handed_on, "key"): the
    # check of the config reads them from the source code, without importing it.
    handed_on: ClassVar[tuple[str, ...]]

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the model's constructor that the data decide (number of classes, vocabulary size)."""

    def state(self) -> dict[str, Any]:
        """What prediction needs besides the model (class names, tokenizers), in plain types, for the checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Load the result of `state` from a checkpoint."""

    def adopt(self, tensors: dict[str, Any], folder: Path) -> Adopted:
        """Convert the content of another program's checkpoint; raises UserError when its layout is unsupported.

        `folder` is the folder of the checkpoint, which may also hold a vocabulary.
        """

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The divisor of each loss term, computed from the targets and constants but not from the model's outputs."""

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss (scalar, at least fp32) and its parts by name (detached scalars).

        The total and the parts are sums over the batch, divided by the `normalisers` of the whole step, so that adding
        them up over micro-batches and ranks gives those of the step. `batch["seeds"]` holds a seed for each sample, for
        random choices of the task.
        """

    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer for each sample, in the user's units, on the CPU; they are for metrics and files."""

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Records for a user's input (a path, an image, a sentence, or a list of these), for notebooks.

        In a class of an earlier version, without `answers`, it is what `answers` is now; see `answers_of`.
        """

    def read(self, input: str) -> Iterator[Batch]:
        """Yield batches of a user's file, folder or pipe, each as soon as its input is read."""

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterable[str]:
        """Write answers as pictures or text under `folder`; yields a line for the console for each answer."""

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
    """Names, for the start summary, of loss terms that `loss` also divides by a function of the model's outputs. These
    terms depend on how a step is split into micro-batches and processes."""

    offered: Sequence[str]
    """Keys of `model_arguments` that are passed only to models whose constructor accepts them."""

    state_schema: type
    """The types of `state`: a TypedDict, by which a checkpoint's state is checked before `restore` and `inherit`."""

    unanswered: list[str]
    """A sentence for each input that `read` or `predict` skipped, with the reason; predict.py lists them at its end."""

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, still accepted in this version."""

    def split_advice(self, split: Split) -> list[str]:
        """The warnings of `advice` about the data of one split, which evaluate.py prints."""

    def evaluation_notes(self) -> Sequence[str]:
        """Sentences for the log of evaluate.py: what was assumed about an imported model's classes, say."""

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over part of the task state of the checkpoint that a run starts from, before the model is built."""


class OptionalModel(Protocol):
    """Optional members of a model."""

    decided_by_data: Sequence[str]
    """Names or prefixes of tensors with a row per class or word; not loaded from a checkpoint of another task state."""

    undecayed: Sequence[str]
    """Names or prefixes of matrices that weight decay skips, such as tables of positions."""

    per_micro_batch: Sequence[str]
    """For the start summary: names of parts that depend on the split into micro-batches, other than BatchNorm."""

    masks_entries: bool
    """Whether the model may give vocabulary entries a logit of about -1e9 to never predict them. Label smoothing omits
    these entries."""

    longest: int
    """The maximum number of input tokens; for longer inputs, a task raises an error that names them."""

    def fetch_weights(self) -> str | None:
        """Load pretrained weights if no `checkpoint` is configured; returns a line for the log, or None."""

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a checkpoint's weights to this model's shapes, such as positions to another grid."""

    def adaptations(self, tensors: dict[str, Tensor]) -> Sequence[str]:
        """Sentences for the log on what `adapt` changes, such as the resampling of positions."""

    def input_summary(self) -> Sequence[str]:
        """Lines for the start summary: the number of tokens of an image, say."""

    def input_advice(self) -> Sequence[str]:
        """Warnings before the first step: an input that is far longer than intended, say."""

    def layers(self) -> Sequence[tuple[str, ...]]:
        """Prefixes of parameter names for each layer, from input to output, for `optimizer.layer_decay`."""

    def features(self, images: Tensor) -> Tensor:
        """The inputs of the model's head, (B, channels, H, W) -> (B, C), for a search of nearest training images."""


def answers_of(task: Any, model: nn.Module, batch: Batch) -> list[Answer]:
    """The task's answers to a batch, by `predict` if its class, or a parent of it, defines this one last.

    That is a task, or a subclass of one, of an earlier version, in which `predict` had the place of `answers`.
    """
    members = next(
        (vars(base) for base in type(task).__mro__ if {"answers", "predict"} & vars(base).keys()), vars(task)
    )
    answers: list[Answer] = (task.answers if "answers" in members else task.predict)(model, batch)
    return answers
