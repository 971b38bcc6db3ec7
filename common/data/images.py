"""Image files to uint8 RGB tensors, whatever their mode."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def list_images(path: Path) -> list[Path]:
    """The image file `path`, or all image files of the folder `path` in order of their names.

    Raises UserError when there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is neither an image nor a folder of images; give the path of one.")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    if not found:
        raise UserError(f"The folder {path} holds no image ({', '.join(sorted(ENDINGS))}); give another one.")
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
