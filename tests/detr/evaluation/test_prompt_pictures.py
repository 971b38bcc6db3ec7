"""Pictures of masks and clicks."""

import torch

from detr.evaluation.pictures import colour
from detr.evaluation.prompt_pictures import CLICK_COLOURS, OPACITY, draw_masks


def test_pixels_of_a_mask_take_its_colour_and_others_stay() -> None:
    image = torch.full((3, 40, 50), 100, dtype=torch.uint8)
    masks = torch.zeros(2, 40, 50, dtype=torch.bool)
    masks[0, 5:35, 5:45] = True
    masks[1, 15:25, 15:25] = True  # smaller, in the first one, and drawn over it
    picture = draw_masks(image, masks)
    factor = picture.shape[1] // 40
    assert picture.shape == (3, 40 * factor, 50 * factor) and picture.shape[2] >= 400
    assert picture[:, 2 * factor, 2 * factor].tolist() == [100, 100, 100]
    expected = torch.full((3,), 100.0)
    for x, y, label in ((8, 8, 0), (20, 20, 1)):  # the second pixel is in both masks
        expected = expected + OPACITY * (torch.tensor(colour(label)) - expected)
        torch.testing.assert_close(picture[:, y * factor, x * factor].float(), expected, rtol=0, atol=0.51)  # rounded
    assert picture[:, 15 * factor, 20 * factor].tolist() == list(colour(1)), "the outline"


def test_clicks_and_boxes_are_drawn_at_their_pixels() -> None:
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    empty = torch.zeros(0, 400, 400, dtype=torch.bool)
    picture = draw_masks(image, empty, [(100.0, 50.0, 1), (300.0, 200.0, 0)], [[20, 30, 90, 120]])
    assert picture[:, 50, 100].tolist() == list(CLICK_COLOURS[1])
    assert picture[:, 200, 300].tolist() == list(CLICK_COLOURS[0])
    assert picture[:, 80, 20].tolist() == list(CLICK_COLOURS[1]) and not picture[:, 80, 60].any()


def test_the_image_is_not_changed() -> None:
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    draw_masks(image, torch.ones(1, 10, 10, dtype=torch.bool), [(1.0, 1.0, 1)])
    assert not image.any()
