"""COCO files that are altered at random end in success or in one sentence, from training to evaluation."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.types import SPLITS
from detr.data.panoptic_png import encode_ids
from detr.evaluation.panoptic_metric import PanopticMetric

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 90, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 64.0, 1e308),
    *(float("inf"), float("-inf"), float("nan"), "", "0", "../a.png", "\ud800", "\udce9", "\0", "x" * 6000, "a\nb"),
    *("http://x/a.png", r"C:\a.png", "caf\u00e9", "cafe\u0301"),
    *([], [1], [[]], {}, {"a": 1}, [1e9] * 4, [0, 0, -5, -5], [1, 2, "3", 4], [float("nan")] * 4, [10**400] * 4),
    *([[1, 2, 3, 4, 5, 6]], [[-1e300] * 6], [[0, 0, 5e8, 5e8, 0, 5e8]], [[10**400] * 6]),
    *({"size": [40, 60], "counts": "ooo"}, {"size": [1, 2], "counts": [1, 2]}, {"size": [-1, -5], "counts": [5]}),
]
BOX = {"image_id": 3, "category_id": 90, "area": 150, "iscrowd": 0}
COCO_JSON: dict[str, Any] = {
    "images": [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in ((7, "b.png"), (3, "a.png"))],
    "categories": [{"id": 90, "name": "brush"}, {"id": 4, "name": "aeroplane"}],
    "annotations": [
        {**BOX, "id": 1, "bbox": [10, 5, 20, 10], "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {
            **BOX,
            "id": 2,
            "bbox": [0.5, 1.5, 3, 4],
            "image_id": 7,
            "segmentation": {"size": [40, 60], "counts": "Z15aY2"},
        },
        {**BOX, "id": 3, "bbox": [0, 0, 60, 40], "iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [5, 2395]}},
    ],
}


SEGMENT = {"category_id": 90, "iscrowd": 0, "bbox": [0, 0, 30, 40], "area": 1200}
PANOPTIC_JSON: dict[str, Any] = {
    "images": COCO_JSON["images"],
    "categories": [{"id": 90, "name": "brush", "isthing": 1}, {"id": 4, "name": "sky", "isthing": 0}],
    "annotations": [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": [{**SEGMENT, "id": 300}, {**SEGMENT, "id": 7}]}
        for i in (3, 7)
    ],
}


def altered(choices: random.Random, original: dict[str, Any]) -> str:
    """The text of `original` with one to three changes."""
    content = copy.deepcopy(original)
    for _ in range(choices.choice([1, 1, 2, 3])):
        key = choices.choice([*original])
        entries, draw = content.get(key), choices.random()
        dicts = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        if (segments := [e["segments_info"] for e in dicts if "segments_info" in e]) and choices.random() < 0.6:
            entries = choices.choice(segments)
        if draw < 0.08 or not isinstance(entries, list) or not entries:
            content[key] = choices.choice(VALUES)
        elif draw < 0.12:
            content.pop(key)
        elif draw < 0.2:
            entries[choices.randrange(len(entries))] = choices.choice(VALUES)
        elif draw < 0.25:
            entries.append(copy.deepcopy(choices.choice(entries)))
        elif isinstance(entry := choices.choice(entries), dict):
            field = choices.choice([*entry, "area", "segmentation"])
            entry.pop(field, None)
            if draw < 0.9:
                entry[field] = choices.choice(VALUES)
    characters = [*json.dumps(content)]
    if choices.random() < 0.08:
        characters[choices.randrange(len(characters))] = chr(choices.randrange(1, 300))
    return "".join(characters[: choices.randrange(len(characters)) if choices.random() < 0.03 else None])


def segment_all(data: Any, folder: Path) -> None:
    """What a panoptic task does with its data in an evaluation."""
    truth = data.panoptic_truth("test")
    metric = PanopticMetric(truth)
    for image, size in truth.sizes.items():
        segments = (torch.ones(size, dtype=torch.int64), [{"id": 1, "category_id": truth.categories[0]["id"]}])
        metric.update({"ids": [image]}, [{"segments": segments}])
    metric.gather()
    metric.compute()
    metric.write(folder)


def use(config: dict[str, Any], folder: Path, with_masks: bool) -> None:
    """What a run does with its data: the summary, a step's batch, an evaluation with its files and pictures."""
    data: Any = build(config["data"])
    task: Any = build(config["task"], data=data)
    if with_masks:
        data.request_masks()
    "\n".join([*data.summary(), *task.advice(False)]).encode("utf-8", "backslashreplace")
    json.dumps([task.state(), *(data.fingerprint(split) for split in SPLITS)])
    training = [data.sample("train", i, torch.Generator()) for i in range(data.count("train"))]
    task.targets(data.collate(training))
    batch = data.collate([data.sample("test", i, None) for i in range(data.count("test"))])
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 5, 30, 15]])
    answer = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.zeros(2, dtype=torch.int64)}
    if with_masks:
        answer["masks"] = torch.ones(2, 40, 60, dtype=torch.bool)
    metric = task.metric("test")
    metric.update(batch, [answer] * len(batch["ids"]))
    metric.gather()
    metric.compute()
    metric.write(folder)
    task.pictures(batch, [answer] * len(batch["ids"]), 2)
    if hasattr(data, "panoptic_truth"):
        segment_all(data, folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "original", "with_masks"),
    [("coco", COCO_JSON, False), ("coco", COCO_JSON, True), ("coco_panoptic", PANOPTIC_JSON, True)],
    ids=["boxes", "masks", "panoptic"],
)
def test_altered_files_end_in_success_or_one_sentence(
    name: str, original: dict[str, Any], with_masks: bool, tmp_path: Path
) -> None:
    """200 files of one seed. A crash of pycocotools would end the test."""
    for folder in ("images", "out", "x"):
        (tmp_path / folder).mkdir()
    for file in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / file)
    for file in ("3.png", "7.png"):
        (tmp_path / "x" / file).write_bytes(encode_ids(np.repeat([[300] * 30 + [7] * 30], 40, axis=0)))
    files = {"images": tmp_path / "images", "annotations": tmp_path / "x.json"}
    paths = [f"data.{split}.{key}={path}" for split in SPLITS for key, path in files.items()]
    config = configure("train", ["model=detr", f"data={name}", *paths])
    choices, sentences = random.Random(0), 0
    for _ in range(200):
        text = altered(choices, original)
        (tmp_path / "x.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            use(config, tmp_path / "out", with_masks)
        except UserError as error:
            sentences += 1
            sentence = str(error).replace("a\nb", "")  # a name, which is escaped where it is printed
            assert "\n" not in sentence and len(sentence) < 700, text
        except Exception as error:
            raise AssertionError(text) from error
    assert 50 < sentences < 190
