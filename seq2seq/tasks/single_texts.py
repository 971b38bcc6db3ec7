"""The part of the tasks of encoder-only models that answers users' texts: reading them, and refusing some of them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import inputs
from common.report.records import Records, check_batch
from common.task import Answer, Batch
from seq2seq.data.protocol import SingleTextData
from seq2seq.tasks.predicting import predict_texts
from seq2seq.tasks.reading import LINES_PER_BATCH, Line, lines


class SingleTextTask(ABC):
    """Answers texts of a user. A subclass defines how, for texts that can be answered."""

    data: SingleTextData
    unanswered: list[str]  # see OptionalTask

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """The answers to a batch of the data, or of `read`."""

    @abstractmethod
    def text_answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """The answers to a batch of `view`, in which every text can be answered."""

    @abstractmethod
    def record(self, text: str, answer: Answer) -> Records:
        """The records of a text's answer, for notebooks."""

    @abstractmethod
    def is_text(self, input: str) -> bool:
        """Whether `input`, which names no file, is a text and not a path with a mistake."""

    def prepared(self, text: str) -> str:
        """A user's text as the tokenizer expects it."""
        return text

    def problem(self, tokens: Tensor) -> str | None:
        """Why a text of these tokens (n,) cannot be answered, although it is short enough; None if it can."""
        return None

    def refuse_long_samples(self, model: nn.Module, batch: Batch) -> None:
        """Raise UserError if a sample of a batch of the data is longer than the model allows."""
        longest, count = getattr(model, "longest", None), batch["tokens"].shape[1]
        if longest is not None and count > longest:
            raise UserError(
                f"a sample has {count:,} tokens, more than model.longest={longest:,}, for which the model has "
                f"positions; give data.longest={longest}, or raise model.longest for a new model."
            )

    def user_answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """An answer for each text of a batch from `read`.

        A text that cannot be answered, such as one that is too long or not UTF-8, has an answer with only `problem`,
        the reason, and a sentence in `unanswered`.
        """
        problems = self._problems(model, batch)
        rows = [i for i in range(len(batch["ids"])) if i not in problems]
        texts = [Line(batch["ids"][i], batch["texts"][i]) for i in rows]
        answers = dict(zip(rows, self._answer(model, texts), strict=True)) if rows else {}
        for i, reason in problems.items():
            id = batch["ids"][i]
            origin = f" ({batch['origins'][id]})" if id in batch["origins"] else ""
            self.unanswered.append(f"Line {id}{origin} was not answered: {reason}.")
        return [answers[i] if i in answers else {"problem": problems[i]} for i in range(len(batch["ids"]))]

    def _answer(self, model: nn.Module, texts: list[Line]) -> list[Answer]:
        answers = self.text_answers(model, self.data.collate([self._view(line) for line in texts]))
        return [{**answer, "text": line.text} for answer, line in zip(answers, texts, strict=True)]

    def _problems(self, model: nn.Module, batch: Batch) -> dict[int, str]:
        """The rows of texts that cannot be answered, with the reasons."""
        longest = getattr(model, "longest", None)
        reasons: dict[int, str] = {}
        for i, (id, tokens) in enumerate(zip(batch["ids"], batch["rows"], strict=True)):
            if id in batch["problems"]:
                reasons[i] = batch["problems"][id]
            elif longest is not None and len(tokens) > longest:
                reasons[i] = (
                    f"it has {len(tokens):,} tokens, more than model.longest={longest:,}, for which the model has "
                    "positions; shorten it"
                )
            elif reason := self.problem(torch.from_numpy(tokens)):
                reasons[i] = reason
        return reasons

    def _view(self, line: Line) -> dict[str, Any]:
        return self.data.view(self.prepared(line.text), id=line.number)

    def read(self, input: str) -> Iterator[Batch]:
        """Yield batches of the lines of text files or, for "-", of a pipe or a terminal as soon as lines arrive.

        `input` may also be a text itself, if no file has this name (see `is_text`). Lines that are empty or only spaces
        are skipped. The id of a line is its number. A batch also has two dicts with ids of lines as keys: `problems`, a
        reason for each line that is not UTF-8, and `origins`, the file and the number of each line if there are several
        files.
        """
        is_path = input == inputs.STANDARD_INPUT or os.path.lexists(input) or bool(inputs.matches(input))
        direct = not is_path and self.is_text(input)
        groups = iter([[Line(1, input)]]) if direct else lines(input, LINES_PER_BATCH)
        for group in groups:
            texts = [line for line in group if line.problem or line.text.strip()]
            if texts:
                yield self.data.collate([self._view(line) for line in texts]) | {
                    "texts": [line.text for line in texts],
                    "problems": {line.number: line.problem for line in texts if line.problem},
                    "origins": {line.number: line.origin for line in texts if line.origin},
                }

    def predict(self, model: nn.Module, input: Any) -> Any:
        """The records of a text; see `record`.

        A list of texts, or the pathlib.Path of a text file, gives a list with the records of each. For a batch (a
        dict), the result is that of `answers`. Raises UserError for a text that cannot be answered.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_texts(input, "text", partial(self._records, model))

    def _records(self, model: nn.Module, group: list[Line]) -> list[Records]:
        batch = self.data.collate([self._view(line) for line in group])
        problems = {line.number: line.problem for line in group if line.problem}
        reasons = self._problems(model, batch | {"problems": problems})
        if reasons:
            i, reason = next(iter(reasons.items()))
            raise UserError(f"Text {group[i].number} was not answered: {reason}.")
        with torch.no_grad():
            return [self.record(answer["text"], answer) for answer in self._answer(model, group)]


def on_device_of(model: nn.Module, tensor: Tensor) -> Tensor:
    """Move a tensor to the device of the model's parameters."""
    return tensor.to(next(model.parameters()).device, non_blocking=True)
