"""A notebook predicts, from images and texts in memory, what predict.py writes for their files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
LENGTH = ["trainer.steps=1", "trainer.device=cpu", "trainer.precision=fp32", "trainer.workers=0", "schedule.warmup=0"]
TINY = {
    "detr": [
        *("model.width=16", "model.heads=2", "model.feedforward=16", "model.queries=7", "data.batch_size=4"),
        *("data.train_count=8", "data.val_count=4", "data.test_count=4"),
    ],
    "vit": ["model.width=16", "model.layers=1", "model.heads=2"],
    "seq2seq": [
        *("model.width=16", "model.heads=2", "model.feedforward=16", "model.encoder_layers=1", "task.predict.beam=2"),
        *(
            "model.decoder_layers=1",
            "data=parallel_text",
            "data.source=en",
            "data.target=de",
            "data.batch_size=400",
            "data.tokenizer.vocabulary=290",
        ),
        *("data.train.pairs=pairs.tsv", "data.val_count=4", "data.test_count=4", "task.predict.longest_extra=2"),
    ],
}


@pytest.mark.slow
def test_the_notebook_runs_and_its_records_are_those_of_predict(inside: Callable[..., str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save("photo.png")
    Path("phrases.txt").write_text("3 hours ago\nMonday\n")
    Path("pairs.tsv").write_text("".join(f"{hours} hours ago\tvor {hours} Stunden\n" for hours in range(60)))
    for model, keys in TINY.items():
        inside("train", f"model={model}", *keys, *LENGTH, f"run_dir={model}")
    command = [sys.executable, str(ROOT / "tests/notebook.py"), *(f"{model}/checkpoints/best.pt" for model in TINY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    records = json.loads(process.stdout)
    inside("predict", "checkpoint=detr", "input=photo.png", "threshold=0")
    inside("predict", "checkpoint=vit", "input=photo.png", "top=3")
    written = {
        name: json.loads(Path(f"predictions/photo.png.{name}.json").read_text()) for name in ("boxes", "classes")
    }
    objects = sorted(written["boxes"]["objects"], key=lambda item: item["score"], reverse=True)
    for record, expected in zip(records["objects"], objects, strict=True):
        assert record["name"] == expected["name"] and record["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert record["box"] == pytest.approx(expected["box"], abs=0.01)
    for record, expected in zip(records["classes"], written["classes"]["classes"], strict=True):
        assert record["name"] == expected["name"] and record["share"] == pytest.approx(
            expected["probability"], abs=1e-4
        )
    lines = inside("predict", "checkpoint=seq2seq", "input=phrases.txt").splitlines()
    assert [translations[0]["text"] for translations in records["phrases"]] == lines
    assert records["translation"][0]["text"] == lines[0]
