"""Draw the README's figure from the checkpoints of the three default runs.

python scripts/readme_figure.py DETECTOR CLASSIFIER TRANSLATOR --output FILE.svg

Each argument is a checkpoint (`runs/.../checkpoints/best.pt`). The three panels show test images of shapes with
predicted boxes, test digits with their attention rollout, and a phrase with its cross-attention. The pictures are drawn
by the same code as in predict.py, then resized and placed side by side.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, write_png
from torchvision.transforms.v2.functional import resize

from common.errors import UserError
from common.train.assembly import load

PHRASE = "January 30, 2021"
SHAPES, DIGITS = (0, 1, 2, 3), (0, 1, 2)  # indices of test images
PANEL, GAP, TITLE = 330, 30, 36  # in pixels: height of a panel, gap between panels, height of the titles above them
TITLES = ("detr: shapes and predicted boxes", "vit: digits and attention", "seq2seq: cross-attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figure; returns the exit code, which is 2 if a checkpoint cannot be read."""
    console.guard()
    options = _options(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model, task = _load(options.detector)
            shapes = [task.data.sample("test", i, None)["image"] for i in SHAPES]
            detector = _picture_grid(model, task, shapes, Path(scratch) / "detr", columns=2)
            model, task = _load(options.classifier, "task.predict.attention=rollout")
            digits = task.data.thumbnails(
                task.data.collate([task.data.sample("test", i, None) for i in DIGITS]), len(DIGITS)
            )
            classifier = _picture_grid(model, task, digits, Path(scratch) / "vit", columns=1)
            translator = _attention_picture(
                *_load(options.translator, "task.predict.attention=true"), Path(scratch) / "seq2seq"
            )
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    figure = _side_by_side([detector, classifier, translator])
    options.output.write_text(figure, encoding="utf-8")
    print(f"{options.output}: {len(figure.encode()) / 1000:.0f} kB")
    return 0


def _load(checkpoint: Path, *overrides: str) -> tuple[nn.Module, Any]:
    """Load a model and its task. The type of the task is Any, since the protocol `Task` has no attribute `data`."""
    return load(checkpoint, *overrides)


def _picture_grid(model: nn.Module, task: Any, images: Iterable[Tensor], folder: Path, *, columns: int) -> str:
    """Draw images, uint8 (3, H, W), with their predictions, as predict.py does.

    Returns an SVG of height PANEL that shows the pictures in a grid of `columns` columns. Intermediate files are
    written to `folder`.
    """
    originals, predictions = folder / "images", folder / "predictions"
    originals.mkdir(parents=True)
    for i, image in enumerate(images):
        write_png(image.contiguous(), str(originals / f"{i}.png"))
    for batch in task.read(str(originals)):
        for _ in task.show(batch, task.predict(model, batch), predictions):
            pass
    files = sorted([*predictions.glob("*.jpg"), *predictions.glob("*.png")])
    rows = -(-len(files) // columns)
    side = (PANEL - 8 * (rows - 1)) / rows  # height of a picture
    pictures = [_read_resized(file, round(2 * side)) for file in files]  # at twice the size, for high-density screens
    height, width = pictures[0].shape[-2:]
    parts = []
    for i, picture in enumerate(pictures):
        x, y = i % columns * (side * width / height + 8), i // columns * (side + 8)
        data = base64.b64encode(encode_jpeg(picture, quality=85).numpy().tobytes()).decode()
        frame = f'x="{x:.1f}" y="{y:.1f}" width="{side * width / height:.1f}" height="{side:.1f}"'
        parts.append(f'<image {frame} href="data:image/jpeg;base64,{data}"/>')
    total = columns * (side * width / height + 8) - 8
    return f'<svg width="{total:.0f}" height="{PANEL}" viewBox="0 0 {total:.0f} {PANEL}">{"".join(parts)}</svg>'


def _read_resized(file: Path, height: int) -> Tensor:
    """Read a picture and resize it to uint8 (3, `height`, W)."""
    picture = decode_image(str(file), ImageReadMode.RGB)
    resized: Tensor = resize(picture, [height, round(height * picture.shape[-1] / picture.shape[-2])], antialias=True)
    return resized


def _attention_picture(model: nn.Module, task: Any, folder: Path) -> str:
    """Translate PHRASE and draw its cross-attention, as predict.py does; returns an SVG of height PANEL.

    Intermediate files are written to `folder`.
    """
    folder.mkdir()
    text = folder / "phrase.txt"
    text.write_text(f"{PHRASE}\n", encoding="utf-8")
    for batch in task.read(str(text)):
        for _ in task.show(batch, task.predict(model, batch), folder):
            pass
    (file,) = folder.glob("*.svg")
    picture = file.read_text(encoding="utf-8")
    width, height = _length(picture, "width"), _length(picture, "height")
    picture = picture[picture.index("<svg") :]
    resized = re.sub(r'width="[\d.]+" height="[\d.]+"', "", picture, count=1)
    return resized.replace("<svg", f'<svg width="{PANEL * width / height:.0f}" height="{PANEL}"', 1)


def _length(picture: str, side: str) -> float:
    """Read the width or the height of an SVG from its first tag that states it."""
    match = re.search(rf'\b{side}="([\d.]+)"', picture)
    assert match, f"an SVG without {side}"
    return float(match[1])


def _side_by_side(panels: Sequence[str]) -> str:
    """Join the panels into one SVG, from left to right, each panel below its title."""
    parts, x = [], 0.0
    for title, panel in zip(TITLES, panels, strict=True):
        width = _length(panel, "width")
        parts.append(f'<text class="title" x="{x:.0f}" y="20" font-family="Arial, sans-serif">{title}</text>')
        parts.append(panel.replace("<svg", f'<svg x="{x:.0f}" y="{TITLE}"', 1))
        x += width + GAP
    size = f'width="{x - GAP:.0f}" height="{PANEL + TITLE}" viewBox="0 0 {x - GAP:.0f} {PANEL + TITLE}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{background}{"".join(parts)}</svg>\n'


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in ("detector", "classifier", "translator"):
        parser.add_argument(name, type=Path, help="a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("scripts/readme_figure.svg"), help="the file to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start.script(main)
