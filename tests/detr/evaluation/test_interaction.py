"""The interactive evaluation with models whose answers are known."""

from typing import Any

import torch
from torch import Tensor

from detr.criterion.clicks import BACKGROUND, OBJECT
from detr.evaluation.interaction import interact


class Scripted:
    """A model that answers the first click with three given masks, and later ones with given masks, one each."""

    image_size = 8

    def __init__(self, first: Tensor, later: list[Tensor], ious: Tensor):
        self.first, self.later, self.ious = first, later, ious
        self.prompts: list[dict[str, Tensor]] = []

    def decode(self, features: Tensor, prompts: dict[str, Tensor]) -> dict[str, Tensor]:
        count, number = len(prompts["image"]), len(self.prompts)
        self.prompts.append(prompts)
        wrong = torch.zeros(count, 1, 8, 8)
        if number == 0:
            masks = torch.cat((wrong, self.first.expand(count, -1, -1, -1)), 1)
        else:
            masks = self.later[number - 1].expand(count, 4, -1, -1)
        return {"masks": masks.float() * 2 - 1, "ious": self.ious.expand(count, -1)}


def square(top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def run(model: Any, masks: Tensor, counts: list[int], sizes: list[list[int]], clicks: int) -> list[dict[str, Any]]:
    return interact(model, torch.zeros(len(counts), 1, 2, 2), masks, counts, torch.tensor(sizes), clicks)


def test_the_mask_with_the_highest_predicted_iou_is_taken_and_corrected() -> None:
    """The object is 4 x 4. The chosen mask is its upper left quarter; the next click is in the rest."""
    target, quarter = square(2, 2, 4), square(2, 2, 2)
    model = Scripted(torch.stack([target, quarter, square(0, 0, 8)]), [target], torch.tensor([0.9, 0.1, 0.8, 0.2]))
    (answer,) = run(model, target[None], [1], [[8, 8]], 2)
    assert answer["ious"][0].tolist() == [4 / 16, 1.0] and answer["oracle"].tolist() == [1.0]
    torch.testing.assert_close(answer["predicted"], torch.tensor([[0.8, 0.9]], dtype=torch.float64), rtol=1e-6, atol=0)
    x, y, label = answer["points"][0, 1].tolist()
    assert label == OBJECT and target[y, x] and not quarter[y, x]
    assert torch.equal(answer["masks"][0], target)
    assert model.prompts[0]["labels"].tolist() == [[OBJECT]] and "masks" not in model.prompts[0]
    assert torch.equal(model.prompts[1]["masks"] > 0, quarter[None])


def test_a_surplus_gets_a_click_on_the_background() -> None:
    target, large = square(3, 3, 2), square(0, 0, 8)
    model = Scripted(large.expand(3, -1, -1), [target], torch.zeros(4))
    (answer,) = run(model, target[None], [1], [[8, 8]], 2)
    assert answer["points"][0, :, 2].tolist() == [OBJECT, BACKGROUND]


def test_an_object_without_error_keeps_its_mask() -> None:
    target = square(1, 1, 5)
    model = Scripted(target.expand(3, -1, -1), [square(0, 0, 1), square(0, 0, 1)], torch.tensor([0.3, 0.7, 0.6, 0.5]))
    (answer,) = run(model, target[None], [1], [[8, 8]], 3)
    assert answer["ious"].tolist() == [[1.0, 1.0, 1.0]] and torch.equal(answer["masks"][0], target)
    assert answer["predicted"].float().tolist() == [[0.7, 0.7, 0.7]] or bool(
        (answer["predicted"] - 0.7).abs().max() < 1e-6
    )


def test_images_of_unequal_size_and_number_of_objects_get_their_own_answers() -> None:
    """Of three images, the second has no object, and the last a mask without a pixel."""
    masks = torch.stack([square(0, 0, 3), square(1, 1, 2), square(0, 0, 4), torch.zeros(8, 8, dtype=torch.bool)])
    model = Scripted(square(0, 0, 4).expand(3, -1, -1), [], torch.zeros(4))
    answers = run(model, masks, [2, 0, 2], [[8, 6], [5, 5], [6, 8]], 1)
    assert [answer["ious"].shape for answer in answers] == [(2, 1), (0, 1), (1, 1)]
    assert [answer["masks"].shape for answer in answers] == [(2, 8, 6), (0, 5, 5), (1, 6, 8)]
    assert answers[0]["ious"].flatten().tolist() == [9 / 16, 4 / 16] and answers[2]["ious"].tolist() == [[1.0]]
    assert model.prompts[0]["image"].tolist() == [0, 0, 2]
