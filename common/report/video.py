"""Write the predictions for the frames of a video, as a video that shows them and as one line of JSON per frame."""

import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from common.data.video import Frame, import_av
from common.files.output import note_replacement

TIME_BASE = Fraction(1, 10_000)  # unit of times, in seconds; some encoders allow no denominator above 65,535
STEP = 400  # units of TIME_BASE between a frame without a time and the frame before it
ENCODERS = ("libx264", "mpeg4")  # the first one that the installed FFmpeg has is used


class VideoAnswers:
    """Writes the predictions for the frames of one video, frame after frame; `close` completes the files."""

    def __init__(self) -> None:
        """Start without files; the first call of `add` creates them."""
        self._container: Any = None
        self._stream: Any = None
        self._lines: Any = None
        self._last = -1  # the time of the last picture in units of TIME_BASE

    def add(self, file: Path, source: Path, frame: Frame, picture: Tensor, content: dict[str, Any]) -> None:
        """Append a picture uint8 (3, H, W) to the video `file`, and a line of JSON to the file beside it (.jsonl).

        The line is an object with the keys "file" (the path `source` of the user's video), "frame" (the number of the
        frame), "time" (in seconds, or null if the frame has no time) and those of `content`. The first picture sets the
        size of the video, with odd sides rounded up to even ones; later pictures are padded or cropped to this size.
        """
        try:
            self._add(file, source, frame, picture, content)
        except BaseException:
            with suppress(Exception):  # the error above is raised, not one of closing
                self.close()
            raise

    def close(self) -> None:
        """Complete and close the files; does nothing if no frame was added."""
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
        self._stream = self._container.add_stream(encoder, rate=25)  # nominal rate; each picture has its own time
        self._stream.width, self._stream.height = (side + side % 2 for side in (picture.shape[-1], picture.shape[-2]))
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = TIME_BASE
