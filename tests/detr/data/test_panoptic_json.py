"""Panoptic JSON becomes instances JSON, and every kind of invalid file is named in one sentence."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from common.errors import UserError
from detr.data.panoptic_json import PNG_KEY, to_coco, write_panoptic
from detr.data.panoptic_png import read_ids

THING = {"id": 300, "category_id": 4, "iscrowd": 0, "bbox": [1, 2, 3, 4], "area": 9}
STUFF = {"id": 7, "category_id": 90, "iscrowd": 0, "bbox": [0, 0, 60, 40], "area": 2000}
PANOPTIC: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in (5, 3)],
    "categories": [{"id": 90, "name": "grass", "isthing": 0}, {"id": 4, "name": "cat", "isthing": 1}],
    "annotations": [
        {"image_id": 3, "file_name": "3.png", "segments_info": [THING, STUFF]},
        {"image_id": 5, "file_name": "5.png", "segments_info": [{**THING, "iscrowd": 1}]},
    ],
}


def test_each_segment_becomes_an_annotation_and_each_image_names_its_png():
    """Annotations are matched to images by id and not by position, as the two lists differ in their order."""
    before = copy.deepcopy(PANOPTIC)
    coco_json = to_coco(PANOPTIC, Path("x.json"))
    assert PANOPTIC == before and coco_json["categories"] == PANOPTIC["categories"]
    assert [(image["id"], image[PNG_KEY]) for image in coco_json["images"]] == [(5, "5.png"), (3, "3.png")]
    assert coco_json["annotations"] == [
        {**THING, "image_id": 3},
        {**STUFF, "image_id": 3},
        {**THING, "iscrowd": 1, "image_id": 5},
    ]


def test_a_file_without_annotations_stays_one():
    assert "annotations" not in to_coco({k: PANOPTIC[k] for k in ("images", "categories")}, Path("x.json"))


def entry(**changes: Any) -> Callable[[Any], None]:
    """A change of the first annotation."""
    return lambda content: content["annotations"][0].update(changes)


def segment(**changes: Any) -> Callable[[Any], None]:
    """A change of the first segment."""
    return lambda content: content["annotations"][0]["segments_info"][0].update(changes)


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "instances": (lambda c: c["annotations"][0].pop("segments_info"), 'no list of "segments_info", so it is not'),
    "segments as text": (entry(segments_info="x"), 'no list of "segments_info"'),
    "a segment as text": (entry(segments_info=["x"]), 'no list of "segments_info"'),
    "no file name": (entry(file_name=None), 'has the "file_name" null; expected the name of its PNG'),
    "an unknown image": (entry(image_id=8), 'Entry 0 of "annotations" in x.json belongs to image 8, which is not'),
    "an image as text": (entry(image_id="3"), 'belongs to image "3", which is not listed'),
    "an image as a list": (entry(image_id=[3]), "belongs to image [3], which is not listed"),
    "an image twice": (entry(image_id=5), "Image 5 has two annotations"),
    "an image without one": (lambda c: c["annotations"].pop(), "1 of 2 images of x.json have no annotation, the first"),
    "segment 0": (segment(id=0), 'a segment with the "id" 0; expected an integer from 1 to 16777215'),
    "a segment that no colour can name": (segment(id=256**3), 'with the "id" 16777216; expected'),
    "a segment as a number with a fraction": (segment(id=1.5), 'with the "id" 1.5; expected'),
    "a segment twice": (segment(id=7), "lists the segment 7 twice"),
    "a segment without an area": (segment(area=None), 'has the segment 300 with the "area" null; expected its number'),
    "a segment with an area of 0": (segment(area=0), 'has the segment 300 with the "area" 0; expected its number'),
    "a category without isthing": (lambda c: c["categories"][0].pop("isthing"), 'has the "isthing" null; expected 1'),
    "isthing as text": (lambda c: c["categories"][1].update(isthing="yes"), 'category 4 of x.json has the "isthing"'),
    "no images": (lambda c: c.pop("images"), 'has no list of "images", so it is not COCO panoptic JSON'),
    "images as text": (lambda c: c.update(images=["a"]), 'Entry 0 of "images" in x.json is "a"; expected an object'),
    "an image id as text": (lambda c: c["images"][0].update(id="5"), 'has the "id" "5"; expected an integer'),
    "annotations as an object": (lambda c: c.update(annotations={}), 'has no list of "annotations"'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_invalid_file_is_named_in_one_sentence(name: str):
    change, words = FAULTS[name]
    content = copy.deepcopy(PANOPTIC)
    change(content)
    with pytest.raises(UserError) as error:
        to_coco(content, Path("x.json"))
    assert words in str(error.value) and "x.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[], None, 5, "text"])
def test_other_json_is_refused(content: Any):
    with pytest.raises(UserError, match=r'x\.json has no list of "images"'):
        to_coco(content, Path("x.json"))


def test_instances_that_were_written_as_panoptic_files_are_read_back(tmp_path: Path):
    masks = np.zeros((2, 40, 60), np.uint8)
    masks[0, :20], masks[1, 20:, 5:9] = 1, 1
    codes = [rle.encode(np.asfortranarray(mask)) for mask in masks]
    objects = [
        {"id": 50 + i, "image_id": 5, "category_id": c, "bbox": [0, 0, 1, 1], "area": int(mask.sum()), "iscrowd": 0}
        for i, (c, mask) in enumerate(zip((4, 90), masks, strict=True))
    ]
    instances = {
        **PANOPTIC,
        "annotations": [a | {"segmentation": code} for a, code in zip(objects, codes, strict=True)],
    }
    write_panoptic(instances, tmp_path / "set.json")
    coco_json = to_coco(json.loads((tmp_path / "set.json").read_text()), tmp_path / "set.json")
    assert coco_json["annotations"] == [a | {"id": i} for i, a in enumerate(objects, 1)]
    ids = read_ids(tmp_path / "set/5.png", (40, 60))
    assert np.array_equal(ids, masks[0] + 2 * masks[1]) and not read_ids(tmp_path / "set/3.png", (40, 60)).any()
