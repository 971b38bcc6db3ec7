"""Prompts: which texts the key `input` means, their continuations by a language model, and how these are printed."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from common.decoding.contract import Hypothesis, SpecialIds
from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.files import inputs
from seq2seq.tasks.reading import LINES_PER_BATCH, Line, lines
from seq2seq.tokenizers.protocol import TextTokenizer

INCOMPLETE = "\ufffd"  # what decoding gives for the first bytes of a character, before the others are there


class Group(NamedTuple):
    """Prompts that are continued in one batch."""

    lines: list[Line]
    raw: bool  # whether a continuation is printed as it is, or as one line, in which line feeds are escaped


def read(input: str) -> Iterator[Group]:
    """Yield the prompts that `input` means: the lines of a file, of all files of a pattern, or of standard input ("-").

    If there is no such file, `input` itself is the prompt. Prompts from a terminal, and such a prompt, are raw. Raises
    UserError as `seq2seq.tasks.reading.lines` does, and if `input` is a name without spaces that looks like a path.
    """
    if input == inputs.STANDARD_INPUT:
        raw = sys.stdin is not None and sys.stdin.isatty()
        yield from (Group(group, raw) for group in lines(input, LINES_PER_BATCH))
    elif os.path.lexists(input) or (inputs.is_pattern(input) and inputs.matches(input)):
        yield from (Group(group, False) for group in lines(input, LINES_PER_BATCH))
    elif re.fullmatch(r"\S*(/|\\|\.[A-Za-z][A-Za-z0-9]{0,4}$)\S*", input):
        raise UserError(f"There is no file {input}; correct its path, or give a text with a space, or input=-.")
    else:
        yield Group([Line(1, input)], True)


def continuations(
    model: Any,
    prompts: list[list[int]],
    options: DecodingOptions,
    special: SpecialIds,
    ids: list[int | str],
    **hook: Any,
) -> list[list[Hypothesis]]:
    """Continue each prompt, a list of at least one token, by at most `options.longest_extra` tokens.

    A continuation also ends at the context of the model: the prompt and all tokens after it but the last, which is
    only predicted, are at most `model.longest`. The prompt must fit into it. `hook` is passed to `decode`.
    """
    longest = getattr(model, "longest", None)
    rooms = [math.inf if longest is None else longest - len(prompt) + 1 for prompt in prompts]
    limits = [int(min(options.longest_extra, room)) for room in rooms]
    results: dict[int, list[Hypothesis]] = {}
    device = next(model.parameters()).device
    for limit in sorted({*limits}):
        rows = [i for i, own in enumerate(limits) if own == limit]
        source = torch.zeros(len(rows), 0, dtype=torch.int64, device=device)  # an empty one: there is no source
        lengths = torch.zeros(len(rows), dtype=torch.int64)
        limited = replace(options, longest_extra=limit)
        row_ids, row_prompts = [ids[i] for i in rows], [prompts[i] for i in rows]
        hypotheses = decode(model, source, lengths, limited, special, row_ids, row_prompts, **hook)
        results |= zip(rows, hypotheses, strict=True)
    return [results[i] for i in range(len(prompts))]


def text_after(tokenizer: TextTokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of `tokens` that follow `prompt`; a tokenizer may decode them differently at the start of a text."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


class Writer:
    """Passes the text of tokens to `write` as they arrive, each character when it is complete.

    It is the argument `on_tokens` of `decode` for a single prompt and a single candidate.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: list[int], write: Callable[[str], None]):
        self.tokenizer, self.prompt, self.write = tokenizer, prompt, write
        self.tokens: list[int] = []
        self.written = 0  # characters

    def __call__(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add one token (1,) of the only row."""
        self.tokens += tokens.tolist()
        text = text_after(self.tokenizer, self.prompt, self.tokens)
        self._advance(text.rstrip(INCOMPLETE))

    def finish(self, text: str) -> None:
        """Write the rest of the whole continuation `text`, and a line feed."""
        self._advance(text)
        self.write("\n")

    def _advance(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def as_line(text: str) -> str:
    r"""A text as one line: a line feed becomes \n, a carriage return \r and a backslash \\."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
