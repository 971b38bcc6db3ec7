"""Pictures of attention: well-formed for any token, a cell for each pair, labels in order, dark where the weight is."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from seq2seq.evaluation.attention_pictures import MAX_LABEL_WIDTH, hex_colours, picture, visible

SVG = "{http://www.w3.org/2000/svg}"
SOURCE = ["▁the", "▁dog", "s", "</s>"]
TARGET = ["▁die", "▁Hunde", "</s>"]
HOSTILE = [
    "<b>",
    "&amp;",
    "\"'",
    "]]>",
    "\x00\x1b",
    "\ud800",
    "\ufffe",
    "\u202e",
    "\U0001fffe",
    "\u2028",
    "",
    "a" * 999,
]


def attention(heads: int, rows: int, columns: int) -> Tensor:
    drawn = torch.randn(heads, rows, columns, generator=torch.Generator().manual_seed(0))
    return (3 * drawn).softmax(-1)


def drawn(weights: Tensor, source: list[str] = SOURCE, target: list[str] = TARGET) -> ElementTree.Element:
    text = picture(weights, source, target, "a title")
    return ElementTree.fromstring(text.encode())  # as a file of it would be


def maps(sheet: ElementTree.Element, kind: str) -> list[list[ElementTree.Element]]:
    """The cells of each map, row by row."""
    groups = sheet.findall(f"{SVG}g[@class='{kind}']")
    return [[cell for cell in group.findall(f"{SVG}rect") if cell.find(f"{SVG}title") is not None] for group in groups]


def said(cell: ElementTree.Element) -> str:
    return str(cell.findtext(f"{SVG}title"))


def labels(sheet: ElementTree.Element, kind: str) -> list[str]:
    return [str(text.text) for text in sheet.findall(f"{SVG}text[@class='{kind}']")]


def lightness(cell: ElementTree.Element) -> int:
    colour = cell.attrib["fill"]
    return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_each_pair_has_a_cell_in_the_mean_that_tells_its_tokens_and_weight() -> None:
    weights = attention(4, 3, 4)
    (cells,) = maps(drawn(weights), "mean")
    expected = [
        f"{column} → {row}: {weights[:, i, j].double().mean():.3f}"
        for i, row in enumerate(TARGET)
        for j, column in enumerate(SOURCE)
    ]
    assert [said(cell) for cell in cells] == expected


def test_rows_are_target_tokens_and_columns_source_tokens_in_order() -> None:
    sheet = drawn(attention(2, 3, 4))
    assert labels(sheet, "row") == TARGET and labels(sheet, "column") == SOURCE
    (cells,) = maps(sheet, "mean")
    assert len({cell.attrib["y"] for cell in cells}) == 3 and len({cell.attrib["x"] for cell in cells}) == 4
    heights = [float(text.attrib["y"]) for text in sheet.findall(f"{SVG}text[@class='row']")]
    assert heights == sorted(heights) and len({*heights}) == 3


def test_the_darkest_cell_is_where_the_weight_is_largest() -> None:
    weights = attention(3, 6, 7)
    sheet = drawn(weights, [f"s{j}" for j in range(7)], [f"t{i}" for i in range(6)])
    for cells, values in zip(maps(sheet, "mean") + maps(sheet, "head"), [weights.mean(0), *weights], strict=True):
        row, column = divmod(int(values.argmax()), 7)
        assert said(min(cells, key=lightness)).startswith(f"s{column} → t{row}:")


def test_more_weight_is_never_lighter_and_the_ends_are_white_and_dark_blue() -> None:
    colours = hex_colours(torch.arange(201) / 200)
    sums = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in colours]
    assert colours[0] == "#ffffff" and colours[-1] == "#0a285a"
    assert all(a > b for a, b in pairwise(sums))
    assert hex_colours(torch.tensor([-1e-9, 1 + 1e-6])) == [colours[0], colours[-1]], "rounding may leave the range"


def test_heads_stand_beside_the_mean_without_cells_that_would_be_white() -> None:
    sheet = drawn(torch.eye(4)[None, :3].repeat(8, 1, 1))
    assert [len(cells) for cells in maps(sheet, "mean") + maps(sheet, "head")] == [12, *[3] * 8]
    assert {f"head {i}" for i in range(1, 9)} <= {*labels(sheet, "pale")}
    places = [group.attrib["transform"] for group in sheet.findall(f"{SVG}g")]
    assert len({*places}) == 9, "no map lies on another"
    assert not maps(drawn(torch.eye(4)[None, :3]), "head"), "one head is its own mean"


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 30), (30, 1), (12, 12)])
def test_everything_lies_on_the_sheet(heads: int, rows: int, columns: int) -> None:
    sheet = drawn(attention(heads, rows, columns), ["Wort"] * columns, ["word"] * rows)
    width, height = int(sheet.attrib["width"]), int(sheet.attrib["height"])
    for group in sheet.findall(f"{SVG}g"):
        x, y = map(float, group.attrib["transform"].removeprefix("translate(").removesuffix(")").split())
        frame = group.findall(f"{SVG}rect")[-1].attrib
        assert 0 < x < x + float(frame["width"]) < width and 0 < y < y + float(frame["height"]) < height
    for text in sheet.findall(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) < width and 0 < float(text.attrib["y"]) < height


def test_hostile_tokens_and_titles_leave_a_well_formed_file() -> None:
    text = picture(attention(2, len(HOSTILE), len(HOSTILE)), HOSTILE, HOSTILE, "".join(HOSTILE))
    sheet = ElementTree.fromstring(text.encode())
    assert labels(sheet, "column")[:4] == HOSTILE[:4] and not sheet.findall(f".//{SVG}b")
    assert int(sheet.attrib["width"]) < 3 * MAX_LABEL_WIDTH + len(HOSTILE) * 60, "a long token is cut"
    assert said(maps(sheet, "mean")[0][-1]).count("a") == 2 * 999, "but told whole"


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible(" a\u00a0b\u3000") == "␣a␣b␣" and visible("\t\n\x7f") == "␉␊␡"
    assert visible("\u202e\u2028\ud800\uffff\x85\u200b") == "\ufffd" * 6
    for joined in ("می\u200cرود", "नी你", "👩\u200d🔬"):  # a joiner is how these are spelt
        assert visible(joined) == joined


def test_weights_of_any_type_are_drawn_and_weights_of_other_tokens_are_not() -> None:
    weights = torch.eye(4, dtype=torch.bfloat16, requires_grad=True)[None, :3]
    assert said(maps(drawn(weights), "mean")[0][0]) == "▁the → ▁die: 1.000"
    with pytest.raises(AssertionError):
        drawn(weights.transpose(1, 2))
