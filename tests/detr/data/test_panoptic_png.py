"""Segment ids survive a PNG, and a PNG of another kind is named."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from detr.data.panoptic_png import MAX_ID, encode_ids, read_ids


def test_ids_are_written_and_read_back_and_red_is_the_lowest_byte(tmp_path: Path):
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 70_000, MAX_ID]], dtype=np.int64)
    (tmp_path / "a.png").write_bytes(encode_ids(ids))
    assert np.array_equal(read_ids(tmp_path / "a.png", (2, 4)), ids)
    with Image.open(io.BytesIO(encode_ids(ids))) as image:
        assert image.getpixel((2, 1)) == (70_000 % 256, 70_000 // 256 % 256, 1)


def test_an_alpha_channel_is_not_part_of_the_id(tmp_path: Path):
    Image.new("RGBA", (3, 2), (7, 1, 0, 128)).save(tmp_path / "a.png")
    assert (read_ids(tmp_path / "a.png", (2, 3)) == 263).all()


def test_a_missing_broken_grey_or_wrongly_sized_png_is_named_in_one_sentence(tmp_path: Path):
    Image.new("RGB", (3, 2)).save(tmp_path / "sized.png")
    Image.new("L", (3, 2)).save(tmp_path / "grey.png")
    Image.new("P", (3, 2)).save(tmp_path / "palette.png")
    whole = encode_ids(np.random.default_rng(0).integers(0, MAX_ID, (40, 40)))
    (tmp_path / "broken.png").write_bytes(whole[:2000])
    (tmp_path / "text.png").write_text("no image")
    for name, words in {
        "gone": "is missing; put it there",
        "broken": "cannot be read",
        "text": "cannot be read",
        "grey": "has the colour mode L; expected RGB",
        "palette": "has the colour mode P",
        "sized": "has 3 x 2 pixels, but its image has 5 x 4",
    }.items():
        size = (4, 5) if name == "sized" else (2, 3)
        with pytest.raises(UserError, match=f"The PNG .*{name}.png .*{words}") as error:
            read_ids(tmp_path / f"{name}.png", size)
        assert "\n" not in str(error.value)
