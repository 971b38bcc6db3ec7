"""The mean of checkpoints' weights: its values and types, what it keeps of the newest file, and what it refuses."""

import os

import pytest
import torch

from common.errors import UserError
from common.files import checkpoint
from common.train.averaging import average
from common.train.state import describe, select_weights


def content(step=1, ema=None, **model):
    """The content of a checkpoint with these tensors."""
    return {
        "step": step,
        "best": step / 10,
        "model": model,
        "average": None if ema is None else {"updates": step, "weights": ema},
        "optimizer": {"state": {}, "steps": step},
        "task": {"classes": ["a", "b"]},
        "config": {"seed": step, "model": {"_target_": "toy.Net", "heads": 4, "stem": {"width": 8}}},
    }


def write(folder, *contents):
    """Paths of checkpoints with these contents."""
    paths = [folder / f"file_{number}.pt" for number in range(len(contents))]
    for path, each in zip(paths, contents, strict=True):
        checkpoint.save(path, each)
    return paths


def test_the_mean_of_three_is_that_worked_out_by_hand(tmp_path):
    """(1 + 2 + 6) / 3 = 3 and (-1 + 0.5 + 2) / 3 = 0.5."""
    rows = [(1.0, -1.0), (2.0, 0.5), (6.0, 2.0)]
    files = write(tmp_path, *(content(step, w=torch.tensor([row])) for step, row in enumerate(rows)))
    assert average(files)["model"]["w"].tolist() == [[3.0, 0.5]]


def test_sums_are_float64_and_the_mean_has_the_type_of_the_tensors(tmp_path):
    """65504 is float16's largest number, and twice that its infinity; in float32, 2^24 + 1 + 1 is 2^24."""
    half = [torch.tensor([65504.0], dtype=torch.float16)] * 3
    single = [torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([1.0])]
    files = write(tmp_path, *(content(h=h, s=s) for h, s in zip(half, single, strict=True)))
    mean = average(files)["model"]
    assert mean["h"].dtype == torch.float16 and mean["h"].item() == 65504
    assert mean["s"].dtype == torch.float32 and mean["s"].item() == (2**24 + 2) / 3 == 5592406


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_mean_of_equal_values_is_that_value_bit_for_bit(tmp_path, dtype, count):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean = average(write(tmp_path, *(content(step, w=value) for step in range(count))))
    assert torch.equal(mean["model"]["w"], value) and mean["model"]["w"].dtype == dtype


def test_tied_tensors_are_not_counted_twice(tmp_path):
    """float64, which needs no conversion, so that a sum in place would reach the other name."""
    tied = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 3.0)]
    mean = average(write(tmp_path, *(content(embedding=tensor, output=tensor) for tensor in tied)))["model"]
    assert mean["embedding"].item() == mean["output"].item() == 2


def test_counters_and_everything_else_are_those_of_the_newest_file_in_any_order(tmp_path):
    files = write(tmp_path, *(content(step, n=torch.tensor(step), w=torch.ones(1) * step) for step in (20, 30, 10)))
    mean, newest = average(files), checkpoint.load(files[1])
    assert mean["model"]["n"].item() == 30 and mean["model"]["w"].item() == 20
    assert mean["mean"] == {"steps": [10, 20, 30], "ema": False} and "mean" not in newest
    for key in newest.keys() - {"model"}:
        assert mean[key] == newest[key], key


def test_ema_weights_are_averaged_where_the_run_kept_them_and_the_result_says_so(tmp_path):
    first, second = ({"w": torch.tensor([value])} for value in (2.0, 4.0))
    files = write(tmp_path, content(8, ema=first, w=torch.zeros(1)), content(9, ema=second, w=torch.zeros(1)))
    mean = average(files)
    for kind in ("auto", "raw"):
        assert select_weights(mean, kind)["w"].item() == 3
        assert describe(files[0], mean, kind) == f"{files[0]}: average of steps 8, 9, averaged (EMA)"
    with pytest.raises(UserError, match="weights=ema, but this file holds one set of weights"):
        select_weights(mean, "ema")


def test_the_mean_has_no_ranges_of_int8_which_are_those_of_other_weights(tmp_path):
    files = write(tmp_path, *({**content(step, w=torch.ones(1)), "int8": {"w": (0.0, 1.0)}} for step in range(2)))
    assert "int8" not in average(files)


def test_a_single_step_and_a_mean_are_described(tmp_path):
    files = write(tmp_path, content(8, w=torch.zeros(1)), content(9, w=torch.zeros(1)))
    assert describe(files[0], checkpoint.load(files[0])) == f"{files[0]}: step 8, raw"
    mean = tmp_path / "mean.pt"
    checkpoint.save(mean, average(files))
    assert describe(mean, checkpoint.load(mean)) == f"{mean}: average of steps 8, 9, raw"


def other_model():
    wider = content(2, w=torch.zeros(2))
    wider["config"]["model"]["stem"]["width"] = 16
    return wider


REFUSED = {
    "another shape": (content(w=torch.zeros(3)), r"differ in w, which is \(2,\) and \(3,\)"),
    "one more": (content(w=torch.zeros(2), v=torch.zeros(1)), r"differ in v, which is missing and \(1,\)"),
    "one less": (content(), r"differ in w, which is \(2,\) and missing"),
    "equal shapes of another model": (other_model(), r"different models: model\.stem\.width was 8 and is 16"),
    "other classes": ({**content(w=torch.zeros(2)), "task": {"classes": ["b", "a"]}}, "different classes or tokens"),
    "averaged and raw": (content(ema={"w": torch.zeros(2)}, w=torch.zeros(2)), r"only one of .* holds EMA weights"),
    "an average": (
        {**content(w=torch.zeros(2)), "mean": {"steps": [1, 2], "ema": False}},
        "is already an average of checkpoints",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_different_runs_are_refused_by_name(tmp_path, name):
    wrong, message = REFUSED[name]
    files = write(tmp_path, content(w=torch.zeros(2)), wrong)
    with pytest.raises(UserError, match=message) as caught:
        average(files)
    assert str(files[1]) in str(caught.value) and "\n" not in str(caught.value)


def test_a_foreign_file_is_refused(tmp_path):
    files = write(tmp_path, content(w=torch.zeros(2)))
    torch.save({"w": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign\.pt was not written by this program"):
        average([*files, tmp_path / "foreign.pt"])


def test_fewer_than_two_files_and_one_file_under_two_names_are_refused(tmp_path):
    [file] = write(tmp_path, content(w=torch.zeros(2)))
    with pytest.raises(UserError, match="needs at least two checkpoints and there is none"):
        average([])
    with pytest.raises(UserError, match=r"at least two checkpoints and there is only .*file_0\.pt"):
        average([file])
    os.link(file, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"file_0\.pt and .*best\.pt are the same file"):
        average([file, tmp_path / "best.pt"])
