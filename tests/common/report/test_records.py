"""Records are lists that show themselves in a notebook, as IPython would call them."""

import copy
import io
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.report.records import MAX_SHOWN, MAX_SIDE, Records, check_batch, draw_on, predict_each


def picture(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 7, dtype=torch.uint8)


def test_records_behave_as_the_list_that_they_are() -> None:
    plain = [{"name": "cat", "share": 0.5}, {"name": "dog", "share": 0.25}]
    for records in (Records(plain), Records(plain, draw=partial(picture, 3, 4)), Records(plain, text="<p>")):
        assert records == plain and plain == records and isinstance(records, list) and repr(records) == repr(plain)
        assert json.loads(json.dumps(records)) == plain and sorted(records, key=lambda r: r["share"]) == plain[::-1]
        assert records[0] is plain[0] and type(records[:1]) is list and [*records, 1] == [*plain, 1]
        for copied in (copy.deepcopy(records), pickle.loads(pickle.dumps(records))):
            assert copied == plain and copied._repr_png_() == records._repr_png_()


def test_a_dict_that_is_no_batch_is_refused() -> None:
    check_batch({"ids": [1], "images": None})
    with pytest.raises(UserError, match=r"a dict with a, b, and not a batch; give a path, an image"):
        check_batch({"a": 1, "b": 2})


def test_a_picture_is_shown_alone_and_text_without_one() -> None:
    drawn, written = Records([], draw=partial(picture, 30, 40)), Records([], text="<p>")
    with Image.open(io.BytesIO(drawn._repr_png_() or b"")) as image:
        assert image.format == "PNG" and image.size == (40, 30) and image.getpixel((0, 0)) == (7, 7, 7)
    assert drawn._repr_html_() is None
    assert written._repr_png_() is None and written._repr_html_() == "<p>"
    assert Records([{"name": "a"}])._repr_png_() is None and Records([{"name": "a"}])._repr_html_() is None


def test_a_large_picture_is_reduced() -> None:
    with Image.open(io.BytesIO(Records(draw=partial(picture, 2, 3000))._repr_png_() or b"")) as image:
        assert image.size == (MAX_SIDE, 1)


def test_records_of_several_inputs_show_the_first_ones() -> None:
    several = Records([Records(text="<p>a"), Records(draw=partial(picture, 3, 4)), Records([{"n": "<"}]), Records()])
    shown = several._repr_html_() or ""
    assert [line[:8] for line in shown.splitlines()] == ["<p>a", "<img src", "<pre>[{&", "<pre>[]<"]
    many = Records([Records(text=f"<p>{i}") for i in range(1500)])._repr_html_() or ""
    assert many.endswith(f"<p>{MAX_SHOWN - 1}<p>and 1,484 more</p>") and many.count("<p>") == MAX_SHOWN + 1
    nested = Records([Records([Records(text="<p>a"), Records(text="<p>b")])])
    assert nested._repr_html_() == "<p>a\n<p>b"


def test_each_input_of_a_list_a_folder_or_a_pattern_has_its_records(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "x/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4)).save(tmp_path / name)

    def predict(input: object) -> Records:
        return Records([Path(str(input)).name])

    assert predict_each(str(tmp_path / "a.png"), predict) == ["a.png"]
    assert predict_each(tmp_path, predict) == [["a.png"], ["b.png"], ["c.png"]]
    assert predict_each([f"{tmp_path}/?.png"], predict) == [[["a.png"], ["b.png"]]]
    assert predict_each([1, (2,)], predict) == [["1"], [["2"]]] and predict_each([], predict) == []
    with pytest.raises(UserError, match="nothing is neither an image nor a folder"):
        predict_each(["nothing"], predict)


def test_a_picture_is_drawn_on_the_input_as_it_is_read() -> None:
    image = Image.new("RGB", (5, 4), (1, 2, 3))
    assert draw_on(image, "auto", lambda pixels: pixels + 1)[:, 0, 0].tolist() == [2, 3, 4]
