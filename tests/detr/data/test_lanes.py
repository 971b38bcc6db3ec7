from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.errors import UserError
from detr.data.lane_transforms import LaneAugmentation
from detr.data.lanes import Lanes

DEFAULTS = yaml.safe_load((Path(__file__).parents[3] / "configs/data/lanes.yaml").read_text())


def lanes(root: Path, **changes: Any) -> Lanes:
    keys = {**DEFAULTS, "root": str(root), "train_count": 6, "val_count": 2, "test_count": 3, **changes}
    keys["augmentation"] = LaneAugmentation(**keys["augmentation"])
    return Lanes(**{key: value for key, value in keys.items() if key != "_target_"})


def test_the_pictures_are_drawn_at_first_use_and_once(tmp_path, capsys):
    data = lanes(tmp_path / "roads")
    assert not (tmp_path / "roads").exists() and not data.root_has_files()
    assert [data.count(split) for split in ("train", "val", "test")] == [6, 2, 3]
    assert "once" in capsys.readouterr().err
    assert lanes(tmp_path / "roads").count("test") == 3 and not capsys.readouterr().err
    assert [path.name for path in (tmp_path / "roads").iterdir()] == [data.folder.name]
    assert sum(1 for _ in data.folder.rglob("*.png")) == 11


def test_a_sample_has_the_labels_of_its_file(tmp_path):
    data = lanes(tmp_path)
    sample, label = data.sample("test", 1, None), data.ground_truth("test")[1]
    assert sample["image"].shape == (3, 64, 64) and sample["original_size"] == (64, 64)
    assert np.allclose(sample["points"][..., 0].numpy(), label.lanes, atol=1e-4)
    flipped = [data.sample("train", 0, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert len({float(s["points"][0, -1, 0]) for s in flipped}) == 2


def test_a_split_does_not_depend_on_the_other_ones_but_on_the_seed(tmp_path):
    first, more, other = lanes(tmp_path), lanes(tmp_path, train_count=9), lanes(tmp_path, seed=1)
    truth = [data.ground_truth("test")[0].lanes.tolist() for data in (first, more, other)]
    assert truth[0] == truth[1] != truth[2] and truth[0] != first.ground_truth("train")[0].lanes.tolist()
    assert len({data.folder for data in (first, more, other)}) == 3


def test_a_set_may_have_no_val(tmp_path):
    assert [lanes(tmp_path, val_count=0).count(split) for split in ("train", "val", "test")] == [6, 0, 3]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be drawn"):
        lanes(tmp_path / "file").count("train")
