"""Read image files of any mode as uint8 RGB tensors, and normalise batches of such tensors for a backbone."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from common.data.opening import open_regular
from common.errors import UserError
from common.machine.device import constant

Exif = Literal["auto", "apply", "ignore"]  # whether the EXIF orientation is applied; see `read_image`

# Pillow's names of the formats that are read. Files are recognised by their content, not by their names. Pillow's other
# formats are excluded: for an EPS, for instance, Pillow would start Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF")
IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}

# Suffixes of formats that cannot be read. A search of a folder also finds files with these suffixes, so that they are
# reported and not skipped.
UNSUPPORTED_SUFFIXES = {".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".psd", ".svg", ".tga"}

PHOTOMETRIC = 262  # TIFF's tag PhotometricInterpretation: 0 if black is the highest value
# The ranges that the values of grey images with floats or more than 8 bits may have, as (highest value, name). The
# range of an image is the first one that contains all its values; [0, 1] is for floats only.
RANGES = ((1.0, "from 0 to 1"), (255.0, "of 8 bits"), (4095.0, "of 12 bits"), (65535.0, "of 16 bits"))
SAMPLED_FILES = 64  # the maximum number of a split's images that are opened to find their ranges
MAX_PNG_TEXT = 64 * 2**20  # maximum bytes of a text in a PNG, such as a photo editor's XMP; Pillow's own limit is 1 MB
_png_text_lock = threading.Lock()  # held while Pillow's own limit, a global variable, is replaced

# Mean and standard deviation of ImageNet's RGB values in [0, 1], with which the pretrained backbones were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

STRIP_ROWS = 32  # number of rows normalised at once: half a megabyte in fp32 for an image 1,333 pixels wide


@contextmanager
def open_image(path: Path, content: bytes | Image.Image | None = None) -> Iterator[Image.Image]:
    """A context manager that opens an image file and closes it at the end. The pixels are read at first use.

    If `content` is None, the file at `path` is opened. Otherwise `content` is the bytes of a file without a path, such
    as standard input, or an open image, which is yielded and not closed. Raises OSError for a file that cannot be read
    or is not a regular one, UnidentifiedImageError for content in none of `FORMATS`, and errors of nearly any type for
    broken content.
    """
    if isinstance(content, Image.Image):
        yield content
        return
    Image.init()  # otherwise Pillow knows only some of its formats
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF needs a library that Pillow may lack
    with open_regular(path) if content is None else io.BytesIO(content) as file:
        with Image.open(file, formats=formats) as image:
            yield image


def read_image(
    path: Path,
    size: tuple[int, int] | None = None,
    exif: Exif = "auto",
    content: bytes | Image.Image | None = None,
) -> Tensor:
    """Read an image file as uint8 (3, H, W), RGB.

    path: the file. If `content` is given, the path is used in messages only.
    size: the (height, width) in pixels that the annotations state; None if no size is stated.
    exif: whether the image is rotated and mirrored as its EXIF orientation tag says. "apply": always. "ignore": never.
        "auto": always if `size` is None. With a `size`, "auto" applies the tag only if the image has this size with the
        tag applied and another size as stored. Pillow always applies the tag of a TIFF.
    content: the bytes of a file without a path, or an open image. None = the file at `path` is read.

    Grey, palette and CMYK images become 8-bit RGB; transparency is dropped. Grey images with more than 8 bits or with
    floats are scaled to 8 bits from the smallest range that holds their values: [0, 1] (floats only), 8, 12 or 16 bits.

    Raises UserError, which names the file, if:

    - the file is missing, is broken or is no image;
    - a grey image with more than 8 bits or with floats has values in none of these ranges, or 0 is white in it (TIFF);
    - a colour image with 16 bits a channel uses only 12 of them;
    - the image has another size than `size`.
    """
    upright = exif == "apply" or (exif == "auto" and size is None)
    image = _decode(path, upright, content)
    if size is None or tuple(image.shape[1:]) == size:
        return image
    other_way = _decode(path, not upright, content)
    fits = tuple(other_way.shape[1:]) == size
    if fits and exif == "auto":
        return other_way
    remedy = f"give data.exif={'ignore' if upright else 'apply'} or auto, or correct" if fits else "correct"
    raise UserError(
        f"The image {path} has {image.shape[2]} x {image.shape[1]} pixels, but its annotations say "
        f"{size[1]} x {size[0]}; {remedy} its width and height there, or the image."
    )


def hides_orientation(path: Path) -> bool:
    """Whether applying the EXIF orientation of an image changes its pixels but not its height and width.

    For such an image, the size in the annotations does not tell whether the annotations refer to the stored or to the
    upright pixels. Only the image's header is read. The result is False for a file without the tag, for a TIFF (Pillow
    always applies its tag), and for a file that cannot be read.
    """
    try:
        with open_image(path) as image:
            if image.format == "TIFF":
                return False
            tags = Image.Exif()
            tags.load(image.info.get("exif") or b"")
            orientation = tags.get(ExifTags.Base.Orientation, 1)
            return orientation in (2, 3, 4) or (orientation in (5, 6, 7, 8) and image.width == image.height)
    except MemoryError:
        raise  # the file is not at fault
    except Exception:  # Pillow raises errors of nearly any type; the fault is reported when the image is decoded
        return False


def _decode(path: Path, upright: bool, content: bytes | Image.Image | None) -> Tensor:
    try:
        try:
            pixels = _pixels(path, upright, content)  # (H, W, 3)
        except ValueError as error:
            if "MAX_TEXT_CHUNK" not in str(error):
                raise
            with _long_png_texts():
                pixels = _pixels(path, upright, content)
    except FileNotFoundError:
        raise UserError(f"The image {path} is missing; put it there or correct its path.") from None
    except (MemoryError, UserError):
        raise  # the file is not broken
    except IsADirectoryError:
        raise UserError(f"The image {path} is a folder; remove it, or give it as the folder of images.") from None
    except Exception as error:  # PIL's plugins raise exceptions of nearly any type on broken files
        if path.name.startswith("._"):
            raise UserError(f"{path} holds metadata of macOS on {path.name[2:]} and is no image; remove it.") from None
        if isinstance(error, OSError) and error.strerror:  # an error of the system, not of Pillow
            raise UserError(f"The image {path} cannot be read ({error.strerror}); replace it or remove it.") from None
        unidentified = f"its content is in none of the formats {', '.join(FORMATS)}"
        reason = unidentified if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"The image {path} is broken or no image ({reason}); replace it or remove it.") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), channels last in memory


def _pixels(path: Path, upright: bool, content: bytes | Image.Image | None) -> NDArray[np.uint8]:
    """The pixels of an image file as uint8 (H, W, 3), RGB."""
    # torchvision.io is not used: it is deprecated (torchvision 0.29), and only 15 % faster than PIL on a JPEG.
    with open_image(path, content) as image:
        has_16_bits, photometric = _has_16_bits(image), getattr(image, "tag_v2", {}).get(PHOTOMETRIC)
        if upright and image is content:
            image = ImageOps.exif_transpose(image)  # a copy, because `content` belongs to the caller
        elif upright:
            ImageOps.exif_transpose(image, in_place=True)
        if not _is_deep(image):
            colours = np.array(image.convert("RGB"))
            if has_16_bits and 0 < colours.max() <= 15:
                raise UserError(f"The image {path} has 16 bits a channel and uses 12 of them; convert it to 8 bits.")
            return colours
        if photometric == 0:
            raise UserError(f"In the image {path}, 0 is white (PhotometricInterpretation); convert it to 8 bits.")
        values = np.asarray(image)  # (H, W); `convert` would clip the values at 255
        highest = _range(values, path)[0]
        if highest == 255 and image.mode == "F":
            return np.array(image.convert("RGB"))
        if highest == 1:
            grey = (values * 255.0).round()
        else:
            grey = values // ((highest + 1) / 256)  # keeps the 8 highest of the range's 8, 12 or 16 bits
        return np.ascontiguousarray(grey.astype(np.uint8)[..., None].repeat(3, axis=2))  # (H, W) -> (H, W, 3)


def _has_16_bits(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has channels of 16 bits.

    Pillow reduces these to 8 bits when it decodes a colour image.
    """
    arguments = [tile.args for tile in getattr(image, "tile", [])]
    return ";16" in str(arguments)


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is grey and its values are floats or have more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _range(values: NDArray[Any], path: Path) -> tuple[float, str]:
    """The first range of `RANGES` that contains the values (H, W) of a grey image; raises UserError if none does.

    For integers, the range [0, 1] is not considered.
    """
    low, high = values.min(), values.max()
    ranges = RANGES if values.dtype.kind == "f" else RANGES[1:]
    taken = next((entry for entry in ranges if high <= entry[0]), None)  # None also if `high` is NaN
    if taken is None or low < 0:
        raise UserError(
            f"The image {path} has values from {low:g} to {high:g}; expected 0 to 1 (floats), 255, 4095 or 65535; "
            "convert it to 8 bits a channel."
        )
    return taken


def range_notes(count: int, file: Callable[[int], Path]) -> list[str]:
    """Open some of a split's `count` images; returns a note on grey images with more than 8 bits or with floats.

    `file` returns the path of an image by its index. At most SAMPLED_FILES images are opened, with equally spaced
    indices. An image that cannot be read is skipped, because `read_image` reports it later.

    The result is a list with one note, which states the ranges from which `read_image` scales these grey images. The
    list is empty if none of the opened images is such an image, or if all of them need the range of 16 bits.
    """
    sampled = [file(index) for index in range(0, count, max(1, -(-count // SAMPLED_FILES)))]
    with ThreadPoolExecutor(8) as threads:  # a network drive serves several requests at once
        names = list(threads.map(_range_name, sampled))
    counts = Counter(name for name in names if name)
    if not counts.keys() - {RANGES[-1][1]}:
        return []
    first = next(path for path, name in zip(sampled, names, strict=True) if name)
    ranges = ", ".join(f"{name} ({count})" for name, count in counts.items())
    note = f"of {len(sampled)} sampled images some are grey with more than 8 bits or floats (the first is {first})"
    remedy = "; images of different ranges do not have the same brightness: convert all to 8 bits a channel"
    return [f"{note}; by their highest value they are read as images {ranges}{remedy if len(counts) > 1 else ''}"]


def _range_name(path: Path) -> str | None:
    try:
        with open_image(path) as image:
            return _range(np.asarray(image), path)[1] if _is_deep(image) else None
    except MemoryError:
        raise  # the file is not at fault
    except Exception:  # Pillow raises errors of nearly any type; the fault is reported when the image is decoded
        return None


@contextmanager
def _long_png_texts() -> Iterator[None]:
    """A context in which Pillow reads PNG files with texts of up to MAX_PNG_TEXT bytes; its own limit is 1 MB."""
    with _png_text_lock:
        limit = PngImagePlugin.MAX_TEXT_CHUNK
        PngImagePlugin.MAX_TEXT_CHUNK = MAX_PNG_TEXT
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK = limit


def normalise(images: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise a padded batch by ImageNet's mean and standard deviation, on the device of `images`.

    `images` is uint8 (B, 3, H, W), padded at the bottom and right; `sizes` (B, 2) holds the true heights and widths in
    pixels. Returns a tensor (B, 3, H, W) of type `dtype`, which is exactly zero in the padding. The result is channels
    last in memory. `images` should be channels last, too: this layout is the fastest for decoding, resizing and
    convolution.
    """
    width, exact = images.shape[-1], torch.promote_types(dtype, torch.float32)
    mean, std = (constant(values, images, exact).repeat(width) for values in (MEAN, STD))  # (W * 3,)
    pixels = images.permute(0, 2, 3, 1).flatten(2)  # (B, 3, H, W) -> (B, H, W * 3); long rows are fast on a CPU
    scale, shift = 1 / (255 * std), mean / std
    scale_and_shift = _in_strips if images.device.type == "cpu" else _at_once
    floats = scale_and_shift(pixels, sizes.to(images.device), scale, shift, dtype)
    return floats.reshape(*floats.shape[:2], width, 3).permute(0, 3, 1, 2)  # -> (B, 3, H, W), channels last in memory


def _in_strips(pixels: Tensor, sizes: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels * scale - shift, (B, H, W * 3), with zeros in the padding; computed a few rows at a time, for CPUs.

    A strip of rows stays in the processor's cache. Applying each operation to the whole batch takes twice as long.
    """
    floats = pixels.new_empty(pixels.shape, dtype=dtype)
    for image_pixels, image_floats, (height, width) in zip(pixels, floats, sizes.tolist(), strict=True):
        image_floats[height:].zero_()
        image_floats[:height, 3 * width :].zero_()
        columns = slice(3 * width)
        for start in range(0, height, STRIP_ROWS):
            strip = slice(start, min(start + STRIP_ROWS, height))
            scaled = image_pixels[strip, columns].to(scale.dtype).mul_(scale[columns])
            image_floats[strip, columns] = scaled.sub_(shift[columns])
    return floats


def _at_once(pixels: Tensor, sizes: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same as `_in_strips`, computed for the whole batch at once, for GPUs.

    `sizes` is not copied to the host, because the copy would wait for the device.
    """
    rows = torch.arange(pixels.shape[1], device=pixels.device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(pixels.shape[2], device=pixels.device) < 3 * sizes[:, 1:]  # (B, W * 3)
    real = rows[:, :, None] & columns[:, None, :]  # (B, H, W * 3)
    return pixels.to(scale.dtype).mul_(scale).sub_(shift).mul_(real).to(dtype)
