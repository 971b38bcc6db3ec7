"""The figures: what is nested, what touches, and that the masks are those of the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage

from detr.data.nested_shapes import FIGURE, GROUP, NestedShapes, draw
from detr.data.shapes import NAMES, Shapes

DEFAULTS = yaml.safe_load((Path(__file__).parents[3] / "configs/data/nested_shapes.yaml").read_text())


def data(root: Path, **changes: Any) -> NestedShapes:
    keys = {**DEFAULTS, "root": str(root), "train_count": 4, "val_count": 2, "test_count": 2, **changes}
    return NestedShapes(**{key: value for key, value in keys.items() if key != "_target_"})


def pictures(count: int) -> list[tuple[np.ndarray, list[np.ndarray], list[int]]]:
    return [draw(np.random.default_rng(seed), 64, plain=False) for seed in range(count)]


def test_a_picture_is_a_function_of_the_generator() -> None:
    first, second = (draw(np.random.default_rng(3), 64, plain=False) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and first[2] == second[2]
    assert all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_a_whole_figure_is_the_union_of_its_two_parts_and_a_group_that_of_its_members() -> None:
    kinds: set[int] = set()
    for _, masks, labels in pictures(40):
        for i, label in enumerate(labels):
            if label == FIGURE:
                outer, inner = masks[i - 2], masks[i - 1]
                assert not (outer & inner).any() and np.array_equal(outer | inner, masks[i])
                enclosed = ndimage.binary_fill_holes(outer)
                assert enclosed[inner].all(), "the outer shape surrounds the inner one"
                assert 0.03 < inner.sum() / masks[i].sum() < 0.6
            if label == GROUP:
                assert ndimage.label(masks[i])[1] == 1, "the members touch"
                members = [m for m in masks[:i] if (m & masks[i]).any()]
                assert len(members) in (2, 3) and np.array_equal(np.any(members, axis=0), masks[i])
                assert sum(int(m.sum()) for m in members) == masks[i].sum(), "visible parts do not overlap"
            kinds.add(label)
    assert kinds == {*range(len(NAMES)), FIGURE, GROUP}


def test_figures_do_not_touch_each_other() -> None:
    for _, masks, _ in pictures(30):
        regions, count = ndimage.label(np.any(masks, axis=0), structure=np.ones((3, 3)))
        for mask in masks:
            assert len({*np.unique(regions[mask])}) == 1
        assert 1 <= count <= 3


def test_parts_of_a_figure_have_different_colours() -> None:
    """Without noise: the mean colours of the two parts of each figure, and of neighbours in a group."""
    for seed in range(20):
        pixels, masks, labels = draw(np.random.default_rng(seed), 64, plain=True)
        for i, label in enumerate(labels):
            if label == FIGURE:
                colours = [pixels[ndimage.binary_erosion(masks[j])].astype(float) for j in (i - 2, i - 1)]
                if all(len(colour) for colour in colours):
                    assert np.linalg.norm(np.median(colours[0], 0) - np.median(colours[1], 0)) > 50


def test_objects_of_the_json_have_their_masks_and_the_set_its_own_folder(tmp_path: Path) -> None:
    nested = data(tmp_path)
    names = [category["name"] for category in nested.categories()]
    assert names == [*NAMES, "figure", "group"]
    shapes = Shapes(**{**{k: v for k, v in DEFAULTS.items() if k != "_target_"}, "root": str(tmp_path), "plain": False})
    assert shapes.folder != nested.folder and "nested" in nested.folder.name


def test_samples_have_the_masks_of_their_boxes(tmp_path: Path) -> None:
    nested = data(tmp_path)
    nested.request_masks()
    for generator in (None, torch.Generator().manual_seed(1)):
        batch = nested.collate([nested.sample("train", i, generator) for i in range(4)])
        assert batch["masks"].shape == (len(batch["boxes"]), 64, 64) and batch["masks"].dtype == torch.bool
        for mask, box in zip(batch["masks"], batch["boxes"], strict=True):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert [int(side) for side in box] == [int(side) for side in expected]


@pytest.mark.parametrize("kind", ["figure", "group"])
def test_a_third_of_the_objects_are_ambiguous_under_their_central_click(kind: str) -> None:
    """The control of the data's purpose: a click at the centre of a whole figure or group is in one of its parts."""
    label = {"figure": FIGURE, "group": GROUP}[kind]
    inside, total = 0, 0
    for _, masks, labels in pictures(40):
        for i, mask in enumerate(masks):
            if labels[i] == label:
                distances = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
                centre = np.unravel_index(distances.argmax(), mask.shape)
                total += 1
                inside += any(other[centre] for j, other in enumerate(masks) if j != i)
    assert total > 5 and inside == total
