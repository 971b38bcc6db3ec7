"""Read the heights and widths of images from the headers of their files, where the annotations do not state them."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image

from common.data.images import Exif, open_image
from common.errors import UserError


@dataclass(kw_only=True)
class HeaderSizes:
    """Reads the sizes of images in `folder`, and records the images' names for the start summary.

    `read` may be called in several threads. A size is that of the stored pixels or, if `exif` is "apply", that of the
    image after its EXIF orientation is applied. Pillow always applies the orientation of a TIFF.
    """

    annotations: Path  # the file or folder that lacks the sizes, for messages
    folder: Path
    exif: Exif
    # The end of the error message if a header cannot be read.
    remedy: str = "add the width and height in pixels there, or correct the image"
    names: list[str] = field(default_factory=list)  # of the images whose sizes were read
    turned: list[str] = field(default_factory=list)  # of those whose EXIF orientation exchanges height and width

    def read(self, name: str) -> tuple[int, int]:
        """Return the (height, width) of the image file `name` in pixels.

        Raises UserError if the header of the file cannot be read.
        """
        path = self.folder / name
        if not path.exists():
            path = self.folder / name.replace("\\", "/")
        try:
            with open_image(path) as image:
                size = image.height, image.width
                # Pillow has already applied the tag of a TIFF. The method of the base class `Image` is called, because
                # that of PngImageFile would decode the pixels of a PNG.
                tags = Image.Exif() if image.format == "TIFF" else Image.Image.getexif(image)
                turned = tags.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except MemoryError:
            raise  # the file is not at fault
        except Exception as error:  # PIL's plugins raise exceptions of nearly any type on broken files
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise UserError(
                f"{self.annotations} lacks the size of {path}, and it cannot be read from the image ({reason}); "
                f"{self.remedy}."
            ) from None
        self.names.append(name)
        if turned:
            self.turned.append(name)
        return size[::-1] if turned and self.exif == "apply" else size

    def notes(self) -> list[str]:
        """Return a note on the sizes that were read, and the result of `notes_on_turned`; empty if no size was read."""
        if not self.names:
            return []
        note = f"{self.annotations.name} lacks the sizes of {len(self.names)} images, which were read from their files"
        return [note, *self.notes_on_turned()]

    def notes_on_turned(self) -> list[str]:
        """Return a note on images whose EXIF orientation would exchange height and width but is not applied.

        The list is empty if there are no such images.
        """
        if not self.turned or self.exif == "apply":
            return []
        return [
            f"{len(self.turned)} of the images whose sizes were read are turned by EXIF (the first is "
            f"{self.turned[0]}) and are read as stored; data.exif=apply turns them"
        ]
