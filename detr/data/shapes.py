"""A small detection set that is drawn on this machine: coloured shapes on noisy backgrounds, in COCO's format."""

import json
import secrets
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from scipy import ndimage

from common.errors import UserError
from common.machine.distributed import is_main
from common.machine.seeds import mix
from common.task import Split
from common.types import SPLITS, Count, Positive, Range
from detr.data.coco import Coco, Files
from detr.data.transforms import Augmentation

NAMES = ("circle", "square", "triangle", "star")
DRAWING_VERSION = 3  # goes up when the same keys draw other pictures
SUBPIXELS = 4  # subpixels along each side of a pixel
MIN_VISIBLE_FRACTION = 0.75  # of each shape's pixels
BACKGROUND_CONTRAST = 0.9  # below 0.7, thresholds begin to find the shapes (tests/detr/data/test_shapes.py)
NOISE_STD = 22.0  # of every pixel, in levels
MIN_COLOUR_LEVEL = 125.0  # level of a shape's colour in each channel; the background's mean is 90
MIN_COLOUR_DISTANCE = 70.0  # distance of a shape's colour from what it covers, in levels of RGB


class Shapes(Coco):
    """Circles, squares, triangles and stars, one to five in an image, drawn once into `root`.

    A shape is a sixth to a half of the image's side long, of random light colour, and may hide up to a quarter of
    another. Box and mask are those of its visible part. Backgrounds are confetti of all colours with noise on every
    pixel, so that thresholds and blobs do not solve it; `plain` draws one colour each and no overlap, so that they do.
    The folder's name holds a hash of the drawing keys: other keys draw another folder.
    """

    drawn = True  # made for a model without pretrained weights

    def __init__(
        self,
        *,
        root: str,
        image_size: Annotated[int, Range(low=32)],
        train_count: Positive,
        val_count: Count,
        test_count: Positive,
        seed: int,
        plain: bool,
        flip: bool,
        batch_size: Positive,
        cache: bool,
    ):
        """Describe the set; it is drawn at first use.

        Args:
            root: folder of all drawn sets.
            image_size: height and width in pixels.
            train_count: images to learn from.
            val_count: images that choose the checkpoint; 0 = no val.
            test_count: images that are reported.
            seed: of the drawing; the run's seed does not change the pictures.
            plain: plain backgrounds and fills, no overlap.
            flip: whether training images are flipped sideways every other time.
            batch_size: images in one optimizer step.
            cache: keep decoded images in memory (each worker its own).
        """
        self.image_size = image_size
        self.train_count = train_count
        self.test_count = test_count
        self.seed = seed
        self.plain = plain
        self.flip = flip
        keys = [DRAWING_VERSION, image_size, train_count, val_count, test_count, seed, int(plain)]
        self.folder = Path(root) / f"{image_size}px{'-plain' if plain else ''}-{f'{mix(*keys):016x}'[:8]}"
        train, val, test = (
            Files(images=str(self.folder / split), annotations=str(self.folder / f"{split}.json")) for split in SPLITS
        )
        if not val_count:
            val = Files(images=None, annotations=None)
        kind: Literal["flip", "none"] = "flip" if flip else "none"
        augmentation = Augmentation(
            kind=kind,
            sizes=[image_size],
            eval_size=image_size,
            max_size=image_size,
            middle_sizes=[image_size],
            crop=(image_size, image_size),
        )
        super().__init__(
            root=root,
            train=train,
            val=val,
            test=test,
            val_count=val_count,
            batch_size=batch_size,
            augmentation=augmentation,
            pad_to=1,  # all images have one size
            cache=cache,
        )

    def prepare(self) -> None:
        """Draw the set unless it is there: beside its place, then renamed, so that it is whole or absent."""
        if self.folder.exists():
            return
        draft = self.folder.with_name(f"{self.folder.name}.draft-{secrets.token_hex(4)}")
        if is_main():
            print(f"Drawing {self.folder}: once, some seconds.", file=sys.stderr)
        counts: dict[Split, int] = {"train": self.train_count, "val": self.val_count, "test": self.test_count}
        try:
            for split, count in counts.items():
                (draft / split).mkdir(parents=True)
                document = self._draw_split(split, count, draft / split)
                (draft / f"{split}.json").write_text(json.dumps(document))
            draft.rename(self.folder)
        except OSError as error:
            if not self.folder.exists():  # else another process of this run was quicker, with the same pictures
                raise UserError(f"The shapes cannot be drawn ({error}); choose another data.root.") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _draw_split(self, split: Split, count: int, folder: Path) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            random = np.random.default_rng(mix(self.seed, split, number))
            pixels, masks, labels = draw(random, self.image_size, self.plain)
            name = f"{number:06d}.png"
            Image.fromarray(pixels).save(folder / name, compress_level=1)
            images.append({"id": number, "file_name": name, "height": self.image_size, "width": self.image_size})
            for mask, label in zip(masks, labels, strict=True):
                annotations.append(_annotation(len(annotations) + 1, number, mask, label))
        categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(NAMES, 1)]
        return {"images": images, "annotations": annotations, "categories": categories}


def draw(
    random: np.random.Generator, size: int, plain: bool
) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]], list[int]]:
    """One picture: pixels (size, size, 3), the visible mask (size, size) of each shape, and its index into NAMES."""
    canvas = np.full((size, size, 3), random.uniform(0, 255, 3)) if plain else _sample_background(random, size)
    masks: list[NDArray[np.bool_]] = []
    whole: list[int] = []  # pixels of each shape before others covered it
    labels: list[int] = []
    wanted = int(random.integers(1, 6))
    for _ in range(20 * wanted):
        if len(masks) == wanted:
            break
        label = int(random.integers(len(NAMES)))
        cover = _sample_coverage(random, size, label)
        mask = cover > 0.5
        if plain and any((other & ndimage.binary_dilation(mask, iterations=2)).any() for other in masks):
            continue
        if any(
            (other & ~mask).sum() < MIN_VISIBLE_FRACTION * pixels for other, pixels in zip(masks, whole, strict=True)
        ):
            continue
        masks = [other & ~mask for other in masks] + [mask]
        whole.append(int(mask.sum()))
        labels.append(label)
        fill = _sample_colour(random, canvas[mask].mean(axis=0))
        if not plain:
            fill = fill + _sample_ramp(random, size, 25.0)
        canvas = canvas * (1 - cover[..., None]) + fill * cover[..., None]
    if not plain:
        canvas = canvas + random.normal(0, NOISE_STD, canvas.shape)
    return canvas.clip(0, 255).round().astype(np.uint8), masks, labels


def _sample_coverage(random: np.random.Generator, size: int, label: int) -> NDArray[np.float64]:
    """How much of each pixel (size, size) a shape of random size and place covers, in [0, 1]."""
    corners = _corners(label) - _corners(label).min(axis=0)
    corners *= random.uniform(size / 6 + 1, size / 2) / corners.max()
    corners += random.uniform(0, size - corners.max(axis=0))
    image = Image.new("L", (size * SUBPIXELS, size * SUBPIXELS))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * SUBPIXELS], fill=1)
    covered: NDArray[np.float64] = np.asarray(image).reshape(size, SUBPIXELS, size, SUBPIXELS).mean(axis=(1, 3))
    return covered


def _corners(label: int) -> NDArray[np.float64]:
    """The outline (n, 2) of a shape of NAMES about the origin."""
    name = NAMES[label]
    count = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angles = np.arange(count) * 2 * np.pi / count + (np.pi / 4 if name == "square" else -np.pi / 2)
    radii = np.where(np.arange(count) % 2, 0.45, 1.0) if name == "star" else np.ones(count)
    outline: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    return outline


def _sample_colour(random: np.random.Generator, behind: NDArray[np.float64]) -> NDArray[np.float64]:
    """A colour (3,) that stands out from the mean of what it will cover."""
    while True:
        colour = random.uniform(MIN_COLOUR_LEVEL, 255, 3)
        if np.linalg.norm(colour - behind) > MIN_COLOUR_DISTANCE:
            return colour


def _sample_background(random: np.random.Generator, size: int) -> NDArray[np.float64]:
    """A background (size, size, 3): specks of all colours, a 10th to a 20th of the side long, dark on average."""
    cells = int(random.integers(10, 21))
    coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    canvas = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)
    return 90 + BACKGROUND_CONTRAST * (canvas - 128)


def _sample_ramp(random: np.random.Generator, size: int, strength: float) -> NDArray[np.float64]:
    """A linear change of colour (size, size, 3) across the picture, of at most `strength` levels either way."""
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    angle = random.uniform(0, 2 * np.pi)
    slope: NDArray[np.float64] = (x * np.cos(angle) + y * np.sin(angle))[..., None]
    return slope * random.uniform(-strength, strength, 3)


def _annotation(number: int, image: int, mask: NDArray[np.bool_], label: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }
