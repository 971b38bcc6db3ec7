import torch
from torch import Tensor

from common.report.colours import HEAT, ramp
from common.report.tiles import SPACING
from detr.evaluation.attention import Points
from detr.evaluation.attention_pictures import (
    MAX_OBJECTS,
    MAX_RADIUS,
    MIN_RADIUS,
    Object,
    draw_encoder,
    draw_points,
    draw_queries,
)

BLACK = torch.zeros(3, 400, 400, dtype=torch.uint8)
HOT, COLD = ((0.65 * ramp(torch.tensor(share), HEAT)).round().to(torch.uint8) for share in (1.0, 0.0))  # on black
RED, GREEN = (255, 0, 0), torch.tensor([60, 255, 60], dtype=torch.uint8)


def tile_of(sheet: Tensor, number: int, columns: int) -> Tensor:
    """The picture of 400 x 400 pixels in a tile, without its caption."""
    rows = -(-(number + 1) // columns)
    height = (sheet.shape[1] + SPACING) // -(-sheet.shape[1] // 435)  # a caption of one line takes less than 35 pixels
    y, x = (rows - 1) * height, number % columns * (400 + SPACING)
    return sheet[:, y : y + 400, x : x + 400]


def is_colour(picture: Tensor, colour: Tensor) -> Tensor:
    return (picture == colour[:, None, None]).all(0)


def test_a_query_that_attends_to_one_cell_lights_exactly_that_part_of_its_tile():
    """Object 0 attends to row 1, column 3 of 2 x 4 cells with one head, and object 1 to row 0, column 0 with both."""
    maps = torch.zeros(2, 2, 2, 4)
    maps[0, 0, 1, 3] = maps[1, :, 0, 0] = 1.0
    objects = [Object((20, 320, 80, 380), "a", RED), Object((300, 300, 390, 390), "b", RED)]
    sheet = draw_queries(BLACK, maps, objects)
    for number, (rows, columns) in enumerate([(slice(200, 400), slice(300, 400)), (slice(0, 200), slice(0, 100))]):
        lit = torch.zeros(400, 400, dtype=torch.bool)
        lit[rows, columns] = True
        tile = tile_of(sheet, number + 1, 2)
        assert torch.equal(is_colour(tile, HOT), lit)
        outline = is_colour(tile, torch.tensor(RED, dtype=torch.uint8)).nonzero()
        x0, y0, x1, y1 = objects[number].box
        assert outline.amin(0).tolist() == [y0, x0] and outline.amax(0).tolist() == [y1, x1]


def test_maps_are_averaged_over_heads():
    maps = torch.zeros(1, 2, 1, 2)
    maps[0, 0, 0, 0], maps[0, 1, 0, 1] = 1.0, 0.5
    tile = tile_of(draw_queries(BLACK, maps, [Object((5, 5, 9, 9), "a", RED)]), 1, 2)
    assert torch.equal(tile[:, 200, 100], HOT)
    assert torch.equal(tile[:, 200, 300], (0.65 * ramp(torch.tensor(0.5), HEAT)).round().to(torch.uint8))


def test_boxes_and_crosses_are_scaled_with_the_image():
    """An image of 100 x 50 pixels is enlarged by 4."""
    sheet = draw_encoder(
        torch.zeros(3, 50, 100, dtype=torch.uint8), torch.ones(1, 1, 2, 2), [Object((10, 20, 30, 40), "a", RED)]
    )
    for number in (0, 1):
        x = number * (400 + SPACING)
        cross = is_colour(sheet[:, :200, x : x + 400], GREEN).nonzero().float()  # centre of the box: 20, 30
        assert (cross.mean(0) - torch.tensor([120.0, 80.0])).abs().max() < 1


def test_the_radius_and_the_colour_of_a_dot_follow_its_weight():
    """Weights 0.9, 0.225 and 0: radii of 1, 1/2 and 0 between the smallest and the largest."""
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.25], [0.5, 0.9]])
    picture = draw_points(BLACK, locations, torch.tensor([0.9, 0.225, 0.0]))
    widths = []
    for (x, y), share in zip((locations * 400).long().tolist(), (1, 0.25, 0), strict=True):
        colour = ramp(torch.tensor(0.3 + 0.7 * share), HEAT)
        dot = is_colour(picture, colour).nonzero().float()
        assert (dot.mean(0) - torch.tensor([y - 0.5, x - 0.5])).abs().max() <= 0.5  # pixels are counted from 0
        widths.append(float(dot[:, 1].max() - dot[:, 1].min()) + 1)
        radius = MIN_RADIUS + share**0.5 * (MAX_RADIUS - MIN_RADIUS)
        assert abs(widths[-1] - 2 * radius) <= 1.5  # Pillow draws whole pixels
    assert widths == sorted({*widths}, reverse=True)


def test_higher_weights_cover_lower_ones_and_points_outside_are_not_seen():
    locations = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.4, -0.2], [-3.0, 0.5]])
    picture = draw_points(BLACK, locations, torch.tensor([0.6, 0.2, 0.1, 0.1]))
    assert torch.equal(picture[:, 200, 200], ramp(torch.tensor(1.0), HEAT))
    rows, columns = picture.sum(0).nonzero().unbind(1)
    assert rows.min() > 185 and rows.max() < 215 and columns.min() > 185 and columns.max() < 215


def test_points_are_drawn_with_the_reference_point_and_the_box():
    points = Points(torch.full((1, 3, 2), 0.75), torch.full((1, 3), 1 / 3), torch.tensor([[0.25, 0.5]]))
    tile = tile_of(draw_queries(BLACK, points, [Object((20, 20, 380, 380), "a", RED)]), 1, 2)
    assert torch.equal(tile[:, 200, 100], GREEN) and torch.equal(tile[:, 300, 300], ramp(torch.tensor(1.0), HEAT))
    assert tile[:, 200, 20].tolist() == [*RED]
    unknown = tile_of(
        draw_queries(BLACK, points._replace(references=None), [Object((20, 20, 380, 380), "a", RED)]), 1, 2
    )
    assert not is_colour(unknown, GREEN).any()


def test_a_sheet_of_no_object_is_the_image_and_one_of_many_is_limited():
    image = torch.randint(0, 256, (3, 400, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for draw in (draw_queries, draw_encoder):
        assert torch.equal(draw(image, torch.zeros(0, 1, 2, 2), [])[:, :400], image)
        objects = [Object((0, 0, 50, 50), str(i), RED) for i in range(60)]
        assert draw(image, torch.ones(60, 1, 2, 2), objects).shape[2] == 5 * (400 + SPACING) - SPACING
    assert MAX_OBJECTS + 1 == 5 * 5
