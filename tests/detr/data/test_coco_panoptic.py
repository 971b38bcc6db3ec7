"""The panoptic format: boxes and masks of segments, ids that do not fit, and COCO's real files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from common.config.check import build
from common.config.compose import configure
from common.data import batching
from common.errors import UserError
from detr.data.coco_panoptic import CocoPanoptic
from detr.data.panoptic_png import encode_ids

SIZE = (40, 60)  # height, width
CATEGORIES = [{"id": 9, "name": "grass", "isthing": 0}, {"id": 4, "name": "cat", "isthing": 1}]


def segment(ids: np.ndarray, id: int, category: int, crowd: int = 0) -> dict[str, Any]:
    """The entry of a segment, with its tight box."""
    rows, columns = np.nonzero(ids == id)
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    fields = {"id": id, "category_id": category, "iscrowd": crowd, "area": len(rows)}
    return fields | {"bbox": [int(side) for side in box]}


def maps() -> dict[int, np.ndarray]:
    """The ids of two images: one with a thing, stuff, a crowd and VOID, one with a thing alone."""
    first = np.full(SIZE, 70_000)
    first[5:15, 10:30], first[20:30, 40:50], first[38:] = 300, 5, 0
    second = np.zeros(SIZE, np.int64)
    second[:8, 50:] = 1
    return {3: first, 7: second}


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., CocoPanoptic]:
    """A function that writes the official layout (train2017 and val2017 alike) and makes a data set of it."""

    def make(change: Callable[[dict[str, Any]], Any] = lambda content: None, masks: bool = True) -> CocoPanoptic:
        ids = maps()
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (7, 3)],
            "categories": copy.deepcopy(CATEGORIES),
            "annotations": [
                {
                    "image_id": 3,
                    "file_name": "3.png",
                    "segments_info": [
                        segment(ids[3], 300, 4),
                        segment(ids[3], 5, 4, crowd=1),
                        segment(ids[3], 70_000, 9),
                    ],
                },
                {"image_id": 7, "file_name": "7.png", "segments_info": [segment(ids[7], 1, 4)]},
            ],
        }
        change(content)
        for split in ("train2017", "val2017"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / "annotations" / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
            for image, colours in ids.items():
                Image.new("RGB", SIZE[::-1]).save(tmp_path / split / f"{image}.jpg")
                file = tmp_path / "annotations" / f"panoptic_{split}" / f"{image}.png"
                if not file.exists():
                    file.write_bytes(encode_ids(colours))
        keys = [f"data.root={tmp_path}", "data.val_count=0", "data.augmentation.kind=none"]
        data: CocoPanoptic = build(
            configure("train", ["model=detr", "data=coco_panoptic", *keys, "data.augmentation.eval_size=40"])["data"]
        )
        if masks:
            data.request_masks()
        return data

    return make


def test_segments_but_crowds_are_targets_with_their_boxes_and_masks(make_data: Callable[..., CocoPanoptic]):
    data, ids = make_data(), maps()
    assert data.categories() == [
        {"id": 4, "name": "cat", "isthing": 1},
        {"id": 9, "name": "grass", "isthing": 0},
    ]
    batch = data.collate([data.sample("train", i, None) for i in range(2)])
    assert batch["ids"] == [7, 3] and batch["counts"] == [1, 2] and batch["labels"].tolist() == [0, 0, 1]
    assert batch["boxes"].tolist() == [[50, 0, 60, 8], [10, 5, 30, 15], [0, 0, 60, 38]]
    expected = np.stack([ids[7] == 1, ids[3] == 300, ids[3] == 70_000])
    assert np.array_equal(batch["masks"].numpy(), expected)


def test_without_masks_no_png_is_read(make_data: Callable[..., CocoPanoptic], tmp_path: Path):
    data = make_data(masks=False)
    for png in tmp_path.rglob("annotations/*/*.png"):
        png.unlink()
    sample = data.sample("train", 1, None)
    assert "masks" not in sample and sample["boxes"].shape == (2, 4) and data.fingerprint("train")
    assert "segmentation" not in data.ground_truth("test")["annotations"][0]


def test_the_ground_truth_has_masks_on_request(make_data: Callable[..., CocoPanoptic]):
    data, ids = make_data(), maps()
    for _ in range(2):  # the second one is not read from PNGs
        annotations = data.ground_truth("test")["annotations"]
        assert [(a["image_id"], a["id"], a["iscrowd"]) for a in annotations] == [
            (3, 300, 0),
            (3, 5, 1),
            (3, 70_000, 0),
            (7, 1, 0),
        ]
        for a in annotations:
            assert np.array_equal(rle.decode(a["segmentation"]), ids[a["image_id"]] == a["id"])


def test_the_panoptic_truth_holds_all_segments(make_data: Callable[..., CocoPanoptic]):
    truth, ids = make_data().panoptic_truth("test"), maps()
    assert truth.sizes == {7: SIZE, 3: SIZE} and [c["isthing"] for c in truth.categories] == [1, 0]
    assert [(s.id, s.category, s.is_crowd) for s in truth.segments[3]] == [
        (300, 4, False),
        (5, 4, True),
        (70_000, 9, False),
    ]
    assert all(np.array_equal(truth.read(image), ids[image]) for image in (3, 7))


def test_a_missing_png_is_named_before_the_first_sample(make_data: Callable[..., CocoPanoptic], tmp_path: Path):
    make_data().count("train")
    folder = tmp_path / "annotations/panoptic_train2017"
    (folder / "3.png").rename(tmp_path / "3.png")
    data = make_data_again(tmp_path)
    with pytest.raises(UserError, match=r"1 of 2 PNGs of segment ids are missing, the first is .*train2017/3.png; put"):
        data.count("train")


def test_a_test_set_without_annotations_has_samples_without_segments(
    make_data: Callable[..., CocoPanoptic], tmp_path: Path
):
    make_data()
    file = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(file.read_text())
    del content["annotations"]
    file.write_text(json.dumps(content))
    data = make_data_again(tmp_path)
    (sample, *_) = [data.sample("test", i, None) for i in range(data.count("test"))]
    assert len(sample["masks"]) == len(sample["boxes"]) == 0 and sample["masks"].shape[1:] == sample["image"].shape[1:]
    assert data.panoptic_truth("test").files == {} and "annotations" not in data.ground_truth("test")


def make_data_again(root: Path) -> CocoPanoptic:
    """A data set of the files in `root` as they are, with masks."""
    keys = [f"data.root={root}", "data.val_count=0"]
    data: CocoPanoptic = build(configure("train", ["model=detr", "data=coco_panoptic", *keys])["data"])
    data.request_masks()
    return data


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda segments: segments.pop(),
            r"PNG .*/3.png has pixels of segment 70000, which the JSON does not list for image 3; list it",
        ),
        (
            lambda segments: segments.append({**segments[0], "id": 99}),
            r"lists the segment 99 for image 3, but the PNG .*/3.png has no pixel of it",
        ),
    ],
    ids=["in the PNG alone", "in the JSON alone"],
)
def test_ids_that_only_one_of_json_and_png_has_are_named(
    change: Callable[[list[Any]], Any], words: str, workers: int, make_data: Callable[..., CocoPanoptic]
):
    data = make_data(lambda content: change(content["annotations"][0]["segments_info"]))
    with pytest.raises(UserError, match=words) as error:
        [*batching.evaluation(data, "test", batch_size=2, rank=0, world=1, workers=workers)]
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        data.panoptic_truth("test").read(3)


def test_an_unknown_category_and_a_missing_box_are_named(make_data: Callable[..., CocoPanoptic]):
    for change, words in (
        ({"category_id": 500}, r"Annotation 300 of .*panoptic_train2017.json has category 500, which is not listed"),
        ({"bbox": None}, r'Annotation 300 of .*panoptic_train2017.json has the "bbox" null'),
    ):
        data = make_data(lambda c, change=change: c["annotations"][0]["segments_info"][0].update(change))
        with pytest.raises(UserError, match=words):
            data.count("train")


def test_a_folder_without_panoptic_files_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has none of the layouts COCO 2017 panoptic \(annotations/panoptic_train2017"):
        make_data_again(tmp_path).count("train")


@pytest.fixture(scope="module")
def mini(real_data: Callable[[str], Path]) -> CocoPanoptic:
    """COCO's files, with a fifth of train as val and small images."""
    keys = [f"data.root={real_data('coco_panoptic_mini')}", "data.val_share=0.2", "data.augmentation.sizes=[128,160]"]
    keys += ["data.augmentation.eval_size=128", "data.augmentation.max_size=256"]
    keys += ["data.augmentation.middle_sizes=[160]", "data.augmentation.crop=[64,128]"]
    data: CocoPanoptic = build(configure("train", ["model=detr", "data=coco_panoptic", *keys])["data"])
    data.request_masks()
    return data


def test_cocos_files_are_read(mini: CocoPanoptic):
    assert [mini.count(split) for split in ("train", "val", "test")] == [21, 5, 27]
    assert len(mini.categories()) == 133 and sum(c["isthing"] for c in mini.categories()) == 80
    assert "layout of COCO 2017 (panoptic)" in mini.summary()[0]
    segments = sum(len(s) for split in ("train", "val") for s in mini.panoptic_truth(split).segments.values())
    assert segments == 285


def test_boxes_of_cocos_files_are_the_extents_of_the_masks(mini: CocoPanoptic):
    checked = 0
    for split in ("train", "val", "test"):
        truth = mini.panoptic_truth(split)
        by_image: dict[int, dict[int, list[float]]] = {image: {} for image in truth.sizes}
        for a in mini.ground_truth(split)["annotations"]:
            by_image[a["image_id"]][a["id"]] = a["bbox"]
        for image in truth.sizes:
            ids = truth.read(image)
            for s in truth.segments[image]:
                assert by_image[image][s.id] == segment(ids, s.id, s.category)["bbox"]
                assert s.area == (ids == s.id).sum()
                checked += 1
    assert checked == 285 + 263


def test_masks_of_cocos_files_are_augmented_with_their_boxes(mini: CocoPanoptic):
    """A segment's mask lies in its box, and reaches its borders up to a pixel unless it was cropped."""
    cropped = total = 0
    for index in range(mini.count("train")):
        sample = mini.sample("train", index, torch.Generator().manual_seed(index))
        assert sample["masks"].shape == (len(sample["boxes"]), *sample["image"].shape[1:])
        assert sample["masks"].sum(0).max() <= 1  # segments do not overlap
        for box, mask in zip(sample["boxes"], sample["masks"], strict=True):
            total += 1
            if mask.any():
                rows, columns = mask.nonzero().unbind(1)
                extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                outside = torch.cat([box[:2] - extent[:2], extent[2:] - box[2:]]).max()
                # Each of two resizings moves an edge by up to a pixel, and the second enlarges the first by up to 2.5.
                assert outside <= 3.5
                cropped += bool(((extent - box).abs() > 4).any())
            else:
                cropped += 1
    assert total > 100 and 0 < cropped < total / 2


@pytest.mark.slow
def test_a_detector_trains_ten_steps_on_cocos_files_and_is_evaluated(
    inside: Callable[..., str], tmp_path: Path, real_data: Callable[[str], Path]
):
    small = ["model.width=32", "model.heads=2", "model.encoder_layers=1", "model.decoder_layers=1", "model.queries=40"]
    sizes = ["sizes=[96]", "eval_size=96", "max_size=160", "middle_sizes=[128]", "crop=[64,96]"]
    keys = ["data.val_share=0.2", "data.batch_size=4", *(f"data.augmentation.{size}" for size in sizes)]
    length = ["trainer.steps=10", "trainer.eval_every=10", "trainer.device=cpu", "run_dir=run"]
    root = f"data.root={real_data('coco_panoptic_mini')}"
    inside("train", "model=detr", "data=coco_panoptic", root, *small, *keys, *length)
    assert "test/AP" in json.loads((tmp_path / "run/results.json").read_text())
