"""The protocols `Data`, `Task` and `Metric`: what the trainer and the evaluator require of a data set and of a problem.

A class satisfies a protocol by having its members; it need not inherit from it. `OptionalData`, `OptionalTask`,
`OptionalModel` and `OptionalMetric` list members that a class may lack, so callers check whether they exist.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.types import Split as Split

Batch = dict[str, Any]  # tensors, lists and flags by name; the key "ids" holds the samples' ids
Costs = Sequence[int] | NDArray[np.integer[Any]]  # the cost of each sample of a split, see `Data.cost`
Answer = dict[str, Any]  # the prediction for one sample, in the units of the user's input, such as its pixels


class Goal(NamedTuple):
    """The metric on `val` that selects the best checkpoint."""

    name: str
    higher_is_better: bool
    undefined: float | None = -1.0  # a number that means "no value", such as COCO's -1; None if there is none

    def is_defined(self, value: float) -> bool:
        """Whether `value` is a number that can be compared: neither nan nor `undefined`."""
        return not math.isnan(value) and value != self.undefined

    def better(self, new: float, old: float | None) -> bool:
        """Whether `new` is better than `old`.

        An undefined `new` is never better. Every other `new` is better than an `old` that is None or undefined.
        """
        if not self.is_defined(new):
            return False
        if old is None or not self.is_defined(old):
            return True
        return new > old if self.higher_is_better else new < old


class Adopted(NamedTuple):
    """The weights and task state of another program's checkpoint, converted for this program."""

    weights: dict[str, Tensor]  # tensors by their names in our model's state dict
    task_state: dict[str, Any]  # for `Task.restore`; empty if the file holds no task state
    left_out: list[str]  # the file's keys that were not used
    notes: tuple[str, ...] = ()  # sentences for the log: how an ambiguous file was interpreted


class Teacher(NamedTuple):
    """A trained model from whose outputs another model learns (distillation; Hinton et al. 2015, arXiv 1503.02531)."""

    model: nn.Module  # on the run's device, in evaluation mode; its parameters have no gradients
    task: Any  # the task of its checkpoint, which holds the names of its classes, or its tokenizers
    title: str  # for the log: the file, the step, and whether the weights are averaged
    digest: str  # of the weights: a run is only resumed with a teacher of the same digest


class Data(Protocol):
    """A data set with its splits. The constructor opens no file."""

    batch_size: int  # samples (or tokens, padding included) of one optimizer step, over all ranks

    def count(self, split: Split) -> int:
        """Return the number of samples in `split`; 0 if there is no such split."""

    def cost(self, split: Split) -> Costs:
        """Return the cost of each sample in the unit of `batch_size`, such as 1 for an image.

        The cost of a batch is its number of samples times the highest cost among these samples. It is at most
        `batch_size`, unless the batch holds a single sample. For data sets of millions of samples, an array is smaller
        than a list, and `common.data.costs.equal_costs` takes no memory.
        """

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return one sample, augmented at random with `generator`, or not augmented if `generator` is None."""

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples into a batch of padded CPU tensors; the batch's key "ids" holds the samples' ids."""

    def summary(self) -> list[str]:
        """Return lines on the data that a run prints at its start: counts of samples, what was left out, and why."""


class OptionalData(Protocol):
    """Optional members of a data set."""

    batch_unit: str
    """The unit of `batch_size`, as the log names it: "tokens" (padding included); without this member, "samples"."""

    drawn: bool
    """Whether the data are synthetic and need no pretrained weights; `Task.advice` then recommends none."""

    exif: str
    """Whether a user's images are turned upright by their EXIF tags: "apply" and "auto" do, "ignore" does not."""

    class_order: str
    """The order of classes that are read from folders: "string" (1, 10, 2) or "natural" (1, 2, 10)."""

    augmentation: Any
    """Options of augmentation, such as `max_size`, the largest side of an image that the model receives."""

    def root_has_files(self) -> bool:
        """Whether the data's files are under `root`.

        Missing files are generated (synthetic images) or downloaded by the data set. If they are missing under the
        `root` in a checkpoint's config, evaluate.py and predict.py use a folder under data/ instead, unless the command
        line sets data.root.
        """

    def epoch_sample(self, split: Split, index: int, epoch_seed: int) -> dict[str, Any]:
        """Return one training sample; training calls this method, if there is one, in place of `sample`.

        `epoch_seed` is the same for all samples of an epoch and differs between epochs. It determines what the samples
        of an epoch have in common, such as where a text is cut into blocks.
        """

    def class_notes(self) -> list[str]:
        """Return a line with the classes' names by index and, if their order may be unexpected, a note on the order."""

    def set_learnt_classes(self, classes: Sequence[str]) -> None:
        """Receive the names of the classes that the model was trained on, in the order of the model's outputs."""

    def split_summary(self, split: Split) -> list[str]:
        """Return the lines of `summary` on one split, for evaluate.py; the files of other splits may be missing."""

    def advice(self, split: Split) -> list[str]:
        """Return warnings about the files of one split, one sentence each; also called for a split without samples."""

    def query_advice(self, split: Split, queries: int) -> list[str]:
        """Return a warning if images of `split` have more objects than a detector has queries, else an empty list."""

    def where(self, split: Split, index: int) -> str:
        """Return where a sample comes from, such as its file and line, for messages; opens no file."""

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Return digests of the content of `split` by name, such as "annotations", which do not depend on paths.

        A run can only be resumed with data that have the same digests, unless allow_changes permits other data.
        common/data/fingerprints.py has functions that compute digests. This method is called on rank 0 only, after
        `count`. If a data set lacks this method, a digest of the samples' costs is compared instead.
        """


class Metric(Protocol):
    """A task's metrics on one split. The evaluator calls `update` for each batch, then `gather`, then `compute`."""

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add one batch of this rank, with one answer for each of its samples."""

    def gather(self) -> None:
        """Gather the answers of all ranks by sample id. This is a collective: all ranks must call it."""

    def compute(self) -> dict[str, float]:
        """Return the metric's values by name, equal on all ranks; empty for a split without annotations."""

    def details(self) -> Sequence[Sequence[Any]]:
        """Return a table of more detailed values, such as those of each class; the first row is the header."""

    def write(self, folder: Path) -> None:
        """Write the predictions to `folder` in the task's usual file format; called on rank 0 only."""


class OptionalMetric(Protocol):
    """Optional members of a metric."""

    def restrict(self, count: int) -> None:
        """Expect the answers to only `count` samples of the split.

        Called before `update` if `trainer.eval_samples` is below the number of samples of the split. A metric without
        this method supports only whole splits.
        """


class Task(Protocol):
    """A problem: its loss, predictions and metrics, independent of the model and the data set."""

    goal: Goal  # an attribute of the class, or set by its constructor
    # The keys of `model_arguments` that every model must accept: a tuple of string literals, which may begin with
    # *Parent.handed_on. The check of the config reads this tuple from the source code, without importing the class.
    handed_on: ClassVar[tuple[str, ...]]

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of the model's constructor that the data determine, such as the number of classes."""

    def state(self) -> dict[str, Any]:
        """Return what prediction needs besides the model, such as class names, in plain types; checkpoints store it."""

    def restore(self, state: dict[str, Any]) -> None:
        """Load the result of `state` that a checkpoint stored."""

    def adopt(self, tensors: dict[str, Any], folder: Path) -> Adopted:
        """Convert the content of another program's checkpoint; raises UserError when its layout is unsupported.

        `folder` is the folder of the checkpoint's file. It may hold other files that are needed, such as a vocabulary.
        """

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return the number that a batch contributes to the divisor of each loss term, by name.

        The numbers are computed from the targets and constants, not from the model's outputs. `loss` receives their
        sums over a step's batches on all ranks.
        """

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss (scalar, at least fp32) and its parts by name (detached scalars).

        The total and the parts are sums over the batch, divided by the `normalisers` of the whole step. Their sums over
        micro-batches and ranks are therefore the loss of the step and its parts. `batch["seeds"]` holds a seed for each
        sample, for random choices of the task.
        """

    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return one answer for each sample, with tensors on the CPU, for metrics and for files."""

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Return the predictions for a user's input (a path, an image, a sentence, or a list of these), for notebooks.

        A task that was written for an earlier version has no `answers`; its `predict` does what `answers` does now (see
        `answers_of`).
        """

    def read(self, input: str) -> Iterator[Batch]:
        """Yield batches of a user's file, folder or pipe, each as soon as its input is read."""

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterable[str]:
        """Write a batch's answers as pictures or text under `folder`; yield a line for the console for each answer."""

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor | None:
        """Draw the first `count` answers for the log: uint8 (B, 3, H, W); None for a task without pictures."""

    def metric(self, split: Split) -> Metric:
        """Create an empty metric for `split`."""

    def advice(self, pretrained: bool) -> list[str]:
        """Return warnings about the data, one sentence each, which are logged before the first step.

        `pretrained`: whether any part of the model starts from trained weights.
        """

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return warnings about the answers to the first val batch of an evaluation, one sentence each."""


class OptionalTask(Protocol):
    """Optional members of a task."""

    per_micro_batch: Sequence[str]
    """Names of loss terms that depend on how a step is split into micro-batches and processes, because `loss` divides
    them by a function of the model's outputs. The summary at the start lists them."""

    offered: Sequence[str]
    """Keys of `model_arguments` that are passed only to models whose constructor accepts them."""

    state_schema: type
    """The types of `state`: a TypedDict, by which a checkpoint's state is checked before `restore` and `inherit`."""

    teacher_file: str | None
    """The checkpoint of the teacher, from the key task.distillation.teacher; None for a task without distillation. At
    the start of training, common/train/assembly.py loads it and calls `set_teacher`."""

    teacher: Teacher | None
    """The teacher; None without distillation, and always None in evaluation and prediction."""

    unanswered: list[str]
    """A sentence for each input that `read` or `answers` left without an answer, with the reason. predict.py prints the
    sentences at its end."""

    def stream(self, model: nn.Module, batch: Batch, write: Callable[[str], None]) -> bool:
        """Pass the answers to a batch of `read` to `write` piece by piece, as they are computed; for a terminal.

        Returns False, and writes nothing, if the answers cannot be streamed; `answers` and `show` are then called.
        """

    def set_teacher(self, teacher: Teacher) -> Sequence[str]:
        """Store the teacher for `loss`; returns notes for the log.

        Raises UserError if the teacher does not suit the task, for instance because it has other classes.
        """

    def fetch_weights(self, model: nn.Module) -> str | None:
        """Load initial weights that depend on the task's state, such as vectors of the vocabulary's words.

        Called for a new run without a `checkpoint`, if the model has no `fetch_weights` of its own. Returns a line for
        the log, or None if nothing was loaded.
        """

    def set_rate(self, rate: float) -> None:
        """Receive the learning rate of the next step, `optimizer.lr` times the schedule's factor; for training only.

        For a loss whose gradient is the result of several small steps, as in word2vec. The optimizer must then be SGD
        without momentum and weight decay, whose step is the rate times the gradient.
        """

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, still accepted in this version."""

    def split_advice(self, split: Split) -> list[str]:
        """Return the warnings of `advice` about the data of one split, for evaluate.py."""

    def evaluation_notes(self) -> Sequence[str]:
        """Return sentences for the log of evaluate.py, such as what was assumed about an imported model's classes."""

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over part of the task state with which a run starts or resumes; called before the model is built."""


class OptionalModel(Protocol):
    """Optional members of a model."""

    decided_by_data: Sequence[str]
    """Names or prefixes of tensors with a row for each class or word. They are not loaded from a checkpoint whose task
    has another state, for example other classes."""

    undecayed: Sequence[str]
    """Names or prefixes of matrices that weight decay skips, such as tables of positions."""

    quantised: Sequence[str]
    """Names of linear maps outside of attentions and feed-forwards that trainer.precision=int8 quantises, too."""

    unquantised: Sequence[str]
    """Names of modules that are not quantised with trainer.precision=int8, such as a detector's decoder."""

    per_micro_batch: Sequence[str]
    """Names of modules, other than BatchNorm, whose output depends on how a step is split into micro-batches. The
    summary at the start lists them."""

    unshardable: str
    """Why FSDP cannot train the model, such as "its blocks share tensors"; trainer.strategy=fsdp then is an error."""

    masks_entries: bool
    """Whether the model may give vocabulary entries a logit of about -1e9, so that they are never predicted. Label
    smoothing omits these entries."""

    longest: int
    """The maximum number of input tokens. In evaluation, the task raises an error that names a longer input. predict.py
    skips and reports a longer input."""

    embedding_weights: str | None
    """A file of word vectors that the task copies to a new model's embeddings; None = there is no such file."""

    def fetch_weights(self) -> str | None:
        """Load pretrained weights; called for a new run without a `checkpoint`.

        Returns a line for the log, or None if nothing was loaded.
        """

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a checkpoint's weights to this model's shapes, such as position embeddings to another grid."""

    def adaptations(self, tensors: dict[str, Tensor]) -> Sequence[str]:
        """Return sentences for the log on what `adapt` changes in these tensors, such as a resampling of positions."""

    def input_summary(self) -> Sequence[str]:
        """Return lines on the model that a run prints at its start, such as the number of tokens of an image."""

    def input_advice(self) -> Sequence[str]:
        """Return warnings that are logged before the first step, such as one about a far too large input."""

    def layers(self) -> Sequence[tuple[str, ...]]:
        """Return the prefixes of each layer's parameter names, from input to output, for `optimizer.layer_decay`."""

    def features(self, images: Tensor) -> Tensor:
        """Compute the inputs of the model's head: images (B, channels, H, W) -> (B, C).

        Nearest training images are searched in this feature space.
        """

    def window_layout(self, layer: int, height: int, width: int, device: torch.device) -> Any:
        """Return the `common.nn.windows.WindowLayout` of block number `layer`, counted from 0.

        `height` and `width` are those of the images in pixels. Pictures of attention within windows need this method.
        """

    words: tuple[int, int]
    """The rows and columns of words in a patch, for a TNT. Pictures of the attention inside a patch need them."""

    def memory_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the map whose positions, row by row, a detector's queries attend to.

        `height` and `width` are those of the images in pixels. Pictures of a detector's attention need this method,
        unless its attention records the sizes of its maps (`common.nn.recording.Samples`).
        """


def answers_of(task: Any, model: nn.Module, batch: Batch) -> list[Answer]:
    """Return the task's answers to a batch, from its method `answers` or, for a task of an earlier version, `predict`.

    In earlier versions, `predict` did what `answers` does now. The first class in the method resolution order that
    defines `answers` or `predict` decides: `answers` is called if this class defines it, otherwise `predict`.
    """
    members = next(
        (vars(base) for base in type(task).__mro__ if {"answers", "predict"} & vars(base).keys()), vars(task)
    )
    answers: list[Answer] = (task.answers if "answers" in members else task.predict)(model, batch)
    return answers
