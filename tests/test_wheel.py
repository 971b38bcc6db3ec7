"""The built wheel, in an environment of its own, trains, evaluates and predicts from any folder by `triptych`."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from common.cli import command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# `triptych NAME --help` for each name, forked from a process that has imported torch, which takes most of a start.
FORKED_HELP = """
import os, sys
import torch
from common.cli import start
for name in sys.argv[1:]:
    if not os.fork():
        sys.argv = ["triptych", name, "--help"]
        start.triptych()
    print(f"end of {name}: {os.wait()[1]}", flush=True)
"""


@pytest.fixture(scope="module")
def triptych(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that runs `triptych` (or `program`) of an installed wheel in a folder and returns stdout and stderr.

    The environment sees the packages of this one, but not this clone: a .pth file inside a folder that a .pth file
    names is not read. A foreign package `scripts` lies on the path.
    """
    folder = tmp_path_factory.mktemp("wheel")
    sources = [
        *command.DOORS,
        "pyproject",
        "README",
        "LICENSE",
        "common",
        "configs",
        "detr",
        "vit",
        "seq2seq",
        "scripts",
    ]
    for source in (path for path in ROOT.iterdir() if path.stem in sources):
        target = folder / "source" / source.name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "built"), str(folder / "source")]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "environment", with_pip=True)
    scripts = folder / "environment" / "bin"
    wheel = next((folder / "built").glob("*.whl"))
    install = [str(scripts / "python"), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    purelib = next((folder / "environment").glob("lib/python*/site-packages"))
    (purelib / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    (folder / "foreign" / "scripts").mkdir(parents=True)
    (folder / "foreign" / "scripts" / "__init__.py").write_text("raise RuntimeError('the foreign package')\n")

    def run(folder_of_user: Path, *arguments: str, code: int = 0, program: str = "triptych") -> str:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder / "foreign"), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [str(scripts / program), *arguments], capture_output=True, text=True, cwd=folder_of_user, env=environment
        )
        output = process.stdout + process.stderr
        assert process.returncode == code, output
        assert str(ROOT) not in output
        return output

    return run


def test_a_wheel_trains_evaluates_predicts_and_exports_from_another_folder(triptych, tmp_path):
    small = ["model.width=32", "model.layers=1", "trainer.workers=1", "trainer.precision=fp32"]
    assert "test/top1" in triptych(tmp_path, "train", "model=vit", "trainer.steps=20", *small, "run_dir=run")
    best = f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'best.pt'}"
    assert "test/top1" in triptych(tmp_path, "evaluate", best)
    from PIL import Image

    Image.new("L", (8, 8), 90).save(tmp_path / "digit.png")
    assert "digit.png" in triptych(tmp_path, "predict", best, "input=digit.png")
    assert "run" in triptych(tmp_path, "compare", "run")
    triptych(tmp_path, "export", best, "--format", "torch")
    assert (tmp_path / "run" / "checkpoints" / "best.export" / "model.pt2").exists()


def test_every_command_prints_its_help_and_an_unknown_one_names_the_closest(triptych, tmp_path):
    overview, names = triptych(tmp_path, "--help"), [*command.commands()]
    rest = triptych(tmp_path, "-c", FORKED_HELP, *names, program="python")
    for name in names:
        assert f"\n  {name} " in overview
        text, end, rest = rest.partition(f"end of {name}: 0\n")
        assert end and (name in ("verify-import",) or f"usage: triptych {name} " in text), text
    assert "did you mean train?" in triptych(tmp_path, "trian", code=2)
