"""Samples are made with and without masks, and collated with padding at the bottom and right."""

from pathlib import Path
from typing import Any

import pytest
import torch

from detr.data.samples import collate, make_sample
from detr.data.transforms import Augmentation

LARGER = Augmentation(kind="none", sizes=[1], eval_size=8, max_size=100, middle_sizes=[1], crop=(1, 1))


def sample(height: int, width: int, count: int, with_masks: bool = True) -> dict[str, Any]:
    """A bright image, enlarged to a shorter side of 8, whose objects cover all of it."""
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, width, height]]).repeat(count, 1)
    masks = torch.ones(count, height, width, dtype=torch.uint8) if with_masks else None
    return make_sample(5, Path("a.png"), image, boxes, torch.arange(count), masks, LARGER, None)


def test_boxes_and_masks_are_resized_with_the_image():
    with_masks, without = sample(4, 6, 2), sample(4, 6, 2, with_masks=False)
    assert with_masks["image"].shape == (3, 8, 12) and with_masks["original_size"] == (4, 6)
    assert with_masks["boxes"].tolist() == [[0, 0, 12, 8]] * 2 and type(with_masks["boxes"]) is torch.Tensor
    masks = with_masks.pop("masks")
    assert masks.shape == (2, 8, 12) and masks.dtype == torch.bool and masks.all()
    assert without.keys() == with_masks.keys() and with_masks["file"] == "a.png" and with_masks["id"] == 5


@pytest.mark.parametrize(("pad_to", "shape"), [(1, (12, 16)), (10, (20, 20))])
def test_a_batch_has_a_common_size_and_nothing_in_the_padding(pad_to: int, shape: tuple[int, int]):
    batch = collate([sample(4, 8, 2), sample(6, 4, 0), sample(4, 4, 1)], pad_to)
    assert batch["images"].shape == (3, 3, *shape) and batch["masks"].shape == (3, *shape) and batch["padded"]
    assert batch["sizes"].tolist() == [[8, 16], [12, 8], [8, 8]] and batch["counts"] == [2, 0, 1]
    real = torch.zeros(3, *shape, dtype=torch.bool)
    for region, (height, width) in zip(real, batch["sizes"].tolist(), strict=True):
        region[:height, :width] = True
    assert torch.equal(batch["masks"], real[[0, 0, 2]])
    assert torch.equal(batch["images"] == 200, real[:, None].expand(-1, 3, -1, -1))
    assert (batch["images"] == 0).logical_or(real[:, None]).all()


def test_a_batch_without_masks_has_no_such_key():
    batch = collate([sample(4, 8, 2, with_masks=False)], 1)
    assert "masks" not in batch and not batch["padded"]
    assert collate([sample(4, 8, 0)], 1)["masks"].shape == (0, 8, 16)
