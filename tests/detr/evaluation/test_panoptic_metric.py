"""The panoptic metric: ground truth against itself, files that are read back, equal numbers on any number of ranks."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from detr.data.panoptic import PanopticTruth, Segment
from detr.data.panoptic_png import encode_ids, read_ids
from detr.evaluation.panoptic_metric import PanopticMetric, Segments

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 40, "name": "grass", "isthing": 0},
    {"id": 41, "name": "sky", "isthing": 0},
]
NAMES = [f"{name}{ending}" for ending in ("", "_things", "_stuff") for name in ("PQ", "SQ", "RQ")]


def write_truth(folder: Path, images: int = 5, side: int = 12) -> PanopticTruth:
    """Random images 1, 2, ... of two things and one stuff each, with their PNGs; no image has the category 41."""
    rng = np.random.default_rng(0)
    segments, files = {}, {}
    folder.mkdir(exist_ok=True)
    for image in range(1, images + 1):
        ids = np.full((side, side), 70_000 + image)
        ids[2:7, 1 : 5 + image % 3] = 300
        ids[8:, 3:8] = 5
        ids[0] = 0
        labels = {300: 3, 5: int(rng.choice([3, 7])), 70_000 + image: 40}
        segments[image] = [Segment(id, c, int((ids == id).sum()), False) for id, c in labels.items()]
        files[image] = folder / f"{image}.png"
        files[image].write_bytes(encode_ids(ids))
    sizes = dict.fromkeys(segments, (side, side))
    return PanopticTruth(categories=CATEGORIES, sizes=sizes, segments=segments, files=files)


def itself(truth: PanopticTruth, image: int) -> dict[str, Segments]:
    """The ground truth of an image as an answer."""
    ids = torch.from_numpy(truth.read(image).astype(np.int64))
    infos = [{"id": s.id, "category_id": s.category} for s in truth.segments[image] if not s.is_crowd]
    for segment in truth.segments[image]:
        ids[ids == segment.id] *= not segment.is_crowd
    return {"segments": Segments(ids, infos)}


def shifted(truth: PanopticTruth, image: int) -> dict[str, Segments]:
    """An answer with errors: the true map moved by `image` pixels, with one segment of another category."""
    ids, infos = itself(truth, image)["segments"]
    ids = ids.roll(image % 4, 1)
    infos = [{**info, "category_id": 41} if info["id"] == 5 and image % 2 else info for info in infos]
    return {"segments": Segments(ids, infos)}


def evaluated(truth: PanopticTruth, answer: Any, images: list[int]) -> PanopticMetric:
    metric = PanopticMetric(truth)
    for image in images:
        metric.update({"ids": [image]}, [answer(truth, image)])
    metric.gather()
    return metric


def test_the_ground_truth_against_itself_has_quality_one(tmp_path: Path):
    metric = evaluated(write_truth(tmp_path / "png"), itself, [3, 1, 2, 5, 4])
    assert metric.compute() == dict.fromkeys(NAMES, 1.0)
    table = metric.details()
    assert table[0] == ("name", "PQ", "SQ", "RQ", "true_positives", "false_positives", "false_negatives")
    assert table[3] == ("grass", 1.0, 1.0, 1.0, 5, 0, 0) and table[4] == ("sky", -1.0, -1.0, -1.0, 0, 0, 0)


def test_qualities_of_things_and_stuff_are_means_over_their_classes(tmp_path: Path):
    metric = evaluated(write_truth(tmp_path / "png"), shifted, [1, 2, 3, 4, 5])
    numbers, rows = metric.compute(), {row[0]: row for row in metric.details()[1:]}
    assert list(numbers) == NAMES and 0 < numbers["PQ"] < 1
    assert numbers["PQ_things"] == pytest.approx((rows["cat"].PQ + rows["dog"].PQ) / 2, abs=1e-15)
    assert numbers["RQ_stuff"] == pytest.approx((rows["grass"].RQ + rows["sky"].RQ) / 2, abs=1e-15)
    assert rows["sky"].false_positives == 3 and rows["sky"].PQ == 0  # in the images 1, 3 and 5


def test_coco_against_itself_has_quality_one(real_data: Any):
    """Two segments of val2017 are crowds, which are no class's segments."""
    root = real_data("coco_panoptic_mini")
    truth = build(configure("train", ["model=detr", "data=coco_panoptic", f"data.root={root}"])["data"]).panoptic_truth(
        "test"
    )
    metric = evaluated(truth, itself, list(truth.sizes))
    assert metric.compute() == dict.fromkeys(NAMES, 1.0)
    assert sum(row[4] for row in metric.details()[1:]) == 263 - 2


def test_the_written_files_hold_the_segments(tmp_path: Path):
    truth = write_truth(tmp_path / "png")
    evaluated(truth, shifted, [1, 2, 3, 4, 5]).write(tmp_path / "out")
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert content.keys() == {"annotations"} and len(content["annotations"]) == 5
    for entry in content["annotations"]:
        assert entry.keys() == {"image_id", "file_name", "segments_info"}
        assert entry["file_name"] == f"{entry['image_id']:012d}.png"
        ids, infos = shifted(truth, entry["image_id"])["segments"]
        assert np.array_equal(read_ids(tmp_path / "out/panoptic" / entry["file_name"], (12, 12)), ids.numpy())
        assert entry["segments_info"] == infos and set(infos[0]) == {"id", "category_id"}


def test_further_keys_of_segments_are_not_written(tmp_path: Path):
    truth = write_truth(tmp_path / "png", images=1)
    ids, infos = itself(truth, 1)["segments"]
    further = [{"id": torch.tensor(i["id"]), "category_id": i["category_id"], "score": 0.5} for i in infos]
    evaluated(truth, lambda *_: {"segments": (ids, further)}, [1]).write(tmp_path / "out")
    (entry,) = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]
    assert entry["segments_info"] == infos


def test_a_part_of_a_split_and_a_split_without_annotations(tmp_path: Path):
    truth = write_truth(tmp_path / "png")
    metric = PanopticMetric(truth)
    metric.restrict(2)
    for image in (2, 5):
        metric.update({"ids": [image]}, [itself(truth, image)])
    metric.gather()
    assert metric.compute()["PQ"] == 1
    unlabelled = PanopticTruth(categories=CATEGORIES, sizes=truth.sizes, segments={}, files={})
    metric = PanopticMetric(unlabelled)
    for image in truth.sizes:
        metric.update({"ids": [image]}, [itself(truth, image)])
    metric.gather()
    assert metric.compute() == {} and len(metric.details()) == 1
    metric.write(tmp_path / "out")
    assert len(list((tmp_path / "out/panoptic").iterdir())) == 5


def test_an_image_without_segments_is_allowed(tmp_path: Path):
    """All three true segments are missed."""
    truth = write_truth(tmp_path / "png", images=1)
    nothing = Segments(torch.zeros(12, 12, dtype=torch.int32), [])
    metric = evaluated(truth, lambda *_: {"segments": nothing}, [1])
    assert metric.compute()["PQ"] == 0 and sum(row[6] for row in metric.details()[1:]) == 3


def test_wrong_answers_are_named(tmp_path: Path):
    truth = write_truth(tmp_path / "png")
    ids = torch.ones(12, 12, dtype=torch.int64)
    metric = PanopticMetric(truth)
    with pytest.raises(UserError, match="image 1: a predicted segment has category 99, which the ground truth"):
        metric.update({"ids": [1]}, [{"segments": (ids, [{"id": 1, "category_id": 99}])}])
    for infos in ([], [{"id": 2, "category_id": 3}], [{"id": 1, "category_id": 3}] * 2):
        with pytest.raises(AssertionError, match="image 1: the ids"):
            metric.update({"ids": [1]}, [{"segments": (ids, infos)}])
    with pytest.raises(AssertionError, match="image 1: the segments have the size"):
        metric.update({"ids": [1]}, [{"segments": (ids[:6], [{"id": 1, "category_id": 3}])}])
    for call in (metric.compute, lambda: metric.write(tmp_path)):
        with pytest.raises(AssertionError, match="gather"):
            call()


@pytest.mark.parametrize("images", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 5]])
def test_a_missing_or_doubled_image_is_an_error(images: list[int], tmp_path: Path):
    with pytest.raises(AssertionError, match=r"4 of 5|more than once: \[5\]"):
        evaluated(write_truth(tmp_path / "png"), itself, images)


def evaluate_on_ranks(rank: int, folder: str) -> None:
    """With three ranks, then two: rank 0 evaluates four of the five images, rank 1 one, rank 2 none."""
    truth = write_truth(Path(folder, f"png{rank}"))
    for world in (3, 2):
        if rank >= world:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
        metric = evaluated(truth, shifted, [[5, 1, 3, 2], [4], []][rank])
        Path(folder, f"{world}-{rank}.json").write_text(json.dumps([metric.compute(), metric.details()]))
        metric.write(Path(folder, f"files{world}"))
        dist.destroy_process_group()


def test_one_two_and_three_ranks_give_the_same_numbers_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))  # so that a new process can import this file
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision", "pycocotools.cocoeval"])
    mp.start_processes(evaluate_on_ranks, (str(tmp_path),), nprocs=3, start_method="forkserver")
    metric = evaluated(write_truth(tmp_path / "png"), shifted, [1, 2, 3, 4, 5])
    expected = json.loads(json.dumps([metric.compute(), metric.details()]))
    metric.write(tmp_path / "files1")
    files = sorted(path.relative_to(tmp_path / "files1") for path in (tmp_path / "files1").rglob("*.*"))
    assert len(files) == 6 and 0 < expected[0]["PQ"] < 1
    for world in (2, 3):
        for rank in range(world):
            assert json.loads((tmp_path / f"{world}-{rank}.json").read_text()) == expected
        for file in files:
            assert (tmp_path / f"files{world}" / file).read_bytes() == (tmp_path / "files1" / file).read_bytes()
