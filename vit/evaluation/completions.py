"""Pictures of images that image GPT has sampled or completed."""

from torch import Tensor

from common.report.tiles import add_caption, sheet_of


def draw_completions(image: Tensor, completions: Tensor, rows: int) -> Tensor:
    """Draw an image, its given upper part, and completions of it as tiles of one picture: uint8 (3, H', W').

    `image` uint8 (channels, H, W) has the palette's colours. `completions` uint8 (n, channels, H, W) agree with it in
    the first `rows` rows, which are given.
    """
    given = image.clone()
    given[:, rows:] = 128
    tiles = [("image", image), (f"{rows} given rows", given)]
    tiles += [(f"completion {number}", completion) for number, completion in enumerate(completions)]
    return sheet_of([add_caption(_rgb(tile), text, None) for text, tile in tiles])


def draw_samples(samples: Tensor, bits: list[float]) -> Tensor:
    """Draw sampled images uint8 (n, channels, H, W), each with its bits per pixel, as tiles: uint8 (3, H', W')."""
    captions = [f"{number:.2f} bits per pixel" for number in bits]
    return sheet_of([add_caption(_rgb(tile), text, None) for text, tile in zip(captions, samples, strict=True)])


def _rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)
