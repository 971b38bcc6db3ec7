"""The PNG format of panoptic segmentation: each pixel's colour is the id of its segment (Kirillov et al. 2019).

The format is defined at cocodataset.org, "Data format", 4. Panoptic Segmentation: id = R + 256 G + 256^2 B, and 0 is a
pixel without a label (VOID).
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.data.images import open_image
from common.errors import UserError

VOID = 0  # the id of pixels without a label
MAX_ID = 256**3 - 1


def read_ids(path: Path, size: tuple[int, int]) -> NDArray[np.uint32]:
    """Read the segment ids (H, W) from a PNG; `size` is the (height, width) that it must have.

    Raises UserError, which names the file, if it is missing, is broken or has another format or size.
    """
    try:
        with open_image(path) as image:
            mode = image.mode
            pixels = np.asarray(image)
    except FileNotFoundError:
        raise UserError(
            f"The PNG {path} of segment ids is missing; put it there, into the folder that has the name of the JSON."
        ) from None
    except MemoryError:
        raise  # the file is not at fault
    except Exception as error:  # Pillow raises exceptions of nearly any type on broken files
        raise UserError(f"The PNG {path} of segment ids cannot be read ({error}); replace it.") from None
    if mode not in ("RGB", "RGBA"):
        raise UserError(
            f"The PNG {path} has the colour mode {mode}; expected RGB, in which a segment's id is R + 256 G + 65536 B."
        )
    if pixels.shape[:2] != size:
        raise UserError(
            f"The PNG {path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image has {size[1]} x "
            f"{size[0]}; replace it."
        )
    red, green, blue = np.moveaxis(pixels[..., :3].astype(np.uint32), -1, 0)
    ids: NDArray[np.uint32] = red + 256 * green + 65536 * blue
    return ids


def encode_ids(ids: NDArray[np.integer]) -> bytes:
    """Encode segment ids (H, W), from 0 to MAX_ID, as a PNG."""
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)  # (H, W, 3)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "png", compress_level=1)
    return file.getvalue()
