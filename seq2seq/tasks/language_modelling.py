"""The task of language modelling: the next token after all before it, exact code lengths, and continuing prompts."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.report.records import Records, check_batch
from common.task import Adopted, Answer, Batch, Goal, Split
from seq2seq.criterion.next_token import next_token_losses
from seq2seq.data.protocol import LanguageData
from seq2seq.evaluation.code_length import CodeLengthMetric
from seq2seq.importing import gpt2
from seq2seq.tasks import prompts
from seq2seq.tasks.fitting_data import refuse_other_data
from seq2seq.tasks.predicting import predict_texts
from seq2seq.tasks.prompts import Group, Writer, as_line, text_after
from seq2seq.tasks.reading import Line
from seq2seq.tokenizers import stored

MAX_NAMED = 5  # maximum number of unknown characters that a message lists


class LanguageModellingState(TypedDict, total=False):
    """The task's part of a checkpoint; `tokenizers` may be missing if the weights were imported."""

    tokenizers: list[str]  # the tokenizer as JSON, in a list of one, as in a checkpoint of a translator


class LanguageModelling:
    """The task of predicting each token of a text from those before it.

    A model maps tokens (B, N) to logits of the token after each of them (B, N, V), and implements
    `common.decoding.contract.Decoder`. Prediction uses the tokenizer of `data`, but reads no file of `data`.
    """

    goal = Goal("bits_per_character", higher_is_better=False)
    handed_on: ClassVar[tuple[str, ...]] = ("vocabulary",)
    state_schema = LanguageModellingState

    def __init__(self, *, data: LanguageData, predict: DecodingOptions, keep_tokenizer: bool):
        """Make the task.

        Args:
            data: a text, as blocks of tokens.
            predict: how prompts are continued. `longest_extra` is the maximum number of tokens of a continuation, which
                also ends at the context of the model. With method=given, prompts are not continued but scored.
            keep_tokenizer: whether a run that starts from a checkpoint uses the checkpoint's tokenizer. With it, each
                embedding stands for the same token as before. Without it, the run trains a tokenizer on its own data.
        """
        refuse_other_data(data, "amounts", "text in blocks, which language models need", "data=text or data=text_gpt2")
        if predict.attention:
            raise UserError("task.predict.attention=true: a language model has no cross-attention to show; use false.")
        self.data, self.options, self.keep_tokenizer = data, predict, keep_tokenizer
        self.unanswered: list[str] = []  # see OptionalTask

    def model_arguments(self) -> dict[str, Any]:
        """The number of entries of the vocabulary."""
        return {"vocabulary": self.data.text_tokenizer().size}

    def state(self) -> dict[str, Any]:
        """The tokenizer as JSON; see LanguageModellingState."""
        return {"tokenizers": [self.data.text_tokenizer().state()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Use the tokenizer of a checkpoint; raises UserError if it has none, or several."""
        states = state.get("tokenizers", [])
        if len(states) != 1:
            raise UserError(
                f"The checkpoint contains {len(states) or 'no'} tokenizers, expected one, which gives its token ids a "
                "text; import it together with the files of its tokenizer."
            )
        self.data.use(stored.restore(states[0]))

    def inherit(self, state: dict[str, Any]) -> None:
        """With `keep_tokenizer`, use the tokenizer in `state`, if there is one, before the model is built."""
        if self.keep_tokenizer and len(state.get("tokenizers", [])) == 1:
            self.restore(state)

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert a file of GPT-2, see seq2seq/importing/gpt2.py."""
        return gpt2.adopt(tensors, folder)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The number of targets that count, under the key "tokens"."""
        return {"tokens": float(batch["counts"].sum())}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy in nats: the sum over the targets that count, divided by their number in the whole step."""
        return self._nats(model, batch).sum() / normalisers["tokens"], {}

    def _nats(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the log probability of each target; 0 where it does not count: (B, N), at least fp32."""
        device = next(model.parameters()).device
        tokens, targets, counts = (batch[name].to(device) for name in ("tokens", "targets", "counts"))
        longest = getattr(model, "longest", None)
        if longest is not None and tokens.shape[1] > longest:
            raise UserError(
                f"data.block={self.data.block} is more than model.longest={longest}, the context of the model; lower "
                "data.block, or raise model.longest for a new model."
            )
        return next_token_losses(model(tokens), targets).masked_fill(~counts, 0)

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer for each row.

        For a batch of data, an answer has nats, the sum over the targets that count, and tokens, their number. For a
        batch of `read`, it has text, score and tokens (ids) of the first continuation: the best one, or with
        method=sample the first sample. If task.predict.candidates is above 1, `candidates` holds the text and score of
        each. With method=given, text is the prompt, and its score the log probability of all its tokens after the
        tokenizer's begin token, divided by the length penalty.

        A prompt that cannot be continued has an empty answer with `problem`, the reason, which `unanswered` lists.
        """
        if "prompts" not in batch:
            nats = self._nats(model, batch).double().sum(1).tolist()
            counts = batch["counts"].sum(1).tolist()
            return [{"nats": total, "tokens": count} for total, count in zip(nats, counts, strict=True)]
        problems = self._problems(model, batch)
        self.unanswered += [f"{self._name(batch, i)} was not continued: {text}." for i, text in problems.items()]
        rows = [i for i in range(len(batch["ids"])) if i not in problems]
        texts = [batch["prompts"][i] for i in rows]
        answer = self._scored if self.options.method == "given" else self._continued
        answers = dict(zip(rows, answer(model, texts, [batch["ids"][i] for i in rows]) if rows else [], strict=True))
        empty: Answer = {"text": "", "score": 0.0, "tokens": []}
        return [answers[i] if i in answers else {**empty, "problem": problems[i]} for i in range(len(batch["ids"]))]

    def _name(self, batch: Batch, i: int) -> str:
        """What a prompt is called in messages, such as "Line 3"."""
        origin = batch["origins"].get(batch["ids"][i])
        return f"Line {batch['ids'][i]}{f' ({origin})' if origin else ''}"

    def _problems(self, model: nn.Module, batch: Batch) -> dict[int, str]:
        """The rows that cannot be continued, with the reasons. The last token of a scored text is only predicted."""
        longest, scored = getattr(model, "longest", None), self.options.method == "given"
        problems = {}
        for i, (id, text) in enumerate(zip(batch["ids"], batch["prompts"], strict=True)):
            if id in batch["problems"]:
                problems[i] = batch["problems"][id]
            elif unknown := self._unknown(text):
                names = ", ".join(map(repr, unknown[:MAX_NAMED])) + ", ..." * (len(unknown) > MAX_NAMED)
                problems[i] = f"the vocabulary lacks its characters {names}; write the prompt without them"
            elif longest is not None and (count := len(self._ids(text)) - scored) > longest:
                problems[i] = (
                    f"it has {count:,} tokens, more than model.longest={longest:,}, the context of the model; give a "
                    "shorter prompt"
                )
        return problems

    def _unknown(self, text: str) -> list[str]:
        """The characters of a prompt that the vocabulary lacks."""
        unknown = getattr(self.data.text_tokenizer(), "unknown", None)  # of a vocabulary of characters
        return list(unknown(text)) if unknown else []

    def _ids(self, text: str) -> list[int]:
        """The tokens of a prompt; that of an empty one is the begin token. With method=given, this token is first."""
        ids = self.data.encode(text)
        begin = [self.data.text_tokenizer().special.begin]
        return [*begin, *ids] if self.options.method == "given" else ids or begin

    def _continued(self, model: nn.Module, texts: list[str], ids: list[Any], **hook: Any) -> list[Answer]:
        tokenizer = self.data.text_tokenizer()
        starts = [self._ids(text) for text in texts]
        unknown = getattr(tokenizer, "unk", None)
        never = (*tokenizer.special.never, *([] if unknown is None else [unknown]))
        special = tokenizer.special._replace(never=never)
        rows = prompts.continuations(model, starts, self.options, special, ids, **hook)
        answers = []
        for start, hypotheses in zip(starts, rows, strict=True):
            candidates = [{"text": text_after(tokenizer, start, h.tokens), "score": h.score} for h in hypotheses]
            answer: Answer = {**candidates[0], "tokens": hypotheses[0].tokens}
            answers.append(answer | ({"candidates": candidates} if self.options.candidates > 1 else {}))
        return answers

    def _scored(self, model: nn.Module, texts: list[str], ids: list[Any]) -> list[Answer]:
        device, answers = next(model.parameters()).device, []
        for text in texts:
            tokens = torch.tensor([self._ids(text)], device=device)
            targets = tokens[:, 1:]
            batch = {"tokens": tokens[:, :-1], "targets": targets, "counts": torch.ones_like(targets).bool()}
            nats = float(self._nats(model, batch).double().sum()) if targets.numel() else 0.0
            score = -nats / self.options.divisor(max(1, targets.shape[1]))
            answers.append({"text": text, "score": score, "tokens": targets[0].tolist()})
        return answers

    @torch.no_grad()
    def stream(self, model: nn.Module, batch: Batch, write: Callable[[str], None]) -> bool:
        """Write each prompt and its continuation token by token; False if `show` must print the answers instead.

        It must for lines of a file, several candidates, beams and scores.
        """
        if not batch.get("raw") or self.options.method in ("beam", "given") or self.options.candidates > 1:
            return False
        if self._problems(model, batch):
            self.answers(model, batch)  # which adds the reasons to `unanswered`
            return True
        for id, text in zip(batch["ids"], batch["prompts"], strict=True):
            write(text)
            writer = Writer(self.data.text_tokenizer(), self._ids(text), write)
            (answer,) = self._continued(model, [text], [id], on_tokens=writer)
            writer.finish(answer["text"])
        return True

    def predict(self, model: nn.Module, input: Any) -> Any:
        """The continuations of a prompt as a list of dicts with text (without the prompt) and score, best first.

        With method=sample, they are in the order of sampling. A list of prompts, or a pathlib.Path of a text file with
        one prompt per line, gives a list with such a list for each. With method=given, a prompt is scored. For a batch
        (a dict), the result is that of `answers`. Raises UserError for a prompt that cannot be continued.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_texts(input, "prompt", partial(self._records, model))

    def _records(self, model: nn.Module, group: list[Line]) -> list[Records]:
        batch = _batch(Group(group, True))
        if problem := next(iter(self._problems(model, batch).items()), None):
            raise UserError(f"Prompt {batch['ids'][problem[0]]} was not continued: {problem[1]}.")
        records = []
        for text, answer in zip(batch["prompts"], self.answers(model, batch), strict=True):
            rows = [{"text": c["text"], "score": float(c["score"])} for c in answer.get("candidates", [answer])]
            shown = "".join(f"<pre><b>{escape(text)}</b>{escape(row['text'])}</pre>" for row in rows)
            records.append(Records(rows, text=shown))
        return records

    def read(self, input: str) -> Iterator[Batch]:
        """Yield batches of the prompts that `input` means, see `seq2seq.tasks.prompts.read`.

        The id of a prompt is the number of its line. `problems` holds a reason for each line that is not UTF-8, and
        `origins` the file and line of each if there are several files, both by id. `raw` is as in `prompts.Group`.
        """
        yield from map(_batch, prompts.read(input))

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        r"""Yield each prompt with its continuation; nothing is written into `folder`.

        A raw batch (see `read`) gives the text as it is, and another one gives it as one line, in which a line feed is
        written as \n and a backslash as \\. With candidates > 1 or method=given, the line begins with the number of the
        prompt and the score, separated by tabs. A prompt that cannot be continued gives an empty line or, if lines
        begin with a number, no line.
        """
        given = self.options.method == "given"
        for id, prompt, answer in zip(batch["ids"], batch["prompts"], answers, strict=True):
            if given or self.options.candidates > 1:
                for candidate in [] if "problem" in answer else answer.get("candidates", [answer]):
                    text = candidate["text"] if given else prompt + candidate["text"]
                    yield f"{id}\t{candidate['score']:.4f}\t{as_line(text)}"
            elif "problem" in answer:
                yield ""
            else:
                text = prompt + answer["text"]
                yield text if batch["raw"] else as_line(text)

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        """Return None, because the log shows no pictures of text."""

    def metric(self, split: Split) -> CodeLengthMetric:
        """A metric for the code length of `split`."""
        stride = self.data.block if split == "train" else self.data.evaluation_stride
        return CodeLengthMetric(self.data.amounts(split), self.data.block, stride, self.data.count(split))

    def evaluation_notes(self) -> list[str]:
        """A sentence on the context from which tokens are predicted, and one on a lossy tokenizer."""
        block, stride = self.data.block, self.data.evaluation_stride
        notes = [
            f"each token of val and test is predicted once, from at least {block - stride} tokens before it, or all "
            f"there are (windows of data.block={block} tokens at a stride of {stride}; train: blocks side by side)"
        ]
        options = self.data.text_tokenizer().options
        if options.normalization != "none" or options.lowercase:
            notes.append("the tokenizer normalises or lowercases text, so the bits code less than the text itself")
        return notes

    def advice(self, pretrained: bool) -> list[str]:
        """Warnings before the first step; this task has none."""
        return []

    def alarms(self, answers: list[Answer]) -> list[str]:
        """A warning if `answers` need more bits than a model that has learnt nothing."""
        tokens = sum(answer["tokens"] for answer in answers)
        bits = sum(answer["nats"] for answer in answers) / math.log(2) / max(1, tokens)
        uniform = math.log2(self.data.text_tokenizer().size)
        if bits <= uniform + 1e-3:
            return []
        return [
            f"{bits:.2f} bits per token are more than the {uniform:.2f} of equal probabilities: lower optimizer.lr, or "
            "give schedule.warmup more steps."
        ]


def _batch(group: Group) -> Batch:
    return {
        "ids": [line.number for line in group.lines],
        "prompts": [line.text for line in group.lines],
        "problems": {line.number: line.problem for line in group.lines if line.problem},
        "origins": {line.number: line.origin for line in group.lines if line.origin},
        "raw": group.raw,
    }
