"""`triptych NAME` finds the doors and scripts, and command lines to repeat begin with what the user typed."""

import sys

import pytest

from common.cli import command


def test_a_command_runs_its_file_as_the_main_module_with_the_other_arguments(monkeypatch, tmp_path, capsys):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "count_words.py").write_text('"""Count: `x`."""\nimport sys\nprint(__name__, sys.argv)\n')
    for door in command.DOORS:
        (tmp_path / f"{door}.py").write_text(f'"""The door {door}."""\n')
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/triptych", "count-words", "a", "-b"])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    command.main()
    assert capsys.readouterr().out == "__main__ ['triptych count-words', 'a', '-b']\n"
    assert command.own_name() == ["triptych", "count-words"]


def test_an_unknown_command_is_refused_with_the_closest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["triptych", "evalute"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "triptych evalute: there is no such command; did you mean evaluate?\n"


def test_a_door_that_python_started_is_repeated_with_python(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/clone/train.py", "model=vit"])
    assert command.own_name() == ["python", "/clone/train.py"]
    assert command.own_name("train") == ["python", "train.py"]


def test_the_commands_to_go_on_with_are_those_of_the_program_that_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/search.py"])
    assert [command.to_run(file) for file in ("train.py", "scripts/compare.py")] == [
        "python train.py",
        "python scripts/compare.py",
    ]
    monkeypatch.setattr(sys, "argv", ["triptych search"])
    assert command.to_run("evaluate.py") == "triptych evaluate"
    assert command.to_run("scripts/export_marian.py") == "triptych export-marian"
