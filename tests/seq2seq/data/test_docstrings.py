"""The documentation strings of the standard library: enough text, the same each time, and no string in two splits."""

import difflib
import inspect
import json
import pathlib
import statistics
import unittest

import pytest

from common.errors import UserError
from common.types import SPLITS
from seq2seq.data import docstrings
from seq2seq.data.docstrings import _split_of, _strings


def test_every_split_has_text_and_train_at_least_500_kilobytes() -> None:
    sizes = {split: sum(len(text.encode()) for text in docstrings.docstrings(split)) for split in SPLITS}
    assert sizes["train"] >= 500_000 and min(sizes["val"], sizes["test"]) >= 20_000, sizes


def test_the_text_is_that_of_the_modules_in_order_of_their_names() -> None:
    whole = "".join("\n\n".join(docstrings.docstrings(split)) for split in SPLITS)
    train = "\n\n".join(docstrings.docstrings("train"))
    for module in (difflib, json, statistics, unittest):
        assert inspect.cleandoc(module.__doc__ or "").strip() in whole
    places = [train.index(inspect.cleandoc(module.__doc__ or "")) for module in (difflib, json, statistics)]
    assert places == sorted(places)


def test_no_documentation_string_is_in_two_splits() -> None:
    parts = {split: {*"\n\n".join(docstrings.docstrings(split)).split("\n\n")} for split in SPLITS}
    long = {split: {part for part in texts if len(part) > 200} for split, texts in parts.items()}
    for split in ("val", "test"):
        shared = long[split] & long["train"]
        assert len(shared) <= 0.01 * len(long[split]), shared  # paragraphs may recur inside different strings


def test_a_module_and_the_one_that_implements_it_are_in_one_split() -> None:
    assert _split_of("io") == _split_of("_io") == _split_of("_pyio")
    assert _split_of("datetime") == _split_of("_pydatetime")


def test_strings_of_methods_and_of_conditional_definitions_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\n'
        'class A:\n    """Class.\n\n    Text.\n      Indented.\n    """\n    def f(self):\n        """Method."""\n'
        '        def g():\n            """Inner."""\n'
        'try:\n    import x\nexcept ImportError:\n    async def h():\n        r"""Handler \\d."""\nelse:\n'
        '    def k():\n        ""\n        "not a docstring"\n'
    )
    assert [*_strings(path)] == ["Module.", "Class.\n\nText.\n  Indented.", "Method.", "Handler \\d."]
    path.write_text("def broken(:\n")
    assert [*_strings(path)] == []


def test_an_installation_without_source_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    docstrings._all_documents.cache_clear()
    try:
        with pytest.raises(UserError, match=r"holds no source files .* data.train=FILE"):
            docstrings.docstrings("val")
    finally:
        docstrings._all_documents.cache_clear()
