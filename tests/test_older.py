"""Files of earlier versions, frozen in tests/data (its README says how each was made), still give their results.

Tolerances: only the order of sums has changed since, which also depends on the processor. On the processor that made
the files, fp32 numbers agree within 1e-6, and within 1e-3 after the hundreds of steps of a run from the start; on
another one, these tolerances are a hundred and ten times as large. In fp16 one sum rounded differently changes a logit
by 1e-3.
"""

import dataclasses
import json
import lzma
import re
import shutil
import tarfile
from contextlib import nullcontext
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
from detr.criterion.set_loss import LossOptions
from scripts import average_checkpoints

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
FROZEN = Path(__file__).parent / "data"
RUNS = ("detr", "vit", "vit_fp16", "seq2seq", "detr_4f99cde", "vit_4f99cde", "seq2seq_4f99cde")
INPUTS = {"detr": "../detr/shapes.png", "vit": "../vit/digit.png", "seq2seq": "../seq2seq/lines.txt"}
TABLES = {"detr": "boxes.json", "vit": "predictions.csv", "seq2seq": "translations.tsv"}
STORED_CONFIG = ["--config-dir", "run", "--config-name", "config"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """The folder in which the shapes of all tests here are drawn, once."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def run(request, inside, tmp_path, shapes) -> Path:
    """A frozen run's folder; the run itself is unpacked to `run` in the working directory, with its data beside it."""
    with tarfile.open(FROZEN / request.param / "run.tar.xz") as archive:
        archive.extractall(tmp_path, **SAFELY)
    (tmp_path / "shapes").symlink_to(shapes)
    return FROZEN / request.param


every_run = pytest.mark.parametrize("run", RUNS, indirect=True)


def wing(run: Path) -> str:
    return run.name.partition("_")[0]


def last(folder: str = "run") -> Path:
    return max(Path(folder, "checkpoints").glob("step_*.pt"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(output: str, expected: str, rel: float = 1e-4, absolute: float = 1e-4) -> None:
    """The words are equal, and the numbers within a tolerance."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.split(number, output) == re.split(number, expected)
    numbers, expected_numbers = ([float(n) for n in re.findall(number, text)] for text in (output, expected))
    assert numbers == pytest.approx(expected_numbers, rel=rel, abs=absolute)


def assert_same_log(log: list[dict], expected: list[dict], rel: float) -> None:
    assert [list(line) for line in log] == [list(line) for line in expected]
    for line, expected_line in zip(log, expected, strict=True):
        for name, number in expected_line.items():
            assert line[name] == (number and pytest.approx(number, rel=rel)), (line["step"], name)


def configs_of(commit: str) -> dict[str, dict]:
    """The configs that an older version composed, by command line."""
    with lzma.open(FROZEN / f"configs_{commit}.json.xz", "rt") as file:
        return json.load(file)


@every_run
def test_an_older_checkpoint_evaluates_to_its_numbers(run, inside):
    output = inside("evaluate", f"checkpoint={last()}", "output=out")
    numbers = next(line for line in output.splitlines() if line.startswith("{"))
    half = {"rel": 1e-2, "absolute": 1e-2} if run.name == "vit_fp16" else {}
    assert_same(numbers, (run / "evaluate.json").read_text().strip(), **half)
    assert_same(Path("out", TABLES[wing(run)]).read_text(), (run / TABLES[wing(run)]).read_text(), **half)


@every_run
def test_an_older_checkpoint_gives_its_predictions(run, inside):
    shutil.copy(run / INPUTS[wing(run)], ".")
    options = ["threshold=0"] if wing(run) == "detr" else []
    output = inside("predict", "checkpoint=run/checkpoints/best.pt", f"input={Path(INPUTS[wing(run)]).name}", *options)
    assert_same(output.strip(), (run / "predict.txt").read_text().strip(), absolute=2e-3)


@every_run
def test_an_older_checkpoint_loads_in_python(run):
    model, _ = assembly.load(last())
    content = checkpoint.load(last())
    weights = content["model"] if content["average"] is None else content["average"]["weights"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.cpu().state_dict().items())


@every_run
def test_an_older_run_resumes_to_the_same_end(run, inside):
    scale = checkpoint.load(last())["scaler"].get("scale")
    inside("train", *STORED_CONFIG, "run_dir=run", "resume=auto")
    assert checkpoint.load(last())["scaler"].get("scale") == scale and (scale is None) == (run.name != "vit_fp16")
    log, expected = lines(Path("run/metrics.jsonl")), lines(run / "metrics.jsonl")
    assert_same_log(log, expected, rel=2e-2 if run.name == "vit_fp16" else 1e-4)


@pytest.mark.slow
@every_run
def test_the_config_of_an_older_run_runs_again(run, inside):
    first = lines(run / "metrics.jsonl")[0]
    # Its backbone was frozen, and the file of its backbone's weights is not in tests/data.
    backbone = ["model.backbone.weights=run/checkpoints/best.pt"] if wing(run) == "detr" else []
    inside("train", *STORED_CONFIG, "run_dir=again", f"trainer.steps={first['step']}", "trainer.keep_best=2", *backbone)
    assert_same_log(lines(Path("again/metrics.jsonl"))[:1], [first], rel=1e-2)
    stored = flatten(OmegaConf.to_container(OmegaConf.load("again/config.yaml")))
    assert stored.keys() >= ADDED_KEYS.keys() - {"cache_dir"}, "no run's config names a folder of downloads"


@every_run
def test_a_new_run_starts_from_an_older_checkpoint(run, inside):
    short = ["trainer.steps=1", "trainer.average_last=0"]
    output = inside("train", *STORED_CONFIG, "run_dir=new", f"checkpoint={last()}", *short)
    tensors = len(checkpoint.load(last())["model"])
    assert f"{last()}: {tensors} tensors\n" in output, "none re-initialised, none unused"


@every_run
def test_older_checkpoints_are_averaged(run, inside):
    assert average_checkpoints.main(["run", "--last", "2", "--output", "mean.pt"]) == 0
    assert "average of steps" in inside("evaluate", "checkpoint=mean.pt")


@every_run
def test_the_frozen_files_are_those_of_an_older_version(run):
    keys = flatten(configure("train", ["model=vit"])).keys()
    for config in (
        torch.load(last(), weights_only=True)["config"],
        OmegaConf.to_container(OmegaConf.load("run/config.yaml")),
    ):
        assert {config[section]["_target_"] for section in ("model", "data", "task")} <= {
            *MOVED_CLASSES,
            *MERGED_CLASSES,
        }
        assert run.name.endswith("4f99cde") or keys - flatten(config).keys() >= {"allow_changes", "trainer.keep_best"}


@pytest.mark.parametrize("run", ["vit"], indirect=True)
def test_a_missing_key_that_older_versions_had_is_reported(run, inside):
    config = OmegaConf.load("run/config.yaml")
    del config["seed"]
    OmegaConf.save(config, "run/config.yaml")
    message = inside("train", *STORED_CONFIG, "run_dir=new", code=2)
    assert message == "seed is missing from the config; train.py needs it."
    content = checkpoint.load(last())
    del content["config"]["trainer"]["precision"]
    checkpoint.save(Path("incomplete.pt"), content)
    message = inside("evaluate", "checkpoint=incomplete.pt", code=2)
    assert message.startswith("trainer.precision is missing: expected auto, fp32, bf16, fp16 or int8")


@pytest.mark.slow
@pytest.mark.parametrize("commit", ["03ca055", "81dd5c1", "ed73988", "4f99cde"])
def test_every_config_of_an_older_version_is_migrated_to_a_valid_one(commit):
    for line, config in configs_of(commit).items():
        with pytest.raises(UserError):
            check(config, [])
        try:
            check(migrate_config(config), [])
        except UserError as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_merged_data_set_is_migrated_to_the_present_one(name):
    line = ["model=vit", f"data={name}"]
    stored = configs_of("81dd5c1")[" ".join(line)]
    assert stored["data"]["_target_"] in MERGED_CLASSES
    assert migrate_config(stored)["data"] == configure("train", line)["data"]


def test_migrating_a_present_config_changes_nothing():
    options = ["schedule=noam", "optimizer.layer_decay=0.7", "schedule.start=0.1", "trainer.average_last=3"]
    for line in (["model=detr"], ["model=vit", "data=cifar10"], ["model=seq2seq", *options]):
        config = configure("train", line)
        assert migrate_config(config) == config
    assert migrate_config({}) == {}


def test_every_added_key_exists():
    config = configure("train", ["model=vit"])
    for key in ADDED_KEYS:
        whole = migrate_config(config)
        section, _, name = key.rpartition(".")
        del (whole[section] if section else whole)[name]
        with pytest.raises(UserError, match=f"{key} is missing"):
            check(whole, [])


@pytest.mark.parametrize(
    "choices", [["model=detr", "data=coco"], ["model=vit", "data=imagefolder"], ["model=seq2seq", "data=parallel_text"]]
)
def test_every_added_key_of_a_class_exists(choices: list[str]):
    whole = configure("train", choices)
    assert any(whole[section]["_target_"] in ADDED_CLASS_KEYS for section in ("data", "task"))
    for section in ("model", "data", "task"):
        for key in ADDED_CLASS_KEYS.get(whole[section]["_target_"], {}):
            config = migrate_config(whole)
            *outer, name = key.split(".")
            subsection = config[section]
            for part in outer:
                subsection = subsection[part]
            del subsection[name]
            optional = key in (
                "exif",
                "class_order",
                "val_share",
                "test_share",
                "root",
                "predict.nms",
                "predict.detections_per_image",
                "predict.attention",
                "predict.panoptic_threshold",
                "predict.panoptic_rule",
                "cache",
                *("masks", "frozen", "stuff", "loss.mask_weight", "loss.dice_weight"),
                *("distillation", "distillation_token", "loss.simcut", "distilled"),
            )  # users' subclasses, and their yaml, were written before these keys
            with nullcontext() if optional else pytest.raises(UserError, match=rf"{section}\.{key} is missing"):
                check(config, [])
            check(migrate_config(config), [])


def test_migrating_a_config_does_not_modify_it():
    config = {"resume": None, "trainer": {"steps": 3}, "data": {"_target_": "vit.downloads.Cifar10"}}
    original = json.dumps(config)
    migrate_config(config)["allow_changes"].append("seed")
    assert json.dumps(config) == original and migrate_config(config)["allow_changes"] == []


def test_a_users_yaml_with_a_former_class_name_may_lack_its_later_keys():
    """It was written before these keys; a yaml with the present name must have them."""
    whole = configure("train", ["model=detr"])
    task = {**whole["task"], "_target_": "detr.task.Detection", "loss": {"no_object": 0.1}}
    update_names(config := {"task": task})
    assert config["task"]["loss"] == {
        "no_object": 0.1,
        "classification": "softmax",
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "mask_weight": 1.0,
        "dice_weight": 1.0,
    }


def test_a_users_task_that_takes_the_loss_options_may_lack_their_later_keys():
    """Its yaml and its checkpoints were written before these keys, and no table names its class."""
    section = {"_target_": "mypackage.task.Mine", "loss": dict.fromkeys(ADDED_NESTED_KEYS["loss"][0], 1.0)}
    assert update_names(config := {"task": deepcopy(section)}) == []
    assert config["task"]["loss"] == section["loss"] | ADDED_NESTED_KEYS["loss"][1]
    assert migrate_config({"task": section})["task"]["loss"] == section["loss"] | ADDED_NESTED_KEYS["loss"][1]
    required = {field.name for field in dataclasses.fields(LossOptions) if field.default is dataclasses.MISSING}
    assert ADDED_NESTED_KEYS["loss"][0] | ADDED_NESTED_KEYS["loss"][1].keys() == required
