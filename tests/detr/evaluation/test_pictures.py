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
    factor = picture.shape[-1] // width
    assert picture.shape == (3, factor * height, factor * width)
    assert MIN_LONGER_SIDE <= max(picture.shape) < MIN_LONGER_SIDE + max(shape)
    assert pixel(picture, picture.shape[2] - 1, picture.shape[1] - 1) == colour(0)


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
