"""What earlier versions wrote: tensors that have been renamed since, and the folders of sweeps."""

import shutil
from pathlib import Path

import pytest

from common.config import diff, migrations
from common.config.compose import configure
from common.config.diff import fingerprint
from common.files import checkpoint

SMALL = ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "data.batch_size=32", "trainer.workers=0"]
SMALL += ["trainer.device=cpu", "trainer.steps=4", "schedule.warmup=1", "trainer.ema_decay=0.5", "trainer.save_every=2"]
SMALL += ["trainer.log_every=1", "trainer.eval_every=2"]
PRESENT = {"classifier": "head", "encoder.layers": "encoder.blocks"}  # a name of an earlier version, and today's


def rewrite_with_former_names(file: Path) -> None:
    """Rewrite a checkpoint as the version wrote it in which tensors had their former names."""
    content = checkpoint.load(file)
    back = {new: old for old, new in PRESENT.items()}

    def former(values: dict) -> dict:
        renamed = {}
        for name, value in values.items():
            new = next((new for new in back if name == new or name.startswith(f"{new}.")), None)
            renamed[name if new is None else back[new] + name.removeprefix(new)] = value
        assert renamed.keys() != values.keys()
        return renamed

    content["model"], content["optimizer"] = former(content["model"]), former(content["optimizer"])
    content["average"]["weights"] = former(content["average"]["weights"])
    content["config"]["optimizer"]["rates"] = former(content["config"]["optimizer"]["rates"])
    file.unlink()
    checkpoint.save(file, content)


@pytest.mark.slow
def test_a_run_with_former_names_of_tensors_goes_on_and_evaluates_as_with_todays(inside, monkeypatch) -> None:
    """Weights, their average, the optimizer's state and optimizer.rates, also as the command line still says them."""
    today, former = "+optimizer.rates.head=0.5", "+optimizer.rates.classifier=0.5"
    inside("train", *SMALL, today, "run_dir=whole")
    evaluated = inside("evaluate", "checkpoint=whole/checkpoints/best.pt").partition("{")[2]
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
    assert inside("evaluate", "checkpoint=former/checkpoints/best.pt").partition("{")[2] == evaluated


def test_a_name_is_renamed_by_whole_words() -> None:
    values = {"classifier.weight": 1, "classifiers.weight": 2, "encoder.layers.0.bias": 3, "encoder": 4}
    assert migrations._renamed(values, PRESENT) == {
        **{"head.weight": 1, "classifiers.weight": 2, "encoder.blocks.0.bias": 3, "encoder": 4}
    }


# Folders of sweeps are named by a fingerprint of the run's config.


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("model=detr", "e44533d7"),
        ("model=vit", "d5f9a9fb"),
        ("model=seq2seq", "bb11929c"),
        ("model=detr_r50 data.root=coco", "43f4e92e"),
    ],
)
def test_the_fingerprint_of_a_run_is_what_it_was_when_folders_got_their_names(line: str, name: str) -> None:
    """The names are those that version 4f99cde gave."""
    assert fingerprint(configure("train", line.split())) == name


def test_a_later_key_counts_only_when_it_changes_what_is_learnt(monkeypatch) -> None:
    before = configure("train", ["model=vit"])
    monkeypatch.setitem(migrations.ADDED_KEYS, "optimizer.later", 0.5)
    monkeypatch.setitem(migrations.ADDED_CLASS_KEYS, before["model"]["_target_"], {"later": {"a": 1}})
    today = migrations.migrate_config(before)
    assert today != before and fingerprint(today) == fingerprint(before)
    for section, value in (("optimizer", 0.7), ("model", {"a": 2})):
        assert fingerprint({**today, section: {**today[section], "later": value}}) != fingerprint(before)
    assert set(diff.ALWAYS_HASHED_KEYS) <= {*diff.flatten(migrations.ADDED_KEYS), "data.pad_to"}
