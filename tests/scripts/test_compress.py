"""Calibration from the command line, and int8 through the doors."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.files import checkpoint
from common.nn import int8
from common.nn.quantisation import range_names
from common.train.assembly import load
from common.train.calibration import calibrate
from scripts.compress import main

Door = Callable[..., str]
FILE = "run/checkpoints/best.pt"
CALIBRATED = "run/checkpoints/best.int8.pt"
SMALL = {
    "vit": [
        *("model=vit", "model.width=16", "model.heads=2", "model.feedforward=24", "model.layers=1"),
        *("trainer.steps=60", "trainer.eval_every=60", "optimizer.lr=0.01"),
    ],
    "detr": [
        *("model=detr", "model.width=16", "model.heads=2", "model.feedforward=24", "trainer.steps=2"),
        *("data.train_count=32", "data.val_count=8", "data.test_count=8"),
    ],
    "seq2seq": [
        *("model=seq2seq", "model.width=16", "model.heads=2", "model.feedforward=24", "trainer.steps=2"),
        *("data=parallel_text", "data.train.pairs=pairs.tsv", "data.val_count=8", "data.test_count=8"),
        *("data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=270", "schedule.warmup=1"),
    ],
}
needs_int8 = pytest.mark.skipif(int8.unsupported() is not None, reason="this machine cannot compute in int8")


def numbers(stdout: str) -> dict[str, float]:
    """The metrics that evaluate.py prints as JSON."""
    found: dict[str, float] = json.loads(next(line for line in stdout.splitlines() if line.startswith("{")))
    return found


@needs_int8
def test_a_calibrated_checkpoint_is_evaluated_and_predicts_in_int8(
    inside: Door, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside("train", *SMALL["vit"], "run_dir=run", "trainer.device=cpu", "trainer.ema_decay=0.5")
    before = Path(FILE).read_bytes()
    assert main([f"checkpoint={FILE}", "quantize=int8"]) == 0
    out = capsys.readouterr().out
    assert Path(FILE).read_bytes() == before and "4 linear maps and convolutions in int8" in out and "top1" in out
    command = shlex.split(out.splitlines()[-1].partition("python evaluate.py ")[2])
    assert command == [f"checkpoint={CALIBRATED}", "trainer.precision=int8"]

    plain, calibrated = checkpoint.load(FILE), checkpoint.load(CALIBRATED)
    assert calibrated.keys() == (plain.keys() - {"optimizer"}) | {"int8"}
    for part in ("model", "average"):
        ours, theirs = ({**content[part].get("weights", content[part])} for content in (calibrated, plain))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert calibrated["config"] == plain["config"] and calibrated["task"] == plain["task"]

    fp32 = [numbers(inside("evaluate", f"checkpoint={f}", "trainer.precision=fp32")) for f in (FILE, CALIBRATED)]
    assert fp32[0] == fp32[1], "without trainer.precision=int8, a calibrated checkpoint is like any other"
    stdout = inside("evaluate", *command, "output=numbers")
    assert "note      4 linear maps and convolutions are in int8" in stdout
    assert abs(numbers(stdout)["test/top1"] - fp32[0]["test/top1"]) < 0.05
    assert json.loads(Path("numbers/results.json").read_text("utf-8"))["precision"] == "int8"

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save("digit.png")
    shares = {}
    for precision in ("fp32", "int8"):
        inside("predict", f"checkpoint={CALIBRATED}", "input=digit.png", "top=10", f"trainer.precision={precision}",
               f"output={precision}")  # fmt: skip
        classes = json.loads((tmp_path / precision / "digit.png.classes.json").read_text())["classes"]
        shares[precision] = torch.tensor([share for _, share in sorted((c["name"], c["probability"]) for c in classes)])
    assert 0 < (shares["fp32"] - shares["int8"]).abs().max() < 0.05


@needs_int8
@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "seq2seq"])
def test_detectors_and_translators_are_calibrated_and_evaluated_in_int8(inside: Door, name: str) -> None:
    lines = [f"{word} and {other}\t{other} und {word}" for word in "abcdefgh" for other in "ijklmnop"]
    Path("pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    inside("train", *SMALL[name], "run_dir=run", "trainer.device=cpu")
    assert main([f"checkpoint={FILE}", "quantize=int8", "output=calibrated.pt"]) == 0
    stdout = inside("evaluate", "checkpoint=calibrated.pt", "trainer.precision=int8")
    assert "are in int8" in stdout and numbers(stdout)
    model, _ = load(FILE)
    assert checkpoint.load("calibrated.pt")["int8"].keys() == {*range_names(model)}, "no tensor is left without a range"


def test_int8_without_calibration_and_training_in_int8_are_refused(inside: Door) -> None:
    sentence = inside("train", "model=vit", "trainer.precision=int8", code=2)
    assert sentence.startswith("trainer.precision=int8 is for evaluate.py and predict.py; train in auto, bf16 or fp32")
    inside("train", "model=vit", "trainer.steps=1", "run_dir=run", "trainer.device=cpu")
    for door, more in (("evaluate", []), ("predict", ["input=digit.png"])):
        Image.new("L", (8, 8)).save("digit.png")
        sentence = inside(door, f"checkpoint={FILE}", "trainer.precision=int8", "trainer.device=cpu", *more, code=2)
        assert sentence.rstrip().endswith(
            f"{FILE} has none; measure them on val: python scripts/compress.py checkpoint={FILE} quantize=int8."
        )
    assert not Path(CALIBRATED).exists()


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint=x.pt", "quantize=int4"]) == 2
    assert capsys.readouterr().err == "quantize=int4: expected quantize=int8; see --help.\n"
    assert main(["checkpoint=x.pt", "quantize=int8"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_model_without_quantisable_maps_and_broken_weights_are_refused(inside: Door) -> None:
    inside("train", "model=vit", "trainer.steps=1", "run_dir=run", "trainer.device=cpu")
    model, task = load(FILE, "trainer.device=cpu")
    options = {"device": torch.device("cpu"), "batch_size": 50, "samples": 50}
    with torch.no_grad():
        model.encoder.blocks[0].residuals[0].norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^encoder\.blocks\.0\.attention\.in_proj\.q gets values that are not finite"):
        calibrate(task, task.data, model, **options)
    model.unquantised = ("encoder",)
    with pytest.raises(UserError, match=r"^Classifier has nothing to compute in int8: no ResNet backbone"):
        calibrate(task, task.data, model, **options)
