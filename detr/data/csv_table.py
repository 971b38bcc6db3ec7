"""Detection data in CSV tables, in which each row states an image, a box in it, and the class of the box."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from common.config.describe import shorten
from common.data.names import composed
from common.data.opening import read_text
from common.errors import UserError
from common.types import Split
from detr.data.converted import Box, Converted, Labels, class_names, count_note, describe_corners, find_splits, xywh
from detr.data.layouts import Layout

IMAGE_COLUMNS = ("image", "filename", "file_name", "file", "path", "image_path", "image_name", "image_id", "img")
CLASS_COLUMNS = ("class", "label", "name", "class_name", "category", "category_name", "label_name")
CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
EXTENTS = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
BOX_COLUMNS = ("box", "bbox")  # four numbers in one column
SIZE_COLUMNS = (("image_height", "image_width"), ("height", "width"))


class Columns(NamedTuple):
    """The names of the columns of a table, by what they hold."""

    image: str  # the image's file name
    name: str  # the name of the box's class
    box: tuple[str, ...]  # the numbers of the box, in four columns or in one
    is_corners: bool  # True: the numbers are left, top, right, bottom; False: left, top, width, height
    size: tuple[str, ...]  # the image's height and width; () if the table does not state them


@dataclass(kw_only=True, eq=False)
class CsvTable(Converted):
    """A detection data set in CSV tables; `layouts` lists the layouts of `root`.

    If a split is given by paths, its `annotations` is a table. Columns are recognised by their names. A row in which
    the columns of the box are empty lists an image without objects.

    Args:
        classes: the names of the classes in the order of their ids; None = all names in the tables, sorted.
        box: what the four numbers in a single column box or bbox are: "corners" (left, top, right, bottom) or "extent"
            (left, top, width, height). None = the tables have no such column.
        first_pixel: how corners are counted. 0 = they are positions between pixels, counted from 0, as in COCO; 1 =
            they are the first and the last pixel of the object, counted from 1, as in Pascal VOC. Boxes that are given
            as left, top, width, height do not depend on `first_pixel`.
    """

    layouts: ClassVar[str] = (
        "train.csv, val.csv and test.csv, Roboflow's train/_annotations.csv, valid/ and test/, or one table, with the "
        "images beside it or in images/"
    )

    box: Literal["corners", "extent"] | None
    first_pixel: Literal[0, 1]

    def find_layout(self, root: Path) -> Layout:
        """Find the table of each split in `root`; `root` may itself be the only table.

        Raises UserError if `root` holds several tables for one split, or several that are not named after splits.
        """
        name, tables = _find_tables(root)
        files = {split: (_image_folder(path), path) for split, path in tables.items()}
        return Layout(name=f"CSV, {name}", official=False, recognised=bool(files), files=files)

    def convert(self, split: Split) -> dict[Split, tuple[Labels, Sequence[str]]]:
        """Read the tables of all splits, because by default the classes are the names in all of them."""
        splits = list(dict.fromkeys([split, *self.splits_with_files()]))
        parts = {name: self._read(self._required_files(name)[1]) for name in splits}
        classes = class_names(list(parts.values()), self.classes)
        return {name: (labels, classes) for name, labels in parts.items()}

    def _read(self, path: Path) -> Labels:
        header, lines = _open(path)
        columns = _choose_columns(header, path, self.box)
        first_pixel = self.first_pixel if columns.is_corners else None
        labels, empty = Labels(), list[str]()
        positions: dict[str, int] = {}  # file name -> position in `labels.images`
        for line, cells in lines:
            if len(cells) != len(header):
                raise UserError(f"{path}, line {line} has {len(cells)} columns, but the first line has {len(header)}.")
            row = _read_row(dict(zip(header, cells, strict=True)), columns, f"{path}, line {line}")
            position = positions.setdefault(row.image, len(positions))
            if position == len(labels.images):
                labels.images.append((row.image, *row.size))
            elif labels.images[position][1:] != row.size:
                raise UserError(f"{path}, line {line} gives {row.image} another size than a line above; correct it.")
            if row.box is None:
                empty.append(row.image)
                continue
            box = row.box if first_pixel is None else xywh(row.box, first_pixel)
            labels.boxes.append(Box(position, row.name, box, f"line {line}"))
        _refuse_relative(path, labels.boxes)
        note = _describe(columns, first_pixel)
        labels.notes = [note, *count_note("without objects", "row without a box", empty)]
        return labels


def _refuse_relative(path: Path, boxes: Sequence[Box]) -> None:
    """Raise UserError if no number of a box exceeds 1, as in boxes that are relative to the image size."""
    if boxes and all(abs(number) <= 1.01 for box in boxes for number in box.xywh):
        raise UserError(
            f"{path}: no number of a box exceeds 1, so the boxes are relative to the image size; multiply them by the "
            "width and height of their images in pixels."
        )


class Row(NamedTuple):
    """The content of one row."""

    image: str
    size: tuple[float, float]  # height, width in pixels; 0 if they are missing
    name: str  # of the class
    box: list[float] | None  # four numbers; None in a row without a box


def _read_row(cells: Mapping[str, str], columns: Columns, origin: str) -> Row:
    image, name = (cells[column].strip() for column in (columns.image, columns.name))
    if not image:
        raise UserError(f"{origin} names no image in the column {columns.image}; add it, or remove the line.")
    height, width = [_numbers([cells[column] or "0"], 1, origin)[0] for column in columns.size] or (0.0, 0.0)
    texts = [cells[column].strip() for column in columns.box]
    if not any(texts):
        return Row(image, (height, width), name, None)
    if not name:
        raise UserError(f"{origin} has a box without a class; add it in the column {columns.name}.")
    if len(texts) == 1:
        texts = texts[0].strip("[](){} ").replace(",", " ").split()
    return Row(image, (height, width), composed(name), _numbers(texts, 4, origin))


def _find_tables(root: Path) -> tuple[str, dict[Split, Path]]:
    """Return the name of the layout of `root`, and the table of each split; {} if `root` holds no table.

    Raises UserError if `root` holds several tables for one split, or several that are not named after splits.
    """
    if roboflow := find_splits(root, "{}/_annotations.csv"):
        return "Roboflow", roboflow
    if beside := find_splits(root, "{}.csv"):
        return "a table for each split", beside
    tables = [root] if root.is_file() else sorted(root.glob("*.csv"))
    if len(tables) > 1:
        raise UserError(f"data.root={root} holds {', '.join(path.name for path in tables)}; give one: {tables[0]}.")
    return "one table", {"train": tables[0]} if tables else {}


def _open(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Open a table; returns its header, and an iterator over the later rows as pairs (line number, cells).

    The header has the names of the columns, in lower case and with underscores in place of spaces. Empty rows are
    skipped. The separator is a comma, a semicolon or a tab, whichever is most frequent in the first line. Raises
    UserError if the file cannot be read or is not CSV.
    """
    text = read_text(path)
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                if any(row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num} is not CSV ({error}); correct it.") from None

    lines = rows()
    _, names = next(lines, (0, []))
    return [name.strip().lower().replace(" ", "_") for name in names], lines


def _choose_columns(header: Sequence[str], path: Path, box: str | None) -> Columns:
    """Choose the columns by their names in `header`; `box` is the argument of `CsvTable`.

    Raises UserError if a required column is missing, or if several columns could be meant. Also raises UserError if the
    four numbers of a box are in a single column (box or bbox) and `box` is None.
    """
    corners = [names for names in CORNERS if set(names) <= set(header)]
    extents = [names for names in EXTENTS if set(names) <= set(header)]
    single = [(name,) for name in BOX_COLUMNS if name in header]
    boxes = [*corners, *extents, *single]
    if len(boxes) != 1:
        several = " and ".join(", ".join(names) for names in boxes)
        raise UserError(
            f"{path} has {f'several boxes ({several})' if boxes else 'no box'} in its columns {_list(header)}; "
            f"expected one of {'; '.join(', '.join(names) for names in (*CORNERS, *EXTENTS))}; or one column box."
        )
    if single and box is None:
        raise UserError(
            f"The column {single[0][0]} of {path} may hold left, top, right, bottom or left, top, width, height; give "
            "data.box=corners or data.box=extent."
        )
    is_corners = bool(corners) or (bool(single) and box == "corners")
    sizes = [names for names in SIZE_COLUMNS if set(names) <= set(header) - set(boxes[0])]
    image, name = (
        _choose(header, names, subject, path)
        for names, subject in ((IMAGE_COLUMNS, "the file of the image"), (CLASS_COLUMNS, "the class"))
    )
    size = sizes[0] if sizes else ()
    if repeated := next((column for column in (*boxes[0], *size) if header.count(column) > 1), None):
        raise UserError(f"{path} has two columns {repeated}; remove or rename one of them.")
    return Columns(image, name, boxes[0], is_corners, size)


def _choose(header: Sequence[str], names: Sequence[str], subject: str, path: Path) -> str:
    present = [name for name in header if name in names]
    if len(present) != 1:
        fault = f"several columns for {subject} ({', '.join(present)})" if present else f"no column for {subject}"
        remedy = (
            "remove or rename all but one" if present else f"name one of them {', '.join(names[:-1])} or {names[-1]}"
        )
        raise UserError(f"{path} has {fault} among {_list(header)}; {remedy}.")
    return present[0]


def _list(header: Sequence[str]) -> str:
    return shorten(", ".join(header))


def _numbers(texts: Sequence[str], count: int, origin: str) -> list[float]:
    try:
        values = list(map(float, texts))
    except ValueError:
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        expected = "4 numbers of a box" if count > 1 else "a number"
        raise UserError(f"{origin} has {shorten(repr(', '.join(texts)))}; expected {expected}.")
    return values


def _describe(columns: Columns, first_pixel: int | None) -> str:
    """Return a note on how the columns were read; `first_pixel` is None if the box is left, top, width, height."""
    meaning = "left, top, width, height"
    if first_pixel is not None:
        meaning = f"corners, {describe_corners(first_pixel)} (data.first_pixel={first_pixel})"
    size = f"; {', '.join(columns.size)}: the size of the image" if columns.size else ""
    return f"columns {columns.image}: the image; {columns.name}: the class; {', '.join(columns.box)}: {meaning}{size}"


def _image_folder(path: Path) -> Path:
    """Return the folder of a table's images: images/ beside the table or, if there is none, the folder of the table.

    The folder of the table is also returned if the first image of the table is in this folder and not in images/.
    """
    images = path.parent / "images"
    if not images.is_dir():
        return path.parent
    header, rows = _open(path)
    _, row = next(rows, (0, []))
    cells = zip(header, row, strict=False)
    names = [cell.strip().replace("\\", "/") for column, cell in cells if column in IMAGE_COLUMNS]
    is_beside = bool(names) and (path.parent / names[0]).exists() and not (images / names[0]).exists()
    return path.parent if is_beside else images
