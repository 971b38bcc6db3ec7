"""A small synthetic detection data set: coloured shapes on noisy backgrounds, drawn at first use in COCO's format."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from common.data.opening import read_json
from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split
from common.types import SPLITS, Positive, Range
from detr.data.annotations import complete
from detr.data.coco import Coco, Files
from detr.data.drawing import draw_once
from detr.data.grounds import NAMES as GROUNDS
from detr.data.grounds import draw_grounds
from detr.data.panoptic import PanopticTruth, panoptic_truth
from detr.data.panoptic_json import to_coco, write_panoptic
from detr.data.transforms import Augmentation

NAMES = ("circle", "square", "triangle", "star")
DRAWING_VERSION = 3  # increase it when a change of the code changes the pictures
STUFF_VERSION = 1  # increase it when a change of the code changes only the pictures with stuff
SUBPIXELS = 4  # along each side of a pixel, for antialiasing
MIN_VISIBLE_FRACTION = 0.75  # of a shape's pixels; shapes that are drawn later may hide the rest
# Factor on the contrast of the background. Below 0.7, thresholding begins to find the shapes
# (tests/detr/data/test_shapes.py).
BACKGROUND_CONTRAST = 0.9
NOISE_STD = 22.0  # of the noise of each pixel and channel, in levels (0 to 255)
MIN_COLOUR_LEVEL = 125.0  # of a shape in each channel; the background's mean is 90
MIN_COLOUR_DISTANCE = 70.0  # between a shape and the mean colour that it covers, Euclidean in RGB levels


class Shapes(Coco):
    """Images of one to five shapes (circles, squares, triangles and stars), drawn once into a folder in `root`.

    The longer side of a shape is a sixth to a half of the image's side. Each shape has a random light colour. Shapes
    that are drawn later may hide up to a quarter of a shape; the box and the mask of a shape cover its visible part.
    The background consists of specks of random colours, and every pixel has noise, so that thresholding does not find
    the shapes. With `plain`, thresholding finds the shapes: the background and each shape have a single colour, shapes
    do not overlap, and there is no noise. The name of the folder contains a hash of the arguments on which the pictures
    depend.

    With `stuff`, the background consists of one or two grounds instead (`detr.data.grounds`), which are objects of the
    classes of stuff. The annotations then also exist in COCO's panoptic format, for the panoptic quality.
    """

    drawn = True  # a detector learns these pictures without pretrained weights
    style: ClassVar[str] = ""  # a part of the folder's name, for a subclass with other pictures

    def __init__(
        self,
        *,
        root: str,
        image_size: Annotated[int, Range(low=32, high=4096)],
        train_count: Annotated[int, Range(low=1, high=10_000_000)],
        val_count: Annotated[int, Range(low=0, high=10_000_000)],
        test_count: Annotated[int, Range(low=1, high=10_000_000)],
        seed: int,
        plain: bool,
        flip: bool,
        batch_size: Positive,
        cache: bool,
        stuff: bool = False,
    ):
        """Store the arguments; the pictures are drawn at first use.

        Args:
            root: folder that holds a folder for each generated data set.
            image_size: height and width of the images in pixels.
            train_count: number of images for training.
            val_count: number of images that select the best checkpoint; 0 = no val.
            test_count: number of images for the reported metrics.
            seed: seed of the pictures, which do not depend on the run's seed.
            plain: whether the background and each shape have a single colour, without noise and without overlap.
            flip: whether training images are flipped horizontally with probability 0.5.
            batch_size: images in one optimizer step.
            cache: whether each worker keeps decoded images in memory.
            stuff: whether the background consists of grounds, which are segments of stuff. It has a default, because
                users' older config files lack it.

        Raises UserError if both `plain` and `stuff` are True.
        """
        if plain and stuff:
            raise UserError(
                "data.plain=true has a background of one colour, and data.stuff=true has grounds; give one."
            )
        self.image_size = image_size
        self.train_count = train_count
        self.test_count = test_count
        self.seed = seed
        self.plain = plain
        self.flip = flip
        self.stuff = stuff
        keys = [DRAWING_VERSION, image_size, train_count, val_count, test_count, seed, int(plain)]
        keys += [STUFF_VERSION] if stuff else []
        kind_of_set = self.style + ("-plain" if plain else "-stuff" if stuff else "")
        self.folder = Path(root) / f"{image_size}px{kind_of_set}-{f'{mix(*keys):016x}'[:8]}"
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

    def root_has_files(self) -> bool:
        """Whether the pictures have been drawn."""
        return self.folder.exists()

    def prepare(self) -> None:
        """Draw the pictures unless they exist; raises UserError when the files cannot be written."""
        draw_once(self.folder, "shapes", self._draw)

    def _draw(self, folder: Path) -> None:
        counts: dict[Split, int] = {"train": self.train_count, "val": self.val_count or 0, "test": self.test_count}
        for split, count in counts.items():
            (folder / split).mkdir(parents=True)
            coco_json = self._draw_split(split, count, folder / split)
            (folder / f"{split}.json").write_text(json.dumps(coco_json))
            if self.stuff:
                write_panoptic(coco_json, folder / f"panoptic_{split}.json")

    def _draw_split(self, split: Split, count: int, folder: Path) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            rng = np.random.default_rng(mix(self.seed, split, number))
            pixels, masks, labels = self.draw_picture(rng)
            name = f"{number:06d}.png"
            Image.fromarray(pixels).save(folder / name, compress_level=1)
            images.append({"id": number, "file_name": name, "height": self.image_size, "width": self.image_size})
            for mask, label in zip(masks, labels, strict=True):
                annotations.append(_annotation(len(annotations) + 1, number, mask, label))
        return {"images": images, "annotations": annotations, "categories": _categories(self.stuff)}

    def panoptic_truth(self, split: Split) -> PanopticTruth:
        """Return the segments of `split`; raises UserError if the pictures have no stuff."""
        if not self.stuff:
            raise UserError("data.stuff=false draws no stuff, which the panoptic quality needs; give data.stuff=true.")
        self.prepare()
        path = self.folder / f"panoptic_{split}.json"
        return panoptic_truth(complete(to_coco(read_json(path), path)), path.with_suffix(""))

    def draw_picture(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]], list[int]]:
        """Draw a picture; returns its pixels (S, S, 3), and the masks (S, S) and labels of its objects."""
        return draw(rng, self.image_size, self.plain, self.stuff)


def draw(
    rng: np.random.Generator, size: int, plain: bool, stuff: bool = False
) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]], list[int]]:
    """Draw a picture; returns its pixels (size, size, 3), and the masks (size, size) and labels of its objects.

    A mask is True where its object is visible. A label is an index in NAMES or, from len(NAMES) on, in the names of
    grounds. With `stuff`, the grounds follow after the shapes, and each pixel belongs to one object.
    """
    canvas = np.full((size, size, 3), rng.uniform(0, 255, 3)) if plain else sample_background(rng, size)
    grounds: list[NDArray[np.bool_]] = []
    kinds: list[int] = []
    if stuff:
        canvas, grounds, kinds = draw_grounds(rng, size, canvas)
    canvas, masks, labels = _draw_shapes(rng, canvas, plain)
    covered = np.any(masks, axis=0)
    for ground, kind in zip(grounds, kinds, strict=True):
        if (visible := ground & ~covered).any():
            masks.append(visible)
            labels.append(len(NAMES) + kind)
    return canvas.clip(0, 255).round().astype(np.uint8), masks, labels


def _draw_shapes(
    rng: np.random.Generator, canvas: NDArray[np.float64], plain: bool
) -> tuple[NDArray[np.float64], list[NDArray[np.bool_]], list[int]]:
    """Draw one to five shapes and, unless `plain`, noise; returns the canvas, and the shapes' masks and labels."""
    from scipy import ndimage  # slow to import

    size = len(canvas)
    masks: list[NDArray[np.bool_]] = []
    areas: list[int] = []  # pixels of each shape before others covered it
    labels: list[int] = []
    count = int(rng.integers(1, 6))
    for _ in range(20 * count):  # attempts; a shape that hides too much of an earlier one is rejected
        if len(masks) == count:
            break
        label = int(rng.integers(len(NAMES)))
        coverage = sample_coverage(rng, size, label)
        mask = coverage > 0.5
        if plain and any((shape & ndimage.binary_dilation(mask, iterations=2)).any() for shape in masks):
            continue
        if any((shape & ~mask).sum() < MIN_VISIBLE_FRACTION * area for shape, area in zip(masks, areas, strict=True)):
            continue
        masks = [shape & ~mask for shape in masks] + [mask]
        areas.append(int(mask.sum()))
        labels.append(label)
        fill = sample_colour(rng, canvas[mask].mean(axis=0))
        if not plain:
            fill = fill + sample_ramp(rng, size, 25.0)
        canvas = canvas * (1 - coverage[..., None]) + fill * coverage[..., None]
    if not plain:
        canvas = canvas + rng.normal(0, NOISE_STD, canvas.shape)
    return canvas, masks, labels


def sample_coverage(rng: np.random.Generator, size: int, label: int) -> NDArray[np.float64]:
    """Sample a shape's scale and position; returns the fraction of each pixel (size, size) that the shape covers."""
    corners = corners_of(label) - corners_of(label).min(axis=0)
    corners *= rng.uniform(size / 6 + 1, size / 2) / corners.max()
    corners += rng.uniform(0, size - corners.max(axis=0))
    return coverage_of(corners, size)


def coverage_of(corners: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return the fraction of each pixel (size, size) that the polygon with these corners (n, 2) x, y covers."""
    image = Image.new("L", (size * SUBPIXELS, size * SUBPIXELS))
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * SUBPIXELS], fill=1)
    coverage: NDArray[np.float64] = np.asarray(image).reshape(size, SUBPIXELS, size, SUBPIXELS).mean(axis=(1, 3))
    return coverage


def corners_of(label: int) -> NDArray[np.float64]:
    """Return the corners (n, 2) of the shape NAMES[label], centred at the origin, with radius 1."""
    name = NAMES[label]
    count = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angles = np.arange(count) * 2 * np.pi / count + (np.pi / 4 if name == "square" else -np.pi / 2)
    radii = np.where(np.arange(count) % 2, 0.45, 1.0) if name == "star" else np.ones(count)
    outline: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    return outline


def sample_colour(rng: np.random.Generator, background: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sample a light colour (3,) at a distance of at least MIN_COLOUR_DISTANCE from `background` (3,)."""
    while True:
        colour = rng.uniform(MIN_COLOUR_LEVEL, 255, 3)
        if np.linalg.norm(colour - background) > MIN_COLOUR_DISTANCE:
            return colour


def sample_background(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Sample a background (size, size, 3) of coloured specks, dark on average.

    A speck is a 20th to a 10th of the image's side long.
    """
    cells = int(rng.integers(10, 21))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    canvas = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)
    return 90 + BACKGROUND_CONTRAST * (canvas - 128)


def sample_ramp(rng: np.random.Generator, size: int, strength: float) -> NDArray[np.float64]:
    """Sample a linear change of colour across the picture, (size, size, 3) in levels, which is zero at the centre.

    Its absolute value is at most `strength` at the middle of a side, and at most sqrt(2) * `strength` in a corner.
    """
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    angle = rng.uniform(0, 2 * np.pi)
    ramp: NDArray[np.float64] = (x * np.cos(angle) + y * np.sin(angle))[..., None]
    return ramp * rng.uniform(-strength, strength, 3)


def _categories(stuff: bool) -> list[dict[str, Any]]:
    shapes: list[dict[str, Any]] = [{"id": i, "name": n, "supercategory": "shape"} for i, n in enumerate(NAMES, 1)]
    if not stuff:
        return shapes
    grounds = enumerate(GROUNDS, len(NAMES) + 1)
    return [
        *({**category, "isthing": 1} for category in shapes),
        *({"id": i, "name": name, "supercategory": "ground", "isthing": 0} for i, name in grounds),
    ]


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
