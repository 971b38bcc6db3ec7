"""Evaluate n-gram models with Kneser-Ney smoothing on a text: `python scripts/ngram.py data.train=FILE --order 5`.

The arguments are keys of data=text; without any, the text is Python's documentation. The models count the tokens of
train, which are characters unless data.tokenizer says otherwise, and predict each token of val and test once. So their
bits per character can be compared with those of a neural language model on the same data. An n-gram model of order 1
(unigrams) is printed as well. The last line is JSON. The exit code is 0, or 2 after a mistake.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.types import SPLITS
from seq2seq.data.text import Text
from seq2seq.evaluation.code_length import CodedWindow, CodeLengthMetric
from seq2seq.evaluation.kneser_ney import KneserNey
from seq2seq.tokenizers.bpe import UNK

DEFAULT_ORDER = 5
COLUMNS = ("bits_per_token", "bits_per_character", "bits_per_byte")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the bits of each model on val and test; returns the exit code."""
    console.guard()
    options = _options(arguments)
    try:
        data = build(configure("train", ["model=gpt", *options.overrides])["data"])
        if not isinstance(data, Text):
            raise UserError("The data are no text for language models; give data=text, or leave data= out.")
        print("\n".join(f"data      {line}" for line in data.summary()))
        numbers = evaluate(data, options.order)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(numbers))
    return 0


def evaluate(data: Text, order: int) -> dict[str, float]:
    """Print a row for each model and split; returns the numbers by name, such as "test/kneser_ney_5/bits_per_byte"."""
    vocabulary = data.text_tokenizer().size - UNK  # without padding, begin and end, which are never predicted
    numbers: dict[str, float] = {}
    print(f"{'model':16}{'split':7}" + "".join(f"{name:>20}" for name in COLUMNS))
    for n in sorted({1, order}):
        model = KneserNey(data.tokens("train") - UNK, vocabulary, n)
        name = "unigram" if n == 1 else f"kneser_ney_{n}"
        for split in SPLITS[1:]:
            if data.count(split):
                scores = _scores(data, split, model)
                print(f"{name:16}{split:7}" + "".join(f"{scores[column]:20.4f}" for column in COLUMNS))
                numbers |= {f"{split}/{name}/{column}": scores[column] for column in COLUMNS}
        discounts = "; ".join(", ".join(f"{d:.3f}" for d in row) for row in model.discounts)
        print(f"discounts of order 1 to {n}, for counts of 1, 2 and more: {discounts}")
    return numbers


def _scores(data: Text, split: Any, model: KneserNey) -> dict[str, float]:
    """The code length of a split; it is computed as for a neural model, see CodeLengthMetric."""
    tokens = data.tokens(split) - UNK
    metric = CodeLengthMetric(data.amounts(split), model.order - 1, 1)
    metric.windows = [CodedWindow(0, -math.fsum(model.log_probabilities(tokens)), len(tokens))]
    return metric.compute()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="keys of the data, such as data.train=FILE")
    parser.add_argument("--order", type=int, default=DEFAULT_ORDER, help=f"n (default {DEFAULT_ORDER})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start.script(main)
