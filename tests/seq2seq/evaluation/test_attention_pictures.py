"""Pictures of attention: well-formed for any token, a cell for each pair of tokens, labels in order, colours."""

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


def random_attention(heads: int, rows: int, columns: int) -> Tensor:
    scores = torch.randn(heads, rows, columns, generator=torch.Generator().manual_seed(0))
    return (3 * scores).softmax(-1)


def draw(attention: Tensor, source: list[str] = SOURCE, target: list[str] = TARGET) -> ElementTree.Element:
    text = picture(attention, source, target, "a title")
    return ElementTree.fromstring(text.encode())  # parsed as a file


def maps(document: ElementTree.Element, kind: str) -> list[list[ElementTree.Element]]:
    """The cells of each map, row by row."""
    groups = document.findall(f"{SVG}g[@class='{kind}']")
    return [[cell for cell in group.findall(f"{SVG}rect") if cell.find(f"{SVG}title") is not None] for group in groups]


def tooltip(cell: ElementTree.Element) -> str:
    return str(cell.findtext(f"{SVG}title"))


def labels(document: ElementTree.Element, kind: str) -> list[str]:
    return [str(text.text) for text in document.findall(f"{SVG}text[@class='{kind}']")]


def lightness(cell: ElementTree.Element) -> int:
    colour = cell.attrib["fill"]
    return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_each_cell_of_the_mean_has_a_tooltip_with_its_tokens_and_value() -> None:
    attention = random_attention(4, 3, 4)
    (cells,) = maps(draw(attention), "mean")
    expected = [
        f"{column} → {row}: {attention[:, i, j].double().mean():.3f}"
        for i, row in enumerate(TARGET)
        for j, column in enumerate(SOURCE)
    ]
    assert [tooltip(cell) for cell in cells] == expected


def test_rows_are_target_tokens_and_columns_source_tokens_in_order() -> None:
    document = draw(random_attention(2, 3, 4))
    assert labels(document, "row") == TARGET and labels(document, "column") == SOURCE
    (cells,) = maps(document, "mean")
    assert len({cell.attrib["y"] for cell in cells}) == 3 and len({cell.attrib["x"] for cell in cells}) == 4
    heights = [float(text.attrib["y"]) for text in document.findall(f"{SVG}text[@class='row']")]
    assert heights == sorted(heights) and len({*heights}) == 3


def test_the_darkest_cell_has_the_largest_value() -> None:
    attention = random_attention(3, 6, 7)
    document = draw(attention, [f"s{j}" for j in range(7)], [f"t{i}" for i in range(6)])
    for cells, values in zip(
        maps(document, "mean") + maps(document, "head"), [attention.mean(0), *attention], strict=True
    ):
        row, column = divmod(int(values.argmax()), 7)
        assert tooltip(min(cells, key=lightness)).startswith(f"s{column} → t{row}:")


def test_colours_darken_strictly_from_white_to_dark_blue() -> None:
    colours = hex_colours(torch.arange(201) / 200)
    sums = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in colours]
    assert colours[0] == "#ffffff" and colours[-1] == "#0a285a"
    assert all(a > b for a, b in pairwise(sums))
    assert hex_colours(torch.tensor([-1e-9, 1 + 1e-6])) == [colours[0], colours[-1]], (
        "values may leave the range by rounding"
    )


def test_heads_are_drawn_beside_the_mean_without_white_cells() -> None:
    document = draw(torch.eye(4)[None, :3].repeat(8, 1, 1))
    assert [len(cells) for cells in maps(document, "mean") + maps(document, "head")] == [12, *[3] * 8]
    assert {f"head {i}" for i in range(1, 9)} <= {*labels(document, "pale")}
    positions = [group.attrib["transform"] for group in document.findall(f"{SVG}g")]
    assert len({*positions}) == 9, "maps do not overlap"
    assert not maps(draw(torch.eye(4)[None, :3]), "head"), "a single head is the mean"


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 30), (30, 1), (12, 12)])
def test_everything_lies_within_the_document(heads: int, rows: int, columns: int) -> None:
    document = draw(random_attention(heads, rows, columns), ["Wort"] * columns, ["word"] * rows)
    width, height = int(document.attrib["width"]), int(document.attrib["height"])
    for group in document.findall(f"{SVG}g"):
        x, y = map(float, group.attrib["transform"].removeprefix("translate(").removesuffix(")").split())
        frame = group.findall(f"{SVG}rect")[-1].attrib
        assert 0 < x < x + float(frame["width"]) < width and 0 < y < y + float(frame["height"]) < height
    for text in document.findall(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) < width and 0 < float(text.attrib["y"]) < height


def test_hostile_tokens_and_titles_give_a_well_formed_file() -> None:
    text = picture(random_attention(2, len(HOSTILE), len(HOSTILE)), HOSTILE, HOSTILE, "".join(HOSTILE))
    document = ElementTree.fromstring(text.encode())
    assert labels(document, "column")[:4] == HOSTILE[:4] and not document.findall(f".//{SVG}b")
    assert int(document.attrib["width"]) < 3 * MAX_LABEL_WIDTH + len(HOSTILE) * 60, "a long token is cut"
    assert tooltip(maps(document, "mean")[0][-1]).count("a") == 2 * 999, "but is whole in the tooltip"


def test_invisible_characters_are_made_visible() -> None:
    assert visible(" a\u00a0b\u3000") == "␣a␣b␣" and visible("\t\n\x7f") == "␉␊␡"
    assert visible("\u202e\u2028\ud800\uffff\x85\u200b") == "\ufffd" * 6
    for text in ("می\u200cرود", "नी你", "👩\u200d🔬"):  # joiners are part of their spelling
        assert visible(text) == text


def test_any_floating_type_is_drawn_and_a_wrong_shape_refused() -> None:
    attention = torch.eye(4, dtype=torch.bfloat16, requires_grad=True)[None, :3]
    assert tooltip(maps(draw(attention), "mean")[0][0]) == "▁the → ▁die: 1.000"
    with pytest.raises(AssertionError):
        draw(attention.transpose(1, 2))
