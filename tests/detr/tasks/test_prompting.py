"""A user's prompts: what is refused, and what the model reads."""

from typing import Any

import pytest
import torch

from common.errors import UserError
from detr.tasks.prompting import PromptOptions, as_tensors


def options(**changes: Any) -> PromptOptions:
    return PromptOptions(**{"points": [], "background": [], "boxes": [], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": [3.0, 4.0, 5.0]}, r"points=3,4,5: 3 numbers; expected x,y for each"),
        ({"points": [1.0]}, r"points=1: 1 numbers; expected x,y"),
        ({"points": [1.0, 1.0], "background": [3.0]}, r"background=3: 1 numbers"),
        ({"boxes": [1.0, 2.0, 3.0]}, r"boxes=1,2,3: 3 numbers; expected x,y,x,y"),
        ({"boxes": [5.0, 2.0, 3.0, 9.0]}, r"boxes=5,2,3,9 has no area"),
        ({"boxes": [1.0, 2.0, 3.0, 2.0]}, r"boxes=1,2,3,2 has no area"),
        ({"boxes": [1.0, 2.0, 3.0, 4.0] * 2, "points": [1.0, 2.0]}, r"2 boxes stand for as many objects"),
        ({"background": [1.0, 2.0]}, r"background=1,2 says only where the object is not"),
    ],
)
def test_mistakes_end_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        options(**changes)
    assert str(raised.value).count(". ") == 0 and str(raised.value).endswith(".")


def test_no_prompt_at_all_is_refused_when_an_image_is_read() -> None:
    with pytest.raises(UserError, match=r"give points=x,y or boxes=x,y,x,y"):
        options().objects()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"points": [3.0, 4.0, 700.0, 20.0]},
            r"points=700,20 is outside of a\.jpg, which has 640 x 480 pixels; give x",
        ),
        ({"points": [3.0, -1.0]}, r"points=3,-1 is outside"),
        ({"points": [3.0, 4.0], "background": [3.0, 481.0]}, r"background=3,481 is outside"),
        ({"boxes": [0.0, 0.0, 641.0, 20.0]}, r"boxes=0,0,641,20 is outside"),
        ({"points": [float("nan"), 4.0]}, r"is outside"),
    ],
)
def test_a_prompt_outside_of_the_image_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**changes).check(480, 640, "a.jpg")


def test_prompts_at_the_border_are_accepted() -> None:
    options(boxes=[0.0, 0.0, 640.0, 480.0]).check(480, 640, "a.jpg")
    options(points=[639.0, 479.0, 0.0, 0.0]).check(480, 640, "a.jpg")


def test_points_and_a_box_are_one_object_and_several_boxes_are_several() -> None:
    (one,) = options(points=[1.0, 2.0, 3.0, 4.0], background=[5.0, 6.0], boxes=[0.0, 0.0, 9.0, 9.0]).objects()
    assert one.points == [(1, 2), (3, 4)] and one.background == [(5, 6)] and one.box == [0, 0, 9, 9]
    assert not one.is_single
    assert [item.box for item in options(boxes=[0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]).objects()] == [
        [0, 0, 1, 1],
        [2, 2, 3, 3],
    ]
    assert (
        options(points=[1.0, 2.0]).objects()[0].is_single and options(boxes=[0.0, 0.0, 1.0, 1.0]).objects()[0].is_single
    )
    assert not options(points=[1.0, 2.0, 3.0, 4.0]).objects()[0].is_single


def test_the_model_reads_points_in_resized_pixels_with_their_labels() -> None:
    objects = options(points=[10.0, 20.0], background=[30.0, 40.0], boxes=[0.0, 4.0, 60.0, 80.0]).objects()
    prompts = as_tensors(objects, torch.tensor([0.5, 0.25]))
    assert prompts["points"].tolist() == [[[5, 5], [15, 10], [0, 1], [30, 20]]]
    assert prompts["labels"].tolist() == [[1, 0, 2, 3]] and prompts["image"].tolist() == [0]
