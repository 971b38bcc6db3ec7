"""The answers to a video's frames are a video with the same times, and lines of JSON."""

import json
from pathlib import Path

import pytest
import torch

from common.data.video import Frame, read_frames
from common.report.video import VideoAnswers
from tests.video_files import av

NOTHING = torch.zeros(3, 1, 1)


def picture(height: int, width: int, value: int) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_pictures_and_lines_have_the_times_of_their_frames(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av, "codecs_available", {codec})
    answers, times = VideoAnswers(), [0.0, 0.04, 0.1, 2.0]
    file = tmp_path / "new" / "a.mp4.boxes.mp4"
    for number, time in enumerate(times):
        frame = Frame(NOTHING, number, time)
        answers.add(file, Path("clips/a.mp4"), frame, picture(400, 500, 50 * number), {"objects": [number]})
    answers.close()
    answers.close()
    written = list(read_frames(file))
    assert [frame.time for frame in written] == pytest.approx(times, abs=1e-3)
    assert [frame.image.float().mean().item() for frame in written] == pytest.approx([0, 50, 100, 150], abs=4)
    lines = [json.loads(line) for line in (tmp_path / "new/a.mp4.boxes.jsonl").read_text().splitlines()]
    assert lines == [{"file": "clips/a.mp4", "frame": i, "time": times[i], "objects": [i]} for i in range(4)]


def test_pictures_of_odd_and_changing_sizes_are_padded_to_the_even_size_of_the_first(tmp_path: Path) -> None:
    answers = VideoAnswers()
    for number, (height, width) in enumerate([(401, 403), (420, 500), (300, 403)]):
        answers.add(tmp_path / "a.mp4", Path("v"), Frame(NOTHING, number, number / 25), picture(height, width, 200), {})
    answers.close()
    first, second, third = (frame.image.float() for frame in read_frames(tmp_path / "a.mp4"))
    assert first.shape == (3, 402, 404)
    assert second.mean() > 195 and third[:, :290].mean() > 190 and third[:, 310:].mean() < 10


def test_two_frames_of_the_same_time_are_both_written(tmp_path: Path) -> None:
    answers = VideoAnswers()
    for number, time in enumerate([0.0, 0.0, 0.0]):
        answers.add(tmp_path / "a.mp4", Path("v"), Frame(NOTHING, number, time), picture(400, 400, 9), {})
    answers.close()
    assert len(list(read_frames(tmp_path / "a.mp4"))) == 3


def test_without_an_answer_there_is_no_file(tmp_path: Path) -> None:
    VideoAnswers().close()
    assert not list(tmp_path.iterdir())


def test_after_an_error_the_answers_so_far_are_complete(tmp_path: Path) -> None:
    answers = VideoAnswers()
    answers.add(tmp_path / "a.mp4", Path("v"), Frame(NOTHING, 0, 0.0), picture(400, 400, 9), {})
    with pytest.raises(TypeError, match="not JSON"):
        answers.add(tmp_path / "a.mp4", Path("v"), Frame(NOTHING, 1, 0.1), picture(400, 400, 9), {"objects": NOTHING})
    answers.close()
    assert len(list(read_frames(tmp_path / "a.mp4"))) == 1


def test_the_answers_for_another_video_are_not_replaced_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in ("x/v.mp4", "y/v.mp4"):
        (tmp_path / source).parent.mkdir()
        (tmp_path / source).touch()
        answers = VideoAnswers()
        answers.add(tmp_path / "v.mp4.boxes.mp4", tmp_path / source, Frame(NOTHING, 0, 0.0), picture(400, 400, 9), {})
        answers.close()
    assert f"v.mp4.boxes.jsonl held the answer for {tmp_path}/x/v.mp4, which" in capsys.readouterr().err
