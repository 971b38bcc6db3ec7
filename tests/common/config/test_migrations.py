"""Files of earlier versions: tensors that have been renamed since, and the names of sweeps' folders."""

import shutil
from pathlib import Path

import pytest

from common.config import diff, migrations
from common.config.compose import Command, configure
from common.config.diff import fingerprint
from common.files import checkpoint

SMALL = ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "data.batch_size=32", "trainer.workers=0"]
SMALL += ["trainer.device=cpu", "trainer.steps=4", "schedule.warmup=1", "trainer.ema_decay=0.5", "trainer.save_every=2"]
SMALL += ["trainer.log_every=1", "trainer.eval_every=2"]
PRESENT = {"classifier": "head", "encoder.layers": "encoder.blocks"}  # former and present names


def rewrite_with_former_names(file: Path) -> None:
    """Rewrite a checkpoint with the former names of tensors."""
    content = checkpoint.load(file)
    former_names = {new: old for old, new in PRESENT.items()}

    def former(values: dict) -> dict:
        renamed = {}
        for name, value in values.items():
            new = next((new for new in former_names if name == new or name.startswith(f"{new}.")), None)
            renamed[name if new is None else former_names[new] + name.removeprefix(new)] = value
        assert renamed.keys() != values.keys()
        return renamed

    content["model"], content["optimizer"] = former(content["model"]), former(content["optimizer"])
    content["average"]["weights"] = former(content["average"]["weights"])
    content["config"]["optimizer"]["rates"] = former(content["config"]["optimizer"]["rates"])
    file.unlink()
    checkpoint.save(file, content)


@pytest.mark.slow
def test_a_run_with_former_tensor_names_resumes_and_evaluates_as_with_present_ones(inside, monkeypatch) -> None:
    """Weights, their average, the optimizer's state and optimizer.rates, also on the command line."""
    present, former = "+optimizer.rates.head=0.5", "+optimizer.rates.classifier=0.5"
    inside("train", *SMALL, present, "run_dir=whole")
    numbers = inside("evaluate", "checkpoint=whole/checkpoints/best.pt").partition("{")[2]
    shutil.copytree("whole", "former")
    for name in ("results.json", "checkpoints/step_00000004.pt", "checkpoints/best.pt"):
        Path("former", name).unlink()
    rewrite_with_former_names(Path("former/checkpoints/step_00000002.pt"))
    config = Path("former/config.yaml")
    config.write_text(config.read_text().replace("head: 0.5", "classifier: 0.5"))
    model = configure("train", SMALL)["model"]["_target_"]
    monkeypatch.setitem(migrations.RENAMED_TENSORS, model, PRESENT)
    inside("train", *SMALL, former, "run_dir=former", "resume=auto")
    for name in ("metrics.jsonl", "results.json"):
        assert Path("former", name).read_text() == Path("whole", name).read_text()
    rewrite_with_former_names(Path("former/checkpoints/best.pt"))
    assert inside("evaluate", "checkpoint=former/checkpoints/best.pt").partition("{")[2] == numbers


def test_a_name_is_renamed_by_whole_words() -> None:
    values = {"classifier.weight": 1, "classifiers.weight": 2, "encoder.layers.0.bias": 3, "encoder": 4}
    assert migrations._renamed(values, PRESENT) == {
        **{"head.weight": 1, "classifiers.weight": 2, "encoder.blocks.0.bias": 3, "encoder": 4}
    }


def test_a_former_evaluator_is_read_as_auto_with_a_notice() -> None:
    """Typed, in a stored config and in a checkpoint; other values stay as they are."""
    command = Command("train", ["model=detr", "task.evaluator=faster_coco_eval"])
    command.prepare()
    typed = command.compose()
    assert typed.config["task"]["evaluator"] == "auto"
    assert [line for line in typed.notices if "task.evaluator=faster_coco_eval is now auto" in line]
    stored = configure("train", ["model=detr"])
    stored["task"]["evaluator"] = "faster_coco_eval"
    assert migrations.migrate_config(stored)["task"]["evaluator"] == "auto"
    content = {"config": stored, "model": {}}
    assert migrations.migrate_checkpoint(content)["config"]["task"]["evaluator"] == "auto"
    for task in ({"evaluator": "pycocotools"}, {"evaluator": None}, {"evaluator": ["faster_coco_eval"]}, {}):
        config = {"task": dict(task)}
        assert migrations.update_names(config) == [] and config == {"task": task}


# A run's folder in a sweep is named by a fingerprint of its config.


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("model=detr", "e44533d7"),
        ("model=vit", "d5f9a9fb"),
        ("model=seq2seq", "bb11929c"),
        ("model=detr_r50 data.root=coco", "43f4e92e"),
    ],
)
def test_fingerprints_are_those_of_the_first_version_that_had_them(line: str, name: str) -> None:
    """The names are those of version 4f99cde."""
    assert fingerprint(configure("train", line.split())) == name


def test_an_added_key_changes_the_fingerprint_only_with_another_value_than_before(monkeypatch) -> None:
    before = configure("train", ["model=vit"])
    monkeypatch.setitem(migrations.ADDED_KEYS, "optimizer.added", 0.5)
    monkeypatch.setitem(migrations.ADDED_CLASS_KEYS, before["model"]["_target_"], {"added": {"a": 1}})
    migrated = migrations.migrate_config(before)
    assert migrated != before and fingerprint(migrated) == fingerprint(before)
    for section, value in (("optimizer", 0.7), ("model", {"a": 2})):
        assert fingerprint({**migrated, section: {**migrated[section], "added": value}}) != fingerprint(before)
    assert set(diff.ALWAYS_HASHED_KEYS) <= {*diff.flatten(migrations.ADDED_KEYS), "data.pad_to"}
