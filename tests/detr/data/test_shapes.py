"""The drawn set: what its pictures hold, that it is drawn once, and that thresholds and blobs do not solve it."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from common.errors import UserError
from detr.data.shapes import MIN_VISIBLE_FRACTION, NAMES, Shapes, draw

DEFAULTS = yaml.safe_load((Path(__file__).parents[3] / "configs/data/shapes.yaml").read_text())


def shapes(root: Path, **changes: Any) -> Shapes:
    """The default set with few images; a picture does not depend on how many there are."""
    keys = {**DEFAULTS, "root": str(root), "train_count": 6, "val_count": 2, "test_count": 2, **changes}
    return Shapes(**{key: value for key, value in keys.items() if key != "_target_"})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """A few default images."""
    return shapes(tmp_path_factory.mktemp("shapes"), test_count=60)


def test_the_default_set_is_what_is_promised():
    assert len(NAMES) >= 4 and DEFAULTS["image_size"] >= 64 and DEFAULTS["train_count"] >= 2000
    assert not DEFAULTS["plain"]


def test_the_constructor_opens_no_file(tmp_path: Path):
    data = shapes(tmp_path / "nothing here")
    assert not (tmp_path / "nothing here").exists()
    assert data.count("train") == 6 and data.count("val") == 2 and data.count("test") == 2
    assert [category["name"] for category in data.categories()] == list(NAMES)


def test_a_set_can_do_without_val(tmp_path: Path):
    data = shapes(tmp_path, val_count=0)
    assert [data.count(split) for split in ("train", "val", "test")] == [6, 0, 2]


def test_pictures_hold_one_to_five_visible_shapes_of_the_promised_size():
    size, counts, overlaps = 64, set(), 0
    for seed in range(60):
        pixels, masks, labels = draw(np.random.default_rng(seed), size, plain=False)
        again, _, _ = draw(np.random.default_rng(seed), size, plain=False)
        assert pixels.shape == (size, size, 3) and np.array_equal(pixels, again)
        assert 1 <= len(masks) == len(labels) <= 5
        counts.add(len(masks))
        assert np.sum(masks, axis=0).max() <= 1  # a pixel shows one shape
        sides = [max(np.ptp(np.nonzero(mask)[axis]) + 1 for axis in (0, 1)) for mask in masks]
        assert max(sides) <= size / 2 + 1 and sides[-1] >= size / 6  # the last one covers and is not covered
        overlaps += any(ndimage.binary_dilation(a, iterations=1)[b].any() for a in masks for b in masks if a is not b)
    assert counts == {1, 2, 3, 4, 5} and overlaps > 10


def test_plain_pictures_hold_no_overlap_and_one_background_colour():
    for seed in range(20):
        pixels, masks, _ = draw(np.random.default_rng(seed), 64, plain=True)
        around = ~ndimage.binary_dilation(np.any(masks, axis=0), iterations=4)  # without soft tips
        assert len(np.unique(pixels[around], axis=0)) == 1
        assert ndimage.label(np.any(masks, axis=0), structure=np.ones((3, 3)))[1] == len(masks)


def test_boxes_masks_and_areas_agree(small: Shapes):
    truth = quiet_coco(small.ground_truth("test"))
    for annotation in truth.anns.values():
        mask = truth.annToMask(annotation)
        x, y, width, height = annotation["bbox"]
        rows, columns = np.nonzero(mask)
        assert annotation["area"] == mask.sum() > 0
        assert [x, y, width, height] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    sample = small.sample("test", 3, None)
    expected = [annotation["bbox"] for annotation in truth.imgToAnns[sample["id"]]]
    torch.testing.assert_close(
        torchvision.ops.box_convert(sample["boxes"], "xyxy", "xywh"), torch.tensor(expected).float()
    )


def test_hidden_parts_stay_below_the_limit():
    """Disks covered by later ones: what is left of a full disk is at least the promised share of its own box's disk."""
    least = 1.0
    for seed in range(150):
        _, masks, labels = draw(np.random.default_rng(seed), 64, plain=False)
        for mask, label in zip(masks, labels, strict=True):
            if NAMES[label] == "circle":
                rows, columns = np.nonzero(mask)
                least = min(least, mask.sum() / (np.pi / 4 * max(np.ptp(rows) + 1, np.ptp(columns) + 1) ** 2))
    assert MIN_VISIBLE_FRACTION - 0.05 < least < 0.9  # 0.05: pixels on the rim of a disk of 11


def test_a_set_is_drawn_once_and_other_keys_draw_another(tmp_path: Path):
    first = shapes(tmp_path)
    first.count("train")
    marker = first.folder / "marker"
    marker.touch()
    again, other = shapes(tmp_path), shapes(tmp_path, seed=1)
    assert torch.equal(again.sample("train", 0, None)["image"], first.sample("train", 0, None)["image"])
    assert again.folder == first.folder and marker.exists()
    assert not torch.equal(other.sample("train", 0, None)["image"], first.sample("train", 0, None)["image"])
    assert {folder.name for folder in tmp_path.iterdir()} == {first.folder.name, other.folder.name}  # no drafts left


def test_splits_share_no_picture(small: Shapes):
    pictures = [small.sample(split, i, None)["image"] for split in ("train", "val", "test") for i in range(2)]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 6


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.root"):
        shapes(tmp_path / "file").count("train")


def test_training_flips_and_evaluation_does_not(small: Shapes):
    images = [small.sample("train", 0, torch.Generator().manual_seed(seed)) for seed in range(12)]
    plain = small.sample("train", 0, None)
    mirrored = [sample for sample in images if torch.equal(sample["image"], plain["image"].flip(2))]
    assert 0 < len(mirrored) < 12
    assert all(torch.equal(s["image"], plain["image"]) for s in images if not any(s is m for m in mirrored))
    boxes = plain["boxes"]
    expected = torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], dim=1)
    torch.testing.assert_close(mirrored[0]["boxes"], expected)


def test_thresholds_and_blobs_solve_plain_shapes(tmp_path: Path):
    """The control for the next test: told its class, each region at the best threshold."""
    easy = shapes(tmp_path, plain=True, test_count=60)
    assert max(average_precision(easy, distant_blobs, level)[1] for level in (40, 60, 80)) >= 0.8


@pytest.mark.slow
def test_thresholds_and_blobs_do_not_solve_the_default_shapes(tmp_path: Path):
    """The same finder and one that looks for regions of one colour, at the thresholds that suit the set best."""
    hard = shapes(tmp_path, test_count=60)
    scores = [average_precision(hard, distant_blobs, level)[0] for level in (80, 110, 140, 170)]
    scores += [average_precision(hard, uniform_blobs, level)[0] for level in (2, 3, 4, 6)]
    assert max(scores) < 0.2


def distant_blobs(image: np.ndarray, threshold: int) -> list[list[float]]:
    """Regions whose colour is farther than `threshold` from the picture's median colour."""
    background = np.median(image.reshape(-1, 3), axis=0)
    return regions(np.linalg.norm(image - background, axis=2) > threshold)


def uniform_blobs(image: np.ndarray, levels: int) -> list[list[float]]:
    """Regions of one colour, when every channel has `levels` levels."""
    colours = (image / 256 * levels).astype(int) @ [1, levels, levels**2]
    found = [box for colour in np.unique(colours) for box in regions(colours == colour)]
    return [box for box in found if max(box[2] - box[0], box[3] - box[1]) <= 34]  # the largest shape, and a pixel


def regions(mask: np.ndarray) -> list[list[float]]:
    """Connected regions of at least 6 x 6 as x0, y0, x1, y1, score; the fuller its box, the higher its score."""
    numbered, _ = ndimage.label(mask)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
        if rows.stop - rows.start >= 6 and columns.stop - columns.start >= 6:
            full = float((numbered[rows, columns] == number).mean())
            found.append([columns.start, rows.start, columns.stop, rows.stop, full])
    return found


def average_precision(data: Shapes, find: Any, level: int) -> tuple[float, float]:
    """AP and AP50 of a finder of boxes on test; a box takes the class of the object that it overlaps most."""
    results = []
    for index in range(data.count("test")):
        sample = data.sample("test", index, None)
        found = find(sample["image"].permute(1, 2, 0).double().numpy(), level)
        if not found:
            continue
        boxes = torch.tensor(found)[:, :4]
        classes = sample["labels"][torchvision.ops.box_iou(boxes, sample["boxes"]).argmax(dim=1)]
        for (x0, y0, x1, y1, score), label in zip(found, classes.tolist(), strict=True):
            results.append(
                {
                    "image_id": sample["id"],
                    "category_id": data.categories()[label]["id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
            )
    if not results:
        return 0.0, 0.0
    truth = quiet_coco(data.ground_truth("test"))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def quiet_coco(document: dict[str, Any]) -> COCO:
    """Index a COCO dict without pycocotools' prints."""
    truth = COCO()
    truth.dataset = document
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
