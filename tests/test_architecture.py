"""Imports go down only, from doors to wings to common and from room to room; and what files must not contain."""

import ast
import re
from pathlib import Path

import pytest

from common.config.schema import WINGS

ROOT = Path(__file__).parents[1]
DOORS = ("train", "evaluate", "predict")
FLOORS = {"common": {"common"}, **{wing: {"common", wing} for wing in WINGS}, **{door: {"common"} for door in DOORS}}
OURS = ("common", *WINGS, "scripts", "tests", *DOORS)
# Rooms from top to bottom: a file may import from its own room and the rooms below it.
ROOMS = {
    "common": (
        *("cli", "report", "train", "decoding", "weights", "files", "data", "config", "nn", "machine"),
        *("task", "types", "errors"),
    ),
    **dict.fromkeys(WINGS, ("tasks", "importing", "evaluation", "criterion", "data", "tokenizers")),
}
# Files that only re-export names that have moved, for one version.
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
    """The name of a file's module: common.data.batching for common/data/batching.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> set[str]:
    """All modules that a file imports, also inside functions; `from a import b` counts as a and as a.b."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are written in full"
            modules |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_there_are_files() -> None:
    assert len(FILES) > 20 and all(file.exists() for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_only(file: Path) -> None:
    floor = name_of(file).split(".")[0]
    floors = {module.split(".")[0] for module in imported(file)} & {*OURS}
    assert floors <= FLOORS.get(floor, {"common", *WINGS, "scripts", *DOORS})


def test_imports_are_not_circular() -> None:
    names = {name_of(file) for file in FILES}
    imports = {name_of(file): (imported(file) & names) - {name_of(file)} for file in FILES}
    while imports:
        leaves = {name for name, targets in imports.items() if not targets & {*imports}}
        assert leaves, f"circular imports among {sorted(imports)}"
        imports = {name: targets for name, targets in imports.items() if name not in leaves}


ROOM_FILES = [file for file in FILES if name_of(file).split(".")[0] in ROOMS and name_of(file) not in COMPATIBILITY]
ROOM_FILES = [file for file in ROOM_FILES if file.name != "__init__.py"]


def imported_from_floor(file: Path, floor: str) -> set[str]:
    """The modules that a file imports from one floor, without the floor's name: data.coco, data.coco.Coco."""
    return {module.removeprefix(f"{floor}.") for module in imported(file) if module.startswith(f"{floor}.")}


@pytest.mark.parametrize("file", ROOM_FILES, ids=name_of)
def test_a_room_imports_only_from_rooms_below_it(file: Path) -> None:
    floor, room = name_of(file).split(".")[:2]
    rooms = {module.split(".")[0] for module in imported_from_floor(file, floor)}
    if room == "models":
        assert rooms <= {"models"}, "a model imports from common only"
    else:
        assert room in ROOMS[floor], "every file is in a room"
        assert rooms <= {*ROOMS[floor][ROOMS[floor].index(room) :]}


@pytest.mark.parametrize("wing", WINGS)
def test_a_task_imports_no_model_and_no_data_set(wing: str) -> None:
    tasks = [file for file in ROOM_FILES if name_of(file).startswith(f"{wing}.tasks.")]
    assert tasks
    for file in tasks:
        modules = {module for module in imported_from_floor(file, wing) if module.split(".")[0] in ("data", "models")}
        assert all(f"{module}.".startswith("data.protocol.") for module in modules - {"data"}), name_of(file)


def test_neural_network_modules_read_no_file() -> None:
    parts = [file for file in ROOM_FILES if name_of(file).startswith("common.nn.")]
    assert len(parts) > 5
    for file in parts:
        readers = {"pathlib", "io", "os", "safetensors", "tempfile", "urllib"}
        assert not {module.split(".")[0] for module in imported(file)} & readers, name_of(file)
        calls = [node.func for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call) for call in calls} & {"open", "torch.load", "torch.save"}, name_of(file)


def test_only_compatibility_files_re_export_and_nothing_imports_them() -> None:
    outside = {name_of(file) for file in FILES if name_of(file).count(".") == 1 and file.name != "__init__.py"}
    outside = {name for name in outside if name.split(".")[0] in ROOMS}
    assert outside - {f"common.{name}" for name in ("task", "types", "errors")} == COMPATIBILITY
    for name in COMPATIBILITY:
        body = ast.parse(Path(ROOT, *name.split(".")).with_suffix(".py").read_text("utf-8")).body
        kinds = [type(node) for node in body]
        assert kinds[:2] == [ast.Expr, ast.ImportFrom] and {*kinds[1:]} == {ast.ImportFrom}, name
    assert not [name_of(file) for file in FILES if imported(file) & COMPATIBILITY]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_names_no_wing(door: str) -> None:
    code = (ROOT / f"{door}.py").read_text(encoding="utf-8")
    strings = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert not strings & {*WINGS}


def test_one_file_imports_torch_distributed() -> None:
    files = [name_of(file) for file in FILES if any(name.startswith("torch.distributed") for name in imported(file))]
    assert files == ["common.machine.distributed"]


def test_only_the_doors_distributed_and_the_allocators_setting_read_the_environment() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)|\bfrom os import .*\b(environ|getenv)\b")
    machine = {f"common.machine.{name}" for name in ("allocation", "distributed")}
    allowed = {"common.cli.main", "common.cli.sweep", *machine, *DOORS}
    wings = [file for file in FILES if not name_of(file).startswith("scripts")]
    assert {name_of(file) for file in wings if reads.search(file.read_text(encoding="utf-8"))} <= allowed


def test_no_file_contains_the_path_of_a_machine() -> None:
    paths = re.compile(r"(?<![\w.])/(?:work|home|Users|root|mnt|tmp|scratch)/|\.\./shared|pypi\.org|pythonhosted")
    kinds = ("*.py", "*.yaml", "*.toml", "*.md", "*.txt", "*.cfg")
    folders = [ROOT / folder for folder in (*OURS[: len(WINGS) + 3], "configs")]
    files = {file for folder in folders for kind in kinds for file in folder.rglob(kind)}
    files |= {file for kind in kinds for file in ROOT.glob(kind)}
    matches = {file for file in files if paths.search(file.read_text(encoding="utf-8"))}
    assert matches <= {Path(__file__)}  # which holds the pattern


def test_names_of_files_describe_their_contents() -> None:
    assert not {file.stem for file in FILES} & {"utils", "util", "misc", "helpers", "base", "tools"}
    assert not [file for file in FILES if file.name == "__init__.py" and file.read_text(encoding="utf-8").strip()]
