"""Images as PIL images, arrays and tensors give the same pixels as their files; what is no image is one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.image_objects import to_image
from common.data.images import read_image
from common.errors import UserError

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
EXPECTED, EXPECTED_GREY = (torch.tensor(COLOURS).permute(2, 0, 1), torch.tensor(GREY).repeat(3, 1, 1))


@pytest.mark.parametrize(
    "array",
    [
        COLOURS,
        COLOURS / 255,
        (COLOURS / 255).astype(np.float32),
        (COLOURS / 255).astype(np.float16),
        np.dstack([COLOURS, np.full((5, 7), 9, np.uint8)]),
        np.asfortranarray(COLOURS),
        COLOURS[..., ::-1].copy()[..., ::-1],  # OpenCV's order, turned
    ],
    ids=["uint8", "float64", "float32", "float16", "rgba", "fortran", "negative strides"],
)
def test_colours_keep_their_order_and_values(array: Any) -> None:
    tolerance = 1 if array.dtype == np.float16 else 0  # 11 bits
    for form in (array, torch.tensor(array.copy()).permute(2, 0, 1)):
        image = to_image(form, "auto")
        assert image.dtype == torch.uint8 and image.shape == (3, 5, 7)
        assert (image.int() - EXPECTED.int()).abs().max() <= tolerance


@pytest.mark.parametrize("array", [GREY, GREY[..., None], GREY / 255])
def test_grey_becomes_three_equal_channels(array: Any) -> None:
    tensor = torch.tensor(array)
    for form in (array, tensor if tensor.ndim == 2 else tensor.permute(2, 0, 1)):
        assert torch.equal(to_image(form, "auto"), EXPECTED_GREY)


def test_a_tensor_may_need_a_gradient_and_be_of_half_precision() -> None:
    tensor = (EXPECTED / 255).bfloat16().requires_grad_()
    assert (to_image(tensor, "auto").int() - EXPECTED.int()).abs().max() <= 1


@pytest.mark.filterwarnings("error")
def test_the_result_shares_no_memory_with_the_array() -> None:
    array = COLOURS.copy()
    image = to_image(array, "auto")
    array[:] = 0
    assert torch.equal(image, EXPECTED)
    array.flags.writeable = False
    to_image(array, "auto")  # without torch's warning


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "F", "1", "LA"])
def test_a_pil_image_gives_the_pixels_of_its_file_and_is_unchanged(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS).convert({"I;16": "L", "F": "L"}.get(mode, mode))
    if mode in ("I;16", "F"):
        image = Image.fromarray(np.array(image).astype({"I;16": np.uint16, "F": np.float32}[mode]) * 200)
    suffix = ".tif" if mode in ("CMYK", "F") else ".png"
    if mode == "F":
        image = image.point(lambda value: value / 51000)
    image.save(tmp_path / f"a{suffix}")
    expected, before = read_image(tmp_path / f"a{suffix}"), image.tobytes()
    assert torch.equal(to_image(image, "auto"), expected) and image.tobytes() == before
    with Image.open(tmp_path / f"a{suffix}") as opened:
        assert torch.equal(to_image(opened, "auto"), expected)
    assert torch.equal(to_image(str(tmp_path / f"a{suffix}"), "auto"), expected)


def test_a_pil_image_is_turned_by_its_exif_tag_unless_it_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned clockwise: the upright image is the stored one, turned clockwise
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(to_image(image, "auto"), EXPECTED.rot90(-1, (1, 2)))
        assert torch.equal(to_image(image, "ignore"), EXPECTED) and image.size == (7, 5)
        assert torch.equal(to_image(image, "apply"), EXPECTED.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("input", "sentence"),
    [
        (np.zeros((3, 40, 50), np.uint8), r"An array of shape \(3, 40, 50\) is no image.*array\.transpose\(1, 2, 0\)"),
        (np.zeros((8, 4, 5, 3), np.uint8), r"An array of shape \(8, 4, 5, 3\) is no image: .*; give a list of images"),
        (np.zeros(5, np.uint8), r"An array of shape \(5,\) is no image"),
        (torch.zeros(40, 50, 3), r"A tensor of shape \(40, 50, 3\) is no image.*; give tensor\.permute\(2, 0, 1\)"),
        (torch.zeros(2, 3, 40, 50), r"A tensor of shape \(2, 3, 40, 50\) is no image: .*; give a list of images"),
        (np.zeros((4, 5, 3), np.int64), r"An image of int64 has no known range: expected uint8, or floats from 0 to 1"),
        (np.zeros((4, 5), np.uint16), r"An image of uint16 has no known range"),
        (np.zeros((4, 5), bool), r"An image of bool has no known range"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), r"An image of int64 has no known range"),
        (np.full((4, 5, 3), 1.5), r"An image of floats has values from 1\.5 to 1\.5: expected 0 to 1"),
        (np.full((4, 5, 3), -0.5), r"An image of floats has values from -0\.5 to -0\.5: expected 0 to 1"),
        (np.full((4, 5, 3), np.nan), r"An image of floats has values from nan to nan: expected 0 to 1"),
        (np.zeros((0, 5, 3), np.uint8), r"An image of 5 x 0 pixels is empty"),
        (torch.zeros(3, 4, 0), r"An image of 0 x 4 pixels is empty"),
        (7, r"A int is no image: expected a path, a PIL image, an array, a tensor, or a list of these\."),
        (None, r"A NoneType is no image"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_one_sentence(input: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        to_image(input, "auto")


def test_a_broken_file_that_pil_has_opened_is_one_sentence(tmp_path: Path) -> None:
    Image.fromarray(COLOURS.repeat(50, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with Image.open(tmp_path / "a.png") as image, pytest.raises(UserError, match=r"^The image PIL\.Image is broken"):
        to_image(image, "auto")
