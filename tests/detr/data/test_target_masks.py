"""Masks of training targets: aligned with the boxes, equal to pycocotools' own, padded, and only on request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from common.data.loading import Loader
from common.errors import UserError
from detr.data.coco import Coco, Files
from detr.data.transforms import Augmentation

UNCHANGED = Augmentation(kind="none", sizes=[1], eval_size=40, max_size=1333, middle_sizes=[1], crop=(1, 1))
PAPER = Augmentation(kind="detr", sizes=[80, 96], eval_size=40, max_size=133, middle_sizes=[40, 50], crop=(30, 50))
NONE = Files(images=None, annotations=None)
SQUARE = [[10, 5, 30, 5, 30, 15, 10, 15]]
RUNS = {"size": [40, 60], "counts": [100, 20, 2280]}
# Out of order by image; the crowd and the box without area are no targets, and their masks are not read.
ANNOTATIONS: list[dict[str, Any]] = [
    {"id": 1, "image_id": 3, "category_id": 9, "bbox": [10, 5, 20, 10], "segmentation": SQUARE},
    {"id": 2, "image_id": 7, "category_id": 4, "bbox": [2, 20, 1, 20], "segmentation": RUNS},
    {"id": 3, "image_id": 3, "category_id": 4, "bbox": [0, 0, 60, 40], "iscrowd": 1},
    {"id": 4, "image_id": 3, "category_id": 4, "bbox": [5, 5, 0, 9]},
    {"id": 5, "image_id": 3, "category_id": 4, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 0, 9], *SQUARE]},
]


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Coco]:
    """A function that makes a data set of the images 7, 3 and 9 of 60 x 40 pixels, as train and test."""
    for i, name in enumerate("abc"):
        Image.new("RGB", (60, 40), (40 * i, 90, 90)).save(tmp_path / f"{name}.png")

    def make(annotations: list[dict[str, Any]] = ANNOTATIONS, with_masks: bool = True, **keys: Any) -> Coco:
        images = [{"id": i, "file_name": f"{name}.png", "width": 60, "height": 40} for i, name in ((7, "b"), (3, "a"))]
        images.append({"id": 9, "file_name": "c.png", "width": 60, "height": 40})
        content = {
            "images": images,
            "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
            "annotations": annotations,
        }
        (tmp_path / "set.json").write_text(json.dumps(content))
        files = Files(images=str(tmp_path), annotations=str(tmp_path / "set.json"))
        defaults: dict[str, Any] = {"root": None, "train": files, "val": NONE, "test": files, "val_count": 0}
        defaults |= {"batch_size": 2, "augmentation": UNCHANGED, "pad_to": 1, "cache": False}
        data = Coco(**defaults | keys)
        if with_masks:
            data.request_masks()
        return data

    return make


def test_masks_are_aligned_with_boxes_and_labels(make_data: Callable[..., Coco]):
    data = make_data()
    batch = data.collate([data.sample("train", i, None) for i in range(3)])
    assert batch["counts"] == [1, 2, 0] and batch["labels"].tolist() == [0, 1, 0]
    assert batch["masks"].dtype == torch.bool and batch["masks"].shape == (3, 40, 60)
    column = torch.zeros(40, 60, dtype=torch.bool)
    column[20:, 2] = True  # run 100 to 119, column by column, of 40 pixels a column
    square = torch.zeros(40, 60, dtype=torch.bool)
    square[5:15, 10:30] = True
    assert torch.equal(batch["masks"][0], column) and torch.equal(batch["masks"][1], square)
    assert (batch["masks"][2] & square).sum() == 200 < batch["masks"][2].sum() < 250
    empty = data.collate([data.sample("train", 2, None)])
    assert empty["masks"].shape == (0, 40, 60) and empty["masks"].dtype == torch.bool


def test_masks_are_padded_with_false_as_images_are(make_data: Callable[..., Coco]):
    data = make_data(pad_to=32)
    batch = data.collate([data.sample("train", i, None) for i in range(2)])
    assert batch["images"].shape[2:] == batch["masks"].shape[1:] == (64, 64)
    assert not batch["masks"][:, 40:].any() and not batch["masks"][:, :, 60:].any()
    full = [{**ANNOTATIONS[0], "segmentation": {"size": [40, 60], "counts": [0, 2400]}}]
    batch = make_data(full).collate([make_data(full).sample("train", 1, None)])
    assert batch["masks"].all()


def test_without_a_request_batches_are_the_same_without_masks(make_data: Callable[..., Coco]):
    keys = [(epoch, (0, 1, 2)) for epoch in range(6)]

    def batches(**options: Any) -> list[dict[str, Any]]:
        return list(Loader(make_data(**options), "train", seed=1, workers=0, pin=False)(keys))

    plain, masked = (batches(with_masks=with_masks, augmentation=PAPER) for with_masks in (False, True))
    for without, with_masks in zip(plain, masked, strict=True):
        masks = with_masks.pop("masks")
        assert masks.shape == (len(with_masks["boxes"]), *with_masks["images"].shape[2:])
        assert without.keys() == with_masks.keys()
        for key, value in without.items():
            assert torch.equal(value, with_masks[key]) if torch.is_tensor(value) else value == with_masks[key]


def test_a_request_reaches_splits_that_have_been_read(make_data: Callable[..., Coco]):
    data = make_data(with_masks=False)
    assert "masks" not in data.sample("train", 1, None)
    data.request_masks()
    assert data.sample("train", 1, None)["masks"].shape == (2, 40, 60)


def test_a_users_image_has_no_masks(make_data: Callable[..., Coco]):
    data = make_data()
    assert "masks" not in data.collate([data.view(torch.zeros(3, 40, 60, dtype=torch.uint8), Path("photo.jpg"))])


def test_a_test_split_without_annotations_has_empty_masks(make_data: Callable[..., Coco], tmp_path: Path):
    data = make_data()
    content = json.loads((tmp_path / "set.json").read_text())
    del content["annotations"]
    (tmp_path / "info.json").write_text(json.dumps(content))
    data.test = Files(images=str(tmp_path), annotations=str(tmp_path / "info.json"))
    batch = data.collate([data.sample("test", i, None) for i in range(3)])
    assert batch["masks"].shape == (0, 40, 60) and "annotations" not in data.ground_truth("test")


def test_splits_that_are_cut_from_train_have_masks(make_data: Callable[..., Coco]):
    data = make_data(val_count=2)
    for split in ("train", "val"):
        for i in range(data.count(split)):
            sample = data.sample(split, i, None)
            count = {7: 1, 3: 2, 9: 0}[sample["id"]]
            assert sample["masks"].shape == (count, 40, 60) and sample["masks"].flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (None, 'has no "segmentation"; add its polygons'),
        ([[1, 2, 3, 4]], "has a polygon of 2 points"),
        ({"size": [60, 40], "counts": [2400]}, r".* of the \"size\" \[60, 40\]; expected \[40, 60\]"),
        ([[70, 5, 80, 5, 80, 9]], ".* wholly outside its image of 60 x 40 pixels"),
    ],
)
def test_an_invalid_mask_is_named_before_the_first_sample(
    segmentation: Any, words: str, make_data: Callable[..., Coco]
):
    annotations = [{**ANNOTATIONS[0], "segmentation": segmentation}]
    with pytest.raises(UserError, match=f"Annotation 1 of .*set.json {words}") as error:
        make_data(annotations).count("train")
    assert "\n" not in str(error.value)
    assert make_data(annotations, with_masks=False).count("train") == 3  # boxes do not need it


def test_masks_without_a_pixel_are_counted(make_data: Callable[..., Coco]):
    thin = [[2.1, 2, 2.2, 2, 2.2, 9]]
    annotations = [*ANNOTATIONS, {**ANNOTATIONS[0], "id": 6, "segmentation": thin}]
    note = "masks without a pixel, whose polygons are too thin or not in pixels: 1 (annotation 6)"
    assert f"train: {note}" in make_data(annotations).summary()
    assert "without a pixel" not in "\n".join(make_data().summary())
    assert "without a pixel" not in "\n".join(make_data(annotations, with_masks=False).summary())


def test_masks_that_lie_elsewhere_than_their_boxes_are_counted(make_data: Callable[..., Coco]):
    """A code of rows instead of columns, as some programs write it, lies elsewhere; a box one pixel off does not."""
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 10:30] = 1
    changes = np.flatnonzero(np.diff(mask.ravel(), prepend=0, append=0))
    by_rows = {"size": [40, 60], "counts": np.diff(changes, prepend=0, append=mask.size).tolist()}
    annotations = [
        {**ANNOTATIONS[0], "id": 1, "bbox": [11, 4, 21, 11]},
        {**ANNOTATIONS[0], "id": 2, "segmentation": by_rows},
        {**ANNOTATIONS[0], "id": 3, "bbox": [30, 20, 4, 4], "segmentation": [[30, 20, 33, 20, 33, 23, 30, 23]]},
    ]
    assert "train: masks that lie elsewhere than their boxes: 1 (annotation 2)" in make_data(annotations).summary()
    assert not any("lie elsewhere" in line for line in make_data(annotations[::2]).summary())


def test_masks_of_coco_are_those_that_pycocotools_reads(real_data: Callable[[str], Path]):
    mini = real_data("coco_mini")
    files = Files(images=str(mini / "images"), annotations=str(mini / "train.json"))
    augmentation = Augmentation(kind="none", sizes=[1], eval_size=64, max_size=64, middle_sizes=[1], crop=(1, 1))
    keys: dict[str, Any] = {"root": None, "train": files, "val": NONE, "test": NONE, "val_count": 0, "batch_size": 1}
    data = Coco(**keys, augmentation=augmentation, pad_to=1, cache=False)
    data.request_masks()
    reader, checked = COCO(str(mini / "train.json")), 0
    for index in range(data.count("train")):
        id = data.sample("train", index, None)["id"]
        masks = data._masks["train"].read(index)  # before resizing
        targets = [a for a in reader.imgToAnns[id] if not a["iscrowd"]]
        expected = np.array([reader.annToMask(a) for a in targets])
        assert masks.shape[0] == len(targets) and np.array_equal(masks.numpy(), expected.reshape(masks.shape))
        checked += len(targets)
    assert checked > 500
