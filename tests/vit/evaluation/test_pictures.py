from itertools import pairwise

import pytest
import torch
from torch import Tensor

from common.report.colours import HEAT
from common.report.tiles import MAX_SIDE, SPACING, add_caption
from vit.evaluation.pictures import draw_attention_sheet, draw_confusion_matrix, draw_heat_map


def pixel(picture: Tensor, x: int, y: int) -> tuple[int, ...]:
    return tuple(picture[:, y, x].tolist())


def lightness(colour: tuple[int, ...] | Tensor) -> float:
    """CIE L* of an sRGB colour, 0..100."""
    red, green, blue = (
        (value / 255 / 12.92) if value < 11 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.00886 else 903.3 * luminance


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def matrix_in(picture: Tensor) -> tuple[int, int, int]:
    """The confusion matrix inside its grey frame in the picture: first column, first row, and side in pixels."""
    frame = (picture == 120).all(0)  # (H, W)
    rows = (frame.sum(1) > frame.sum(1).max() * 0.9).nonzero().flatten().tolist()
    columns = (frame.sum(0) > frame.sum(0).max() * 0.9).nonzero().flatten().tolist()
    assert len(rows) == len(columns) == 2 and rows[1] - rows[0] == columns[1] - columns[0]
    return columns[0] + 1, rows[0] + 1, rows[1] - rows[0] - 1


@pytest.mark.parametrize("classes", [1, 2, 10, 40, 41, 250, 1000])
def test_a_confusion_matrix_is_shaded_by_the_share_of_its_row_for_any_number_of_classes(classes):
    """Row 0 (80 % right, the rest in the last column), the row of the last class (all right), and empty rows."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts[0, 0], counts[0, -1], counts[-1, -1] = 80, 20, 5
    picture = draw_confusion_matrix(counts, [f"class {label}" for label in range(classes)])
    assert picture.dtype == torch.uint8 and len(picture) == 3 and max(picture.shape) < 2300
    left, top, side = matrix_in(picture)
    assert side % classes == 0
    cell = side // classes

    def shade(row: int, column: int) -> tuple[int, ...]:
        return pixel(picture, left + column * cell + cell // 5, top + row * cell + cell // 5)

    assert shade(classes - 1, classes - 1) == (10, 40, 90)
    if classes == 1:
        return
    assert lightness((10, 40, 90)) < lightness(shade(0, 0)) < lightness(shade(0, classes - 1)) < 90
    assert shade(classes - 1, 0) == (255, 255, 255)
    if classes > 2:
        assert shade(1, 1) == shade(1, 0) == (255, 255, 255)


def test_rows_are_the_true_and_columns_the_predicted_classes():
    counts = torch.tensor([[5, 5], [0, 5]])
    picture = draw_confusion_matrix(counts, ["a", "b"])
    left, top, side = matrix_in(picture)
    assert pixel(picture, left + side - 5, top + 5) != (255, 255, 255)
    assert pixel(picture, left + 5, top + side - 5) == (255, 255, 255)


def test_the_longest_count_stays_in_its_cell():
    counts = torch.full((10, 10), 12_345_678)
    picture = draw_confusion_matrix(counts, list("abcdefghij"))
    left, top, side = matrix_in(picture)
    cell = side // 10
    for line in range(11):  # no digit may cross the fine lines or the frame
        column = picture[:, top : top + side, left + line * cell - (line == 0)]
        assert len({tuple(p) for p in column.T.tolist()} - {(225, 225, 225), (120, 120, 120)}) == 0


@pytest.mark.parametrize("names", [["a " * 200, "b"], ["two\nlines", ""], ["größe", "Größe"]])
def test_names_of_any_length_and_script_fit(names):
    picture = draw_confusion_matrix(torch.eye(2, dtype=torch.int64), names)
    assert max(picture.shape) < 700


def test_a_name_that_the_font_cannot_write_is_replaced_by_the_class_index():
    counts = torch.eye(2, dtype=torch.int64)
    assert torch.equal(draw_confusion_matrix(counts, ["猫", "dog"]), draw_confusion_matrix(counts, ["0", "dog"]))
    assert torch.equal(draw_confusion_matrix(counts, ["Käfer", "dog"]), draw_confusion_matrix(counts, ["Kafer", "dog"]))
    assert not torch.equal(draw_confusion_matrix(counts, ["what?", "dog"]), draw_confusion_matrix(counts, ["0", "dog"]))


@pytest.mark.parametrize(("size", "factor"), [((8, 8), 50), ((30, 20), 14), ((500, 300), 1)])
def test_a_heat_map_is_beside_the_image_enlarged_by_an_integer(size, factor):
    image = noise(3, *size)
    picture = draw_heat_map(image, torch.rand(2, 2))
    height, width = (side * factor for side in size)
    assert picture.shape == (3, height, 2 * width + SPACING) and picture.dtype == torch.uint8
    assert torch.equal(picture[:, factor // 2 :: factor, factor // 2 : width : factor], image)
    assert (picture[:, :, width : width + SPACING] == 255).all()


def test_a_heat_map_is_scaled_to_its_maximum_and_rises_in_lightness():
    """On a black image, the cells 0, 1, 2, ... 8 of a 3 x 3 map; its scale does not matter."""
    black = torch.zeros(3, 450, 450, dtype=torch.uint8)
    attention = torch.arange(9.0).view(3, 3)
    picture = draw_heat_map(black, attention)
    assert torch.equal(picture, draw_heat_map(black, attention * 1e-6))
    overlay = picture[:, :, 450 + SPACING :]
    shades = [lightness(pixel(overlay, 75 + 150 * (i % 3), 75 + 150 * (i // 3))) for i in range(9)]
    assert shades == sorted({*shades}) and shades[0] < 5 and shades[-1] > 60
    assert len({pixel(overlay, x, 10) for x in range(150)}) == 1  # a cell is one patch, not smoothed


def test_the_anchors_of_the_heat_colours_are_evenly_spaced_in_lightness():
    steps = [lightness(colour) for colour in HEAT]
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert min(gaps) > 15 and max(gaps) < 30


def test_the_image_under_a_heat_map_is_grey():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 400, 400)
    under = draw_heat_map(red, torch.zeros(2, 2))[:, 10, -10].tolist()
    assert max(under) - min(under) <= 10


@pytest.mark.parametrize("attention", [torch.zeros(2, 2), torch.full((2, 2), torch.nan), torch.tensor([[-1.0, -2.0]])])
def test_a_map_without_a_positive_value_is_dark_everywhere(attention):
    overlay = draw_heat_map(torch.zeros(3, 400, 400, dtype=torch.uint8), attention)[:, :, 400 + SPACING :]
    assert overlay.max() < 20


@pytest.mark.parametrize(("heads", "columns", "rows"), [(1, 2, 2), (2, 2, 2), (3, 3, 2), (12, 4, 4), (16, 5, 4)])
def test_a_sheet_holds_the_image_the_mean_and_each_head(heads, columns, rows):
    image = noise(3, 8, 8)
    maps = torch.zeros(heads, 2, 2)
    maps[torch.arange(heads), torch.arange(heads) % 2, 0] = 1  # head i looks at the upper or the lower left
    sheet = draw_attention_sheet(image, maps)
    tile = add_caption(image, "image", None)
    height, width = tile.shape[1] + SPACING, tile.shape[2] + SPACING
    assert sheet.shape == (3, rows * height - SPACING, columns * width - SPACING)
    assert torch.equal(sheet[:, : height - SPACING, : width - SPACING], tile)
    for number in range(heads):
        row, column = divmod(number + 2, columns)
        part = sheet[:, row * height : row * height + 400, column * width : column * width + 400]
        assert torch.equal(part, draw_heat_map(image, maps[number])[:, :, -400:])
    mean = sheet[:, :400, width : width + 400]
    assert torch.equal(mean, draw_heat_map(image, maps.mean(0))[:, :, -400:])


def test_a_sheet_downscales_a_large_image():
    sheet = draw_attention_sheet(noise(3, 3000, 2000), torch.rand(2, 14, 14))
    assert sheet.shape[2] == 2 * (MAX_SIDE * 2 // 3) + SPACING and sheet.shape[1] < 2 * MAX_SIDE + 100
