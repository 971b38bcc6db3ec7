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
# FFmpeg's demuxers of these files. Other demuxers are excluded: the one of playlists, for instance, would open further
# files and URLs.
CONTAINERS = "asf,avi,m4v,matroska,mov,mpeg,mpegts,mpegvideo"


class Frame(NamedTuple):
    """A frame of a video, with its position in the video."""

    image: Tensor  # uint8 (3, H, W), RGB, upright
    number: int  # the frame's index in the video, counted from 0
    # Seconds since the first frame that has a time. None if the file states no time for this frame, or a time that is
    # not after the times of all earlier frames.
    time: float | None


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a video in the order in which they are shown, rotated as the file says.

    Raises UserError if PyAV is not installed, or if the file is missing, empty, broken or not a video. If only a later
    part of the file is broken, the frames before it are yielded first.
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
    """Yield the image and the time of each frame, as in `Frame`.

    Only the first video stream of the file is read. A file with only sound has no frames.
    """
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
    """Yield the frames in the order in which they are shown, and their times in seconds (None for an unknown time).

    An AVI file states only the times at which frames are decoded. Frames are shown at the same times, but maybe in
    another order than they are decoded. So the n-th frame that is shown gets the n-th time. FFmpeg's own guess is wrong
    for H.264 with B-frames (frames that refer to later frames).
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
    """Import PyAV and return the module; raises UserError, which names the video `path`, if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError:
        raise UserError(f"{path} is a video, which PyAV reads and writes: pip install av.") from None


def _upright(frame: Any) -> Tensor:
    """The pixels of a frame, rotated upright, uint8 (3, H, W).

    `frame.rotation` is in degrees counterclockwise, as FFmpeg states it.
    """
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # (H, W, 3)
    return pixels.rot90(round(frame.rotation / 90)).permute(2, 0, 1)
