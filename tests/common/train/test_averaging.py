"""The mean of checkpoints' weights: its values and types, what of the newest it keeps, and what it refuses."""

import os

import pytest
import torch

from common.errors import UserError
from common.files import checkpoint
from common.train.averaging import average
from common.train.state import describe, select_weights


def content(step=1, ema=None, **model):
    """A checkpoint with these tensors, as a run writes it."""
    return {
        "step": step,
        "best": step / 10,
        "model": model,
        "average": None if ema is None else {"updates": step, "weights": ema},
        "optimizer": {"state": {}, "steps": step},
        "task": {"classes": ["a", "b"]},
        "config": {"seed": step, "model": {"_target_": "toy.Net", "heads": 4, "stem": {"width": 8}}},
    }


def written(folder, *contents):
    paths = [folder / f"file_{number}.pt" for number in range(len(contents))]
    for path, one in zip(paths, contents, strict=True):
        checkpoint.save(path, one)
    return paths


def test_the_mean_of_three_is_that_worked_out_by_hand(tmp_path):
    """(1 + 2 + 6) / 3 = 3 and (-1 + 0.5 + 2) / 3 = 0.5."""
    rows = [(1.0, -1.0), (2.0, 0.5), (6.0, 2.0)]
    files = written(tmp_path, *(content(step, w=torch.tensor([row])) for step, row in enumerate(rows)))
    assert average(files)["model"]["w"].tolist() == [[3.0, 0.5]]


def test_the_sum_is_float64_and_the_mean_has_the_tensors_own_type(tmp_path):
    """65504 is float16's largest number, and twice that its infinity; in float32, 2^24 + 1 + 1 is 2^24."""
    half = [torch.tensor([65504.0], dtype=torch.float16)] * 3
    single = [torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([1.0])]
    files = written(tmp_path, *(content(h=h, s=s) for h, s in zip(half, single, strict=True)))
    mean = average(files)["model"]
    assert mean["h"].dtype == torch.float16 and mean["h"].item() == 65504
    assert mean["s"].dtype == torch.float32 and mean["s"].item() == (2**24 + 2) / 3 == 5592406


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_one_value_repeated_stays_bit_for_bit(tmp_path, dtype, count):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean = average(written(tmp_path, *(content(step, w=value) for step in range(count))))
    assert torch.equal(mean["model"]["w"], value) and mean["model"]["w"].dtype == dtype


def test_tied_tensors_are_not_counted_twice(tmp_path):
    """float64, which needs no conversion, so that a sum in place would reach the other name."""
    tied = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 3.0)]
    mean = average(written(tmp_path, *(content(embedding=tensor, output=tensor) for tensor in tied)))["model"]
    assert mean["embedding"].item() == mean["output"].item() == 2


def test_counters_and_all_else_are_the_newest_ones_in_whatever_order_the_files_come(tmp_path):
    files = written(tmp_path, *(content(step, n=torch.tensor(step), w=torch.ones(1) * step) for step in (20, 30, 10)))
    mean, newest = average(files), checkpoint.load(files[1])
    assert mean["model"]["n"].item() == 30 and mean["model"]["w"].item() == 20
    assert mean["mean"] == {"steps": [10, 20, 30], "ema": False} and "mean" not in newest
    for key in newest.keys() - {"model"}:
        assert mean[key] == newest[key], key


def test_ema_weights_are_averaged_where_the_run_kept_them_and_the_result_says_so(tmp_path):
    one, two = ({"w": torch.tensor([value])} for value in (2.0, 4.0))
    files = written(tmp_path, content(8, ema=one, w=torch.zeros(1)), content(9, ema=two, w=torch.zeros(1)))
    mean = average(files)
    for kind in ("auto", "raw"):
        assert select_weights(mean, kind)["w"].item() == 3
        assert describe(files[0], mean, kind) == f"{files[0]}: average of steps 8, 9, averaged (EMA)"
    with pytest.raises(UserError, match="weights=ema, but this file holds one set of weights"):
        select_weights(mean, "ema")


def test_files_with_and_without_the_note_are_described(tmp_path):
    files = written(tmp_path, content(8, w=torch.zeros(1)), content(9, w=torch.zeros(1)))
    assert describe(files[0], checkpoint.load(files[0])) == f"{files[0]}: step 8, raw"
    mean = tmp_path / "mean.pt"
    checkpoint.save(mean, average(files))
    assert describe(mean, checkpoint.load(mean)) == f"{mean}: average of steps 8, 9, raw"


def other_model():
    one = content(2, w=torch.zeros(2))
    one["config"]["model"]["stem"]["width"] = 16
    return one


REFUSED = {
    "another shape": (content(w=torch.zeros(3)), r"differ in w, which is \(2,\) and \(3,\)"),
    "one more": (content(w=torch.zeros(2), v=torch.zeros(1)), r"differ in v, which is missing and \(1,\)"),
    "one less": (content(), r"differ in w, which is \(2,\) and missing"),
    "equal shapes of another model": (other_model(), r"different models: model\.stem\.width was 8 and is 16"),
    "other classes": ({**content(w=torch.zeros(2)), "task": {"classes": ["b", "a"]}}, "different classes or tokens"),
    "averaged and raw": (content(ema={"w": torch.zeros(2)}, w=torch.zeros(2)), r"only one of .* holds EMA weights"),
    "an average": ({**content(w=torch.zeros(2)), "mean": {"steps": [1, 2], "ema": False}}, "is an average already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_a_common_mean_are_refused_by_name(tmp_path, name):
    wrong, said = REFUSED[name]
    files = written(tmp_path, content(w=torch.zeros(2)), wrong)
    with pytest.raises(UserError, match=said) as caught:
        average(files)
    assert str(files[1]) in str(caught.value) and "\n" not in str(caught.value)


def test_a_foreign_file_is_refused(tmp_path):
    files = written(tmp_path, content(w=torch.zeros(2)))
    torch.save({"w": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign\.pt was not written by this program"):
        average([*files, tmp_path / "foreign.pt"])


def test_fewer_than_two_files_and_one_file_under_two_names_are_refused(tmp_path):
    [file] = written(tmp_path, content(w=torch.zeros(2)))
    with pytest.raises(UserError, match="needs at least two checkpoints and there is none"):
        average([])
    with pytest.raises(UserError, match=r"at least two checkpoints and there is only .*file_0\.pt"):
        average([file])
    os.link(file, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"file_0\.pt and .*best\.pt are the same file"):
        average([file, tmp_path / "best.pt"])
