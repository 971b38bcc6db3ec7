"""Imports go down only: doors -> wings -> common, and from room to room in each; and what no file may say."""

import ast
import re
from pathlib import Path

import pytest

from common.config.schema import WINGS

ROOT = Path(__file__).parents[1]
DOORS = ("train", "evaluate", "predict")
FLOORS = {"common": {"common"}, **{wing: {"common", wing} for wing in WINGS}, **{door: {"common"} for door in DOORS}}
OURS = ("common", *WINGS, "scripts", "tests", *DOORS)
# Rooms from top to bottom: a file may import its own room and those under it.
ROOMS = {
    "common": (
        *("cli", "report", "train", "decoding", "weights", "files", "data", "config", "nn", "machine"),
        *("task", "types", "errors"),
    ),
    **dict.fromkeys(WINGS, ("tasks", "importing", "evaluation", "criterion", "data", "tokenizers")),
}
# Files that only re-export what has moved, importable for one version.
COMPATIBILITY = {
    *("common.assembly", "common.attention", "common.dropout", "common.linear", "common.positions"),
    *("detr.backbone", "detr.coco", "detr.detector", "detr.loss", "detr.matcher", "detr.task"),
    *("vit.augmentation", "vit.classifier", "vit.digits", "vit.folder", "vit.in_memory", "vit.loss", "vit.patches"),
    *("vit.task", "seq2seq.decoding", "seq2seq.loss", "seq2seq.multi30k", "seq2seq.pairs", "seq2seq.task"),
    *("seq2seq.text", "seq2seq.tokenizer", "seq2seq.transformer"),
}
FILES = sorted(file for folder in ("common", *WINGS, "scripts") for file in (ROOT / folder).rglob("*.py"))
FILES += [ROOT / f"{door}.py" for door in DOORS]


def name_of(file: Path) -> str:
    """common/data/batching.py is common.data.batching."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are written in full"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 20 and all(file.exists() for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_only(file: Path) -> None:
    floor = name_of(file).split(".")[0]
    known = {module.split(".")[0] for module in imported(file)} & {*OURS}
    assert known <= FLOORS.get(floor, {"common", *WINGS, "scripts", *DOORS})


def test_imports_make_no_circle() -> None:
    names = {name_of(file) for file in FILES}
    arrows = {name_of(file): (imported(file) & names) - {name_of(file)} for file in FILES}
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & {*arrows}}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}


HOUSED = [file for file in FILES if name_of(file).split(".")[0] in ROOMS and name_of(file) not in COMPATIBILITY]
HOUSED = [file for file in HOUSED if file.name != "__init__.py"]


def of_floor(file: Path, floor: str) -> set[str]:
    """The modules that a file imports from one floor, without the floor's name: data.coco, data.coco.Coco."""
    return {module.removeprefix(f"{floor}.") for module in imported(file) if module.startswith(f"{floor}.")}


@pytest.mark.parametrize("file", HOUSED, ids=name_of)
def test_a_room_knows_only_those_under_it(file: Path) -> None:
    floor, room = name_of(file).split(".")[:2]
    known = {module.split(".")[0] for module in of_floor(file, floor)}
    if room == "models":
        assert known <= {"models"}, "a model knows only common"
    else:
        assert room in ROOMS[floor], "a file stands in a room"
        assert known <= {*ROOMS[floor][ROOMS[floor].index(room) :]}


@pytest.mark.parametrize("wing", WINGS)
def test_a_task_knows_no_model_and_no_data_set(wing: str) -> None:
    tasks = [file for file in HOUSED if name_of(file).startswith(f"{wing}.tasks.")]
    assert tasks
    for file in tasks:
        known = {module for module in of_floor(file, wing) if module.split(".")[0] in ("data", "models")}
        assert all(f"{module}.".startswith("data.protocol.") for module in known - {"data"}), name_of(file)


def test_neural_network_parts_read_no_file() -> None:
    parts = [file for file in HOUSED if name_of(file).startswith("common.nn.")]
    assert len(parts) > 5
    for file in parts:
        readers = {"pathlib", "io", "os", "safetensors", "tempfile", "urllib"}
        assert not {module.split(".")[0] for module in imported(file)} & readers, name_of(file)
        calls = [node.func for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call) for call in calls} & {"open", "torch.load", "torch.save"}, name_of(file)


def test_files_that_only_re_export_are_those_that_users_may_name() -> None:
    homeless = {name_of(file) for file in FILES if name_of(file).count(".") == 1 and file.name != "__init__.py"}
    homeless = {name for name in homeless if name.split(".")[0] in ROOMS}
    assert homeless - {f"common.{name}" for name in ("task", "types", "errors")} == COMPATIBILITY
    for name in COMPATIBILITY:
        body = ast.parse(Path(ROOT, *name.split(".")).with_suffix(".py").read_text("utf-8")).body
        kinds = [type(node) for node in body]
        assert kinds[:2] == [ast.Expr, ast.ImportFrom] and {*kinds[1:]} == {ast.ImportFrom}, name
    assert not [name_of(file) for file in FILES if imported(file) & COMPATIBILITY]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_never_asks_which_model_it_has(door: str) -> None:
    code = (ROOT / f"{door}.py").read_text(encoding="utf-8")
    strings = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert not strings & {*WINGS}


def test_one_file_says_torch_distributed() -> None:
    says = [name_of(file) for file in FILES if any(name.startswith("torch.distributed") for name in imported(file))]
    assert says == ["common.machine.distributed"]


def test_the_environment_is_read_in_the_doors_and_in_distributed_alone() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)|\bfrom os import .*\b(environ|getenv)\b")
    allowed = {"common.cli.main", "common.cli.sweep", "common.machine.distributed", *DOORS}
    wings = [file for file in FILES if not name_of(file).startswith("scripts")]
    assert {name_of(file) for file in wings if reads.search(file.read_text(encoding="utf-8"))} <= allowed


def test_no_file_names_a_place_on_some_machine() -> None:
    places = re.compile(r"(?<![\w.])/(?:work|home|Users|root|mnt|tmp|scratch)/|\.\./shared|pypi\.org|pythonhosted")
    kinds = ("*.py", "*.yaml", "*.toml", "*.md", "*.txt", "*.cfg")
    folders = [ROOT / folder for folder in (*OURS[: len(WINGS) + 3], "configs")]
    files = {file for folder in folders for kind in kinds for file in folder.rglob(kind)}
    files |= {file for kind in kinds for file in ROOT.glob(kind)}
    named = {file for file in files if places.search(file.read_text(encoding="utf-8"))}
    assert named <= {Path(__file__)}  # which says what is forbidden


def test_names_say_what_is_inside() -> None:
    assert not {file.stem for file in FILES} & {"utils", "util", "misc", "helpers", "base", "tools"}
    assert not [file for file in FILES if file.name == "__init__.py" and file.read_text(encoding="utf-8").strip()]
