"""Heights and widths of images that a COCO JSON lacks, read from the headers of the image files."""

from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags

from common.data.images import Exif, open_image
from common.errors import UserError


@dataclass(kw_only=True)
class HeaderSizes:
    """Reads the sizes of the images in `folder`, and counts them for the summary.

    Sizes are those of the stored pixels; with `exif` "apply", those of the image turned by its EXIF orientation.
    """

    annotations: Path  # the JSON, for messages
    folder: Path
    exif: Exif
    count: int = 0  # sizes read
    turned: int = 0  # images whose height and width are exchanged by their EXIF orientation

    def read(self, name: str) -> tuple[int, int]:
        """The (height, width) of the image file `name` in pixels; raises UserError if its header cannot be read."""
        path = self.folder / name
        if not path.exists():
            path = self.folder / name.replace("\\", "/")
        try:
            with open_image(path) as image:
                size = image.height, image.width
                # Pillow applies the tag of a TIFF when it opens the file.
                tag = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
        except MemoryError:
            raise  # the file is not at fault
        except Exception as error:  # PIL's plugins raise exceptions of nearly any type on broken files
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise UserError(
                f"{self.annotations} lacks the size of {path}, and it cannot be read from the image ({reason}); "
                "add the width and height in pixels to the JSON, or correct the image."
            ) from None
        self.count += 1
        turned = tag in (5, 6, 7, 8)
        self.turned += turned
        return size[::-1] if turned and self.exif == "apply" else size

    def notes(self) -> list[str]:
        """A note on the sizes that were read; nothing if there were none."""
        if not self.count:
            return []
        note = f"the JSON lacks the sizes of {self.count} images, which were read from the image files"
        if self.turned and self.exif != "apply":
            note += f"; {self.turned} of them are turned by EXIF and are read as stored; data.exif=apply turns them"
        return [note]
