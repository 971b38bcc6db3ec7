"""JPEGs for benchmarks of DETR's input, and the paper's augmentation written with PIL, as in the official code.

The paper is Carion et al. 2020, arXiv 2005.12872, section 4. Random numbers are sampled in the same order as in
detr/data/transforms.py, so both pipelines flip, crop and resize equally if their generators have the same seed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.data.images import MEAN, STD, normalise, open_image, read_image
from common.machine.seeds import generator
from detr.data.transforms import Augmentation, resized_shape

Sample = tuple[Tensor, Tensor, Tensor]  # image float (3, h, w), boxes (n, 4) xyxy in pixels, labels (n,)


def sample_photo(height: int, width: int, seed: int) -> Tensor:
    """Sample an artificial photo, uint8 (3, height, width): edges, and noise that is weaker at higher frequencies.

    As a JPEG of quality 90, the photo takes about 4 bits per pixel, like COCO's.
    """
    rng = generator("photo", seed)
    picture = torch.zeros(3, height, width)
    for octave in range(2, 10):
        rows, columns = (max(2, min(side, round(side / 512 * 2**octave))) for side in (height, width))
        noise = torch.randn(1, 1, rows, columns, generator=rng) + 0.3 * torch.randn(1, 3, rows, columns, generator=rng)
        picture += F.interpolate(noise, (height, width), mode="bilinear")[0] * 0.85**octave
    for _ in range(12):
        (top, bottom), (left, right) = (
            sorted(torch.randint(0, side, (2,), generator=rng).tolist()) for side in (height, width)
        )
        picture[:, top:bottom, left:right] += 0.5 * torch.randn(3, 1, 1, generator=rng)
    return (110 + 45 * picture).clamp(0, 255).to(torch.uint8)


def sample_images(count: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sample `count` photos; returns two tensors (count, 3, height, width): the uint8 images, and normalised images.

    Both are in PyTorch's channels_last memory format.
    """
    images = torch.stack([sample_photo(height, width, seed) for seed in range(count)])
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return images, normalise(images, torch.tensor([[height, width]] * count))


def write_photos(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Write a JPEG for each (height, width) of `sizes`; returns the files."""
    files = [folder / f"{number:03d}.jpg" for number in range(len(sizes))]
    for seed, (file, size) in enumerate(zip(files, sizes, strict=True)):
        Image.fromarray(sample_photo(*size, seed).permute(1, 2, 0).numpy()).save(file, quality=90)
    return files


def write_annotations(path: Path, files: list[Path], boxes: int) -> None:
    """Write the COCO JSON file `path` with `boxes` random boxes for each image file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, file in enumerate(files):
        height, width = read_image(file).shape[1:]
        images.append({"id": number, "file_name": file.name, "height": height, "width": width})
        corners = torch.rand(boxes, 2, 2, generator=generator("boxes", number)).sort(1).values.flatten(1)
        for x0, y0, x1, y1 in (corners * torch.tensor([width, height] * 2)).tolist():
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 1, "image_id": number}
            annotations.append({**box, "id": len(annotations) + 1, "iscrowd": 0, "area": 1.0})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_text(json.dumps(document), encoding="utf-8")


def targets(path: Path, number: int) -> tuple[Tensor, Tensor]:
    """Read the objects of image `number` from the file `path`, which `write_annotations` wrote.

    Returns boxes (n, 4) xyxy in pixels, and labels (n,), which are all 0.
    """
    annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    boxes = [annotation["bbox"] for annotation in annotations if annotation["image_id"] == number]
    x, y, width, height = torch.tensor(boxes).unbind(1)
    return torch.stack([x, y, x + width, y + height], dim=1), torch.zeros(len(boxes), dtype=torch.int64)


def pil_sample(file: Path, boxes: Tensor, labels: Tensor, options: Augmentation, rng: torch.Generator) -> Sample:
    """Make a training sample: decode the image, flip and crop it randomly, resize it, and normalise its pixels."""
    with open_image(file) as opened:
        image = opened.convert("RGB")
    if torch.rand((), generator=rng) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([image.width, 0] * 2)
    if torch.rand((), generator=rng) < 0.5:
        image, boxes = _resize(image, boxes, _sample_choice(options.middle_sizes, rng), None)
        image, boxes, labels = _crop(image, boxes, labels, options.crop, rng)
    image, boxes = _resize(image, boxes, _sample_choice(options.sizes, rng), options.max_size)
    pixels = torch.from_numpy(np.array(image))  # (h, w, 3)
    floats = pixels.permute(2, 0, 1).contiguous().float().div_(255)  # (h, w, 3) -> (3, h, w)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return floats.sub_(mean).div_(std), boxes, labels


def pil_collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Collate samples: images (B, 3, H, W), zero-padded at bottom and right, and a mask (B, H, W) of real pixels."""
    height, width = (max(image.shape[axis] for image, _, _ in samples) for axis in (1, 2))
    images, real = torch.zeros(len(samples), 3, height, width), torch.zeros(len(samples), height, width).bool()
    for number, (image, _, _) in enumerate(samples):
        images[number, :, : image.shape[1], : image.shape[2]] = image
        real[number, : image.shape[1], : image.shape[2]] = True
    return images, real


def _resize(image: Image.Image, boxes: Tensor, size: int, max_size: int | None) -> tuple[Image.Image, Tensor]:
    height, width = resized_shape(image.height, image.width, size, max_size)
    scale = torch.tensor([width / image.width, height / image.height] * 2)
    return image.resize((width, height), Image.Resampling.BILINEAR), boxes * scale


def _crop(
    image: Image.Image, boxes: Tensor, labels: Tensor, limits: tuple[int, int], rng: torch.Generator
) -> tuple[Image.Image, Tensor, Tensor]:
    height, width = (_sample_int(min(limits[0], n), min(limits[1], n), rng) for n in (image.height, image.width))
    top, left = _sample_int(0, image.height - height, rng), _sample_int(0, image.width - width, rng)
    boxes = (boxes - torch.tensor([left, top] * 2)).clamp(min=0).minimum(torch.tensor([width, height] * 2))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return image.crop((left, top, left + width, top + height)), boxes[inside], labels[inside]


def _sample_int(low: int, high: int, rng: torch.Generator) -> int:
    """Sample a random integer from `low` to `high`, inclusive."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def _sample_choice(values: list[int], rng: torch.Generator) -> Any:
    return values[_sample_int(0, len(values) - 1, rng)]
