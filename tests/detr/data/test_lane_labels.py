import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from detr.data.lane_labels import read_labels

GOOD = {"raw_file": "clips/1/20.jpg", "h_samples": [240, 250, 260], "lanes": [[-2, 10, 20.5], [30, 31, -2]]}


def write(folder: Path, *records: object) -> Path:
    path = folder / "labels.json"
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def test_a_file_has_one_image_on_each_line(tmp_path):
    path = write(tmp_path, GOOD, "", {**GOOD, "raw_file": "b.jpg", "lanes": []})
    first, second = read_labels(path)
    assert first.raw_file == "clips/1/20.jpg" and first.rows.tolist() == [240, 250, 260]
    assert np.array_equal(first.lanes, [[-2, 10, 20.5], [30, 31, -2]])
    assert second.lanes.shape == (0, 3) and second.origin == f"{path}, line 3"


def test_lanes_without_a_point_are_kept_but_have_no_points(tmp_path):
    (image,) = read_labels(write(tmp_path, {**GOOD, "lanes": [[-2, -2, -2], [1, 2, 3]]}))
    assert len(image.lanes) == 2 and [lane.tolist() for lane in image.with_points()] == [[1, 2, 3]]


def test_lines_of_a_test_without_labels_have_no_lanes(tmp_path):
    (image,) = read_labels(write(tmp_path, {k: v for k, v in GOOD.items() if k != "lanes"}))
    assert image.lanes is None


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no object"),
        (without("raw_file"), "has no raw_file"),
        ({**GOOD, "raw_file": 7}, "has no raw_file"),
        (without("h_samples"), "h_samples is missing"),
        ({**GOOD, "h_samples": 240}, "h_samples is no list"),
        ({**GOOD, "h_samples": []}, "h_samples must be ascending"),
        ({**GOOD, "h_samples": [240, 240, 250]}, "h_samples must be ascending"),
        ({**GOOD, "h_samples": [-10, 240, 250]}, "h_samples must be ascending"),
        ({**GOOD, "lanes": 5}, "lanes must be a list"),
        ({**GOOD, "lanes": [[1, 2, 3], 5]}, "lane 2 is no list"),
        ({**GOOD, "lanes": [[1, 2]]}, "lane 1 has 2 values, but there are 3 h_samples"),
        ({**GOOD, "lanes": [[1, 2, 3], [-2, 7, -2]]}, "lane 2 has 1 point; a lane needs at least 2"),
        ({**GOOD, "lanes": [[1, "a", 3]]}, "lane 1 has the value 'a'"),
        ({**GOOD, "lanes": [[1, None, 3]]}, "lane 1 has the value None"),
        ({**GOOD, "lanes": [[1, True, 3]]}, "lane 1 has the value True"),
        ({**GOOD, "lanes": [[1, float("nan"), 3]]}, "lane 1 has the value nan"),
        ({**GOOD, "lanes": [[1, float("inf"), 3]]}, "lane 1 has the value inf"),
    ],
)
def test_a_line_that_is_no_label_is_refused_in_one_sentence_with_its_place(tmp_path, record, words):
    path = write(tmp_path, GOOD, record)
    with pytest.raises(UserError) as error:
        read_labels(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 2") and words in message and "\n" not in message and message[-1] == "."


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no line"):
        read_labels(write(tmp_path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "none.json")
