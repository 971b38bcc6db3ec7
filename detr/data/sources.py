"""Where the files of a data set's splits are: at their own paths, in a folder of a known layout, or cut from train."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from common.errors import UserError
from common.task import Split
from common.types import Count, Share
from detr.data.layouts import LAYOUTS, Layout, find_layout

COCO_2017_VAL_COUNT = 2000  # images of train2017 that are cut as val, which selects the best checkpoint
VAL_SHARE = 0.1  # share of train's images that is cut as val in any other data set


@dataclass(frozen=True, kw_only=True)
class Files:
    """The paths of one split: both are given, or both are None."""

    images: str | None  # folder that holds the files named by "file_name" in the JSON
    annotations: str | None  # COCO instances JSON


@dataclass(kw_only=True, eq=False)
class SplitSources:
    """The files of each split.

    They are those at the split's own paths if these are given, and otherwise those in `root`. For COCO 2017, val2017
    serves as `test`, because no labelled test set is published. If val has no files, its images are taken from train
    (see `val_count` and `val_share`). If test has no files, its images are taken from train, provided that `test_share`
    is above 0 and the files of train are in `root`. Which images are taken does not depend on the run's seed.

    Args:
        root: folder in one of the layouts of `detr.data.layouts`; None if the splits have paths of their own.
        train: paths of the split for training.
        val: paths of the split that selects the best checkpoint.
        test: paths of the split for the reported metrics.
        val_count: number of images to cut from train as val, at random, if val has no files. 0 = no val; None =
            `val_share` decides.
        val_share: share of train's images to cut as val, by a hash of their names, if val has no files and `val_count`
            is None. 0 = no val. If `val_count` and `val_share` are None, val gets 2,000 random images of COCO 2017, or
            a tenth of the images of any other data set.
        test_share: share of train's images to cut as test, by a hash of their names, if test has no files and train is
            in `root`. 0 = no test.
    """

    layouts: ClassVar[str] = LAYOUTS  # of `root`, for messages

    root: str | None
    train: Files
    val: Files
    test: Files
    val_count: Count | None
    val_share: Share | None = None  # this and the next key have defaults, because users' older config files lack them
    test_share: Share = 0.0

    def __post_init__(self) -> None:
        """Raise UserError for a split that has only one of its two paths."""
        for name, files in (("train", self.train), ("val", self.val), ("test", self.test)):
            if (files.images is None) != (files.annotations is None):
                raise UserError(f"data.{name}.images and data.{name}.annotations go together; give both or neither.")

    def find_layout(self, root: Path) -> Layout:
        """Find the files of the splits in `root`.

        A subclass for another format overrides this method, `read_annotations`, `digest_annotations` and `file_notes`.
        """
        return find_layout(root)

    def _split_files(self, split: Split) -> tuple[Path, Path] | None:
        """Return the folder of images and the JSON of a split; None if there are no files.

        A split that is cut from train has the folder and the JSON of train.
        """
        files = {"train": self.train, "val": self.val, "test": self.test}[split]
        if files.images is not None and files.annotations is not None:
            return Path(files.images), Path(files.annotations)
        if self.root is not None and (paths := self._layout.files.get(split)):
            return paths
        return self._split_files("train") if self._is_cut(split) else None

    @cached_property
    def _layout(self) -> Layout:
        assert self.root is not None
        return self.find_layout(Path(self.root))

    def _uses_root(self) -> bool:
        """Whether train or test is looked up in `root`, because it has no paths of its own."""
        return self.root is not None and (self.train.images is None or self.test.images is None)

    def _is_cut(self, split: Split) -> bool:
        """Whether `split` has no files and is cut from train."""
        if split == "train" or {"val": self.val, "test": self.test}[split].images is not None:
            return False
        if self.root is not None and split in self._layout.files:
            return False
        if split == "val":
            return self._val_count() != 0
        return self.test_share > 0 and self.root is not None and self.train.images is None

    def _val_count(self) -> int | None:
        """Return the number of images to cut from train as val; None if `_val_share` determines this number."""
        if self.val_count is not None:
            return self.val_count
        if self.val_share is not None:
            return None if self.val_share else 0
        official = self.root is not None and self.train.images is None and self._layout.official
        return COCO_2017_VAL_COUNT if official else None

    def _val_share(self) -> float:
        return VAL_SHARE if self.val_share is None else self.val_share

    def _describe_cut(self, split: Split) -> str:
        if split == "val" and (count := self._val_count()) is not None:
            return f"cut from train at random (data.val_count={count})"
        share = self._val_share() if split == "val" else self.test_share
        return f"cut from train by a hash of the file names (data.{split}_share={share})"

    def _has_split(self, split: Split) -> bool:
        return split == "train" or self._split_files(split) is not None

    def _has_labels(self, split: Split) -> bool:
        files = self._split_files(split)
        return files is not None and files[1].exists()

    def _owner(self, split: Split) -> Split:
        """Return the split that has the files of `split`: train if `split` is cut from it."""
        return "train" if self._is_cut(split) else split

    def _required_files(self, split: Split) -> tuple[Path, Path]:
        files = self._split_files(split)
        if self.root is not None and files == self._layout.files.get(split) and not self._layout.recognised:
            is_folder = Path(self.root).is_dir()
            if is_folder or files is None:
                raise UserError(
                    f"data.root={self.root} {'has none' if is_folder else 'is no folder with one'} of the layouts "
                    f"{self.layouts}; give such a folder, or data.{split}.images and data.{split}.annotations, or the "
                    "format that the data have (data=coco, voc, yolo or csv)."
                )
        if files is None:
            raise UserError(
                f"There are no {split} images: give data.root (a folder with {self.layouts}), or data.{split}.images "
                f"and data.{split}.annotations."
            )
        return files
