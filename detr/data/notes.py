"""Notes and warnings on one split of a COCO data set, for the start of a run and for evaluate.py."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.images import hides_orientation
from common.types import Split
from detr.data.arrays import SplitArrays, decode

MAX_ORIENTATION_FILES = 4000  # maximum number of a split's images that are opened; a slow drive takes seconds for them

NO_OBJECTS: dict[Split, str] = {  # warnings about a split without any target box
    "train": "there is no box to learn from (no annotations, or only crowds and boxes without area), so the model can "
    'learn nothing but "no object"; correct data.train.annotations',
    "val": "there is no object to find (no annotations, or only crowds and boxes without area), so its AP is -1 or 0 "
    "and cannot select a checkpoint; correct data.val.annotations",
    "test": "there is no object to find (no annotations, or only crowds and boxes without area), so its AP is -1 or 0; "
    "correct data.test.annotations",
}


def classes_without_boxes(labels: NDArray[np.int64], categories: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note on the classes that have no box.

    The list is empty if every class has a box, or if there is no box at all. `labels` (T,) are the class indices of the
    boxes.
    """
    used = set(labels.tolist())
    unused = [f"{c['name']} (id {c['id']})" for i, c in enumerate(categories) if i not in used]
    if not used or not unused:
        return []
    more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
    return [
        f"{len(unused)} of {len(categories)} classes have no box and will not be learnt: {', '.join(unused[:5])}{more}"
    ]


def hidden_orientations(count: int, file: Callable[[int], Path]) -> list[str]:
    """Return a note on images that EXIF turns or mirrors without changing their size; empty if there are none.

    The size of such an image does not tell whether its boxes refer to the stored or to the upright image. `file`
    returns the path of an image, given its index below `count`. Of more than MAX_ORIENTATION_FILES images, only a
    sample is opened.
    """
    files = [file(index) for index in range(0, count, -(-count // MAX_ORIENTATION_FILES))]
    with ThreadPoolExecutor(8) as threads:  # a network drive serves several requests at once
        hidden = [file for file, hides in zip(files, threads.map(hides_orientation, files), strict=True) if hides]
    if not hidden:
        return []
    sampled = "" if len(files) == count else "sampled "
    return [
        f"{len(hidden)} of {len(files)} {sampled}images are turned by EXIF without a change of their size (180 "
        f"degrees, mirrored or square; the first is {hidden[0]}): they are read as stored; if their boxes were "
        "drawn on the upright picture, give data.exif=apply, otherwise data.exif=ignore"
    ]


def images_of_train(arrays: SplitArrays, train: SplitArrays) -> list[str]:
    """Return a warning if images of a split are also in train; both splits have the same folder of images."""
    names = set(train.files.tolist())
    shared = [name for name in arrays.files.tolist() if name in names]
    if not shared:
        return []
    counts = f"{len(shared)} of {len(arrays.files)} images are also in train (the first is {decode(shared[0])})"
    return [f"{counts}, so its metrics are in part those of images that were trained on"]


def doubts(split: Split, arrays: SplitArrays) -> list[str]:
    """Return reasons to doubt the annotations of a labelled split: boxes in an unexpected format, or no box at all."""
    return [*arrays.doubts, *([] if len(arrays.labels) else [NO_OBJECTS[split]])]


def more_objects_than_queries(arrays: SplitArrays, queries: int, file: Callable[[int], Path]) -> list[str]:
    """Return a warning about images with more objects than `queries`; an empty list if there are no such images.

    `file` returns the path of an image, given its index.
    """
    counts = np.diff(arrays.starts)  # (N,) objects of each image
    excess = int((counts > queries).sum())
    if not excess:
        return []
    worst = int(counts.argmax())
    return [
        f"{excess} of {len(counts)} images have more objects than the model has queries ({queries}), at most "
        f"{counts[worst]} in {file(worst)}; the surplus is neither learnt nor detected, so raise model.queries"
    ]
