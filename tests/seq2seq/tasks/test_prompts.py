"""Prompts: what the key `input` means, how long continuations get, streaming, and texts as lines."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from searching import BEAM
from tokenizing import BYTE_OPTIONS
from torch import Tensor, nn

from common.decoding.contract import SpecialIds
from common.errors import UserError
from seq2seq.tasks import prompts
from seq2seq.tasks.prompts import Writer, as_line, continuations
from seq2seq.tokenizers.bpe import Tokenizer

END, ENTRIES = 9, 10
SPECIAL = SpecialIds(END, END, ())
GREEDY = replace(BEAM, method="greedy", beam=1, candidates=1, longest_factor=0.0, longest_extra=6, at_limit="cut")


class Counter(nn.Module):
    """A model without a source that counts: after token n comes n + 1; its context is `longest` tokens."""

    longest = 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.most = 0  # tokens that a state has held

    def encode(self, source: Tensor, lengths: Tensor) -> list[int]:
        assert source.shape[1] == 0
        return [0]

    def step(self, state: list[int], tokens: Tensor) -> Tensor:
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        state[0] += tokens.shape[1]
        self.most = max(self.most, state[0])
        logits = torch.zeros(len(tokens), ENTRIES)
        logits[torch.arange(len(tokens)), (tokens[:, -1] + 1) % ENTRIES] = 5.0
        return logits

    def reorder(self, state: list[int], rows: Tensor) -> list[int]:
        return state


def lines_of(input: str) -> list[tuple[list[str], bool]]:
    return [([line.text for line in group.lines], group.raw) for group in prompts.read(input)]


def test_a_file_gives_its_lines_and_any_other_text_is_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("one\n\ntwo")
    (tmp_path / "what is it").write_text("a file with a name of words\n")
    assert lines_of("in.txt") == [(["one", "", "two"], False)]
    assert lines_of("what is it") == [(["a file with a name of words"], False)]
    assert lines_of("in.*") == lines_of("in.txt")
    for text in ("what is that?", "def f(x):", "Hello.", "a = b[*] / 2", "x" * 5000, "word"):
        assert lines_of(text) == [([text], True)]


@pytest.mark.parametrize("name", ["missing.txt", "folder/missing", "texts/*.txt", "a.py"])
def test_a_name_of_a_missing_file_is_not_taken_for_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no file"):
        lines_of(name)


def test_a_continuation_ends_at_the_limit_or_the_context_of_the_model() -> None:
    """A prompt of P tokens and a continuation of n take P + n - 1 tokens of context: the last one is not read."""
    model = Counter()
    rows = continuations(model, [[0], [0, 1, 2, 3, 4], [1] * 8], GREEDY, SPECIAL, [0, 1, 2])
    assert [row[0].tokens for row in rows] == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 8], [2]]
    assert model.most == 8
    model.longest = None  # a model without a limit
    (row,) = continuations(model, [[0, 1, 2, 3, 4]], replace(GREEDY, longest_extra=4), SPECIAL, [0])
    assert row[0].tokens == [5, 6, 7, 8] and not row[0].ended
    (row,) = continuations(model, [[6]], GREEDY, SPECIAL, [0])
    assert row[0].tokens == [7, 8] and row[0].ended


def test_a_writer_passes_on_whole_characters_only() -> None:
    tokenizer, written = Tokenizer.train([], BYTE_OPTIONS), []
    prompt, text = tokenizer.encode_continuation("say "), "grün 好 \ufffd!"
    writer = Writer(tokenizer, prompt, written.append)
    for token in tokenizer.encode_continuation(text):
        writer(torch.tensor([0]), torch.tensor([token]))
    writer.finish(text)
    assert "".join(written) == text + "\n"
    assert written[:5] == ["g", "r", "ü", "n", " "] and "\ufffd" not in written[:7]


def test_a_space_at_the_start_of_a_continuation_is_kept() -> None:
    tokenizer = Tokenizer.train([], BYTE_OPTIONS)
    prompt, tokens = tokenizer.encode_continuation("one"), tokenizer.encode_continuation(" two")
    assert prompts.text_after(tokenizer, prompt, tokens) == " two"
    assert tokenizer.decode(tokens) == "two", "a text of its own loses it"


def test_a_text_as_one_line_can_be_restored() -> None:
    text = "a\n\\n\r\\\tb"
    line = as_line(text)
    assert "\n" not in line and "\r" not in line and line == r"a\n\\n\r\\" + "\tb"
