"""The generated set: its pictures, that it is generated once, and that thresholding does not find the shapes."""

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

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import mix
from common.types import SPLITS
from detr.data.grounds import NAMES as GROUNDS
from detr.data.shapes import DRAWING_VERSION, MIN_VISIBLE_FRACTION, NAMES, Shapes, draw

DEFAULTS = yaml.safe_load((Path(__file__).parents[3] / "configs/data/shapes.yaml").read_text())


def shapes(root: Path, **changes: Any) -> Shapes:
    """The default set with few images; a picture does not depend on the number of images."""
    keys = {**DEFAULTS, "root": str(root), "train_count": 6, "val_count": 2, "test_count": 2, **changes}
    return Shapes(**{key: value for key, value in keys.items() if key != "_target_"})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """A few default images."""
    return shapes(tmp_path_factory.mktemp("shapes"), test_count=60)


def test_the_default_set_is_large_enough_and_not_plain():
    assert len(NAMES) >= 4 and DEFAULTS["image_size"] >= 64 and DEFAULTS["train_count"] >= 2000
    assert not DEFAULTS["plain"]


def test_the_constructor_opens_no_file(tmp_path: Path):
    data = shapes(tmp_path / "nothing here")
    assert not (tmp_path / "nothing here").exists()
    assert data.count("train") == 6 and data.count("val") == 2 and data.count("test") == 2
    assert [category["name"] for category in data.categories()] == list(NAMES)


def test_a_set_may_have_no_val(tmp_path: Path):
    data = shapes(tmp_path, val_count=0)
    assert [data.count(split) for split in ("train", "val", "test")] == [6, 0, 2]


def test_pictures_have_one_to_five_visible_shapes_within_the_size_limits():
    size, counts, overlaps = 64, set(), 0
    for seed in range(60):
        pixels, masks, labels = draw(np.random.default_rng(seed), size, plain=False)
        repeated, _, _ = draw(np.random.default_rng(seed), size, plain=False)
        assert pixels.shape == (size, size, 3) and np.array_equal(pixels, repeated)
        assert 1 <= len(masks) == len(labels) <= 5
        counts.add(len(masks))
        assert np.sum(masks, axis=0).max() <= 1  # a pixel shows one shape
        sides = [max(np.ptp(np.nonzero(mask)[axis]) + 1 for axis in (0, 1)) for mask in masks]
        assert max(sides) <= size / 2 + 1 and sides[-1] >= size / 6  # the last shape is not covered
        overlaps += any(ndimage.binary_dilation(a, iterations=1)[b].any() for a in masks for b in masks if a is not b)
    assert counts == {1, 2, 3, 4, 5} and overlaps > 10


def test_plain_pictures_have_no_overlap_and_one_background_colour():
    for seed in range(20):
        pixels, masks, _ = draw(np.random.default_rng(seed), 64, plain=True)
        background = ~ndimage.binary_dilation(np.any(masks, axis=0), iterations=4)  # without antialiased edges
        assert len(np.unique(pixels[background], axis=0)) == 1
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
    """For disks, whose whole area follows from their box: the visible part is at least the minimum fraction."""
    smallest = 1.0
    for seed in range(150):
        _, masks, labels = draw(np.random.default_rng(seed), 64, plain=False)
        for mask, label in zip(masks, labels, strict=True):
            if NAMES[label] == "circle":
                rows, columns = np.nonzero(mask)
                smallest = min(smallest, mask.sum() / (np.pi / 4 * max(np.ptp(rows) + 1, np.ptp(columns) + 1) ** 2))
    assert MIN_VISIBLE_FRACTION - 0.05 < smallest < 0.9  # 0.05: the rim's pixels of a disk of 11


def test_a_set_is_drawn_once_and_other_keys_draw_another(tmp_path: Path):
    first = shapes(tmp_path)
    first.count("train")
    marker = first.folder / "marker"
    marker.touch()
    same_keys, other_seed = shapes(tmp_path), shapes(tmp_path, seed=1)
    assert torch.equal(same_keys.sample("train", 0, None)["image"], first.sample("train", 0, None)["image"])
    assert same_keys.folder == first.folder and marker.exists()
    assert not torch.equal(other_seed.sample("train", 0, None)["image"], first.sample("train", 0, None)["image"])
    # No temporary folders are left.
    assert {folder.name for folder in tmp_path.iterdir()} == {first.folder.name, other_seed.folder.name}


def test_pictures_with_stuff_are_another_set_in_which_each_pixel_has_an_object(tmp_path: Path):
    data, without = shapes(tmp_path, stuff=True), shapes(tmp_path)
    data.request_masks()
    assert data.folder != without.folder and data.folder.name.startswith("64px-stuff-")
    assert [(c["name"], c["isthing"]) for c in data.categories()] == [
        *((name, 1) for name in NAMES),
        *((name, 0) for name in GROUNDS),
    ]
    assert [c["name"] for c in without.categories()] == list(NAMES)
    kinds = set()
    for index in range(6):
        sample = data.sample("train", index, torch.Generator().manual_seed(index))
        assert (sample["masks"].sum(0) == 1).all()
        stuff = sample["labels"] >= len(NAMES)
        assert 1 <= stuff.sum() <= 2 and 1 <= (~stuff).sum() <= 5
        kinds |= set(sample["labels"][stuff].tolist())
        for box, mask in zip(sample["boxes"].tolist(), sample["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert len(kinds) > 1


def test_the_instances_and_the_panoptic_files_agree(tmp_path: Path):
    data = shapes(tmp_path, stuff=True)
    data.request_masks()
    for split in SPLITS:
        truth, instances = data.panoptic_truth(split), quiet_coco(data.ground_truth(split))
        assert list(truth.sizes) == instances.getImgIds() and not any(s.is_crowd for s in truth.segments[1])
        for image in truth.sizes:
            ids, objects = truth.read(image), instances.imgToAnns[image]
            assert (ids > 0).all() and len(objects) == len(truth.segments[image])
            for segment, annotation in zip(truth.segments[image], objects, strict=True):
                assert segment.category == annotation["category_id"] and segment.area == annotation["area"]
                assert np.array_equal(ids == segment.id, instances.annToMask(annotation))


def test_the_panoptic_files_are_read_as_cocos_are(tmp_path: Path):
    """By the paths of a split, the drawn files are a panoptic data set."""
    data = shapes(tmp_path, stuff=True)
    data.count("train")
    paths = [f"data.train.images={data.folder}/train", f"data.train.annotations={data.folder}/panoptic_train.json"]
    keys = ["data.val_count=0", "data.augmentation.kind=none", "data.augmentation.eval_size=64"]
    read = build(configure("train", ["model=detr", "data=coco_panoptic", *paths, *keys])["data"])
    for each in (data, read):
        each.request_masks()
    for index in range(6):
        ours, theirs = data.sample("train", index, None), read.sample("train", index, None)
        assert all(torch.equal(ours[key], theirs[key]) for key in ("image", "boxes", "labels", "masks"))


def test_stuff_needs_a_key_and_excludes_plain_pictures(tmp_path: Path):
    with pytest.raises(UserError, match=r"data.stuff=false draws no stuff"):
        shapes(tmp_path).panoptic_truth("val")
    with pytest.raises(UserError, match=r"data.plain=true .* data.stuff=true"):
        shapes(tmp_path, stuff=True, plain=True)


def test_a_set_without_stuff_has_the_folder_of_earlier_versions(tmp_path: Path):
    """The name depends on the old keys alone, so that pictures that users have drawn are found again."""
    keys = [DRAWING_VERSION, 64, 6, 2, 2, 0, 0]
    assert shapes(tmp_path).folder.name == f"64px-{f'{mix(*keys):016x}'[:8]}"


def test_splits_share_no_picture(small: Shapes):
    pictures = [small.sample(split, i, None)["image"] for split in ("train", "val", "test") for i in range(2)]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 6


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path):
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


def test_thresholding_solves_plain_shapes(tmp_path: Path):
    """The control for the next test: AP50 at the best threshold, with the true class of each region."""
    easy = shapes(tmp_path, plain=True, test_count=60)
    assert max(average_precision(easy, distant_blobs, level)[1] for level in (40, 60, 80)) >= 0.8


@pytest.mark.slow
def test_thresholding_does_not_solve_the_default_shapes(tmp_path: Path):
    """The detector of the test above, and one of regions of one colour, at their best thresholds."""
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
    boxes = [box for colour in np.unique(colours) for box in regions(colours == colour)]
    return [box for box in boxes if max(box[2] - box[0], box[3] - box[1]) <= 34]  # the largest shape and one pixel


def regions(mask: np.ndarray) -> list[list[float]]:
    """Connected regions of at least 6 x 6 as x0, y0, x1, y1, score; the score is the filled fraction of the box."""
    numbered, _ = ndimage.label(mask)
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
        if rows.stop - rows.start >= 6 and columns.stop - columns.start >= 6:
            filled = float((numbered[rows, columns] == number).mean())
            boxes.append([columns.start, rows.start, columns.stop, rows.stop, filled])
    return boxes


def average_precision(data: Shapes, detect: Any, level: int) -> tuple[float, float]:
    """AP and AP50 of `detect` on test; a box gets the class of the object that it overlaps most."""
    results = []
    for index in range(data.count("test")):
        sample = data.sample("test", index, None)
        detected = detect(sample["image"].permute(1, 2, 0).double().numpy(), level)
        if not detected:
            continue
        boxes = torch.tensor(detected)[:, :4]
        classes = sample["labels"][torchvision.ops.box_iou(boxes, sample["boxes"]).argmax(dim=1)]
        for (x0, y0, x1, y1, score), label in zip(detected, classes.tolist(), strict=True):
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


def quiet_coco(coco_json: dict[str, Any]) -> COCO:
    """Index a COCO JSON without pycocotools' output."""
    truth = COCO()
    truth.dataset = coco_json
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth
