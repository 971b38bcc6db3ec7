import torch

from detr.evaluation.lane_pictures import draw_lanes
from detr.evaluation.pictures import MIN_LONGER_SIDE, colour


def test_lanes_are_drawn_at_their_points_with_colours_from_left_to_right():
    image = torch.full((3, 400, 500), 90, dtype=torch.uint8)
    lanes = [[(400.0, 100.0), (400.0, 300.0)], [(100.0, 100.0), (200.0, 300.0)]]
    picture = draw_lanes(image, lanes, [0.9, 0.8])
    assert picture.shape == image.shape and (image == 90).all()
    for (x, y), number in (((400, 200), 1), ((150, 200), 0), ((400, 120), 1)):
        assert tuple(picture[:, y, x].tolist()) == colour(number)
    assert tuple(picture[:, 200, 300].tolist()) == (90, 90, 90)
    assert (picture[:, 250:350] == 0).all(0).any(), "black digits of the scores"


def test_a_small_image_is_enlarged_with_its_lanes():
    picture = draw_lanes(torch.zeros(3, 64, 64, dtype=torch.uint8), [[(10.0, 20.0), (10.0, 50.0)]], [0.5])
    factor = -(-MIN_LONGER_SIDE // 64)
    assert picture.shape == (3, 64 * factor, 64 * factor)
    assert tuple(picture[:, 30 * factor, 10 * factor].tolist()) == colour(0)


def test_points_outside_of_the_image_are_not_visible_and_no_lanes_change_nothing():
    image = torch.randint(0, 256, (3, 400, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_lanes(image, [], []), image)
    picture = draw_lanes(image, [[(-50.0, 100.0), (-50.0, 300.0)], [(200.0, 350.0), (200.0, 900.0)]], [0.5, 0.6])
    assert tuple(picture[:, 352, 200].tolist()) == colour(1)
