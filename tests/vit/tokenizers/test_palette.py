"""Palettes: nearest colours, k-means, and exact palettes of images with few colours."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from common.machine.seeds import generator
from vit.tokenizers import palette as module
from vit.tokenizers.palette import Palette


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator("noise", *shape))


def test_the_17_levels_of_digits_are_kept_exactly() -> None:
    levels = torch.from_numpy(load_digits().data).mul(255 / 16).round().to(torch.uint8)  # (1797, 64)
    palette = Palette.fit(levels.reshape(-1, 1), 32)
    assert palette.lossless and len(palette) == 17 and palette.channels == 1
    images = levels.view(-1, 1, 8, 8)
    tokens = palette.encode(images)
    assert tokens.shape == (1797, 64) and torch.equal(palette.decode(tokens, (8, 8)), images)
    order = levels.long().unique(return_inverse=True)[1]
    assert torch.equal(tokens, order), "indices ascend with brightness"


@pytest.mark.parametrize("channels", [1, 3])
def test_each_pixel_gets_the_nearest_colour(channels: int) -> None:
    colours = torch.rand(9, channels, generator=generator("colours")) * 2 - 1
    images = noise(2, channels, 5, 7)
    tokens = Palette(colours, False).encode(images)
    for image, row in zip(images, tokens, strict=True):
        for position, index in enumerate(row.tolist()):
            pixel = image[:, position // 7, position % 7].double() / 127.5 - 1
            distances = [float(((pixel - colour.double()) ** 2).sum()) for colour in colours]
            assert distances[index] <= min(distances) + 1e-6  # fp32 distances


def test_colours_are_decoded_as_by_the_authors() -> None:
    centres = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    tokens = torch.randint(512, (2, 3, 6), generator=generator("indices"))
    expected = np.rint(127.5 * (centres[tokens.numpy()] + 1)).astype(np.uint8)  # (2, 3, 6, 3)
    decoded = Palette(torch.from_numpy(centres), False).decode(tokens, (2, 3))
    assert decoded.shape == (2, 3, 3, 2, 3)
    assert np.array_equal(decoded.flatten(-2).transpose(-1, -2).numpy(), expected)


def test_k_means_finds_separate_groups_of_colours() -> None:
    """Three groups of unequal size, each within 2 of its centre: the palette is the groups' means."""
    centres, counts = ([20, 200, 40], [120, 30, 220], [230, 230, 10]), (500, 50, 5)
    rng = np.random.default_rng(1)
    groups = [rng.integers(-2, 3, (n, 3)) + centre for centre, n in zip(centres, counts, strict=True)]
    palette = Palette.fit(torch.from_numpy(np.concatenate(groups).astype(np.uint8)), 3)
    assert not palette.lossless and len(palette) == 3
    means = np.stack([group.mean(0) for group in groups]) / 127.5 - 1
    np.testing.assert_allclose(palette.colours.numpy(), means, atol=1e-5)


def test_frequent_colours_draw_the_centres_towards_them() -> None:
    """One centre for the levels 0 (three times) and 100 (once): their mean is 25, not 50."""
    palette = Palette.fit(torch.tensor([[0], [100], [0], [0]], dtype=torch.uint8), 1)
    assert float(palette.colours) == pytest.approx(25 / 127.5 - 1, abs=1e-6)


def test_the_order_of_pixels_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DISTINCT", 300)  # fewer than there are distinct colours
    pixels = noise(2000, 3)
    first, second = Palette.fit(pixels, 8), Palette.fit(pixels.flip(0), 8)
    assert torch.equal(first.colours, second.colours) and len(first) == 8
