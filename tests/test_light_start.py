"""A door imports a slow package only if its run uses it: the time until the first step is mostly that of imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from common.config.schema import WINGS

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("common", *WINGS) for file in (ROOT / folder).rglob("*.py"))
FILES += [ROOT / f"{door}.py" for door in ("train", "evaluate", "predict")]
# Packages that may be imported at the head of a file, besides the standard library and our own: each takes less than a
# tenth of a second, but torch and torchvision, which every run needs.
FAST = {"torch", "torchvision", "numpy", "PIL", "hydra", "omegaconf", "yaml", "tqdm", "safetensors"}
FAST |= {"pycocotools", "tokenizers", "babel", "sacrebleu"}
SLOW = {"scipy", "sklearn", "tensorboard", "pandas", "matplotlib", "transformers", "joblib", "mlflow", "wandb"}
# Trains a classifier for one step and predicts with it, as the doors do, and prints which packages have been imported.
PROGRAM = """
import gc, sys
import predict, train
from common.cli import start

folder = sys.argv[1]
best = f"checkpoint={folder}/run/checkpoints/best.pt"
commands = {
    "train": ["model=vit", "trainer.steps=1", "trainer.log=[]", f"run_dir={folder}/run"],
    "predict": [best, f"input={folder}/digit.png", f"output={folder}/out"],
}
for module in (train, predict):
    name = module.__name__
    try:
        start.door(getattr(module, name), name, getattr(module, "stored_config", None), commands[name])
    except SystemExit as end:
        assert not end.code, name
print("collects" if gc.isenabled() and gc.get_freeze_count() else "does not")
print("imported", *{name.partition(".")[0] for name in sys.modules})
"""


def at_the_head(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """The packages that are imported with a file: not in functions, and not for type checking alone."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from at_the_head([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from at_the_head(node.body)


def test_no_file_imports_a_slow_package_at_its_head() -> None:
    ours = {"common", *WINGS} | {*sys.stdlib_module_names}
    assert {*at_the_head(ast.parse("try:\n    import scipy.stats\nexcept ImportError:\n    pass").body)} == {"scipy"}
    others = {file.relative_to(ROOT): {*at_the_head(ast.parse(file.read_text("utf-8")).body)} - ours for file in FILES}
    assert FAST >= (found := set().union(*others.values())), {f: o - FAST for f, o in others.items() if o - FAST}
    assert {"torch", "hydra", "tokenizers"} <= found, "the files are read"


@pytest.mark.slow
def test_training_a_classifier_and_predicting_with_it_import_no_slow_package(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "digit.png")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    *_, collects, names = process.stdout.splitlines()
    imported = {*names.split()}
    assert {"imported", "torch", "vit"} <= imported and not imported & SLOW
    assert collects == "collects", "garbage collection pauses only until the imports are done"
