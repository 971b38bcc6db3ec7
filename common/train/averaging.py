"""Average the weights of several checkpoints (Vaswani et al. 2017, section 6.1).

The average often has a better metric than each of the checkpoints.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.diff import differences
from common.errors import UserError
from common.files import checkpoint
from common.files.content import TO_RESTORE
from common.train.state import select_weights

File = tuple[Path, dict[str, Any]]


def average(files: Sequence[Path]) -> dict[str, Any]:
    """Return the content of a checkpoint with the mean of the weights in `files`.

    Each file contributes the weights that its run evaluated: the EMA weights or, without EMA, the raw weights. Floats
    are summed in float64, and their mean is converted back to their own type. Other tensors (counters), the optimizer's
    state and everything else come from the file of the latest step. At most three files and the sums are in memory at
    once. The key `mean` marks an average. A new run may start from an average. A run never resumes from its average.pt,
    because resuming reads only the checkpoints of single steps.

    Raises UserError for fewer than two files, for a file given twice, for a file that is not a checkpoint of a single
    step, for files of different models, classes or tokens, and if only some of the files hold EMA weights.
    """
    _check_count(files)
    sums: dict[str, Tensor] = {}
    steps: list[int] = []
    newest: File | None = None
    for path in files:
        content = _read_single_step(path)
        if newest is not None:
            _refuse_another_model(newest, (path, content))
        for name, tensor in select_weights(content).items():
            if tensor.is_floating_point():
                value = tensor.to(torch.float64)
                sums[name] = sums[name] + value if name in sums else value  # not in place: tied tensors share memory
        steps.append(content["step"])
        if newest is None or content["step"] >= newest[1]["step"]:
            newest = path, content
    assert newest is not None
    last = newest[1]
    mean = {
        name: (sums[name] / len(files)).to(tensor.dtype) if name in sums else tensor
        for name, tensor in select_weights(last).items()
    }
    last = {name: value for name, value in last.items() if name != "int8"}  # the ranges of other weights
    return {**last, "model": mean, "average": None, "mean": {"steps": sorted(steps), "ema": _has_ema(last)}}


def _check_count(files: Sequence[Path]) -> None:
    if len(files) < 2:
        count = f"there is only {files[0]}" if files else "there is none"
        raise UserError(f"an average needs at least two checkpoints and {count}; give more of one run.")
    for first, second in combinations(files, 2):
        if first.exists() and second.exists() and first.samefile(second):  # best.pt is a hard link to a step's file
            raise UserError(f"{first} and {second} are the same file, which would count twice; name it once.")


def _read_single_step(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a single step; raises UserError for any other file, such as an average."""
    content = checkpoint.load(path, TO_RESTORE)
    if not checkpoint.is_ours(content):
        raise UserError(f"{path} was not written by this program; give checkpoints of its runs.")
    if content.get("mean"):
        raise UserError(f"{path} is already an average of checkpoints; give the original checkpoints instead.")
    return content


def _refuse_another_model(first: File, second: File) -> None:
    """Raise UserError if two files differ in the model, in its classes or tokens, or in having EMA weights."""
    (path, content), (other_path, other_content) = first, second
    both = f"{path} and {other_path}"
    model, other_model = ({"model": file["config"].get("model")} for file in (content, other_content))
    if changed := differences(model, other_model):
        raise UserError(f"{both} are of different models: {', '.join(changed)}; give checkpoints of one run.")
    shapes, other_shapes = ({k: tuple(t.shape) for k, t in select_weights(c).items()} for c in (content, other_content))
    for name in [*shapes, *other_shapes]:
        if shapes.get(name) != other_shapes.get(name):
            pair = " and ".join(str(each.get(name, "missing")) for each in (shapes, other_shapes))
            raise UserError(f"{both} differ in {name}, which is {pair}; give checkpoints of one run.")
    if content["task"] != other_content["task"]:  # a classifier's row is then for different classes or tokens
        raise UserError(f"{both} were trained for different classes or tokens; give checkpoints of one run.")
    if _has_ema(content) != _has_ema(other_content):
        raise UserError(f"only one of {both} holds EMA weights (trainer.ema_decay); give checkpoints of one run.")


def _has_ema(content: dict[str, Any]) -> bool:
    return content["average"] is not None
