"""The doors' command line: mistakes are one sentence and exit code 2, paths arrive unchanged, runs have own folders."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common.cli import main as cli
from common.cli import sweep
from common.cli.jobs import statuses_in
from common.config import compose, paths
from common.config.check import build, check
from common.errors import Stopped, UserError
from common.files import run_folder

ROOT = Path(__file__).parents[3]


class Outcome:
    """The exit code of a command line, its two streams, and the configs and folders that the job received."""

    def __init__(self) -> None:
        self.code, self.out, self.err = 0, "", ""
        self.configs: list[dict[str, Any]] = []
        self.folders: list[Path | None] = []


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Launch a job that records its arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def launch(*arguments: str, door: str = "train", base: Any = None, job: Any = None) -> Outcome:
        outcome = Outcome()

        def record(config: dict[str, Any], folder: Path | None = None) -> float | None:
            outcome.configs.append(config)
            outcome.folders.append(folder)
            return job(config, folder) if job else None

        with pytest.raises(SystemExit) as exit_info:
            cli.launch(record, door, base, arguments)
        outcome.code = int(str(exit_info.value.code))
        outcome.out, outcome.err = capsys.readouterr()
        return outcome

    return launch


def sentence(outcome: Outcome) -> str:
    """The single line on stderr of a refused command that ran nothing and created nothing."""
    assert outcome.code == 2 and not outcome.configs and not Path("runs").exists()
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err
    return outcome.err.strip()


# Before the run.


@pytest.mark.parametrize("door", ["train", "evaluate", "predict"])
def test_help_needs_no_model(start: Callable[..., Outcome], door: str) -> None:
    outcome = start("--help", door=door, base=None if door == "train" else lambda file: {})
    assert outcome.code == 0 and not outcome.err
    assert f"python {door}.py" in outcome.out and "detr_r50" in outcome.out and "trust: []" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "train.py needs model=NAME (see --help); there are bert, bert_base, "),
        (("seed=1",), "train.py needs model=NAME"),
        (("model=det",), "model=det: there is no configs/model/det.yaml; did you mean detr?"),
        (("model=detr", "data=cocoo"), "data=cocoo: there is no configs/data/cocoo.yaml; did you mean coco?"),
        (("model=detr", "optmizer.lr=1"), "optmizer.lr is not a key of this config; did you mean optimizer.lr?"),
        (("model=detr", "optimizer.lrr=1"), "optimizer.lrr is not a key of this config; did you mean optimizer.lr?"),
        (("modl=detr", "model=detr"), "modl is not a key of this config; did you mean model?"),
        (("model=detr", "lr=1"), "lr is not a key of this config; did you mean optimizer.lr?"),
        (("model=vit", "data.train=x"), "data.train is not a key of data=digits; it is one with data=imagefolder."),
        (
            ("model=detr", "data.train.images=x"),
            "data.train.images is not a key of data=shapes; it is one with",
        ),
        (
            ("model=vit", "data.root=x"),
            "data.root is not a key of data=digits; it is one with data=cifar10 or",
        ),
        (("model=vit", "data.rot=x"), "data.rot is not a key of this config; did you mean data."),
        (("model=detr", "sed=1"), "sed is not a key of this config; did you mean seed?"),
        (("model=detr", "+foo=1"), "foo is not a key of train.py"),
        (("model=detr", "+optimizer.foo=1"), "optimizer.foo is not a key of common.train.optim.OptimizerOptions"),
        (("model=detr", "~task"), "task is missing from the config"),
        (("model=detr", "~task.loss.no_object"), "task.loss.no_object is missing: expected a number from 0."),
        (("model=detr", "optimizer.lr=fast"), "optimizer.lr=fast: expected a number above 0."),
        (("model=detr", "data.batch_size="), 'data.batch_size="": expected a whole number from 1.'),
        (("model=detr", "data=null"), "data=null: expected one name; there are cifar10, "),
        (("model=[detr]",), "model=[detr]: expected one name; there are bert, bert_base, "),
        (("experiment=[1,[2]]",), "experiment=[1,[2]]: expected one name; there are cnn_fashion_mnist, deit_s_"),
        (("-m", "model=vit", "optimizer=[1,[2]],adam"), "optimizer=[1,[2]]: expected one name; there are "),
        (("model=detr", f"seed={'1' * 5000}"), f"seed={'1' * 55}...{'1' * 30}: not understood; it has too many digits"),
        (
            ("model=detr", f"model.width={'[' * 5000}{']' * 5000}"),
            f"model.width={'[' * 48}...{']' * 30}: not understood",
        ),
        (
            ("model=seq2seq", "task.predict.alpha=1e308"),
            "task.predict.alpha=1e+308: expected a number from 0 up to 10.",
        ),
        (
            ("model=seq2seq", "data.tokenizer.vocabulary=2000000000"),
            "data.tokenizer.vocabulary=2000000000: expected a whole number from 1 up to 1000000.",
        ),
        (
            ("model=seq2seq", "task.predict.longest_factor=1e308"),
            "task.predict.longest_factor=1e+308: expected a number",
        ),
        (("model=detr", "optimizer.lr=1,2"), "optimizer.lr=1,2: several values are a sweep, which needs -m"),
        (("model=detr", "optimizer.name=a(b"), "optimizer.name=a(b: not understood; write key=value"),
        (("model=detr", "seed"), "seed: not understood; write key=value"),
        (("model=detr", "seed=${nope}"), "seed refers to the key nope, which this config lacks; give seed= a value."),
        (
            ("model=gpt", "data=sentences"),
            "model.longest refers to the key data.block, which this config lacks; give model.longest= a value, or "
            "another data=.",
        ),
        (("model=detr", "--sweep"), "unrecognized arguments: --sweep; see --help."),
        (("model=detr", "--config-dir", "nowhere"), "--config-dir nowhere: there is no such folder."),
        (("--config-name", "trian"), "there is no trian.yaml"),
        (("model=detr", "experiment=detr_r50_coco_300"), "experiment= already chooses the model"),
        (("model=detr", "resume=auto"), "resume=auto needs run_dir=FOLDER"),
        (("model=detr", "hydra.run.dir=x"), "hydra.run.dir: Hydra's settings apply to sweeps (-m) only"),
        (("-m", "model=detr", "seed=1,2", "run_dir=x"), "run_dir= and resume= name one run"),
        (("-m", "model=detr,det"), "model=det: there is no configs/model/det.yaml; did you mean detr?"),
        (("-m", "model=detr", "optimizer.lr=1,fast"), "optimizer.lr=fast: expected a number above 0."),
        (("-m", "model=detr", "optimizer.lrr=1,2"), "optimizer.lrr is not a key of this config; did you mean"),
        (("-m", "model=detr", "seed=a(b"), "seed=a(b: not understood"),
        (("-m", "model=detr", "seed=interval(0,1)"), "seed=interval(0,1): expected single values"),
        (("-m", "model=detr", "hydra.sweep.dir=x"), "hydra.sweep.dir: a sweep is always a grid in sweep_dir="),
        (("-m", "model=detr", "hydra/sweeper=optuna"), "hydra/sweeper: a sweep is always a grid"),
        (("-m", "model=detr", "hydra/launcher=jobli"), "hydra/launcher/jobli does not exist; did you mean joblib?"),
        (("model=detr", "sweep_dir=x"), "sweep_dir= is the folder of a sweep, which needs -m"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(
    start: Callable[..., Outcome], arguments: tuple[str, ...], expected: str
) -> None:
    assert sentence(start(*arguments)).startswith(expected)


def test_nothing_heavy_is_imported_before_the_job(tmp_path: Path) -> None:
    code = "import sys; from common.cli import main; main.launch(lambda *_: sys.exit('torch' in sys.modules), 'train')"
    command = [sys.executable, "-c", code, "model=detr"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0


PATHS = ["a b", "a=b", "a,b", "(1)", "[x]", "it's", "é{x}", "a&b#c", "1e3", "no", "a\\b", "it\\'s", "a\\", "'", "x: y"]


@pytest.mark.parametrize("path", PATHS)
def test_any_path_arrives_as_it_was_typed(start: Callable[..., Outcome], path: str) -> None:
    folder = f"out {path}"
    outcome = start("model=detr", "data=coco", f"data.root={path}", f"data.val.images={path}", f"run_dir={folder}")
    assert outcome.code == 0, outcome.err
    assert outcome.configs[0]["data"]["root"] == outcome.configs[0]["data"]["val"]["images"] == path
    assert outcome.folders == [Path(folder)] and (Path(folder) / "config.yaml").is_file()
    again = start("--config-dir", folder, "--config-name", "config", f"run_dir={folder}/again")
    assert again.configs[0]["data"] == outcome.configs[0]["data"]


def test_a_tilde_is_the_home_folder_and_null_is_nothing(
    start: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/of me")
    outcome = start("model=vit_b16", "data.train=~/photos")
    assert outcome.configs[0]["data"]["train"] == "/of me/photos"
    outcome = start("model=detr", "data=coco", "data.root=~/coco", "data.val.images=null", "checkpoint=~")
    assert outcome.configs[0]["data"]["root"] == "/of me/coco"
    assert outcome.configs[0]["data"]["val"]["images"] is None
    assert outcome.configs[0]["checkpoint"] == "/of me"


def test_cfg_prints_the_config_and_runs_nothing(start: Callable[..., Outcome]) -> None:
    outcome = start("model=detr", "--cfg", "job", "seed=3")
    assert outcome.code == 0 and not outcome.configs and not Path("runs").exists()
    check({**OmegaConf.to_container(OmegaConf.create(outcome.out))}, [])  # type: ignore[dict-item]


# The run's folder and the exit code.


def test_runs_that_start_in_the_same_second_get_different_folders(
    start: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    folders = [start("model=detr_r50", "data=shapes").folders[0] for _ in range(3)]
    assert folders == [Path("runs/detr_r50-shapes", name) for name in ("now", "now_2", "now_3")]


def test_an_experiments_folder_is_named_by_its_model_and_data(start: Callable[..., Outcome]) -> None:
    folder = start("experiment=detr_r50_coco_300", "data.root=x").folders[0]
    assert folder is not None and folder.parent == Path("runs/detr_r50-coco")


def test_a_saved_config_runs_again(start: Callable[..., Outcome]) -> None:
    first = start("model=detr", "seed=5", "run_dir=first", "optimizer.name=sgd", "+optimizer.rates.backbone=0.5")
    again = start("--config-dir", "first", "--config-name", "config", "run_dir=second", "optimizer.lr=1e-3")
    expected = {**first.configs[0], "run_dir": "second"}
    expected["optimizer"]["lr"] = 1e-3
    assert again.configs == [expected]
    third = start("--config-dir", "first", "--config-name", "config")
    assert third.folders[0] is not None and third.folders[0].parent == Path("runs/detector-shapes")
    refused = start("--config-dir", "first", "--config-name", "config", "data=coco")
    assert refused.code == 2 and refused.err.startswith("data= cannot be chosen here: config.yaml is a whole config")


def test_the_sentence_on_a_whole_config_of_an_older_version_names_the_users_file(start: Callable[..., Outcome]) -> None:
    start("model=vit", "run_dir=old")
    content = OmegaConf.load("old/config.yaml")
    del content.trainer["eval_samples"]  # so that the config is migrated
    OmegaConf.save(content, "old/config.yaml")
    refused = start("--config-dir", "old", "--config-name", "config", "optimizer=adamw")
    assert refused.code == 2 and refused.err.startswith("optimizer= cannot be chosen here: config.yaml is a whole")


def test_config_dir_adds_choices_to_groups(start: Callable[..., Outcome]) -> None:
    Path("my configs/experiment").mkdir(parents=True)
    Path("my configs/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: detr_r18, override /data: shapes]\n"
        "seed: 9\nmodel: {width: 64}\n"
    )
    outcome = start("experiment=mine", "--config-dir", "my configs", "model.heads=4")
    config = outcome.configs[0]
    assert (config["seed"], config["model"]["width"], config["model"]["heads"]) == (9, 64, 4)
    assert config["model"]["backbone"]["name"] == "resnet18"
    error = start("experiment=mien", "--config-dir", "my configs").err
    assert error.startswith("experiment=mien: there is no") and error.endswith("did you mean mine?\n")


FORMER = "vit.task.Classification"
PRESENT = "vit.tasks.classification.Classification"


@pytest.fixture
def older_yaml(tmp_path: Path) -> list[str]:
    """A user's model yaml that names a class by its path in an earlier version."""
    (tmp_path / "own/model").mkdir(parents=True)
    text = f"# @package _global_\ndefaults: [vit, _self_]\ntask: {{_target_: {FORMER}}}\n"
    (tmp_path / "own/model/mine.yaml").write_text(text)
    return ["--config-dir", "own", "model=mine"]


def test_a_moved_class_is_read_from_its_present_path_with_one_notice(start: Callable[..., Outcome], older_yaml) -> None:
    outcome = start(*older_yaml)
    assert outcome.err == f"task._target_={FORMER} is now {PRESENT}; please update your yaml.\n"
    assert FORMER not in outcome.out and outcome.configs[0]["task"]["_target_"] == PRESENT
    assert (outcome.folders[0] / "config.yaml").read_text().count(PRESENT) == 1
    same = [*older_yaml, f"run_dir={outcome.folders[0]}", "resume=auto"]
    assert start(*same).code == 0
    outcome = start(*same, f"task._target_={PRESENT}")
    assert outcome.code == 0 and outcome.err == "", "the present name gives no notice"


def test_only_the_first_rank_of_a_machine_prints_the_notice_of_a_moved_class(
    start: Callable[..., Outcome], older_yaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    outcome = start(*older_yaml)
    assert outcome.err == "" and outcome.configs[0]["task"]["_target_"] == PRESENT


def test_a_sweep_prints_the_notice_of_a_moved_class_once(start: Callable[..., Outcome], older_yaml) -> None:
    outcome = start("-m", *older_yaml, "seed=1,2")
    assert outcome.err.count(FORMER) == 1
    assert [config["task"]["_target_"] for config in outcome.configs] == [PRESENT] * 2


def test_a_users_class_is_found_in_the_working_folder_and_needs_trust(start: Callable[..., Outcome]) -> None:
    Path("mynets.py").write_text(
        "class Net:\n    def __init__(self, *, classes: int, width: int): self.width = width\n"
    )
    Path("mine/model").mkdir(parents=True)
    task = OmegaConf.load(compose.CONFIGS / "model/detr.yaml").task
    own_config = OmegaConf.create(
        {"model": {"_target_": "mynets.Net", "width": 3}, "task": task, "trainer": {"steps": 9}}
    )
    own_config.task.queries = 5
    groups = "override /data: shapes, override /optimizer: adamw, override /schedule: cosine"
    Path("mine/model/net.yaml").write_text(
        f"# @package _global_\ndefaults: [{groups}]\n{OmegaConf.to_yaml(own_config)}"
    )
    arguments = ("model=net", "--config-dir", "mine", "model.width=4")
    assert "trust=[mynets]" in sentence(start(*arguments))
    outcome = start(*arguments, "trust=[mynets]")
    assert outcome.code == 0, outcome.err
    assert build(outcome.configs[0]["model"], classes=2).width == 4
    assert outcome.folders[0] is not None and outcome.folders[0].parent == Path("runs/net-shapes")


def test_a_folder_that_holds_a_run_is_refused_without_resume(start: Callable[..., Outcome]) -> None:
    assert start("model=detr", "run_dir=x", "resume=auto").code == 0  # starts the run
    config_text = Path("x/config.yaml").read_text()
    assert start("model=detr", "run_dir=x", "resume=auto").folders == [Path("x")]  # resumes it
    assert Path("x/config.yaml").read_text() == config_text
    refused = start("model=detr", "run_dir=x")
    assert refused.code == 2 and not refused.configs and "x already holds a run; add resume=auto" in refused.err


def test_another_run_in_the_same_folder_is_refused_with_its_differences_unless_they_are_allowed(
    start: Callable[..., Outcome],
) -> None:
    line = ("model=detr", "run_dir=x", "resume=auto")
    assert start(*line).code == 0
    changed = (*line, "seed=1", "optimizer.lr=1", "trainer.workers=7")  # the last one may change
    message = sentence(start(*changed))
    assert message.startswith("x belongs to another run") and "seed was 0 and is 1, optimizer.lr was" in message
    assert "workers" not in message
    assert "seed was" not in sentence(start(*changed, "allow_changes=[seed]"))
    assert start(*changed, "allow_changes=[seed,optimizer]").code == 0
    assert start(*changed).code == 0, "the run's config now holds the allowed changes"
    message = sentence(start(*line, "allow_changes=[optimizer.lrr]"))
    assert message == "allow_changes: optimizer.lrr is not a key of this config; did you mean optimizer.lr?"
    Path("x/config.yaml").write_text("model: [")
    assert sentence(start(*line)).startswith("x/config.yaml cannot be read")


def test_a_finished_run_cannot_be_changed(start: Callable[..., Outcome]) -> None:
    line = ("model=detr", "run_dir=x", "resume=auto")
    assert start(*line).code == 0
    config_text = Path("x/config.yaml").read_text()
    Path("x/results.json").write_text("{}")
    message = sentence(start(*line, "trainer.steps=9", "allow_changes=[trainer.steps]"))
    assert "trainer.steps was" in message and Path("x/config.yaml").read_text() == config_text
    assert start(*line).code == 0


def test_allowed_changes_are_written_after_the_run_and_not_before(start: Callable[..., Outcome]) -> None:
    line = ("model=detr", "run_dir=x", "resume=auto")
    assert start(*line).code == 0
    config_text = Path("x/config.yaml").read_text()
    changed = (*line, "seed=1", "allow_changes=[seed]")
    assert start(*changed, job=fail(UserError("no"))).code == 2
    assert Path("x/config.yaml").read_text() == config_text, "a mistake leaves the existing run's folder unchanged"
    assert start(*line).code == 0
    assert start(*changed).code == 0 and "seed: 1" in Path("x/config.yaml").read_text()


def test_a_full_disk_is_one_sentence(start: Callable[..., Outcome]) -> None:
    outcome = start("model=detr", "run_dir=x", job=fail(OSError(28, "No space left on device", "x/predictions/a")))
    assert outcome.code == 2 and outcome.err.startswith("x/predictions/a cannot be written (No space left on device)")


def test_a_folder_in_use_is_refused_until_its_process_ends(start: Callable[..., Outcome]) -> None:
    Path("x").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from common.files.lock import lock\n"
         "with lock(Path('x')): print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(compose.CONFIGS.parent)},
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert re.match(
        rf"x is in use by process {holder.pid} on \S+ since .*; wait", sentence(start("model=detr", "run_dir=x"))
    )
    holder.kill()
    holder.wait()
    assert start("model=detr", "run_dir=x").code == 0


def test_a_stop_exits_with_its_code_and_prints_the_line_that_resumes(start: Callable[..., Outcome]) -> None:
    outcome = start("model=detr", "data.root=a b", job=fail(Stopped(["SIGTERM"], "after step 3 of 9")))
    assert outcome.code == 143 and outcome.err.startswith("Stopped by SIGTERM after step 3 of 9. To resume: python ")
    words = shlex.split(outcome.err.partition("python ")[2])
    assert words[1:3] == ["model=detr", "data.root=a b"] and words[4] == "resume=auto"
    assert Path(words[3].removeprefix("run_dir="), "config.yaml").exists()
    assert start(*words[1:]).code == 0
    outcome = start(
        "model=detr", "resume=auto", "run_dir=y", job=fail(Stopped(["SIGINT"], "during the evaluation of val"))
    )
    assert outcome.code == 130 and outcome.err.rstrip().endswith("model=detr resume=auto run_dir=y")


def test_a_folder_that_cannot_be_made_is_a_sentence(start: Callable[..., Outcome]) -> None:
    Path("file").write_text("")
    for folder in ("file", "file/inside"):
        assert sentence(start("model=detr", f"run_dir={folder}")).startswith(f"run_dir={folder}: cannot be written")


def fail(error: BaseException, leave: str | None = None) -> Callable[..., None]:
    """A job that creates the folder `leave` in its own and raises `error`."""

    def job(config: dict[str, Any], folder: Path) -> None:
        if leave:
            (folder / leave).mkdir(parents=True)
        raise error

    return job


def test_a_users_mistake_in_the_job_is_one_sentence_and_frees_the_folder(start: Callable[..., Outcome]) -> None:
    outcome = start("model=detr", "run_dir=x", job=fail(UserError("There is no file y.")))
    assert (outcome.code, outcome.err) == (2, "There is no file y.\n")
    assert not Path("x").exists()
    outcome = start("model=detr", "run_dir=x", job=fail(UserError("The loss is not finite."), leave="checkpoints/1.pt"))
    assert outcome.code == 2 and Path("x/config.yaml").exists()


@pytest.mark.parametrize(("error", "code"), [(UserError("There is no file y."), 2), (KeyboardInterrupt(), 130)])
def test_a_command_that_ends_before_its_first_step_leaves_nothing(
    start: Callable[..., Outcome], error: BaseException, code: int
) -> None:
    def job(config: dict[str, Any], folder: Path) -> None:
        for name in ("task.json", "train.log", "metrics.jsonl", "events.out.tfevents.1"):
            (folder / name).write_text("" if name == "metrics.jsonl" else "text")
        (folder / "checkpoints").mkdir()
        raise error

    for arguments in (["run_dir=x"], ["run_dir=x", "resume=auto"], []):
        assert start("model=detr", *arguments, job=job).code == code and os.listdir() == []
    Path("x").mkdir()
    for name in ("mine.txt", "train.log"):
        Path("x", name).write_text("of another program")
    assert start("model=detr", "run_dir=x", job=job).code == code
    assert sorted(os.listdir("x")) == [".lock", "mine.txt", "train.log"], "a file that was there stays"


def test_a_command_refused_after_logged_steps_leaves_their_records(start: Callable[..., Outcome]) -> None:
    def job(config: dict[str, Any], folder: Path) -> None:
        (folder / "train.log").write_text("text")
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        raise UserError("The loss is not finite.")

    assert start("model=detr", "run_dir=x", job=job).code == 2
    assert sorted(os.listdir("x")) == [".lock", "metrics.jsonl", "train.log"]


def test_control_characters_of_a_name_are_escaped_in_a_sentence(start: Callable[..., Outcome]) -> None:
    missing = start("checkpoint=a\x1b[2J\nb\r.pt", door="evaluate", base=dict)
    assert sentence(missing) == r"checkpoint=a\x1b[2J\nb\r.pt: there is no such file."


def test_ctrl_c_prints_no_traceback(start: Callable[..., Outcome]) -> None:
    outcome = start("model=detr", job=fail(KeyboardInterrupt()))
    assert outcome.code == 130 and outcome.err.count("\n") == 1


def test_a_defect_keeps_its_traceback(start: Callable[..., Outcome]) -> None:
    with pytest.raises(ZeroDivisionError):
        start("model=detr", job=fail(ZeroDivisionError()))


def test_ranks_above_0_create_no_folder(start: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert start("model=detr", "run_dir=x").folders == [None]
    assert os.listdir() == []
    assert start("model=det").err == ""  # rank 0 reports it
    assert start("model=detr", job=fail(UserError("No memory."))).err == "rank 1: No memory.\n"
    assert start("-m", "model=detr", "seed=1,2").code == 2


def test_sweeps_are_refused_under_torchrun(start: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sentence(start("-m", "model=detr", "seed=1,2")).startswith("-m does not work under torchrun")


# Sweeps in one process; other launchers and stops are in test_sweep.py.


def readable(folder: Path | None) -> str:
    """A run's folder without the hash at its end."""
    assert folder is not None and re.fullmatch(r"[\w.+-]+-[0-9a-f]{8}", folder.name), folder
    return folder.name[:-9]


def finish(config: dict[str, Any], folder: Path) -> float:
    """A job that writes its results."""
    results = {"val/AP": 0.5 + config["seed"], "goal": "val/AP", "direction": "maximize"}
    (folder / "results.json").write_text(json.dumps(results))
    return 0.5


def test_a_sweep_takes_models_swept_keys_and_fixed_keys(start: Callable[..., Outcome]) -> None:
    outcome = start(
        *("-m", "model=detr,detr_r50", "optimizer.lr=1e-3,1e-4", "model.heads=2", "data.root=a (b), c", "data=shapes"),
        *("trainer.epochs=null", "trainer.steps=7"),
        job=finish,
    )
    assert outcome.code == 0, outcome.err
    assert {(c["trainer"]["epochs"], c["trainer"]["steps"]) for c in outcome.configs} == {(None, 7)}
    values = [
        (c["model"]["width"], c["optimizer"]["lr"], c["model"]["heads"], c["data"]["root"]) for c in outcome.configs
    ]
    assert values == [(width, lr, 2, "a (b), c") for width in (128, 256) for lr in (1e-3, 1e-4)]
    names = [readable(folder) for folder in outcome.folders]
    assert names == ["detr-lr_0.001", "detr-lr_0.0001", "detr_r50-lr_0.001", "detr_r50-lr_0.0001"]
    assert {folder.parent.parent for folder in outcome.folders if folder} == {Path("runs/sweeps")}
    files = {name for folder in outcome.folders if folder for name in os.listdir(folder)}
    assert files == {"config.yaml", "results.json", ".lock"}


def test_a_sweep_takes_experiments_ranges_and_lists(start: Callable[..., Outcome]) -> None:
    line = ("-m", "experiment=detr_r50_coco_300", "seed=range(2)", "optimizer.betas=[0.9,0.9],[0.8,0.9]")
    outcome = start(*line, job=finish)
    values = [(c["seed"], c["optimizer"]["betas"][0]) for c in outcome.configs]
    assert values == [(0, 0.9), (0, 0.8), (1, 0.9), (1, 0.8)]
    names = [readable(folder) for folder in outcome.folders]
    assert names == [f"detr_r50_coco_300-seed_{seed}" for seed in (0, 0, 1, 1)], "a list is left out of the name"


def test_a_runs_folder_as_checkpoint_is_its_best_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b, c"):
        Path(run, "checkpoints").mkdir(parents=True)
        Path(run, "checkpoints/best.pt").touch()
    Path("empty").mkdir()
    assert paths.quote_path("checkpoint=a") == "checkpoint='a/checkpoints/best.pt'"
    assert paths.quote_path("checkpoint=b, c") == "checkpoint='b, c/checkpoints/best.pt'"
    assert paths.quote_path("checkpoint=a,x.pth", sweep=True) == "checkpoint='a/checkpoints/best.pt','x.pth'"
    assert paths.quote_path("task.distillation.teacher=null,x y.pt", sweep=True).endswith("teacher=null,'x y.pt'")
    assert paths.quote_path("checkpoint=a/checkpoints/best.pt") == "checkpoint='a/checkpoints/best.pt'"
    assert paths.quote_path("data.root=a") == "data.root='a'"
    with pytest.raises(UserError, match=r"^checkpoint=empty: the folder holds no checkpoints/best\.pt; give a run's"):
        paths.quote_path("checkpoint=empty")
    Path("detr_r50").mkdir()
    with pytest.raises(
        UserError, match=r"no checkpoints/best\.pt.* the folder .*detr_r50, and not the published weights"
    ):
        paths.quote_path("checkpoint=detr_r50")


@pytest.mark.parametrize("path", ["9" * 256, "a/" + "é" * 128, "a/" * 2048 + "b"])
@pytest.mark.parametrize("key", ["data.root", "run_dir", "checkpoint"])
def test_a_path_that_no_file_system_has_is_refused(key, path):
    sentence = rf"^{key}=.*: no file system has such a path; .* 255 bytes, and the path 4095\.$"
    for argument in (f"{key}={path}", f"{key}='{path}'"):  # quoted, the path is judged after Hydra has read it
        is_name = argument.startswith("checkpoint='9")  # and no name of published weights
        with pytest.raises(UserError, match="no such file" if is_name else sentence):
            command = compose.Command("train", ["model=detr", argument])
            command.prepare()
            command.compose()
    if key != "checkpoint":  # which would have to exist
        command = compose.Command("train", ["model=detr", f"{key}={path[:100]}"])
        command.prepare()
        assert command.compose()


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs", "notice"),
    [
        (["model=vit_b16", "trainer.steps=20"], 20, None, "trainer.steps=20 replaces trainer.epochs=300."),
        (["model=vit", "trainer.epochs=3"], None, 3, "trainer.epochs=3 replaces trainer.steps="),
        (["model=vit", "trainer.steps=20"], 20, None, None),
        (["model=vit", "trainer.epochs=3", "trainer.steps=null"], None, 3, None),
    ],
)
def test_the_typed_length_of_a_run_replaces_that_of_the_preset(arguments, steps, epochs, notice):
    command = compose.Command("train", arguments)
    command.prepare()
    composed = command.compose()
    trainer = composed.config["trainer"]
    assert (trainer["steps"], trainer["epochs"]) == (steps, epochs)
    replaced = [line for line in composed.notices if "replaces" in line]
    assert [line.startswith(notice) for line in replaced] == [True] if notice else not replaced


@pytest.mark.parametrize(("error", "code"), [(UserError("Seed 1 is unlucky."), 2), (ZeroDivisionError("oh"), 1)])
def test_a_failing_run_does_not_stop_the_others(start: Callable[..., Outcome], error: Exception, code: int) -> None:
    def job(config: dict[str, Any], folder: Path) -> float:
        if config["seed"] == 1:
            raise error
        return finish(config, folder)

    outcome = start("-m", "model=detr", "seed=0,1,2", job=job)
    assert outcome.code == code and [config["seed"] for config in outcome.configs] == [0, 1, 2]
    assert f"{outcome.folders[1]}: " in outcome.err and str(error) in outcome.err and "1 of the runs in" in outcome.err
    assert ("Traceback" in outcome.err) == (code == 1)
    states = [line.split()[1:] for line in outcome.out.splitlines() if line.startswith("detr-seed_")]
    assert states == [["done", "0.5000"], ["refused" if code == 2 else "failed", "-"], ["done", "2.5000"]]


def test_a_repeated_sweep_skips_runs_that_are_done_and_resumes_the_others(start: Callable[..., Outcome]) -> None:
    def job(config: dict[str, Any], folder: Path) -> float | None:
        return None if config["seed"] == 1 and len(folders) < 3 else finish(config, folder)

    folders: list[Path | None] = []
    line = ["-m", "model=detr", "seed=0,1,2", "data.root=a b"]
    first = start(*line, job=job)
    folders = first.folders
    assert first.code == 1 and "1 of the runs" in first.err
    again = shlex.split(first.err.rpartition("To resume: python train.py ")[2])
    assert again[:-1] == line and again[-1].startswith("sweep_dir=runs/sweeps/")
    second = start(*again, job=job)
    assert second.code == 0 and second.folders == [folders[1]] and second.configs[0]["resume"] == "auto"
    third = start(*again, job=job)
    assert third.code == 0 and not third.configs and "3 runs in" in third.out and "3 of them already done" in third.out


def test_a_wider_sweep_finds_the_runs_of_a_narrower_one(start: Callable[..., Outcome]) -> None:
    assert start("-m", "model=detr", "seed=1", "sweep_dir=x", job=finish).code == 0
    (folder,) = Path("x").glob("detr-*")
    outcome = start("-m", "model=vit,detr", "seed=1,0", "sweep_dir=x", "trainer.workers=5", job=finish)
    names = [readable(path) for path in outcome.folders]
    assert names == ["vit-seed_1", "vit-seed_0", "detr-seed_0"] and folder.exists()


def test_combinations_that_are_the_same_run_are_run_once(start: Callable[..., Outcome]) -> None:
    outcome = start("-m", "model=detr", "trainer.log_every=5,7", "optimizer.lr=1e-3,0.001", job=finish)
    assert outcome.code == 0 and len(outcome.configs) == 1 and outcome.out.count("are the same run") == 3


def test_several_paths_are_swept_and_one_with_a_comma_is_one(start: Callable[..., Outcome]) -> None:
    outcome = start("-m", "model=detr", "checkpoint=runs/a.pth,b (1).pth", "sweep_dir=x,y", job=finish)
    assert outcome.code == 0, outcome.err
    assert [config["checkpoint"] for config in outcome.configs] == ["runs/a.pth", "b (1).pth"]
    assert {path.parent for path in outcome.folders if path} == {Path("x,y")}
    Path("c,d.pth").touch()
    outcome = start("-m", "model=detr", "checkpoint=c,d.pth", "seed=0,1", job=finish)
    assert [config["checkpoint"] for config in outcome.configs] == ["c,d.pth"] * 2
    (config,) = start("model=detr", "checkpoint=e,f.pth").configs
    assert config["checkpoint"] == "e,f.pth", "without -m it is a name"


def test_a_run_that_another_sweep_holds_is_open_and_not_refused(start: Callable[..., Outcome]) -> None:
    line = ["-m", "model=detr", "seed=0,1", "sweep_dir=x"]
    folder = start(*line, job=finish).folders[0]
    assert folder
    (folder / "results.json").unlink()
    holder = "from common.files.lock import lock; import pathlib, sys\n"
    holder += "with lock(pathlib.Path(sys.argv[1])): print(flush=True), input()"
    command = [sys.executable, "-c", holder, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout and process.stdout.readline()
        outcome = start(*line, job=finish)
        process.communicate(b"\n")
    assert outcome.code == 1 and not outcome.configs
    assert "is in use by process" in outcome.err and "still runs" in outcome.err and "refused" not in outcome.out
    assert not statuses_in(Path("x"))
    assert start(*line, job=finish).code == 0


def test_a_launcher_that_is_not_installed_is_named_with_the_line_that_installs_it(
    start: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "OPTIONAL_LAUNCHERS", ("ray",))
    message = sentence(start("-m", "model=detr", "seed=0,1", "hydra/launcher=ray"))
    assert message == "hydra/launcher=ray is not installed: pip install hydra-ray-launcher."


def test_a_stop_ends_the_sweep_and_prints_the_line_that_resumes(start: Callable[..., Outcome]) -> None:
    outcome = start("-m", "model=detr", "seed=0,1", job=fail(Stopped(["SIGTERM"], "after step 3")))
    assert outcome.code == 143 and len(outcome.configs) == 1
    assert "To resume: python train.py -m model=detr seed=0,1 sweep_dir=runs/sweeps/" in outcome.err


# evaluate.py and predict.py.


def checkpoint_config(start: Callable[..., Outcome], *arguments: str) -> dict[str, Any]:
    """The config in a checkpoint of a run with these arguments."""
    Path("a file.pt").write_text("")
    return start("model=detr", *arguments).configs[0]


def test_a_checkpoints_config_is_the_base_of_the_command_line(start: Callable[..., Outcome]) -> None:
    config = checkpoint_config(start, "model.width=64", "seed=5", "trainer.precision=bf16", "data.image_size=96")
    outcome = start(
        *("checkpoint=a file.pt", "trainer.workers=3", "details=true"), door="evaluate", base=lambda file: config
    )
    composed = outcome.configs[0]
    assert {**composed["trainer"], "workers": 0} == config["trainer"] and composed["trainer"]["workers"] == 3
    assert all(composed[key] == config[key] for key in ("seed", "model", "data", "task", "optimizer", "schedule"))
    assert (composed["checkpoint"], composed["split"], composed["details"]) == ("a file.pt", "test", True)
    assert not {"run_dir", "resume"} & {*composed}


def test_groups_replace_sections_of_a_checkpoints_config(start: Callable[..., Outcome]) -> None:
    config = checkpoint_config(start, "model.width=64")
    arguments = ("data=coco", "checkpoint=a file.pt", "data.root=x")
    composed = start(*arguments, door="evaluate", base=lambda file: config).configs[0]
    assert composed["data"]["_target_"] == "detr.data.coco.Coco" and composed["model"]["width"] == 64


def test_a_misspelt_key_is_refused_with_a_checkpoint(start: Callable[..., Outcome]) -> None:
    config = checkpoint_config(start)

    def message(*arguments: str, door: str = "evaluate") -> str:
        outcome = start("checkpoint=a file.pt", *arguments, door=door, base=lambda file: config)
        assert outcome.code == 2
        return outcome.err.strip()

    assert message("splitt=val") == "splitt is not a key of this config; did you mean split?"
    assert message("model.widht=1") == "model.widht is not a key of this config; did you mean model.width?"
    assert message("split=vall").startswith("split=vall: expected train, val or test; did you mean val?")
    assert message("run_dir=x").startswith("run_dir is not a key")
    assert message("threshold=1") == "threshold is not a key of this config; did you mean task.predict.threshold?"
    assert message("-m", "split=val,test").startswith("-m sweeps are for train.py")
    assert message("threshhold=1", "input=x", door="predict").endswith("did you mean threshold?")
    assert message(door="predict").startswith(
        "input has no value: give input=, the path of an image, a folder, a pattern"
    )
    assert message("input=", door="predict").startswith("input has no value")
    assert message("input=x", "output=", door="predict").startswith("output has no value")


def test_several_numbers_are_a_list_in_a_short_option_of_prediction(start: Callable[..., Outcome]) -> None:
    Path("a file.pt").write_text("")
    arguments = ("model=promptable", "checkpoint=a file.pt", "input=x", "points=10,20.5,3,4", "boxes=-1,2,30,4e1")
    options = start(*arguments, door="predict", base=lambda file: {}).configs[0]["task"]["predict"]
    assert options["points"] == [10, 20.5, 3, 4] and options["boxes"] == [-1, 2, 30, 40.0]
    outcome = start(*arguments[:3], "points=10,left", door="predict", base=lambda file: {})
    assert outcome.code == 2 and "a list is written [a,b]" in outcome.err


def test_prediction_options_have_short_names(start: Callable[..., Outcome]) -> None:
    config = checkpoint_config(start)
    arguments = ("checkpoint=a file.pt", "input=photo (1), a=b.jpg", "threshold=0.25")
    composed = start(*arguments, door="predict", base=lambda file: config).configs[0]
    assert composed["task"]["predict"]["threshold"] == 0.25 and composed["input"] == "photo (1), a=b.jpg"


@pytest.mark.parametrize("door", ["evaluate", "predict"])
def test_the_seed_of_training_is_not_taken_for_that_of_sampling(start: Callable[..., Outcome], door: str) -> None:
    config = checkpoint_config(start)
    outcome = start("checkpoint=a file.pt", "seed=1", door=door, base=lambda file: config)
    assert outcome.code == 2 and not outcome.configs
    assert f"without effect in {door}.py" in outcome.err and "depends on task.predict.seed=." in outcome.err


@pytest.mark.parametrize("key", ["trainer.eval_samples", "trainer.patience", "trainer.log"])
def test_options_of_training_alone_are_refused_in_evaluation(start: Callable[..., Outcome], key: str) -> None:
    config = checkpoint_config(start)
    outcome = start("checkpoint=a file.pt", f"{key}=3", door="evaluate", base=lambda file: config)
    assert outcome.code == 2 and f"{key}= is for training, and without effect in evaluate.py" in outcome.err


def test_a_checkpoint_without_a_config_needs_a_model(start: Callable[..., Outcome]) -> None:
    Path("detr.pth").write_text("")
    error = start("checkpoint=detr.pth", door="evaluate", base=lambda file: {}).err
    assert error.startswith(
        "evaluate.py needs model=NAME (the checkpoint does not say which); there are bert, bert_base,"
    )
    outcome = start("checkpoint=detr.pth", "model=detr_r50", "data.root=x", door="evaluate", base=lambda file: {})
    assert outcome.configs[0]["model"]["backbone"]["name"] == "resnet50"


def test_a_checkpoint_must_be_named_and_exist(start: Callable[..., Outcome]) -> None:
    assert sentence(start(door="evaluate", base=dict)).startswith("evaluate.py needs checkpoint=FILE")
    missing = start("checkpoint=no.pt", door="evaluate", base=dict)
    assert sentence(missing) == "checkpoint=no.pt: there is no such file."


def test_an_untrusted_checkpoints_config_is_refused_whatever_it_trusts(start: Callable[..., Outcome]) -> None:
    def error(**changes: Any) -> str:
        outcome = start("checkpoint=a file.pt", door="evaluate", base=lambda file: {**config, **changes})
        assert outcome.code == 2 and not outcome.configs, outcome.err
        return outcome.err

    config = checkpoint_config(start)
    malicious = {"_target_": "os.system", "command": "true"}
    assert "model._target_=os.system: expected a class of detr" in error(model=malicious, trust=["os"])
    assert "data.defaults is not a key" in error(data={**config["data"], "defaults": ["/model: detr"]})
    assert "task._target_=null" in error(task=None)
    assert "seed=a: expected" in error(seed="a")


@pytest.mark.parametrize("path", ["a${oc.env:HOME}b", "${", r"a\\${x}", "'${a},b"])
def test_a_path_is_not_interpolated_anywhere(start: Callable[..., Outcome], path: str) -> None:
    """On the command line, in a checkpoint's config, in a run's config.yaml and in a sweep."""
    config = start("model=vit", "data=imagefolder", f"data.root={path}", f"run_dir=runs/{path}").configs[0]
    assert config["data"]["root"] == path and config["run_dir"] == f"runs/{path}"
    file = Path("runs", path, "config.yaml")
    assert run_folder.read_config(file)["data"]["root"] == path
    file.rename("config.yaml")
    again = start("--config-dir", ".", "--config-name", "config", "run_dir=x")
    assert again.configs[0]["data"]["root"] == path
    Path(f"{path}.pt").write_text("")
    arguments = (f"checkpoint={path}.pt", f"input={path}")
    predicted = start(*arguments, door="predict", base=lambda file: config).configs[0]
    assert (predicted["data"]["root"], predicted["checkpoint"], predicted["input"]) == (path, f"{path}.pt", path)
    if (
        path != "${"
    ):  # Hydra's launchers resolve the line of each run once more, and stop at a bracket that never closes
        swept = start("model=vit", f"checkpoint={path}.pt", "-m", f"sweep_dir=sweep{path}")
        assert swept.configs[0]["checkpoint"] == f"{path}.pt" and Path(f"sweep{path}").is_dir()


def test_a_checkpoint_does_not_choose_where_data_are_written(start: Callable[..., Outcome], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path("a.pt").write_text("")

    def root(config: dict[str, Any], *arguments: str) -> tuple[str, str]:
        outcome = start("checkpoint=a.pt", *arguments, door="evaluate", base=lambda file: config)
        return outcome.configs[0]["data"]["root"], outcome.err

    for model, arguments in (("detr", ()), ("vit", ("data=cifar10",))):
        config = start(f"model={model}", *arguments, f"data.root={elsewhere}").configs[0]
        assert root(config)[0] == "data/elsewhere" and "data.root=FOLDER names another folder" in root(config)[1]
        assert root({**config, "data": {**config["data"], "root": f"{elsewhere}/.."}})[0] == "data/checkpoint"
        assert root(config, "data.root=mine") == ("mine", "")
        assert root(config, *(arguments or ("data=shapes",)), f"data.root={elsewhere}") == (str(elsewhere), "")
        files = build(config["data"]).folder if model == "detr" else elsewhere / "cifar-10-python.tar.gz"
        files.mkdir()
        assert root(config) == (str(elsewhere), ""), "data that exist are read where they are"
    config = start("model=vit", "data=imagefolder", f"data.root={elsewhere}").configs[0]
    assert root(config) == (str(elsewhere), ""), "a data set that writes nothing"


def test_only_paths_are_quoted() -> None:
    assert paths.quote_path("optimizer.lr=1e-3") == "optimizer.lr=1e-3"
    assert paths.quote_path("data.root='a'") == "data.root='a'"
    assert paths.quote_path("data.root=choice(a,b)") == "data.root=choice(a,b)"
    assert paths.quote_path("+data.root=a b") == "+data.root='a b'"
    assert paths.quote_path("my_dir=a b") == "my_dir='a b'"
    assert paths.quote_path("model.blocks.drop_path=0.1,2e-1") == "model.blocks.drop_path=0.1,2e-1", "a number"
    assert paths.quote_path("data.root=2024") == "data.root='2024'", "a folder"
    assert paths.quote_path("data.train=a,b") == "data.train='a,b'"
    assert paths.quote_path("data.train=a,b", sweep=True) == "data.train='a','b'"
    assert paths.quote_path("data.train=a, b", sweep=True) == "data.train='a, b'"
    assert paths.quote_path("data.train=a b") == "data.train='a b'"
    assert paths.quote_path("data.train={images: a, annotations: b}") == "data.train={images: a, annotations: b}"


# Files that the user did not write.


@pytest.fixture
def strangers_config(start: Callable[..., Outcome]) -> Path:
    """A whole config that trusts a module beside it and would create the folder `ran` as a sweep's callback."""
    config = start("model=vit").configs[0]
    Path("theirs").mkdir()
    hydra = {"callbacks": {"evil": {"_target_": "os.mkdir", "path": "ran"}}}
    content = OmegaConf.create({**config, "run_dir": None, "trust": ["evil"], "check_memory": False, "hydra": hydra})
    Path("theirs/config.yaml").write_text(OmegaConf.to_yaml(content))
    return Path("theirs/config.yaml")


def test_a_whole_config_neither_trusts_nor_sets_hydra(start: Callable[..., Outcome], strangers_config: Path) -> None:
    outcome = start("--config-dir", "theirs", "--config-name", "config", "-m", "seed=1,2")
    assert not Path("ran").exists()
    assert [(config["trust"], config["check_memory"]) for config in outcome.configs] == [([], True)] * 2
    assert outcome.err.count("config.yaml: its section hydra is ignored") == 1
    assert outcome.err.count("trust=['evil'] in a config file is ignored") == 1
    assert start("--config-dir", "theirs", "--config-name", "config", "trust=[mine]").configs[0]["trust"] == ["mine"]


def test_trust_in_a_whole_config_does_not_permit_its_classes(
    start: Callable[..., Outcome], strangers_config: Path
) -> None:
    Path("evil.py").write_text(
        "class Net:\n    def __init__(self, *, classes: int, channels: int, image_size: list): open('ran', 'w')\n"
    )
    content = OmegaConf.load(strangers_config)
    content.model = {"_target_": "evil.Net"}
    OmegaConf.save(content, strangers_config)
    arguments = ("--config-dir", "theirs", "--config-name", "config")
    for flags in ((), ("-m",)):
        outcome = start(*arguments, *flags)
        assert outcome.code == 2 and outcome.err.endswith("that you name by trust=[evil].\n")
    assert start(*arguments, "trust=[evil]").configs[0]["model"] == {"_target_": "evil.Net"}


@pytest.mark.parametrize(
    "file, content",
    [
        ("mine.yaml", "hydra: {callbacks: {evil: {_target_: os.mkdir, path: ran}}}"),
        ("mine.yaml", "hydra: {job_logging: {handlers: {evil: {(): os.mkdir, path: ran}}}}"),
        ("../evil.yaml", ""),
    ],
)
def test_a_choice_of_a_group_does_not_set_hydra(start: Callable[..., Outcome], file: str, content: str) -> None:
    Path("theirs/model").mkdir(parents=True)
    defaults = "[vit, /evil@hydra.callbacks, _self_]" if file == "../evil.yaml" else "[vit, _self_]"
    Path("theirs/model/mine.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\n{content}\n")
    Path("theirs/evil.yaml").write_text("evil: {_target_: os.mkdir, path: ran}\n")
    error = sentence(start("--config-dir", "theirs", "model=mine", "-m", "seed=1,2"))
    assert error.startswith("--config-dir theirs: its files set hydra.") and not Path("ran").exists()


@pytest.mark.parametrize("file", ["launcher/basic.yaml", "output/default.yaml", "config.yaml"])
@pytest.mark.parametrize("flags", [(), ("-m", "seed=1,2")])
def test_a_folder_of_configs_has_no_settings_of_hydra(start: Callable[..., Outcome], flags: Any, file: str) -> None:
    (Path("theirs/hydra") / file).parent.mkdir(parents=True)
    (Path("theirs/hydra") / file).write_text("_target_: os.mkdir\npath: ran\n")
    error = sentence(start("--config-dir", "theirs", "model=vit", *flags))
    assert error.startswith("--config-dir theirs: its folder hydra would change") and not Path("ran").exists()


def test_plugins_in_the_working_folder_are_not_executed(start: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins/evil").mkdir(parents=True)
    for file in ("hydra_plugins/__init__.py", "hydra_plugins/evil/__init__.py", "joblib.py", "sitecustomize.py"):
        (tmp_path / file).write_text("open('ran', 'w')\n")
    code = f"import sys; sys.path[:0] = ['', {str(ROOT)!r}]; from common.cli.main import launch; launch(print, 'train')"
    for command in ([str(ROOT / "train.py")], ["-c", code]):
        words = [sys.executable, *command, "model=vit", "--cfg", "job"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert not (tmp_path / "ran").exists()
    refused = start("model=vit", "-m", "seed=1,2", "hydra/launcher=joblib")
    assert sentence(refused).startswith("hydra_plugins in the working folder would be executed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_printed_config_that_is_lost_on_a_full_disk_is_no_success() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train.py", "model=vit", "--cfg", "job"]
        completed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert completed.returncode == 2 and completed.stderr.count("\n") == 1
    assert "standard output cannot be written (No space left on device)" in completed.stderr
