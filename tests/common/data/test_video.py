"""The frames of a video with their times, upright; what is no video is one sentence."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.data.video import read_frames
from common.errors import UserError
from tests.video_files import av, turn_clockwise, write_video

TIMES = [0, 40, 100, 130, 500, 2000]  # milliseconds, not at equal distances
RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def near(pixel: list[int], colour: tuple[int, int, int]) -> bool:
    """Colours are compressed."""
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 30


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".mkv", "libx264"), (".MOV", "mpeg4"), (".webm", "libvpx-vp9"), (".avi", "mpeg4")],
)
def test_frames_have_their_pixels_numbers_and_times(suffix: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(path, TIMES, codec=codec)
    frames = list(read_frames(path))
    assert [frame.number for frame in frames] == list(range(6))
    assert [frame.time for frame in frames] == pytest.approx([time / 1000 for time in TIMES], abs=0.002)
    for frame, colour in zip(frames, [BLUE, *[BLACK] * 5], strict=True):
        assert frame.image.shape == (3, 48, 64)
        for (y, x), expected in {(5, 10): RED, (30, 10): WHITE, (30, 50): BLACK, (5, 50): colour}.items():
            assert near(frame.image[:, y, x].tolist(), expected), (frame.number, y, x)


def test_times_begin_with_the_first_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", [1000, 1040, 1100])
    assert [frame.time for frame in read_frames(tmp_path / "a.mkv")] == pytest.approx([0, 0.04, 0.1], abs=0.002)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_the_frames_of_an_avi_have_the_times_of_its_rate(codec: str, tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", [40 * i for i in range(20)], codec=codec, rate=25)
    times = [frame.time for frame in read_frames(tmp_path / "a.avi")]
    assert times == pytest.approx([0.04 * i for i in range(20)])


def test_a_frame_without_a_time_after_those_before_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    frames = [
        SimpleNamespace(time=time, rotation=0, to_ndarray=lambda format: pixels)
        for time in (None, 5.0, 5.5, 5.5, 0.0, 5.25, 6.0, None)
    ]
    container = SimpleNamespace(
        streams=SimpleNamespace(video=[SimpleNamespace()]),
        demux=lambda stream: [SimpleNamespace(size=1, dts=0, decode=lambda: frames)],
        format=SimpleNamespace(name="mov"),
    )
    monkeypatch.setattr(av, "open", lambda file, options: nullcontext(container))
    (tmp_path / "a.mp4").write_text("content")
    assert [frame.time for frame in read_frames(tmp_path / "a.mp4")] == [None, 0, 0.5, None, None, None, 1, None]


def test_a_video_of_a_telephone_is_upright(tmp_path: Path) -> None:
    """Turned clockwise, the lower left corner becomes the upper left one."""
    write_video(tmp_path / "a.mp4", [0, 40])
    turn_clockwise(tmp_path / "a.mp4")
    first, _ = read_frames(tmp_path / "a.mp4")
    assert first.image.shape == (3, 64, 48)
    for (y, x), expected in {(10, 43): RED, (10, 10): WHITE, (50, 10): BLACK, (50, 43): BLUE}.items():
        assert near(first.image[:, y, x].tolist(), expected), (y, x)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; replace it or remove it."),
        (b"a text", "is broken or no video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n", "is broken or no video"),
        (None, "cannot be read (No such file or directory); replace it or remove it."),
    ],
    ids=["empty", "text", "playlist", "missing"],
)
def test_what_is_no_video_is_one_sentence(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    write_video(tmp_path / "other.mp4", [0])
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_frames(tmp_path / "a.mp4"))
    assert str(error.value).startswith(f"The video {tmp_path / 'a.mp4'} {sentence}")


def test_the_frames_before_a_broken_part_are_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", list(range(0, 8000, 40)))
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])
    assert 0 < len(list(read_frames(tmp_path / "a.mkv"))) < 200


def test_without_pyav_one_sentence_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a\.mp4 is a video, .* PyAV .*: pip install av"):
        next(read_frames(tmp_path / "a.mp4"))
