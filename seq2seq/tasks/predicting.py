"""Answer the texts that `Task.predict` receives: one text, a list of texts, or a text file."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.report.records import Records
from seq2seq.tasks.reading import LINES_PER_BATCH, Line, lines


def predict_texts(input: Any, noun: str, answer: Callable[[list[Line]], list[Records]]) -> Records:
    """The records of a text (str), or a list with the records of each text of a list or of a text file (Path).

    `answer` maps a group of lines to the records of each. `noun` names a text in messages. A string is a text even if
    it is also the path of a file; then a warning says so. Raises UserError for any other input.
    """
    if isinstance(input, str):
        if os.path.isfile(input):
            warnings.warn(f"{input!r} is taken as a {noun}; Path({input!r}) reads the file.", stacklevel=3)
        return answer([Line(1, input)])[0]
    groups: Iterable[list[Line]]
    if isinstance(input, Path):
        groups = lines(str(input), LINES_PER_BATCH)
    elif isinstance(input, list | tuple) and all(isinstance(text, str) for text in input):
        numbered = [Line(number, text) for number, text in enumerate(input, 1)]
        groups = (numbered[i : i + LINES_PER_BATCH] for i in range(0, len(numbered), LINES_PER_BATCH))
    else:
        raise UserError(f"A {noun} (str), a list of {noun}s, or the pathlib.Path of a text file was expected.")
    return Records(records for group in groups for records in answer(group))
