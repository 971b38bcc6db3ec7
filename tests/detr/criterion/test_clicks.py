"""Simulated prompts: where they are, what they depend on, and their distribution."""

from typing import Any

import numpy as np
import pytest
import torch

from detr.criterion.clicks import (
    BACKGROUND,
    BOTTOM_RIGHT,
    OBJECT,
    PADDING,
    TOP_LEFT,
    PromptingOptions,
    add_clicks,
    boxes_of,
    centre_of_error,
    first_prompts,
    sample_cells,
    sample_objects,
    to_position,
)

LIKE = torch.zeros(())


def options(**changes: Any) -> PromptingOptions:
    return PromptingOptions(**{"objects": 2, "rounds": 3, "boxes": 0.5, "jitter": 0.1, "max_jitter": 2.0, **changes})


def squares(count: int, side: int = 16) -> torch.Tensor:
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for i in range(count):
        masks[i, 2 + i % 3 : 9 + i % 4, 3:12] = True
    return masks


def test_what_is_sampled_for_an_image_depends_on_its_seed_and_objects_alone() -> None:
    whole = sample_objects(options(), [3, 0, 1, 5], [11, 12, 13, 14], LIKE)
    assert whole.images.tolist() == [0, 0, 2, 3, 3]
    assert whole.objects[2] == 3 and whole.uniforms.shape == (5, 4) and whole.normals.shape == (5, 4)
    alone = sample_objects(options(), [5], [14], LIKE)
    assert torch.equal(whole.objects[3:] - 4, alone.objects)
    assert torch.equal(whole.uniforms[3:], alone.uniforms) and torch.equal(whole.normals[3:], alone.normals)
    other = sample_objects(options(), [5], [15], LIKE)
    assert not torch.equal(other.uniforms, alone.uniforms)


def test_no_object_is_prompted_twice_and_every_object_is_prompted_at_times() -> None:
    chosen = [sample_objects(options(), [4], [seed], LIKE).objects.tolist() for seed in range(60)]
    assert all(len({*pair}) == 2 for pair in chosen) and {i for pair in chosen for i in pair} == {0, 1, 2, 3}


def test_a_batch_without_objects_gives_no_prompts() -> None:
    sampled = sample_objects(options(), [0, 0], [1, 2], LIKE)
    assert len(sampled.images) == len(sampled.objects) == len(sampled.uniforms) == 0


def test_points_are_uniform_in_the_object() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 2, 3] = mask[0, 3, 0] = True
    cells = sample_cells(mask.expand(3000, -1, -1), torch.rand(3000, generator=torch.Generator().manual_seed(0)))
    values, counts = cells.unique(return_counts=True)
    assert values.tolist() == [1, 11, 12]
    assert (counts - 1000).abs().max() < 5 * 26  # five standard deviations of a binomial of 3000 and a third
    extremes = sample_cells(mask.expand(2, -1, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert extremes.tolist() == [1, 12]


def test_positions_are_the_centres_of_cells() -> None:
    assert to_position(torch.tensor([0, 5]), side=4, cell=1.0).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert to_position(torch.tensor([6]), side=4, cell=4.0).tolist() == [[9.5, 5.5]]


def test_boxes_enclose_their_masks() -> None:
    boxes = boxes_of(squares(2), cell=4.0)
    assert boxes.tolist() == [[12.0, 8.0, 48.0, 36.0], [12.0, 12.0, 48.0, 40.0]]


def test_first_prompts_are_points_on_the_object_or_boxes_around_it() -> None:
    count = 400
    targets, sizes = squares(count), torch.tensor([[16, 16]] * count)
    sampled = sample_objects(options(objects=1), [1] * count, list(range(count)), LIKE)
    prompts = first_prompts(options(objects=1), sampled, targets, sizes, cell=1.0)
    is_box = prompts["labels"][:, 0] == TOP_LEFT
    assert 150 < is_box.sum() < 250, "half of 400"
    for i in range(count):
        (x, y), second = prompts["points"][i, 0].tolist(), prompts["points"][i, 1]
        if is_box[i]:
            assert prompts["labels"][i].tolist() == [TOP_LEFT, BOTTOM_RIGHT]
            noise = torch.tensor([x, y, *second.tolist()]) - boxes_of(targets[i : i + 1], 1.0)[0]
            assert noise.abs().max() <= 2.0
        else:
            assert prompts["labels"][i].tolist() == [OBJECT, PADDING] and targets[i, int(y), int(x)]
    noise = prompts["points"][is_box].flatten(1) - boxes_of(targets[is_box], 1.0)
    assert 0.5 < noise[:, 0].std() < 1.1, "a tenth of the width, 9"


def test_a_box_stays_in_its_image() -> None:
    targets = torch.ones(50, 16, 16, dtype=torch.bool)
    sampled = sample_objects(options(objects=1), [1] * 50, list(range(50)), LIKE)
    prompts = first_prompts(
        options(objects=1, boxes=1.0, max_jitter=9.0), sampled, targets, torch.tensor([[12, 10]] * 50), 1.0
    )
    assert prompts["points"].min() >= 0
    assert (prompts["points"].amax((0, 1)) <= torch.tensor([9.0, 11.0])).all()


def test_a_click_is_added_where_the_mask_is_wrong() -> None:
    targets, masks, real = squares(3), squares(3), torch.ones(3, 16, 16, dtype=torch.bool)
    masks[0, 5, 5] = False  # missing
    masks[1, 15, 15] = True  # surplus
    real[1, 15, 14] = False
    masks[1, 15, 14] = True  # in the padding: no error
    prompts = {"points": torch.zeros(3, 2, 2), "labels": torch.zeros(3, 2, dtype=torch.int64)}
    added = add_clicks(prompts, masks, targets, real, torch.tensor([0.7, 0.2, 0.5]), 1.0)
    assert added["points"].shape == (3, 3, 2)
    assert added["points"][:2, 2].tolist() == [[5.0, 5.0], [15.0, 15.0]]
    assert added["labels"][:, 2].tolist() == [OBJECT, BACKGROUND, OBJECT]
    x, y = added["points"][2, 2].long().tolist()
    assert targets[2, y, x], "without an error, the click is in the object"


@pytest.mark.parametrize("label", [OBJECT, BACKGROUND])
def test_the_next_click_is_the_centre_of_the_largest_error(label: int) -> None:
    """A wide region of 5 x 9 and a long one of 3 x 20; the widest circle is in the first, around (14, 4)."""
    errors = np.zeros((30, 30), dtype=bool)
    errors[2:7, 10:19] = True
    errors[20:23, 2:22] = True
    empty = np.zeros_like(errors)
    x, y, answer = centre_of_error(empty, errors) if label == OBJECT else centre_of_error(errors, empty)  # type: ignore[misc]
    assert y == 4 and 12 <= x <= 16 and answer == label


def test_the_border_of_the_image_is_an_edge() -> None:
    target = np.zeros((9, 9), dtype=bool)
    target[:5, :5] = True
    assert centre_of_error(np.zeros_like(target), target) == (2, 2, OBJECT)


def test_a_mask_without_error_needs_no_click() -> None:
    target = np.eye(5, dtype=bool)
    assert centre_of_error(target, target) is None
