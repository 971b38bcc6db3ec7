"""Videos for tests, written by PyAV."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av: Any = pytest.importorskip("av", reason='PyAV is not installed: pip install -e ".[video]"')
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # ISO 14496-12, 8.3.2.3
CLOCKWISE = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)


def write_video(
    path: Path, times: Sequence[int], size: tuple[int, int] = (64, 48), codec: str = "libx264", rate: int = 1000
) -> None:
    """Frames at these milliseconds, which are stored in units of 1 / rate seconds.

    The right half is black, the upper quarter of the left half is red, the rest is white. The first frame has a blue
    upper right quarter.
    """
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number, time in enumerate(times):
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            pixels[:, : width // 2] = 255
            pixels[: height // 4, : width // 2] = (255, 0, 0)
            pixels[: height // 4, width // 2 :] = (0, 0, 255 * (number == 0))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def turn_clockwise(path: Path) -> None:
    """Let an MP4 file state that its frames are to be turned by 90 degrees clockwise, as those of a telephone."""
    content = path.read_bytes()
    header = content.index(b"tkhd")
    assert IDENTITY in content[header:]
    path.write_bytes(content[:header] + content[header:].replace(IDENTITY, CLOCKWISE, 1))
