"""Files of earlier versions, frozen in tests/data (its README says how each was made): they do today what they did.

Tolerances: nothing but the order of sums has changed since, which another processor changes, too. On the one that made
the files fp32 numbers are the same within 1e-6, and within 1e-3 after the hundreds of steps of a run from the start;
another may be a hundred times and ten times as far. In fp16 a sum that is rounded the other way moves a logit by 1e-3.
"""

import json
import lzma
import re
import shutil
import tarfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from common.config.check import check
from common.config.compose import configure
from common.config.diff import flatten
from common.config.migrations import (
    ADDED_CLASS_KEYS,
    ADDED_KEYS,
    ADDED_NESTED_KEYS,
    MERGED_CLASSES,
    MOVED_CLASSES,
    migrate_config,
    update_names,
)
from common.errors import UserError
from common.files import checkpoint
from common.train import assembly
from scripts import average_checkpoints

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
FROZEN = Path(__file__).parent / "data"
RUNS = ("detr", "vit", "vit_fp16", "seq2seq", "detr_4f99cde", "vit_4f99cde", "seq2seq_4f99cde")
INPUTS = {"detr": "../detr/shapes.png", "vit": "../vit/digit.png", "seq2seq": "../seq2seq/lines.txt"}
TABLES = {"detr": "boxes.json", "vit": "predictions.csv", "seq2seq": "translations.tsv"}
AS_IT_WAS = ["--config-dir", "run", "--config-name", "config"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Where the shapes of all tests here are drawn, once."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def run(request, inside, tmp_path, drawn) -> Path:
    """A frozen run's folder, `run` in the present folder, with its data beside it."""
    with tarfile.open(FROZEN / request.param / "run.tar.xz") as archive:
        archive.extractall(tmp_path, **SAFELY)
    (tmp_path / "shapes").symlink_to(drawn)
    return FROZEN / request.param


every_run = pytest.mark.parametrize("run", RUNS, indirect=True)


def wing(run: Path) -> str:
    return run.name.partition("_")[0]


def last(folder: str = "run") -> Path:
    return max(Path(folder, "checkpoints").glob("step_*.pt"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(said: str, before: str, rel: float = 1e-4, absolute: float = 1e-4) -> None:
    """The same words, and numbers within a tolerance."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.split(number, said) == re.split(number, before)
    numbers, expected = ([float(n) for n in re.findall(number, text)] for text in (said, before))
    assert numbers == pytest.approx(expected, rel=rel, abs=absolute)


def assert_same_log(now: list[dict], before: list[dict], rel: float) -> None:
    assert [list(line) for line in now] == [list(line) for line in before]
    for line, other in zip(now, before, strict=True):
        for name, number in other.items():
            assert line[name] == (number and pytest.approx(number, rel=rel)), (line["step"], name)


def configs_of(commit: str) -> dict[str, dict]:
    """What an older version composed, by the line that was given."""
    with lzma.open(FROZEN / f"configs_{commit}.json.xz", "rt") as file:
        return json.load(file)


@every_run
def test_an_older_checkpoint_evaluates_to_the_numbers_of_its_day(run, inside):
    said = inside("evaluate", f"checkpoint={last()}", "output=out")
    numbers = next(line for line in said.splitlines() if line.startswith("{"))
    half = {"rel": 1e-2, "absolute": 1e-2} if run.name == "vit_fp16" else {}
    assert_same(numbers, (run / "evaluate.json").read_text().strip(), **half)
    assert_same(Path("out", TABLES[wing(run)]).read_text(), (run / TABLES[wing(run)]).read_text(), **half)


@every_run
def test_an_older_checkpoint_predicts_what_it_did(run, inside):
    shutil.copy(run / INPUTS[wing(run)], ".")
    options = ["threshold=0"] if wing(run) == "detr" else []
    said = inside("predict", "checkpoint=run/checkpoints/best.pt", f"input={Path(INPUTS[wing(run)]).name}", *options)
    assert_same(said.strip(), (run / "predict.txt").read_text().strip(), absolute=2e-3)


@every_run
def test_an_older_checkpoint_loads_from_python(run):
    model, _ = assembly.load(last())
    content = checkpoint.load(last())
    weights = content["model"] if content["average"] is None else content["average"]["weights"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.cpu().state_dict().items())


@every_run
def test_an_older_run_goes_on_to_where_it_would_have_come(run, inside):
    scale = checkpoint.load(last())["scaler"].get("scale")
    inside("train", *AS_IT_WAS, "run_dir=run", "resume=auto")
    assert checkpoint.load(last())["scaler"].get("scale") == scale and (scale is None) == (run.name != "vit_fp16")
    now, before = lines(Path("run/metrics.jsonl")), lines(run / "metrics.jsonl")
    assert_same_log(now, before, rel=2e-2 if run.name == "vit_fp16" else 1e-4)


@pytest.mark.slow
@every_run
def test_the_config_of_an_older_run_runs_again(run, inside):
    first = lines(run / "metrics.jsonl")[0]
    # Its backbone never trained, and the file that it came from is not among the frozen ones.
    backbone = ["model.backbone.weights=run/checkpoints/best.pt"] if wing(run) == "detr" else []
    inside("train", *AS_IT_WAS, "run_dir=again", f"trainer.steps={first['step']}", "trainer.keep_best=2", *backbone)
    assert_same_log(lines(Path("again/metrics.jsonl"))[:1], [first], rel=1e-2)
    assert flatten(OmegaConf.to_container(OmegaConf.load("again/config.yaml"))).keys() >= ADDED_KEYS.keys()


@every_run
def test_a_new_run_starts_from_an_older_checkpoint(run, inside):
    short = ["trainer.steps=1", "trainer.average_last=0"]
    said = inside("train", *AS_IT_WAS, "run_dir=new", f"checkpoint={last()}", *short)
    tensors = len(checkpoint.load(last())["model"])
    assert f"{last()}: {tensors} tensors\n" in said, "none re-initialised, none unused"


@every_run
def test_older_checkpoints_are_averaged(run, inside):
    assert average_checkpoints.main(["run", "--last", "2", "--output", "mean.pt"]) == 0
    assert "average of steps" in inside("evaluate", "checkpoint=mean.pt")


@every_run
def test_the_frozen_files_are_of_before(run):
    now = flatten(configure("train", ["model=vit"])).keys()
    for config in (
        torch.load(last(), weights_only=True)["config"],
        OmegaConf.to_container(OmegaConf.load("run/config.yaml")),
    ):
        assert {config[section]["_target_"] for section in ("model", "data", "task")} <= {
            *MOVED_CLASSES,
            *MERGED_CLASSES,
        }
        assert run.name.endswith("4f99cde") or now - flatten(config).keys() >= {"allow_changes", "trainer.keep_best"}


@pytest.mark.parametrize("run", ["vit"], indirect=True)
def test_a_key_that_is_missing_in_earnest_is_still_asked_for(run, inside):
    config = OmegaConf.load("run/config.yaml")
    del config["seed"]
    OmegaConf.save(config, "run/config.yaml")
    said = inside("train", *AS_IT_WAS, "run_dir=new", code=2)
    assert said == "seed is missing from the config; train.py needs it."
    content = checkpoint.load(last())
    del content["config"]["trainer"]["precision"]
    checkpoint.save(Path("lacking.pt"), content)
    said = inside("evaluate", "checkpoint=lacking.pt", code=2)
    assert said.startswith("trainer.precision is missing: expected auto, fp32, bf16 or fp16")


@pytest.mark.slow
@pytest.mark.parametrize("commit", ["03ca055", "81dd5c1", "ed73988", "4f99cde"])
def test_every_choice_of_an_older_version_is_a_config_of_today(commit):
    for line, config in configs_of(commit).items():
        with pytest.raises(UserError):
            check(config, [])
        try:
            check(migrate_config(config), [])
        except UserError as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_class_that_moved_is_still_the_same_data(name):
    line = ["model=vit", f"data={name}"]
    before = configs_of("81dd5c1")[" ".join(line)]
    assert before["data"]["_target_"] in MERGED_CLASSES
    assert migrate_config(before)["data"] == configure("train", line)["data"]


def test_a_config_of_today_lacks_nothing():
    others = ["schedule=noam", "optimizer.layer_decay=0.7", "schedule.start=0.1", "trainer.average_last=3"]
    for line in (["model=detr"], ["model=vit", "data=cifar10"], ["model=seq2seq", *others]):
        config = configure("train", line)
        assert migrate_config(config) == config
    assert migrate_config({}) == {}


def test_every_row_of_the_table_is_a_key_of_today():
    config = configure("train", ["model=vit"])
    for key in ADDED_KEYS:
        whole = migrate_config(config)
        section, _, name = key.rpartition(".")
        del (whole[section] if section else whole)[name]
        with pytest.raises(UserError, match=f"{key} is missing"):
            check(whole, [])


def test_every_key_that_a_class_got_later_is_a_key_of_today():
    whole = configure("train", ["model=detr", "data=coco"])
    assert {whole["task"]["_target_"], whole["data"]["_target_"]} == ADDED_CLASS_KEYS.keys()
    for section in ("model", "data", "task"):
        for key in ADDED_CLASS_KEYS.get(whole[section]["_target_"], {}):
            before = migrate_config(whole)
            *outer, name = key.split(".")
            inner = before[section]
            for part in outer:
                inner = inner[part]
            del inner[name]
            with pytest.raises(UserError, match=rf"{section}\.{key} is missing"):
                check(before, [])
            check(migrate_config(before), [])


def test_completing_a_config_leaves_the_given_one_as_it_is():
    config = {"resume": None, "trainer": {"steps": 3}, "data": {"_target_": "vit.downloads.Cifar10"}}
    before = json.dumps(config)
    migrate_config(config)["allow_changes"].append("seed")
    assert json.dumps(config) == before and migrate_config(config)["allow_changes"] == []


def test_a_users_yaml_with_a_class_that_has_moved_need_not_have_its_later_keys():
    """It was written before them; one with the present name must have them."""
    whole = configure("train", ["model=detr"])
    task = {**whole["task"], "_target_": "detr.task.Detection", "loss": {"no_object": 0.1}}
    update_names(config := {"task": task})
    assert config["task"]["loss"] == {
        "no_object": 0.1,
        "classification": "softmax",
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
    }


def test_a_users_task_that_takes_the_loss_options_need_not_have_their_later_keys():
    """Its yaml and its checkpoints were written before them, and no row names its class."""
    section = {"_target_": "mypackage.task.Mine", "loss": dict.fromkeys(ADDED_NESTED_KEYS["loss"][0], 1.0)}
    assert update_names(config := {"task": deepcopy(section)}) == []
    assert config["task"]["loss"] == section["loss"] | ADDED_NESTED_KEYS["loss"][1]
    assert migrate_config({"task": section})["task"]["loss"] == section["loss"] | ADDED_NESTED_KEYS["loss"][1]
    assert (
        ADDED_NESTED_KEYS["loss"][0] | ADDED_NESTED_KEYS["loss"][1].keys()
        == configure("train", ["model=detr"])["task"]["loss"].keys()
    )
