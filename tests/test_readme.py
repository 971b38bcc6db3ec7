"""What the README promises in commands is what CI runs, and what is there."""

import re
from pathlib import Path

import pytest

from common.config.compose import configure

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in README.replace("\\\n", " ").splitlines() if line.startswith("    ")]
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "


def test_the_readme_opens_with_two_commands_that_do_all_the_set_up():
    first, second = [line for line in COMMANDS if line.startswith("python3 -m venv")]
    assert first == SET_UP + ". && .venv/bin/python train.py model=detr"
    assert second.startswith(SET_UP) and second.endswith('-m pytest -q -m "not slow"')
    assert COMMANDS[:2] == [first, second]


def test_ci_runs_the_very_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert COMMANDS[1] in script


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if re.match(r"(python|torchrun).* train\.py .*model=", line)]
)
def test_training_commands_of_the_readme_compose(line):
    arguments = [
        word for word in line.partition("train.py ")[2].split() if not re.search(r"=.*,|^-m$|^sweep_dir=", word)
    ]
    assert configure("train", arguments)["model"]["_target_"]


def test_files_and_configs_that_the_readme_names_are_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for model in re.findall(r"model=(\w+)", README):
        assert (ROOT / f"configs/model/{model}.yaml").exists(), model


def test_every_row_of_the_faults_names_tests_that_are_there():
    section = README.partition("## Nothing is lost")[2].partition("\n## ")[0]
    rows = [line.split("|")[3] for line in section.splitlines() if line.startswith("| ")][2:]
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    names = re.findall(r"def (test_\w+)", "\n".join(files.values()))
    held = [word for row in rows for word in re.findall(r"`([^`]+)`", row)]
    assert len(rows) > 20 and len(held) >= len(rows)
    missing = [word for word in held if word not in files and not any(word in name for name in names)]
    assert not missing
