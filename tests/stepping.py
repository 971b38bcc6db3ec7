"""Steps of detectors for tests: eight images of unequal size, and their splits into micro-batches."""

import torch

from common.train.optim import OptimizerOptions
from detr.data.coco import Coco, Files
from detr.data.transforms import Augmentation

SPLITS = {"1x8": [8], "3+1+4": [3, 1, 4], "8x1": [1] * 8}
OPTIMIZER = OptimizerOptions(
    name="adamw",
    lr=1e-3,
    weight_decay=1e-2,
    decay_norms=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.0,
    rates={"backbone": 0.1},
    layer_decay=1.0,
    reference_batch=None,
    scaling="linear",
)


def data() -> Coco:
    nowhere = Files(images=None, annotations=None)
    augmentation = Augmentation(kind="none", sizes=[64], eval_size=64, max_size=64, middle_sizes=[64], crop=(32, 64))
    return Coco(
        root=None,
        train=nowhere,
        val=nowhere,
        test=nowhere,
        val_count=0,
        batch_size=8,
        augmentation=augmentation,
        pad_to=1,
        cache=False,
    )


def samples() -> list[dict]:
    """Eight images of unequal size; one has no object and one has more than there are queries."""
    rng = torch.Generator().manual_seed(1)
    images = []
    for i, count in enumerate([2, 0, 7, 1, 3, 1, 0, 4]):
        height, width = 33 + 9 * i, 120 - 11 * i
        corners = torch.rand(count, 2, generator=rng) * torch.tensor([width, height]) * 0.5
        images.append(
            {
                "id": i,
                "file": str(i),
                "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng),
                "original_size": (height, width),
                "boxes": torch.cat([corners, corners + torch.tensor([width, height]) * 0.4], dim=1),
                "labels": torch.randint(0, 3, (count,), generator=rng),
            }
        )
    return images


def batches(counts: list[int], part: list[dict] | None = None) -> list[dict]:
    iterator = iter(samples() if part is None else part)
    return [data().collate([next(iterator) for _ in range(count)]) for count in counts]


def normalise64(images, sizes, dtype):
    from common.data.images import normalise

    return normalise(images, sizes, torch.float64)
