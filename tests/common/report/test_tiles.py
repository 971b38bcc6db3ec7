import pytest
import torch
from torch import Tensor

from common.report.tiles import CAPTION_COLOURS, MIN_SIDE, SPACING, add_caption, sheet_of


def pixel(picture: Tensor, x: int, y: int) -> tuple[int, ...]:
    return tuple(picture[:, y, x].tolist())


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_tiles_of_unequal_size_keep_their_pixels_and_get_white_margins():
    tiles = [noise(3, 20, 30), noise(3, 10, 40), noise(3, 5, 5)]
    sheet = sheet_of(tiles)
    assert sheet.shape == (3, 2 * 20 + SPACING, 2 * 40 + SPACING)
    for number, tile in enumerate(tiles):
        y, x = number // 2 * (20 + SPACING), number % 2 * (40 + SPACING)
        assert torch.equal(sheet[:, y : y + tile.shape[1], x : x + tile.shape[2]], tile)
    assert (sheet[:, :20, 30 : 40 + SPACING] == 255).all() and (sheet[:, 20 + SPACING :, 40:] == 255).all()


@pytest.mark.parametrize("correct", [True, False, None])
def test_a_caption_is_under_the_image_on_the_colour_of_its_correctness(correct):
    image = noise(3, 450, 500)
    picture = add_caption(image, "ankle boot 0.98", correct)
    assert torch.equal(picture[:, :450], image) and picture.shape[2] == 500
    strip = picture[:, 450:]
    assert pixel(strip, 499, 0) == CAPTION_COLOURS[correct] and (strip.sum(0) < 30).any()  # black letters


def test_a_long_caption_gets_more_lines_and_never_reaches_the_edge():
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    short, long = add_caption(image, "word", True), add_caption(image, "some more words " * 6, True)
    assert long.shape[1] > short.shape[1] + 30
    for picture in (long, add_caption(image, "w" * 1000, True)):
        assert (picture[:, 400:, -4:] == torch.tensor(CAPTION_COLOURS[True])[:, None, None]).all()


@pytest.mark.parametrize("size", [(8, 8), (1, 30), (300, 2), (2000, 10)])
def test_a_small_or_narrow_image_gets_room_for_its_caption(size):
    picture = add_caption(noise(3, *size), "ankle boot", None)
    factor = max(1, -(-MIN_SIDE // max(size)))
    width = size[1] * factor
    assert picture.shape[2] == max(width, MIN_SIDE // 2) and picture.shape[1] > size[0] * factor + 15
    left = (picture.shape[2] - width) // 2
    shown = picture[:, factor // 2 : size[0] * factor : factor, left + factor // 2 : left + width : factor]
    assert torch.equal(shown, noise(3, *size))


def test_an_empty_caption_is_an_empty_strip():
    picture = add_caption(noise(3, 400, 400), "", False)
    assert (picture[:, 400:] == torch.tensor(CAPTION_COLOURS[False])[:, None, None]).all()
