"""Heights and widths of images that the annotations lack, read from the headers of the image files."""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image

from common.data.images import Exif, open_image
from common.errors import UserError


@dataclass(kw_only=True)
class HeaderSizes:
    """Reads the sizes of the images in `folder`, also in several threads, and counts them for the summary.

    Sizes are those of the stored pixels; with `exif` "apply", those of the image turned by its EXIF orientation.
    """

    annotations: Path  # the file or folder that lacks the sizes, for messages
    folder: Path
    exif: Exif
    remedy: str = "add the width and height in pixels there, or correct the image"  # for an image that is unreadable
    names: list[str] = field(default_factory=list)  # of the images whose sizes were read
    turned: list[str] = field(default_factory=list)  # of those whose EXIF orientation exchanges height and width

    def read(self, name: str) -> tuple[int, int]:
        """The (height, width) of the image file `name` in pixels; raises UserError if its header cannot be read."""
        path = self.folder / name
        if not path.exists():
            path = self.folder / name.replace("\\", "/")
        try:
            with open_image(path) as image:
                size = image.height, image.width
                # Pillow applies the tag of a TIFF when it opens the file. The method of a PNG would decode its pixels.
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
        """A note on the sizes that were read; nothing if there were none."""
        if not self.names:
            return []
        note = f"{self.annotations.name} lacks the sizes of {len(self.names)} images, which were read from their files"
        return [note, *self.notes_on_turned()]

    def notes_on_turned(self) -> list[str]:
        """A note on images that EXIF turns, unless they are read as turned."""
        if not self.turned or self.exif == "apply":
            return []
        return [
            f"{len(self.turned)} of the images whose sizes were read are turned by EXIF (the first is "
            f"{self.turned[0]}) and are read as stored; data.exif=apply turns them"
        ]
