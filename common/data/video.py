"""Read the frames of a video with PyAV, which `pip install .[video]` installs."""

import importlib
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from common.data.opening import open_regular
from common.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# FFmpeg's readers of these files. It has others, such as those of playlists, which read further files and addresses.
CONTAINERS = "asf,avi,m4v,matroska,mov,mpeg,mpegts,mpegvideo"


class Frame(NamedTuple):
    """A frame of a video."""

    image: Tensor  # uint8 (3, H, W), RGB, upright
    number: int  # from 0
    time: float | None  # in seconds after the first frame; None if the file states no time after those before


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a video in the order in which they are shown, turned as the file says.

    Raises UserError if PyAV is not installed, and for a file that is missing, broken or no video, if need be after the
    frames before the broken part.
    """
    av, number = import_av(path), 0
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"The video {path} is empty; replace it or remove it.")
            for image, time in _decode(av, file):
                yield Frame(image, number, time)
                number += 1
    except av.FFmpegError as error:
        where = f"is broken after {number:,} frames" if number else "is broken or no video"
        raise UserError(f"The video {path} {where} ({error.strerror}); replace it or remove it.") from None
    except OSError as error:
        raise UserError(f"The video {path} cannot be read ({error.strerror}); replace it or remove it.") from None
    if not number:
        raise UserError(f"The video {path} holds no picture; give another file.")


def _decode(av: Any, file: BinaryIO) -> Iterator[tuple[Tensor, float | None]]:
    """The images and times of all frames, none for a file with sound alone."""
    with av.open(file, options={"format_whitelist": CONTAINERS}) as container:
        start: float | None = None
        latest = -math.inf
        for stream in container.streams.video[:1]:
            stream.thread_type = "AUTO"
            for frame, time in _timed_frames(container, stream):
                if time is None or time <= latest:
                    yield _upright(frame), None
                    continue
                start, latest = time if start is None else start, time
                yield _upright(frame), time - start


def _timed_frames(container: Any, stream: Any) -> Iterator[tuple[Any, float | None]]:
    """The frames in the order in which they are shown, and their times in seconds.

    An AVI file states the times at which frames are decoded. They are those at which as many frames are shown, whose
    order differs; what FFmpeg guesses for H.264 with frames that refer to later ones is wrong.
    """
    decoded: deque[int] = deque()
    for packet in container.demux(stream):
        if packet.size and packet.dts is not None:
            decoded.append(packet.dts)
        for frame in packet.decode():
            if container.format.name == "avi":
                yield frame, float(decoded.popleft() * stream.time_base) if decoded else None
            else:
                yield frame, frame.time


def import_av(path: Path) -> Any:
    """PyAV; raises UserError if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError:
        raise UserError(
            f'{path} is a video, which PyAV reads and writes: pip install -e ".[video]", or pip install av.'
        ) from None


def _upright(frame: Any) -> Tensor:
    """The pixels of a frame, uint8 (3, H, W). `frame.rotation` is in degrees counterclockwise, as FFmpeg states it."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # (H, W, 3)
    return pixels.rot90(round(frame.rotation / 90)).permute(2, 0, 1)
