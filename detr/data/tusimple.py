"""Lane data in the format of TuSimple's Lane Detection Challenge: images, and lines of JSON with the lanes at rows."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data import fingerprints
from common.data.costs import equal_costs
from common.data.images import read_image
from common.errors import UserError
from common.task import Batch, Costs, Split
from common.types import SPLITS, Positive, PositiveFloat, Side
from detr.data.lane_labels import LaneLabels, read_labels
from detr.data.lane_transforms import LaneAugmentation, augment

FOLDERS = (".", "train_set", "test_set")  # in `root`, as the official archives are unpacked


@dataclass(frozen=True, kw_only=True)
class LaneFiles:
    """The files of one split.

    images: the folder to which `raw_file` in the labels is relative; None = the folder of the file of labels or, if the
        images are not there, one of its folders train_set and test_set.
    labels: files of labels: paths, or names of files in `root` or in its folders train_set and test_set; [] = the split
        does not exist.
    """

    images: str | None
    labels: list[str]


@dataclass(kw_only=True, eq=False)
class TuSimple:
    """Images of roads with lanes, in TuSimple's format; see `detr.data.lane_labels`.

    The constructor opens no file. An invalid file raises UserError when its split is first used. A file for `test`
    whose lines lack "lanes" (test_tasks_0627.json) is accepted: then there are no numbers.

    Args:
        root: folder with the files of labels; None if `labels` are paths.
        train: files of the split for training.
        val: files of the split that selects the best checkpoint.
        test: files of the split for the reported metrics.
        image_size: height and width to which all images are resized, in pixels.
        batch_size: images in one optimizer step.
        augmentation: options of the augmentation of training images.
        cache: whether each worker keeps decoded images in memory, for small data sets.
        tolerance: horizontal distance up to which a point is right in the metrics, in pixels of the original image; the
            official one is 20.
    """

    root: str | None
    train: LaneFiles
    val: LaneFiles
    test: LaneFiles
    image_size: tuple[Side, Side]
    batch_size: Positive
    augmentation: LaneAugmentation
    cache: bool
    tolerance: PositiveFloat

    def __post_init__(self) -> None:
        """Prepare empty caches."""
        self._labels: dict[Split, list[LaneLabels]] = {}
        self._files: dict[Split, list[Path]] = {}
        self._decoded: dict[tuple[Split, int], Tensor] = {}

    def prepare(self) -> None:
        """Do nothing; a subclass may write its files here. This method is called before any file is opened."""

    def count(self, split: Split) -> int:
        """Return the number of images in `split`; 0 if there is no such split."""
        return len(self.ground_truth(split)) if self._has_split(split) else 0

    def cost(self, split: Split) -> Costs:
        """Return the cost of each image, which is 1."""
        return equal_costs(1, self.count(split))

    def ground_truth(self, split: Split) -> list[LaneLabels]:
        """Return the labels of all images of `split`, in the order of their indices."""
        if split not in self._labels:
            self.prepare()
            labels: list[LaneLabels] = []
            files: list[Path] = []
            for path in self._paths(split):
                own = read_labels(path)
                folder = self._folder(split, path, own[0].raw_file)
                labels += own
                files += [folder / image.raw_file for image in own]
            unlabelled = [image for image in labels if image.lanes is None]
            if unlabelled and (split != "test" or len(unlabelled) < len(labels)):
                raise UserError(f"{unlabelled[0].origin} has no lanes; expected a list of x at each row for each lane.")
            if missing := [file for file in files if not file.is_file()]:
                raise UserError(
                    f"{len(missing)} of {len(files)} images of {split} are missing, the first is {missing[0]}; give "
                    f"the folder to which raw_file is relative as data.{split}.images."
                )
            self._labels[split], self._files[split] = labels, files
        return self._labels[split]

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return one image with its lanes, augmented at random; if `generator` is None, it is only resized.

        The returned dict has these keys:

        id: the index of the image in its split.
        file: the path of the image.
        image: uint8 (3, h, w).
        original_size: height and width (H, W) of the image in its file.
        rows: float64 (P,) the rows of the labels, in pixels of the original image.
        points: float32 (n, P, 2) x and y of the points of n lanes, in pixels of `image`.
        valid: boolean (n, P), False where a lane has no point in `image`.

        Raises UserError when the image cannot be decoded, or when its labels are those of a larger one.
        """
        labels, file = self.ground_truth(split)[index], self._files[split][index]
        image = self._decoded.get((split, index))
        if image is None:
            image = read_image(file)
            if self.cache:
                self._decoded[split, index] = image
        lanes = torch.zeros(0, len(labels.rows)) if labels.lanes is None else torch.from_numpy(labels.lanes).float()
        _check_size(labels, file, *image.shape[1:])
        return self._make_sample(index, file, image, torch.from_numpy(labels.rows), lanes, generator)

    def where(self, split: Split, index: int) -> str:
        """Return the path of an image, for messages."""
        self.ground_truth(split)
        return str(self._files[split][index])

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Return the digest of the files of labels."""
        return {"labels": fingerprints.digest(fingerprints.digest_file(p).encode() for p in self._paths(split))}

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image uint8 (3, H, W), with id 0 and without lanes.

        Its rows are as far apart as TuSimple's: a 72nd of the image's height.
        """
        rows = torch.arange(1, 73, dtype=torch.float64) * (image.shape[-2] / 72)
        return self._make_sample(0, file, image, rows, torch.zeros(0, len(rows)), None)

    def _make_sample(
        self, index: int, file: Path, image: Tensor, rows: Tensor, lanes: Tensor, generator: torch.Generator | None
    ) -> dict[str, Any]:
        points = torch.stack((lanes, rows.float().expand_as(lanes)), -1)  # (n, P, 2)
        augmented, points, valid = augment(image, points, lanes >= 0, self.image_size, self.augmentation, generator)
        return {
            "id": index,
            "file": str(file),
            "image": augmented,
            "original_size": tuple(image.shape[1:]),
            "rows": rows,
            "points": points,
            "valid": valid,
        }

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples, whose images have one size.

        The returned dict has these keys:

        ids, files: lists of the images' ids and paths.
        images: uint8 (B, 3, H, W).
        sizes: (B, 2) heights and widths.
        original_sizes: (B, 2) heights and widths before resizing.
        rows: a list of the rows (P,) of each image.
        points: (T, P, 2) x and y in pixels of the resized images; the lanes of all images, concatenated.
        valid: (T, P) False where a lane has no point, and where an image has fewer than P rows.
        counts: a list of the number of lanes of each image.
        padded: False.
        """
        images = torch.stack([sample["image"] for sample in samples]).contiguous(memory_format=torch.channels_last)
        counts = [len(sample["points"]) for sample in samples]
        longest = max(len(sample["rows"]) for sample in samples)
        points, valid = torch.zeros(sum(counts), longest, 2), torch.zeros(sum(counts), longest, dtype=torch.bool)
        start = 0
        for sample, count in zip(samples, counts, strict=True):
            own = slice(start, start + count), slice(sample["points"].shape[1])
            points[own], valid[own] = sample["points"], sample["valid"]
            start += count
        return {
            "ids": [sample["id"] for sample in samples],
            "files": [sample["file"] for sample in samples],
            "images": images,
            "sizes": torch.tensor([sample["image"].shape[1:] for sample in samples]),
            "padded": False,
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "rows": [sample["rows"] for sample in samples],
            "points": points,
            "valid": valid,
            "counts": counts,
        }

    def summary(self) -> list[str]:
        """Return lines for the start of a run, on each split."""
        return [line for split in SPLITS if self._has_split(split) for line in self.split_summary(split)]

    def split_summary(self, split: Split) -> list[str]:
        """Return the number of images of `split` by their lanes, and how many lanes have no point."""
        labels = self.ground_truth(split)
        counts = Counter(0 if image.lanes is None else len(image.lanes) for image in labels)
        lanes = ", ".join(f"{count} with {number} lanes" for number, count in sorted(counts.items()))
        if any(image.lanes is None for image in labels):
            lanes = "no lanes (there will be no numbers)"
        lines = [f"{split}: {len(labels)} images ({lanes}) of {', '.join(map(str, self._paths(split)))}"]
        if empty := sum(len(image.lanes) - len(image.with_points()) for image in labels if image.lanes is not None):
            lines.append(f"{split}: {empty} lanes without a point are no targets, but count in the numbers")
        return lines

    def query_advice(self, split: Split, queries: int) -> list[str]:
        """Return a warning if images of `split` have more lanes than a model has queries; otherwise nothing."""
        if not self._has_split(split):
            return []
        crowded = [i for i in self.ground_truth(split) if len(i.with_points()) > queries]
        if not crowded:
            return []
        first = f"the first is {crowded[0].origin}"
        return [
            f"{split}: {len(crowded)} images have more lanes than the model has queries ({queries}; {first}); the "
            "surplus is neither learnt nor found, so raise model.queries."
        ]

    def _split_files(self, split: Split) -> LaneFiles:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _has_split(self, split: Split) -> bool:
        return split == "train" or bool(self._split_files(split).labels)

    def _paths(self, split: Split) -> list[Path]:
        """Return the paths of a split's files of labels; raises UserError if one does not exist."""
        names = self._split_files(split).labels
        if not names:
            raise UserError(f"There are no labels of {split}: give data.{split}.labels=[FILE, ...].")
        return [self._find(split, name) for name in names]

    def _find(self, split: Split, name: str) -> Path:
        root = Path(".") if self.root is None else Path(self.root)
        paths = [root / folder / name for folder in FOLDERS]
        for path in paths:
            if path.is_file():
                return path
        where = "" if self.root is None else f" in data.root={self.root} (nor in its train_set and test_set)"
        raise UserError(
            f"There is no file {name}{where}; give data.root, the folder with TuSimple's files, or the paths in "
            f"data.{split}.labels."
        )

    def _folder(self, split: Split, labels: Path, raw_file: str) -> Path:
        """Return the folder of the images whose labels are in the file `labels`."""
        images = self._split_files(split).images
        if images is not None:
            return Path(images)
        folders = [labels.parent / folder for folder in FOLDERS]
        return next((folder for folder in folders if (folder / raw_file).is_file()), labels.parent)


def _check_size(labels: LaneLabels, file: Path, height: int, width: int) -> None:
    """Raise UserError if the image is too small for its labels: a row or a whole lane is outside of it."""
    if labels.rows[-1] > height:
        raise UserError(
            f"{labels.origin}: h_samples has row {labels.rows[-1]:g}, but {file} has {height} rows; give the labels of "
            "these images."
        )
    for lane in labels.with_points():
        if (leftmost := lane[lane >= 0].min()) > width:
            raise UserError(
                f"{labels.origin}: a lane has no x below {leftmost:g}, but {file} has {width} columns; give the labels "
                "of these images."
            )
