"""Mutated command lines, checkpoints and COCO JSONs end in success or in one sentence, run no code and do not hang.

The mutations are sampled with a fixed seed, so that a failure can be repeated: its message has the number of the case.
"""

import copy
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Child, run
from PIL import Image

from common.config.compose import configure
from common.config.diff import flatten
from common.train.assembly import stored_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TASKS = ("detr", "vit", "seq2seq")
PAIRS = "one\teins\ntwo\tzwei\nthree\tdrei\n"
SECONDS = 30  # after which a command counts as hanging
SHORT = ["trainer.steps=1", "trainer.workers=0", "schedule.warmup=0", "run_dir=run", "trainer.precision=fp32"]
SMALL = {
    "detr": [
        *("model=detr", "model.width=16", "model.heads=2", "model.queries=3", "data.image_size=64"),
        *("data.train_count=2", "data.val_count=1", "data.test_count=1", "data.batch_size=2"),
    ],
    "vit": [*("model=vit", "model.width=16", "model.heads=2", "model.layers=1", "data.batch_size=8")],
    "seq2seq": [
        *("model=seq2seq", "data=parallel_text", "model.width=16", "model.heads=2", "model.feedforward=16"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "data.tokenizer.pieces=bytes"),
        *("data.tokenizer.vocabulary=262", "data.batch_size=100", "data.longest=50", "task.predict.longest_extra=2"),
        *("data.train.pairs=train.tsv", "data.val.pairs=train.tsv", "data.test.pairs=train.tsv"),
    ],
}
SIZES = ["data.augmentation.sizes=[48]", "data.augmentation.eval_size=48", "data.augmentation.max_size=64"]
SIZES += ["data.augmentation.middle_sizes=[40]", "data.augmentation.crop=[20,30]"]
HUGE = 10**30
TEXTS = ["", "null", "???", "nan", "-1", "0", "1e308", "true", "[]", "{}", "[1,[2]]", "{a:1}", "[0,0.99]", "-inf", "'"]
TEXTS += [
    str(HUGE),
    "9" * 5000,
    "x" * 5000,
    "${oc.env:HOME}",
    "${seed}",
    "\x1b[31m",
    "\udce9",
    "a=b",
    "../..",
    "/dev/null",
]
TEXTS += [
    "os.system",
    "{_target_:os.system,command:'touch ran'}",
    "1,2",
    "glob(*)",
    "range(1,3)",
    "café",
    "1_0",  # ten: a thousand layers would be right, and take minutes
    "0x10",
]


class RunsCode:
    """An object whose pickle creates the file `ran` when it is loaded without protection."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("ran").touch, ()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a text file, and a plugin folder that creates the file `ran` if it is imported."""
    (tmp_path / "train.tsv").write_text(PAIRS)
    plugins = tmp_path / "hydra_plugins" / "stranger"
    plugins.mkdir(parents=True)
    (plugins / "__init__.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The content of a checkpoint of a task, from a run of one step."""
    contents: dict[str, dict[str, Any]] = {}

    def train(task: str) -> dict[str, Any]:
        if task not in contents:
            folder = tmp_path_factory.mktemp(task)
            (folder / "train.tsv").write_text(PAIRS)
            run(folder, *SMALL[task], *SHORT)
            contents[task] = torch.load(next(folder.glob("run/checkpoints/step_*.pt")), weights_only=True)
        return contents[task]

    return train


def clean(folder: Path) -> Path:
    """Remove what earlier commands wrote to the working folder; returns it."""
    for name in ("run", "runs", "data", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def faults_of(name: str, folder: Path, door: str, arguments: list[str]) -> list[str]:
    """Run a door; returns what is wrong with its end, and nothing after success or one sentence."""
    (folder / f"{door}-0.txt").unlink(missing_ok=True)
    (folder / "ran").unlink(missing_ok=True)
    with Child(folder, *arguments, door=door) as child:
        try:
            code = child.end(SECONDS)
        except AssertionError as error:
            return [f"{name[:300]!r} hangs: {str(error)[-300:]}"]
        output = child.output()
    lines = [line for line in output.splitlines() if line.strip()] or [""]
    faults = [f"{name[:300]!r} runs code"] * (folder / "ran").exists()
    if code not in (0, 2) or "Traceback" in output:
        faults.append(f"{name[:300]!r} exits with {code}: {' | '.join(lines[-3:])[-600:]}")
    elif code == 2 and not lines[-1].rstrip().endswith((".", ")", "?")):
        faults.append(f"{name[:300]!r} ends without a sentence: {lines[-1][-300:]}")
    return faults


# Command lines.


def mutated_line(rng: random.Random, arguments: list[str], keys: list[str]) -> list[str]:
    """A command line with one to three mutations: a key with a strange value, or a change of an argument's text."""
    arguments = list(arguments)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(8)
        number = rng.randrange(len(arguments))
        if kind < 5:
            arguments.append(f"{rng.choice(keys)}={rng.choice(TEXTS)}")
        elif kind == 5:
            position = rng.randrange(len(arguments[number]) + 1)
            text = rng.choice(["=", "+", "~", ".", "@", ",", "[", "'", " ", "é", "\\", "--", "/", ":"])
            arguments[number] = arguments[number][:position] + text + arguments[number][position:]
        elif kind == 6:
            arguments[number] = arguments[number][: rng.randrange(len(arguments[number]))]
        else:
            arguments.append(
                rng.choice(["-m", "--cfg", "--config-dir", "-h", "--config-name", "-x", "--cfg=job", "-cd=."])
            )
    return arguments


def keys_of(door: str, arguments: list[str]) -> list[str]:
    """The keys of a door's config, of its groups and of some options."""
    base = stored_config if door != "train" else None
    return [
        *flatten(configure(door, arguments, base)),
        *("model", "data", "experiment", "optimizer", "trust", "resume"),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_a_mutated_command_line_succeeds_or_is_refused_in_one_sentence(task, folder, trained, monkeypatch):
    """36 lines of train.py, 12 of evaluate.py and 12 of predict.py for each task."""
    monkeypatch.chdir(folder)
    torch.save(trained(task), folder / "best.pt")
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), (200, 90, 30)).save(folder / "images/a.png")
    inputs = ["checkpoint=best.pt", f"input={'train.tsv' if task == 'seq2seq' else 'images'}", "output=out"]
    lines = {"train": [*SMALL[task], *SHORT], "evaluate": inputs[::2], "predict": inputs}
    keys = {door: keys_of(door, arguments) for door, arguments in lines.items()}
    rng = random.Random(TASKS.index(task))
    faults = []
    for number in range(60):
        door = ("train", "train", "train", "evaluate", "predict")[number % 5]
        line = mutated_line(rng, lines[door], keys[door])
        faults += faults_of(f"{number}: {door} {line[len(lines[door]) - 1 :]}", clean(folder), door, line)
    assert not faults, "\n".join(faults)


# Checkpoints.


def strange_values() -> list[Any]:
    """Values that no field of a checkpoint expects."""
    tensors = [torch.tensor([float("nan")]), torch.ones(2, 2).to_sparse(), torch.ones(3, dtype=torch.complex64)]
    tensors += [torch.zeros(0), torch.ones(2, 2, dtype=torch.bool), torch.empty(3, device="meta")]
    return [
        None,
        5,
        -1,
        HUGE,
        1.5,
        float("nan"),
        "text",
        "0123456789",
        b"bytes",
        [],
        [None],
        {},
        {None: 1},
        {1: 2},
        True,
        *tensors,
    ]


def paths_of(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields of nested dicts and lists; of a list, those of its first items."""
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    nested = [paths_of(value, (*path, key)) for key, value in items]
    inner = [field for fields in nested for field in fields]
    return [path, *inner] if path else inner


def altered(rng: random.Random, content: dict[str, Any], path: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
    """A copy of `content` in which the field at `path` has another value or is missing, and a description."""
    content = copy.deepcopy(content)
    *above, last = path
    parent: Any = content
    for key in above:
        parent = parent[key]
    value = rng.choice(["missing", "renamed", "code", *strange_values()])
    if isinstance(value, str) and value == "missing":
        del parent[last]
    elif isinstance(value, str) and value == "renamed" and isinstance(parent, dict):
        parent[7] = parent.pop(last)
    else:
        parent[last] = RunsCode() if isinstance(value, str) and value == "code" else value
    return f"{'.'.join(map(str, path))} = {str(value)[:40]}", content


@pytest.mark.parametrize("task", TASKS)
def test_an_altered_checkpoint_is_evaluated_or_refused_in_one_sentence(task, folder, trained):
    rng, content = random.Random(TASKS.index(task)), trained(task)
    paths = {name: paths_of({name: value}) for name, value in content.items()}
    faults = []
    for number in range(45):
        of_field = paths[sorted(paths)[number % len(paths)]]  # each field in turn
        name, changed = altered(rng, content, rng.choice(of_field))
        torch.save(changed, folder / "altered.pt", pickle_module=pickle)
        door = rng.choice(["evaluate", "evaluate", "train"])
        arguments = ["checkpoint=altered.pt", *([*SMALL[task], *SHORT] if door == "train" else [])]
        faults += faults_of(f"{number}: {door} {name}", clean(folder), door, arguments)
    assert not faults, "\n".join(faults)


# COCO JSONs.


def coco(folder: Path) -> dict[str, Any]:
    """A COCO JSON with three images, whose files are written to `folder`, and four annotations."""
    folder.mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(3):
        Image.new("RGB", (40 + number, 30), (number * 60, 90, 30)).save(folder / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": 30, "width": 40 + number})
    for number in range(4):
        annotations.append(
            {
                "id": number + 1,
                "image_id": number % 2 + 1,
                "category_id": number % 2 + 3,
                "bbox": [2.0, 3.0, 10.0 + number, 12.5],
                "area": 125.0,
                "iscrowd": 0,
                "segmentation": [[2.0, 3.0, 12.0, 3.0, 12.0, 15.0]],
            }
        )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "b"}],
    }


def mutated_json(rng: random.Random, content: dict[str, Any]) -> tuple[str, str]:
    """The text of a JSON in which one to three fields are missing, repeated or of another value; and a description."""
    content, names = copy.deepcopy(content), []
    values = [
        None,
        0,
        -1,
        HUGE,
        1e308,
        float("nan"),
        "",
        "5",
        "\ud800",
        "x" * 5000,
        "../..",
        [],
        [[]],
        {},
        True,
        1.5,
        [1, 2],
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(paths_of(content) or [()])
        if not path:
            break
        *above, last = path
        parent: Any = content
        for key in above:
            parent = parent[key]
        value = rng.choice(["missing", "repeated", *values])
        names.append(f"{'.'.join(map(str, path))} = {str(value)[:30]!r}")
        if value == "missing":
            del parent[last]
        elif value == "repeated" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[last] = value
    text = json.dumps(content)
    if rng.random() < 0.1:
        names.append("cut")
        text = text[: rng.randrange(len(text))]
    if rng.random() < 0.03:
        names.append("nested")
        text = "[" * 200_000
    return ", ".join(names), text


@pytest.mark.parametrize("part", range(2))
def test_a_mutated_coco_json_is_trained_on_or_refused_in_one_sentence(part, folder):
    rng, content = random.Random(part), coco(folder / "images")
    (folder / "good.json").write_text(json.dumps(content))
    splits = ["data.train={images:%s,annotations:%s}", "data.val={images:%s,annotations:%s}"]
    small = [*SMALL["detr"][:4], "data=coco", "data.batch_size=2", *SIZES, *SHORT]
    run(folder, *small, *[split % (folder / "images", folder / "good.json") for split in splits])  # succeeds
    faults = []
    for number in range(60):
        name, text = mutated_json(rng, content)
        (folder / "mutated.json").write_text(text)
        files = ["mutated.json", "good.json"] if rng.random() < 0.7 else ["good.json", "mutated.json"]
        data = [split % (folder / "images", folder / file) for split, file in zip(splits, files, strict=True)]
        faults += faults_of(f"{number}: {files[0]} {name}", clean(folder), "train", [*small, *data])
    assert not faults, "\n".join(faults)
