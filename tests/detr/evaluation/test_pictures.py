import math

import pytest
import torch

from detr.evaluation.pictures import MIN_LONGER_SIDE, colour, draw


def pixel(picture: torch.Tensor, x: int, y: int) -> tuple[int, ...]:
    return tuple(picture[:, y, x].tolist())


def test_the_outline_lies_on_the_box_in_the_colour_of_its_class():
    image = torch.full((3, 500, 600), 90, dtype=torch.uint8)
    boxes = torch.tensor([[100.0, 200.0, 300.0, 400.0], [350.0, 200.0, 550.0, 400.0]])
    picture = draw(image, boxes, ["cat", "dog"], torch.tensor([0.9, 0.4]), torch.tensor([4, 2]))
    assert picture.shape == image.shape and picture.dtype == torch.uint8
    assert (image == 90).all()
    for x, label in ((100, 4), (300, 4), (350, 2), (550, 2)):
        assert pixel(picture, x, 300) == colour(label)
    for x, y in ((99, 300), (301, 300), (200, 300), (200, 450)):
        assert pixel(picture, x, y) == (90, 90, 90)
    assert (picture[:, 170:198, 100:130] == 0).any()  # black letters above the box


@pytest.mark.parametrize("shape", [(64, 64), (1, 30), (399, 20)])
def test_a_small_image_is_enlarged_by_an_integer_with_its_boxes(shape):
    height, width = shape
    picture = draw(torch.zeros(3, height, width, dtype=torch.uint8), torch.tensor([[0.0, 0.0, width, height]]), ["a"])
    factor = math.ceil(MIN_LONGER_SIDE / max(shape))
    right, bottom = factor * width - 1, factor * height - 1  # there may be a white margin, see below
    for x, y in ((right, bottom), (right, 0), (0, bottom)):
        assert pixel(picture, x, y) == colour(0)


def test_a_picture_smaller_than_a_label_gets_a_white_margin_for_it():
    picture = draw(
        torch.zeros(3, 400, 10, dtype=torch.uint8), torch.tensor([[2.0, 100.0, 8.0, 200.0]]), ["a long name"]
    )
    assert picture.shape[1] == 400 and 60 < picture.shape[2] < 120
    assert (picture[:, 300:, 10:] == 255).all() and not picture[:, 300:, :10].any()
    label = (picture == torch.tensor(colour(0))[:, None, None]).all(0)
    assert label[:, 10:].sum() > 500, "the label is whole"
    wide = draw(torch.zeros(3, 4, 400, dtype=torch.uint8), torch.tensor([[2.0, 0.0, 8.0, 4.0]]), ["a"])
    assert wide.shape[2] == 400 and 10 < wide.shape[1] < 30


def test_labels_hide_neither_each_other_nor_outlines():
    """All boxes have one corner in common, so that labels at their upper left corners would all lie in one place."""
    boxes = torch.tensor([[100.0, 100.0, 150.0 + 40 * i, 130.0 + 50 * i] for i in range(5)])
    names, scores, image = [f"class {i}" for i in range(5)], torch.arange(5) / 10, torch.zeros(3, 480, 640)
    picture = draw(image.byte(), boxes, names, scores, torch.arange(5))
    for i, (x0, y0, x1, y1) in enumerate(boxes.long().tolist()):
        alone = draw(image.byte(), boxes[[i]], [names[i]], scores[[i]], torch.tensor([i]))
        counts = []
        for drawn in (picture, alone):
            pixels = (drawn == torch.tensor(colour(i))[:, None, None]).all(0)
            assert pixels[y1, x0 + 20 : x1].all(), "the lower outline"
            pixels[y0 : y1 + 1, x0 : x0 + 2] = pixels[y0 : y1 + 1, x1 - 1 : x1 + 1] = False
            pixels[y0 : y0 + 2, x0 : x1 + 1] = pixels[y1 - 1 : y1 + 1, x0 : x1 + 1] = False
            counts.append(int(pixels.sum()))
        assert counts[0] >= counts[1] > 500, "the label"


def test_an_image_without_detections_is_unchanged():
    image = torch.randint(0, 256, (3, 450, 420), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(image, torch.zeros(0, 4), [], torch.zeros(0), torch.zeros(0, dtype=torch.int64)), image)


def test_the_highest_score_lies_on_top():
    image = torch.zeros(3, 500, 500, dtype=torch.uint8)
    boxes = torch.tensor([[100.0, 100.0, 300.0, 300.0]]).repeat(2, 1)
    for scores, top in (([0.9, 0.1], 0), ([0.1, 0.9], 1)):
        picture = draw(image, boxes, ["a", "b"], torch.tensor(scores), torch.tensor([0, 1]))
        assert pixel(picture, 200, 300) == colour(top)


def test_boxes_and_labels_are_clipped_to_the_image():
    boxes = torch.tensor([[-50.0, -50.0, 900.0, 900.0], [490.0, 490.0, 700.0, 700.0], [600.0, 600.0, 700.0, 700.0]])
    picture = draw(torch.zeros(3, 500, 500, dtype=torch.uint8), boxes, ["a long name of a class"] * 3)
    assert picture.shape == (3, 500, 500)
    assert pixel(picture, 499, 250) == pixel(picture, 0, 250) == colour(0)


def test_eighty_classes_have_different_colours():
    assert len({colour(label) for label in range(91)}) == 91
