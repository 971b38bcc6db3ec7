"""Write the answers to the frames of a video as a video with pictures of them, and as lines of JSON."""

import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from common.data.video import Frame, import_av
from common.files.output import note_replacement

TIME_BASE = Fraction(1, 10_000)  # seconds; some encoders allow no denominator above 65,535
STEP = 400  # of TIME_BASE after the picture before, for a frame without a time
ENCODERS = ("libx264", "mpeg4")  # the first that FFmpeg has is taken


class VideoAnswers:
    """The answers to the frames of one video, one after the other; `close` completes their files."""

    def __init__(self) -> None:
        """Nothing is written before the first answer."""
        self._container: Any = None
        self._stream: Any = None
        self._lines: Any = None
        self._last = -1  # the time of the last picture in TIME_BASE

    def add(self, file: Path, source: Path, frame: Frame, picture: Tensor, content: dict[str, Any]) -> None:
        """Append a picture uint8 (3, H, W) to the video `file`, and `content` to the lines of JSON beside it.

        A line begins with the path `source` as "file", the number of the frame, and its time in seconds or null. All
        pictures get the size of the first one, which is made even.
        """
        try:
            self._add(file, source, frame, picture, content)
        except BaseException:
            with suppress(Exception):  # the first error counts
                self.close()
            raise

    def close(self) -> None:
        """Complete the files, if there were answers."""
        container, self._container = self._container, None
        if container is not None:
            with self._lines, container:
                container.mux(self._stream.encode())

    def _add(self, file: Path, source: Path, frame: Frame, picture: Tensor, content: dict[str, Any]) -> None:
        if self._container is None:
            self._open(file, source, picture)
        time = None if frame.time is None else round(frame.time, 4)
        line = {"file": str(source), "frame": frame.number, "time": time, **content}
        self._lines.write(json.dumps(line) + "\n")
        margin = self._stream.width - picture.shape[-1], self._stream.height - picture.shape[-2]
        pixels = pad(picture, (0, margin[0], 0, margin[1])).permute(1, 2, 0).contiguous()  # (H, W, 3)
        encoded = import_av(file).VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
        self._last = self._last + STEP if time is None else max(self._last + 1, round(time / TIME_BASE))
        encoded.pts, encoded.time_base = self._last, TIME_BASE
        self._container.mux(self._stream.encode(encoded))

    def _open(self, file: Path, source: Path, picture: Tensor) -> None:
        av, lines = import_av(file), file.with_suffix(".jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        note_replacement(lines, source)
        self._lines = open(lines, "w", encoding="utf-8")
        self._container = av.open(str(file), "w")
        encoder = next(name for name in ENCODERS if name in av.codecs_available)
        self._stream = self._container.add_stream(encoder, rate=25)  # the times count, not this rate
        self._stream.width, self._stream.height = (side + side % 2 for side in (picture.shape[-1], picture.shape[-2]))
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = TIME_BASE
