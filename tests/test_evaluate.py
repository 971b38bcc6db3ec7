"""evaluate.py records what its numbers were computed from, and `load` computes as documented."""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.train.assembly import load


def test_results_name_checkpoint_weights_data_versions_and_command(inside: Callable[..., str], tmp_path: Path) -> None:
    inside("train", "model=vit", "run_dir=run", "trainer.steps=1", "trainer.device=cpu", "trainer.precision=fp32")
    file = "run/checkpoints/best.pt"
    stdout = inside("evaluate", f"checkpoint={file}", "weights=raw", "split=val", "output=numbers (1)")
    written = json.loads(Path("numbers (1)/results.json").read_text("utf-8"))
    assert written.items() >= json.loads(next(line for line in stdout.splitlines() if line.startswith("{"))).items()
    assert written["checkpoint"] == str(tmp_path / file) and written["weights"] == f"{file}: step 1, raw"
    assert (written["split"], written["samples"], written["precision"]) == ("val", 200, "fp32")
    assert written["digests"].keys() == {"images", "labels"} and written["files"] == {}
    assert written["versions"].items() >= {"python": platform.python_version(), "torch": torch.__version__}.items()
    assert written["command"].startswith("python ")


def test_load_computes_as_predict_in_fp32_and_under_autocast_in_bf16(
    inside: Callable[..., str], tmp_path: Path
) -> None:
    inside("train", "model=vit", "run_dir=run", "trainer.steps=2", "trainer.device=cpu", "trainer.ema_decay=0.5")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save("digit.png")
    model, task = load("run/checkpoints/best.pt")
    (batch,) = task.read("digit.png")
    for precision in ("fp32", "bf16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            (answer,) = task.predict(model, batch)
        file = ["checkpoint=run/checkpoints/best.pt", "input=digit.png", "top=10", f"trainer.precision={precision}"]
        inside("predict", *file, f"output={precision}")
        classes = json.loads((tmp_path / precision / "digit.png.classes.json").read_text())["classes"]
        probabilities = answer["log_probabilities"].exp()
        assert {c["name"]: c["probability"] for c in classes} == {
            name: round(float(p), 4) for name, p in zip(map(str, range(10)), probabilities, strict=True)
        }
