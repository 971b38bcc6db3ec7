"""Find the grid of the positions in another program's file, and tell how that program resamples positions.

A file holds positions as a table with one row for each position. It contains neither the height and width of the grid
nor the method of resampling.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from common.errors import UserError
from common.nn.positions import Resampling

Grid = tuple[int, int]  # rows and columns of patches

# The method by which each program resamples positions.
METHODS: dict[str, Resampling] = {
    "torchvision": "bicubic_corners",
    "timm": "bicubic_antialias",
    "transformers": "bicubic",
    "google": "bilinear_corners",
}


class GridReading(NamedTuple):
    """An interpretation of a table of positions."""

    before: int  # number of rows of the class token and registers, which precede the rows of the patches
    grid: Grid  # formed by the rows of the patches
    notes: list[str]  # sentences for the log if the interpretation may be wrong


def read_grid(rows: int, tokens: int, registers: int, configured: Grid | None) -> GridReading:
    """Decide which rows of a table of positions belong to patches, and which grid these form.

    Args:
        rows: number of rows of the table.
        tokens: number of class and distillation tokens in the file: 0, 1 (a class token alone) or 2.
        registers: number of registers in the file.
        configured: grid of patches for the config's image size; None if unknown.

    The table may begin with the rows of the patches, with rows for the tokens, or with rows for the tokens and the
    registers. If in one of these cases the number of the patches' rows equals the number of patches of the
    configured grid, this grid is taken. Otherwise, the patches' rows must form a square. If a grid is configured, a
    note states an interpretation that may be wrong. Raises UserError when the configured grid is unknown or does not
    fit, and there is not exactly one possible square.
    """
    patches = {before: rows - before for before in (0, int(tokens), tokens + registers) if rows > before}
    squares = [(before, (math.isqrt(n), math.isqrt(n))) for before, n in patches.items() if math.isqrt(n) ** 2 == n]
    fitting = [(before, configured) for before, n in patches.items() if configured and math.prod(configured) == n]
    readings = list(dict.fromkeys(fitting + squares))
    if not fitting and len(readings) != 1:
        raise UserError(_refusal(rows, tokens, registers, several=bool(readings)))
    before, grid = readings[0]
    if fitting and len(readings) > 1:
        others = " or ".join(_describe(*reading, tokens) for reading in readings[1:])
        return GridReading(before, grid, [
            f"the {rows} positions are read as {_describe(before, grid, tokens)}, the grid of data.image_size, and not "
            f"as {others}"
        ])  # fmt: skip
    if configured and not fitting:
        return GridReading(before, grid, [
            f"the {rows} positions are read as {_describe(before, grid, tokens)}, since the file does not hold the "
            "shape of its grid, and the grid of data.image_size does not fit; if the file's grid is not square, give "
            "data.image_size the same shape"
        ])  # fmt: skip
    return GridReading(before, grid, [])


def method_note(names: Iterable[str], layout: str) -> str:
    """Return a note on how the programs with this layout resample positions; `names` are the file's tensor names."""
    leaves = {name.rpartition("blocks.")[2].split(".", 1)[-1] for name in names} | {*names}
    if layout != "timm":
        return f"{layout} itself resamples positions by model.positions.resample={METHODS[layout]}"
    if "register_tokens" in leaves:  # DINOv2's models with registers; its torch.hub entries set antialias, no offset
        return "DINOv2's own code resamples positions of models with registers by bicubic_antialias"
    dino = "DINO's and DINOv2's own code resamples by model.positions.resample=bicubic_offset"
    if {"mask_token", "ls1.gamma"} <= leaves:
        return f"{dino}, and this looks like a file of DINOv2; timm resamples by {METHODS['timm']}"
    return f"timm resamples positions by model.positions.resample={METHODS['timm']}; {dino}"


def _describe(before: int, grid: Grid, tokens: int) -> str:
    rows = {0: " without a position of the class token", 1: " and the class token"}
    others = rows.get(before, f" and {before} tokens") if tokens or before else ""
    return f"{grid[0]} x {grid[1]} patches{others}"


def _refusal(rows: int, tokens: int, registers: int, several: bool) -> str:
    names = ("no class token", "a class token", "a class token, a distillation token")[tokens]
    return (
        f"The checkpoint has {rows} positions and {names} and {registers} registers, which "
        f"{'leave more than one square grid' if several else 'do not leave a square grid'}; files of other programs do "
        "not store the shape of their grid: give the image size of the file as data.image_size=[HEIGHT,WIDTH], or "
        "resample the positions to a square grid in the other program."
    )
