"""A small synthetic lane data set: roads drawn at first use, with labels in TuSimple's format."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from common.machine.seeds import mix
from common.task import Split
from common.types import SPLITS, Positive, PositiveFloat, Range
from detr.data.drawing import draw_once
from detr.data.lane_transforms import LaneAugmentation
from detr.data.roads import draw
from detr.data.tusimple import LaneFiles, TuSimple

DRAWING_VERSION = 1  # increase it when a change of the code changes the pictures


class Lanes(TuSimple):
    """Pictures of roads with two to five lanes, drawn once into a folder in `root`.

    Roads are straight or curved, lanes are white or yellow, solid or dashed, and cars hide parts of them; the labels
    continue there. The name of the folder contains a hash of the arguments on which the pictures depend.
    """

    drawn = True  # a model learns these pictures without pretrained weights

    def __init__(
        self,
        *,
        root: str,
        image_size: Annotated[int, Range(low=32, high=4096)],
        train_count: Annotated[int, Range(low=1, high=10_000_000)],
        val_count: Annotated[int, Range(low=0, high=10_000_000)],
        test_count: Annotated[int, Range(low=1, high=10_000_000)],
        seed: int,
        batch_size: Positive,
        augmentation: LaneAugmentation,
        cache: bool,
        tolerance: PositiveFloat,
    ):
        """Store the arguments; the pictures are drawn at first use.

        Args:
            root: folder that holds a folder for each generated data set.
            image_size: height and width of the images in pixels.
            train_count: number of images for training.
            val_count: number of images that select the best checkpoint; 0 = no val.
            test_count: number of images for the reported metrics.
            seed: seed of the pictures, which do not depend on the run's seed.
            batch_size: images in one optimizer step.
            augmentation: options of the augmentation of training images.
            cache: whether each worker keeps decoded images in memory.
            tolerance: horizontal distance up to which a point is right in the metrics, in pixels.
        """
        self.counts: dict[Split, int] = {"train": train_count, "val": val_count, "test": test_count}
        self.side, self.seed = image_size, seed
        keys = [DRAWING_VERSION, image_size, train_count, val_count, test_count, seed]
        self.folder = Path(root) / f"{image_size}px-{f'{mix(*keys):016x}'[:8]}"
        train, val, test = (
            LaneFiles(images=None, labels=[f"{self.folder.name}/{split}.json"] if count else [])
            for split, count in self.counts.items()
        )
        super().__init__(
            root=root,
            train=train,
            val=val,
            test=test,
            image_size=(image_size, image_size),
            batch_size=batch_size,
            augmentation=augmentation,
            cache=cache,
            tolerance=tolerance,
        )

    def root_has_files(self) -> bool:
        """Whether the pictures have been drawn."""
        return self.folder.exists()

    def prepare(self) -> None:
        """Draw the pictures unless they exist; raises UserError when the files cannot be written."""
        draw_once(self.folder, "roads", self._draw)

    def _draw(self, folder: Path) -> None:
        for split in SPLITS:
            (folder / split).mkdir(parents=True)
            (folder / f"{split}.json").write_text(self._draw_split(split, folder))

    def _draw_split(self, split: Split, folder: Path) -> str:
        """Draw the pictures of a split, and return its labels."""
        lines = []
        for number in range(1, self.counts[split] + 1):
            pixels, rows, lanes = draw(np.random.default_rng(mix(self.seed, split, number)), self.side)
            raw_file = f"{split}/{number:06d}.png"
            Image.fromarray(pixels).save(folder / raw_file, compress_level=1)
            lines.append(json.dumps({"raw_file": raw_file, "lanes": lanes.tolist(), "h_samples": rows.tolist()}) + "\n")
        return "".join(lines)
