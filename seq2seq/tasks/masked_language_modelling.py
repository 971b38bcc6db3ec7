"""The task of masked language modelling: predict tokens of a sentence that were masked, from both of their sides.

Devlin et al. 2019 (arXiv 1810.04805), section 3.1. Masks are sampled anew in each epoch, as in RoBERTa (Liu et al.
2019, arXiv 1907.11692, section 4.1); those of val and test are always the same. There is no prediction of the next
sentence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import UserError
from common.nn.padding import is_real
from common.report.records import Records
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import Count, Positive
from seq2seq.criterion.masking import Entries, Masked, MaskOptions, mask_batch
from seq2seq.data.protocol import SentenceData
from seq2seq.evaluation.masked_tokens import MaskedTokenMetric
from seq2seq.importing import bert as importing
from seq2seq.tasks.fitting_data import refuse_other_data
from seq2seq.tasks.single_texts import SingleTextTask, on_device_of
from seq2seq.tokenizers.stored import restore_vocabulary
from seq2seq.tokenizers.vocabulary import CONTINUATION

BLANKS = ("[MASK]", "<mask>")  # what stands for a blank in a user's text, whatever the tokenizer's own text is


@dataclass(frozen=True, kw_only=True)
class FillingOptions:
    """Options of filling in blanks.

    top: number of fillings of each blank.
    """

    top: Positive


class MaskedLanguageModellingState(TypedDict, total=False):
    """The task's part of a checkpoint; both may be missing if the weights were imported."""

    tokenizer: str  # as JSON
    token_counts: list[Count]  # how often each entry occurs in train; empty if unknown


class MaskedLanguageModelling(SingleTextTask):
    """Prediction of masked tokens. In prediction, blanks in a user's text are filled in."""

    data: SentenceData
    goal = Goal("nats", higher_is_better=False)
    handed_on: ClassVar[tuple[str, ...]] = ("vocabulary",)
    state_schema = MaskedLanguageModellingState

    def __init__(self, *, data: SentenceData, masks: MaskOptions, predict: FillingOptions):
        """Make the task.

        Args:
            data: sentences.
            masks: which tokens are masked, and what replaces them.
            predict: how blanks are filled in.
        """
        refuse_other_data(
            data,
            "token_counts",
            "sentences to mask, which masked language models need",
            "data=sentences or data=sentences_512",
        )
        self.data, self.masks, self.options = data, masks, predict
        self.unanswered: list[str] = []  # see OptionalTask
        self._counts: list[int] | None = None

    def model_arguments(self) -> dict[str, Any]:
        """The number of entries of the vocabulary."""
        return {"vocabulary": self.data.text_tokenizer().size}

    def state(self) -> dict[str, Any]:
        """The tokenizer as JSON, and how often each entry occurs in train, for the unigram model of the metric."""
        return {"tokenizer": self.data.text_tokenizer().state(), "token_counts": self._token_counts()}

    def restore(self, state: dict[str, Any]) -> None:
        """Use the tokenizer and the counts of a checkpoint; raises UserError if it has no tokenizer."""
        if "tokenizer" not in state:
            raise UserError(
                "The checkpoint contains no tokenizer, which gives its token ids a text; put the tokenizer's files "
                "(tokenizer.json, vocab.txt, or vocab.json and merges.txt) beside it."
            )
        self.inherit(state)
        self._counts = list(state.get("token_counts", []))

    def inherit(self, state: dict[str, Any]) -> None:
        """Use the tokenizer in `state`, if any, before the model is built, since the weights have learnt its tokens."""
        if "tokenizer" in state:
            self.data.use(restore_vocabulary(state["tokenizer"]))
            self.__dict__.pop("entries", None)  # of another tokenizer

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert a BERT or RoBERTa of transformers with the tokenizer in its folder; see seq2seq/importing/bert.py."""
        return importing.adopt(tensors, folder)

    @cached_property
    def entries(self) -> Entries:
        """What masking needs to know about the vocabulary."""
        tokenizer = self.data.text_tokenizer()
        special = tokenizer.special_entries
        fixed = np.zeros(tokenizer.size, np.bool_)
        fixed[list(special.ids - {special.unknown})] = True
        begins = np.array([tokenizer.begins_word(id) for id in range(tokenizer.size)])
        assert special.mask is not None, "the data refuse a tokenizer without a mask"
        return Entries(special.mask, special.pad or 0, fixed, begins)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The number of masked tokens, under the key "tokens"."""
        return {"tokens": float(sum(self._mask(batch).counts))}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of the masked tokens in nats: its sum, divided by their number in the step. No parts."""
        self.refuse_long_samples(model, batch)
        masked = self._mask(batch)
        targets = on_device_of(model, masked.targets)
        nats = F.cross_entropy(self._logits(model, batch["rows"], masked), targets, reduction="sum")
        return nats / normalisers["tokens"], {}

    def _mask(self, batch: Batch) -> Masked:
        """Mask a batch: in training by the samples' seeds, otherwise by their ids, so that the masks never change."""
        seeds = batch["seeds"] if "seeds" in batch else batch["ids"]
        return mask_batch(batch["rows"], seeds, self.masks, self.entries)

    def _logits(self, model: nn.Module, rows: list[NDArray[np.int64]], masked: Masked) -> Tensor:
        """The logits of the masked tokens in at least fp32, (M, V)."""
        real = is_real(torch.tensor([len(row) for row in rows]), masked.inputs.shape[1])  # (B, N)
        inputs = (on_device_of(model, tensor) for tensor in (masked.inputs, real, masked.selected))
        logits: Tensor = model(*inputs)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer for each sample.

        To a batch of the data, an answer has tokens (the number of masked tokens), nats (summed over these), correct
        (how many are predicted), and the same two numbers of the unigram model, unigram_nats and unigram_correct, which
        are None if the checkpoint does not say how often each entry occurs in train.

        To a batch of `read`, an answer has `blanks`, a list with the fillings of each blank: records {name, share,
        text}, most probable first. `text` is the sentence with this filling, and for other blanks the most probable
        one. A text that cannot be answered has no blanks, and `problem`, the reason.
        """
        if "problems" in batch:
            return self.user_answers(model, batch)
        self.refuse_long_samples(model, batch)
        masked = self._mask(batch)
        logits, targets = self._logits(model, batch["rows"], masked), on_device_of(model, masked.targets)
        nats = F.cross_entropy(logits, targets, reduction="none").double().cpu()  # (M,)
        correct = (logits.argmax(1) == targets).cpu()
        parts = (part.split(masked.counts) for part in (nats, correct, masked.targets))
        unigram = self._unigram()
        return [
            {"tokens": len(own), "nats": float(own.sum()), "correct": int(hits.sum()), **_unigram_answer(unigram, ids)}
            for own, hits, ids in zip(*parts, strict=True)
        ]

    def evaluation_notes(self) -> list[str]:
        """A sentence if the unigram model has no numbers."""
        if self._token_counts():
            return []
        return ["the checkpoint does not say how often each token occurs in its training text, so no unigram_nats"]

    def _token_counts(self) -> list[int]:
        if self._counts is None:
            self._counts = self.data.token_counts().tolist()
        return self._counts

    def _unigram(self) -> tuple[Tensor, int] | None:
        """The nats of each entry under the unigram model, float64 (V,), and the most frequent entry; None if unknown.

        Counts are increased by one, so that no entry has probability zero.
        """
        size = self.data.text_tokenizer().size
        counts: NDArray[np.int64] = np.array(self._token_counts(), np.int64)
        if not len(counts):
            return None
        if len(counts) != size:
            raise UserError(
                f"The checkpoint counts {len(counts):,} entries, and its tokenizer has {size:,}; give another one."
            )
        return torch.from_numpy(-np.log((counts + 1) / (counts + 1).sum())), int(counts.argmax())

    def problem(self, tokens: Tensor) -> str | None:
        """A text without a blank cannot be answered."""
        if not (tokens == self.entries.mask).any():
            return f"it has no blank; write {BLANKS[0]} in place of a word"
        return None

    def text_answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """The fillings of the blanks of each text, see `answers`. Special entries are no fillings."""
        tokens, tokenizer = batch["tokens"].cpu(), self.data.text_tokenizer()
        blanks = tokens == self.entries.mask  # (B, N)
        counts = blanks.sum(1).tolist()
        masked = Masked(tokens, blanks.flatten().nonzero()[:, 0], tokens[blanks], counts)
        logits = self._logits(model, batch["rows"], masked)
        special = list(tokenizer.special_entries.ids)
        logits[:, special] = -torch.inf
        shares, ids = logits.softmax(1).topk(min(self.options.top, tokenizer.size - len(special)))  # (M, top)
        rows = [
            [(tokenizer.filling(id), share) for id, share in zip(*row, strict=True)]
            for row in zip(ids.tolist(), shares.tolist(), strict=True)
        ]
        ends = np.cumsum(counts).tolist()
        return [
            {"blanks": _records(text, rows[end - count : end])}
            for text, count, end in zip(batch["texts"], counts, ends, strict=True)
        ]

    def is_text(self, input: str) -> bool:
        """Whether `input` has a blank, or a space, as paths rarely have."""
        return " " in input or any(blank in input for blank in BLANKS)

    def prepared(self, text: str) -> str:
        """Write each blank as the tokenizer expects it."""
        for blank in BLANKS:
            text = text.replace(blank, self.data.text_tokenizer().mask_text)
        return text

    def record(self, text: str, answer: Answer) -> Records:
        """The fillings of a text's only blank as records {name, share, text}, or a list of these for each blank."""
        blanks = [
            Records(
                fillings,
                text="".join(f"<p>{escape(f['text'])} <small>{f['share']:.4f}</small></p>" for f in fillings),
            )
            for fillings in answer["blanks"]
        ]
        return blanks[0] if len(blanks) == 1 else Records(blanks)

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Yield a line for each text, the text with its most probable fillings, and a line for each of its blanks.

        A blank's line lists the fillings with their shares. A text that was not answered gives an empty line.
        """
        for answer in answers:
            yield answer["blanks"][0][0]["text"] if answer.get("blanks") else ""
            for number, fillings in enumerate(answer.get("blanks", []), 1):
                yield f"  {number}: " + ", ".join(f"{filling['name']} {filling['share']:.4f}" for filling in fillings)

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        """Return None, because the log shows no pictures of texts."""

    def metric(self, split: Split) -> MaskedTokenMetric:
        """A metric of nats and accuracy per masked token of `split`."""
        return MaskedTokenMetric(self.data.count(split))

    def advice(self, pretrained: bool) -> list[str]:
        """Warnings before the first step; this task has none."""
        return []

    def alarms(self, answers: list[Answer]) -> list[str]:
        """A warning if at least ten samples are predicted worse than by a model of equal probabilities."""
        tokens, nats = (sum(answer[name] for answer in answers) for name in ("tokens", "nats"))
        limit = float(np.log(self.data.text_tokenizer().size))
        if len(answers) < 10 or not tokens or nats / tokens <= limit + 1e-3:
            return []
        return [
            f"{nats / tokens:.2f} nats per masked token are more than the {limit:.2f} of equal probabilities: lower "
            "optimizer.lr, or give schedule.warmup more steps."
        ]


def _unigram_answer(unigram: tuple[Tensor, int] | None, ids: Tensor) -> dict[str, Any]:
    """The unigram model's part of the answer to a sample with these masked tokens (M,)."""
    if unigram is None:
        return {"unigram_nats": None, "unigram_correct": None}
    nats, most_frequent = unigram
    return {"unigram_nats": float(nats[ids].sum()), "unigram_correct": int((ids == most_frequent).sum())}


def _records(text: str, fillings: list[list[tuple[str, float]]]) -> list[list[dict[str, Any]]]:
    """The records {name, share, text} of each blank of a text, given the names and shares of its fillings."""
    if text.lstrip().startswith(BLANKS):  # nothing is before the first blank to which a filling could be joined
        fillings = [[(name.removeprefix(CONTINUATION), share) for name, share in fillings[0]], *fillings[1:]]
    best = [names[0][0] for names in fillings]
    return [
        [
            {"name": name, "share": share, "text": _filled(text, [*best[:blank], name, *best[blank + 1 :]])}
            for name, share in names
        ]
        for blank, names in enumerate(fillings)
    ]


def _filled(text: str, names: list[str]) -> str:
    """Put a name in place of each blank; one that continues a word (##ing) is joined to what is before it."""
    for name in names:
        start, blank = min((text.find(blank), blank) for blank in BLANKS if blank in text)
        before, after = text[:start], text[start + len(blank) :]
        is_joined = name.startswith(CONTINUATION)
        text = (before.rstrip() + name.removeprefix(CONTINUATION) if is_joined else before + name) + after
    return text
