"""The reading of users' images and videos, for all tasks of this wing."""

from collections.abc import Iterator
from contextlib import closing

from torch import Tensor

from common.data.image_objects import exif_of
from common.data.images import read_image
from common.data.video import VIDEO_SUFFIXES, read_frames
from common.files.inputs import InputFile, read_each
from common.files.names import printable
from common.report.video import VideoAnswers
from common.task import Batch
from detr.data.protocol import ImageFiles


class ImageInput:
    """The part of a task that reads users' images and the frames of videos as batches of one image."""

    data: ImageFiles
    unanswered: list[str]

    def read(self, input: str) -> Iterator[Batch]:
        """Read each image that `input` names, and each frame of a video, as a batch of one image.

        The image is resized as in evaluation. If `input` is a folder or a pattern, files that cannot be read are
        skipped, and the reasons are added to `unanswered`. If `input` is one file that cannot be read, UserError is
        raised. Besides the keys of `collate`, a batch has these keys, each with a list of one item:

        names: the name of the input file, from which `show` makes the names of the files that it writes.
        originals: the image before resizing, uint8 (3, H, W).
        frames: the `Frame` of a video; this key is missing for an image.
        videos: the `VideoAnswers` that writes the pictures of the video's frames; this key is missing for an image.
        """
        return read_each(input, self._read_batches, self.unanswered, VIDEO_SUFFIXES)

    def _read_batches(self, file: InputFile) -> Iterator[Batch]:
        if not is_video(file):
            yield self._view(self._read_image(file), file)
            return
        with closing(VideoAnswers()) as answers:
            for frame in read_frames(file.path):
                yield self._view(frame.image, file) | {"frames": [frame], "videos": [answers]}

    def _view(self, image: Tensor, file: InputFile) -> Batch:
        batch = self.data.collate([self.data.view(image, file.path)])
        return batch | {"names": [file.name], "originals": [image]}

    def _read_image(self, file: InputFile) -> Tensor:
        return read_image(file.path, exif=exif_of(self.data), content=file.content)


def is_video(file: InputFile) -> bool:
    """Whether an input file is a video, by its suffix; standard input never is."""
    return file.content is None and file.path.suffix.lower() in VIDEO_SUFFIXES


def describe_input(batch: Batch, index: int, name: str) -> str:
    """Return how an answer's line on the console names image `index` of the batch: its file and, in a video, frame."""
    if "frames" not in batch:
        return printable(name)
    frame = batch["frames"][index]
    time = "" if frame.time is None else f" at {frame.time:.3f} s"
    return f"{printable(name)} frame {frame.number}{time}"
