"""Convert an image that is passed in Python (a path, a PIL image, an array or a tensor) to a uint8 RGB tensor."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.data.images import Exif, read_image
from common.errors import UserError

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def to_image(input: Any, exif: Exif) -> Tensor:
    """Convert `input` to an image, uint8 (3, H, W), RGB.

    A single grey channel is repeated three times. An alpha channel is dropped.

    Raises UserError for anything other than:

    - the path of an image file, which `read_image` reads;
    - a PIL image of any mode, which is rotated and mirrored as its EXIF tag says, unless `exif` is "ignore";
    - a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), RGB, of uint8 or of floats from 0 to 1;
    - a torch tensor (H, W), (1, H, W), (3, H, W) or (4, H, W), RGB, of uint8 or of floats from 0 to 1, on any device.
    """
    if isinstance(input, str | os.PathLike):
        return read_image(Path(input), exif=exif)
    if isinstance(input, Image.Image):
        return read_image(Path("PIL.Image"), exif=exif, content=input)
    if isinstance(input, np.ndarray):
        if input.ndim not in (2, 3) or (input.ndim == 3 and input.shape[-1] not in CHANNELS):
            remedy = "array.transpose(1, 2, 0)" if input.ndim == 3 else "a list of images"
            raise _not_an_image("array", input.shape, "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)", remedy)
        return _from_array(input if input.ndim == 3 else input[..., None])
    if isinstance(input, Tensor):
        if input.ndim not in (2, 3) or (input.ndim == 3 and input.shape[0] not in CHANNELS):
            remedy = "tensor.permute(2, 0, 1)" if input.ndim == 3 else "a list of images"
            raise _not_an_image("tensor", input.shape, "(H, W), (1, H, W), (3, H, W) or (4, H, W)", remedy)
        tensor = (input if input.ndim == 3 else input[None]).detach().permute(1, 2, 0).cpu()  # (H, W, C)
        return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy())
    kind = f"{type(input).__module__}.{type(input).__qualname__}".removeprefix("builtins.")
    raise UserError(f"A {kind} is no image: expected a path, a PIL image, an array, a tensor, or a list of these.")


def exif_of(data: object) -> Exif:
    """The attribute `exif` of a data set, or "auto" if it has none.

    Prediction treats EXIF tags in the same way as the data set on which the model was trained.
    """
    exif: Exif = getattr(data, "exif", "auto")
    return exif


def _not_an_image(kind: str, shape: tuple[int, ...], expected: str, remedy: str) -> UserError:
    article = "An" if kind == "array" else "A"
    return UserError(f"{article} {kind} of shape {tuple(shape)} is no image: expected {expected}; give {remedy}.")


def _from_array(array: NDArray[Any]) -> Tensor:
    """Convert an array (H, W, C) of uint8, or of floats from 0 to 1, to uint8 (3, H, W)."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise UserError(
            f"An image of {array.dtype} has no known range: expected uint8, or floats from 0 to 1; convert it."
        )
    if not array.size:
        raise UserError(f"An image of {array.shape[1]} x {array.shape[0]} pixels is empty; give one with pixels.")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # NaN fails this test, too
            raise UserError(
                f"An image of floats has values from {low:g} to {high:g}: expected 0 to 1, before any normalisation; "
                "give uint8 for values from 0 to 255."
            )
        array = (array.astype(np.float32) * 255).round().astype(np.uint8)
    colours = array[..., :3] if array.shape[-1] > 1 else array.repeat(3, axis=-1)
    return torch.from_numpy(np.array(colours, order="C")).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
