"""Mistakes in YAML files of users and strangers are one sentence with the file, and no file fills the memory."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config.yaml_files import read_yaml
from common.errors import UserError

# Ten aliases of ten aliases of ...: 10^9 entries.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
BOMB += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))

MISTAKES = {
    "a tab": ("a:\n\t- b", r"line 2, column 1: found character '\\t'"),
    "an open bracket": ("a: [1,", "line 1, column "),
    "deep lists": ("[" * 1000, "nested too deeply"),
    "many digits": ("seed: " + "9" * 5000, "a number has too many digits"),
    "Latin-1": ("name: caf\udce9", "can't decode byte 0xe9"),
    "the same key twice": ("a: 1\na: 2", "found duplicate key a"),
}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_with_its_place(mistake: str, tmp_path: Path) -> None:
    text, reason = MISTAKES[mistake]
    write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError, match=rf"a\.yaml cannot be read \(.*{reason}.*\); correct it\.$") as caught:
        read_yaml(tmp_path / "a.yaml", "correct it")
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]"], ids=["aliases of aliases", "an alias of itself"])
def test_aliases_that_repeat_more_than_a_config_has_are_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError, match=r"a\.yaml has more than 100,000 entries, repeated by aliases; correct it\.$"):
        read_yaml(tmp_path / "a.yaml", "correct it")
    write(tmp_path / "a.yaml", "a: &a [1, 1e-3]\nb: *a")
    assert read_yaml(tmp_path / "a.yaml", "correct it") == {"a": [1, 0.001], "b": [1, 0.001]}


@pytest.mark.timeout(60)
def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    for name, reason in {"a.yaml": "it is no regular file", "b.yaml": "No such file or directory"}.items():
        with pytest.raises(UserError, match=rf"{name} cannot be read \({reason}\); correct it\."):
            read_yaml(tmp_path / name, "correct it")


@pytest.mark.parametrize("mistake", ["a tab", "deep lists", "many digits", "Latin-1"])
def test_a_users_own_config_with_a_mistake_is_one_sentence(mistake: str, inside: Callable[..., str]) -> None:
    """As a whole config, as a choice of a group, and in the folder of a run that is resumed."""
    text = MISTAKES[mistake][0]
    write(Path("mine/config.yaml"), text)
    write(Path("mine/model/net.yaml"), text)
    whole = ("--config-dir", "mine", "--config-name", "config")
    for command in (whole, (*whole, "-m", "seed=1,2"), ("model=vit", "run_dir=mine", "resume=auto")):
        assert inside("train", *command, code=2).partition("config.yaml cannot be read (")[2]
    for flags in ((), ("-m", "seed=1,2")):
        message = inside("train", "--config-dir", "mine", "model=net", *flags, code=2)
        assert message.startswith("a file of --config-dir mine cannot be read (")
    assert not list(Path().glob("run*"))
