"""Image files to uint8 RGB tensors, whatever their mode, and those to the floats that a backbone takes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError
from common.machine.device import constant

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# Mean and standard deviation of ImageNet's RGB values in [0, 1], which the backbones were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

STRIP_ROWS = 32  # rows that are normalised at once, half a megabyte of an image 1,333 pixels wide


def list_images(path: Path) -> list[Path]:
    """The image file `path`, or all image files of the folder `path` in order of their names.

    Raises UserError when there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is neither an image nor a folder of images; give the path of one.")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"The folder {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); give another one.")
    return found


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file as uint8 (3, H, W), RGB.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is dropped. Without `size` the image is turned
    upright as its EXIF tag says. With `size` (height, width: what the annotations were drawn on) it is turned only if
    that, and not the image as stored, has this size. Raises UserError naming a file that is missing, broken or of
    another size.
    """
    image = _decode(path, upright=size is None)
    if size is None or tuple(image.shape[1:]) == size:
        return image
    turned = _decode(path, upright=True)
    if tuple(turned.shape[1:]) == size:
        return turned
    raise UserError(
        f"The image {path} has {image.shape[2]} x {image.shape[1]} pixels, but its annotations say "
        f"{size[1]} x {size[0]}; correct its width and height in the JSON, or the image."
    )


def _decode(path: Path, upright: bool) -> Tensor:
    # PIL and not torchvision.io, which is leaving torchvision (deprecated in 0.29) and wins 15 % on a JPEG.
    try:
        with Image.open(path) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip at 255
                grey = np.asarray(image).astype(np.int64) // 256  # (H, W)
                pixels = grey.clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)  # (H, W, 3)
            else:
                pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except FileNotFoundError:
        raise UserError(f"The image {path} is missing; put it there or mend its path.") from None
    except MemoryError:
        raise  # is no mistake in the file
    except Exception as error:  # PIL's plugins raise nearly any type on broken files
        raise UserError(f"The image {path} is broken or no image ({error}); replace it or remove it.") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), a view: channels last in memory


def normalise(images: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A padded batch as the network takes it, computed where `images` are.

    Images uint8 (B, 3, H, W), zero padded at the bottom and right; sizes (B, 2) true heights and widths. Returns
    floats (B, 3, H, W) with ImageNet's mean and deviation, exactly zero in the padding. Memory is channels last in and
    out, which decoding, resizing and convolution all run fastest on.
    """
    width, exact = images.shape[-1], torch.promote_types(dtype, torch.float32)
    mean, std = (constant(values, images, exact).repeat(width) for values in (MEAN, STD))  # (W * 3,)
    pixels = images.permute(0, 2, 3, 1).flatten(2)  # (B, 3, H, W) -> (B, H, W * 3): long rows are fast on a CPU
    scale, shift = 1 / (255 * std), mean / std
    scaled = _in_strips if images.device.type == "cpu" else _at_once
    floats = scaled(pixels, sizes.to(images.device), scale, shift, dtype)
    return floats.reshape(*floats.shape[:2], width, 3).permute(0, 3, 1, 2)  # -> (B, 3, H, W), channels last in memory


def _in_strips(pixels: Tensor, sizes: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """pixels * scale - shift, (B, H, W * 3), zero in the padding, a few rows at a time.

    They stay in the processor's cache; a pass over all memory for each operation takes twice as long.
    """
    floats = pixels.new_empty(pixels.shape, dtype=dtype)
    for row_pixels, row_floats, (height, width) in zip(pixels, floats, sizes.tolist(), strict=True):
        row_floats[height:].zero_()
        row_floats[:height, 3 * width :].zero_()
        part = slice(3 * width)
        for start in range(0, height, STRIP_ROWS):
            strip = slice(start, min(start + STRIP_ROWS, height))
            row_floats[strip, part] = row_pixels[strip, part].to(scale.dtype).mul_(scale[part]).sub_(shift[part])
    return floats


def _at_once(pixels: Tensor, sizes: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a GPU, which is not asked for the sizes."""
    rows = torch.arange(pixels.shape[1], device=pixels.device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(pixels.shape[2], device=pixels.device) < 3 * sizes[:, 1:]  # (B, W * 3)
    real = rows[:, :, None] & columns[:, None, :]  # (B, H, W * 3)
    return pixels.to(scale.dtype).mul_(scale).sub_(shift).mul_(real).to(dtype)
