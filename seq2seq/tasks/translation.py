"""The task of translation: the loss, the tokenizers, decoding, and translations as text, scores and pictures."""

import re
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import Tensor, nn

from common.decoding.contract import Decoder, Hypothesis
from common.decoding.decode import decode
from common.decoding.given import score
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.machine.device import to_device
from common.nn.attention import record_attention
from common.nn.distillation import DistillationOptions
from common.report.records import Records, check_batch
from common.task import Adopted, Answer, Batch, Goal, Split, Teacher
from seq2seq.criterion.cross_entropy import LossOptions, token_losses
from seq2seq.data.protocol import TextData
from seq2seq.evaluation.attention_pictures import picture
from seq2seq.evaluation.scores import TranslationMetric
from seq2seq.importing import adopt as importing
from seq2seq.importing.embeddings import load_embeddings
from seq2seq.tasks.fitting_data import refuse_other_data
from seq2seq.tasks.predicting import predict_texts
from seq2seq.tasks.reading import LINES_PER_BATCH, Line, lines
from seq2seq.tasks.translation_loss import TranslationLoss
from seq2seq.tokenizers import marian as foreign_tokenizers
from seq2seq.tokenizers import stored
from seq2seq.tokenizers.bpe import BOS, EOS, SPECIAL_NAMES
from seq2seq.tokenizers.vocabulary import VocabularyTokenizer

CPU = torch.device("cpu")


class TranslationState(TypedDict, total=False):
    """The task's part of a checkpoint; `tokenizers` may be missing if the weights were imported."""

    tokenizers: list[str]  # as JSON: one if source and target use the same object, otherwise one for each


class Translation(TranslationLoss):
    """The task of translating sentences. Prediction uses the tokenizers of `data`, but reads no file of `data`."""

    goal = Goal("bleu", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("vocabularies", "joint")
    state_schema = TranslationState

    def __init__(
        self,
        *,
        data: TextData,
        loss: LossOptions,
        predict: DecodingOptions,
        keep_tokenizers: bool,
        distillation: DistillationOptions | None = None,  # users' tasks and their yaml may be older than this key
    ):
        """Make the task.

        Args:
            data: pairs of sentences.
            loss: see LossOptions.
            predict: how translations are decoded.
            keep_tokenizers: whether a run that starts from a checkpoint uses the checkpoint's tokenizers. With them,
                each embedding stands for the same token as before. Without them, the run trains tokenizers on its own
                data.
            distillation: see common.nn.distillation.DistillationOptions.
        """
        refuse_other_data(
            data,
            "tokenizers",
            "pairs of sentences, which models of translation need",
            "data=multi30k, data=cldr or data=parallel_text",
        )
        self.data, self.loss_options, self.options = data, loss, predict
        self.keep_tokenizers = keep_tokenizers
        self.distillation = distillation
        self.teacher: Teacher | None = None
        self.unanswered: list[str] = []  # see OptionalTask

    def model_arguments(self) -> dict[str, Any]:
        """The sizes of the vocabularies of source and target, and whether they are one and the same vocabulary."""
        source, target = self.data.tokenizers()
        return {
            "vocabularies": (source.size, target.size),
            "joint": foreign_tokenizers.share_vocabulary(source, target),
        }

    def state(self) -> dict[str, Any]:
        """The tokenizers as JSON: one if source and target use the same object, otherwise one for each."""
        source, target = self.data.tokenizers()
        return {"tokenizers": [source.state()] if source is target else [source.state(), target.state()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Use the tokenizers of a checkpoint; raises UserError if it has none, as is common in imported files."""
        states = state.get("tokenizers", [])
        if len(states) not in (1, 2):
            raise UserError(
                f"The checkpoint contains {len(states) or 'no'} tokenizers, expected those of source and target, which "
                "give its token ids a text; import it together with its vocabulary."
            )
        tokenizers = [stored.restore(text) for text in states]
        self.data.use(tokenizers[0], tokenizers[-1])

    def inherit(self, state: dict[str, Any]) -> None:
        """With `keep_tokenizers`, use the tokenizers in `state`, if any, before the model is built.

        `state` is the task state of the checkpoint from which a new run starts, or of the run that is resumed. If it is
        that of a masked language model, its tokenizer becomes that of the source, and the target's is trained. Raises
        UserError for such a state without `keep_tokenizers`, since the encoder has learnt the tokens of its tokenizer.
        """
        if self.keep_tokenizers and state.get("tokenizers"):
            self.restore(state)
        source = stored.restore(state["tokenizer"]) if "tokenizer" in state else None
        if not isinstance(source, VocabularyTokenizer) or source.special_entries.mask is None:
            return
        if not self.keep_tokenizers:
            raise UserError(
                "task.keep_tokenizers=false with the checkpoint of a masked language model, whose encoder has learnt "
                "the tokens of its own tokenizer; leave out task.keep_tokenizers."
            )
        self.data.use(source, self.data.tokenizers()[1])

    def fetch_weights(self, model: nn.Module) -> str | None:
        """Load the word vectors that the model's key `embedding_weights` names, if any; see OptionalTask."""
        path = getattr(model, "embedding_weights", None)
        return load_embeddings(model, Path(path), self.data.tokenizers()) if path else None

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert a file of Marian (in transformers' layout) or fairseq; see seq2seq/importing/adopt.py."""
        return importing.adopt(tensors, folder)

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer per sentence, with text, score and tokens (ids without BOS and EOS) of its first translation.

        The first translation is the best one, or with method=sample the first sample. If task.predict.candidates is
        above 1, `candidates` holds the text and score of each translation. If task.predict.attention is true, sentences
        with text have `attention` (h, T, S), see `_attention`. If the batch has targets, `reference_log_probability` is
        the log probability of the target in nats, and `reference_tokens` its number of tokens. A sentence that is
        empty, or only white space, has an empty translation (except with method=given).

        A line of a user that cannot be translated, such as one that is too long or not UTF-8, has an empty answer with
        `problem`, the reason. In a batch that is not from `read`, a sentence that is too long raises UserError.
        """
        problems = _problems(model, batch)
        batch = to_device(batch, next((parameter.device for parameter in model.parameters()), CPU))
        if not problems:
            return self._translations(model, batch)
        ids = batch["ids"]
        origins = {id: f" ({origin})" for id, origin in batch.get("origins", {}).items()}
        lines = {i: f"Line {ids[i]}{origins.get(ids[i], '')}" for i in problems}
        self.unanswered += [f"{lines[i]} was not translated: {problem}." for i, problem in problems.items()]
        rows = [i for i in range(len(ids)) if i not in problems]
        answers = dict(zip(rows, self._translations(model, _take(batch, rows)) if rows else [], strict=True))
        empty: Answer = {"text": "", "score": 0.0, "tokens": []}
        return [answers[i] if i in answers else {**empty, "problem": problems[i]} for i in range(len(ids))]

    def predict(self, model: nn.Module, input: Any) -> Any:
        """The translations of a sentence as a list of dicts with text and score, best first.

        With method=sample, they are in the order of sampling instead. There are at most task.predict.candidates
        translations. A list of sentences, or a pathlib.Path of a text file, gives a list with such a list for each
        sentence. With method=given, the input is a sentence, a tab and its translation, which is scored. In Jupyter,
        the lists are shown as text. For a batch (a dict), the result is that of `answers`. Raises UserError for a
        sentence that cannot be translated, and for any other input.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_texts(input, "sentence", partial(self._records, model))

    def _records(self, model: nn.Module, group: list[Line]) -> list[Records]:
        """The records of each line of `group`, see `predict`; raises UserError for a line that cannot be translated."""
        checked = [_check_tab(line) if self.options.method == "given" else line for line in group]
        if problem := next((line for line in checked if line.problem), None):
            raise UserError(f"Sentence {problem.number} was not translated: {problem.problem}.")
        batch = self.data.collate([self._view(line.text, line.number) for line in checked])
        return [self._record(batch, i, answer) for i, answer in enumerate(self.answers(model, batch))]

    def _record(self, batch: Batch, i: int, answer: Answer) -> Records:
        candidates = [{"text": c["text"], "score": float(c["score"])} for c in answer.get("candidates", [answer])]
        rows = "<br>".join(f"{escape(c['text'])} <small>{c['score']:.4f}</small>" for c in candidates)
        svg = self._picture(batch, i, answer) if "attention" in answer else ""
        return Records(candidates, text=f"<p>{escape(batch['source_texts'][i])}<br>{rows}</p>{svg}")

    def _translations(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """The `answers` to a batch that is on the model's device and in which every sentence can be translated."""
        scores_given_targets = self.options.method == "given"
        rows = [i for i, text in enumerate(batch["source_texts"]) if scores_given_targets or text.strip()]
        hypotheses = dict(zip(rows, self._hypotheses(model, batch, rows), strict=True))
        empty = [Hypothesis([], 0.0, 0.0, True)]
        answers = [self._answer(hypotheses.get(i, empty)) for i in range(len(batch["ids"]))]
        if "target_out" in batch:
            for answer, (log_probability, tokens) in zip(answers, self._references(model, batch), strict=True):
                answer |= {"reference_log_probability": log_probability, "reference_tokens": tokens}
        if self.options.attention:
            for i in rows:
                answers[i]["attention"] = self._attention(model, batch, i, answers[i]["tokens"])
        return answers

    def _hypotheses(self, model: nn.Module, batch: Batch, rows: list[int]) -> list[list[Hypothesis]]:
        """The decoded translations of these rows of the batch or, with method=given, their targets with scores."""
        source, lengths = batch["source"][rows], batch["source_lengths"][rows]
        decoder, special = cast(Decoder, model), self.data.tokenizers()[1].special
        if self.options.method != "given":
            return decode(decoder, source, lengths, self.options, special, [batch["ids"][i] for i in rows])
        targets, counts = batch["target_out"][rows], batch["target_lengths"][rows]
        scored = score(decoder, source, lengths, targets, counts, special)
        return [
            [Hypothesis(tokens[: count - 1], log_probability / self.options.divisor(count), log_probability, True)]
            for tokens, (log_probability, count) in zip(targets.tolist(), scored, strict=True)
        ]

    def _answer(self, hypotheses: list[Hypothesis]) -> Answer:
        target = self.data.tokenizers()[1]
        texts = [target.decode(hypothesis.tokens) for hypothesis in hypotheses]
        answer: Answer = {"text": texts[0], "score": hypotheses[0].score, "tokens": hypotheses[0].tokens}
        if self.options.candidates > 1:
            pairs = zip(texts, hypotheses, strict=True)
            answer["candidates"] = [{"text": text, "score": hypothesis.score} for text, hypothesis in pairs]
        return answer

    def _references(self, model: nn.Module, batch: Batch) -> list[tuple[float, int]]:
        """For each target, its log probability in nats and its number of tokens, including EOS."""
        logits = model(batch["source"], batch["source_lengths"], batch["target_in"])  # (B, T, V)
        losses = token_losses(logits, batch["target_out"])  # (B, T)
        return list(zip((-losses.double().sum(1)).tolist(), batch["target_lengths"].tolist(), strict=True))

    def _attention(self, model: nn.Module, batch: Batch, i: int, tokens: list[int]) -> Tensor:
        """The last layer's cross-attention in predicting each token of row `i`'s translation, and EOS: (h, T, S).

        T is the number of `tokens` plus 1, and S the number of source tokens, including EOS. Raises UserError for a
        model without cross-attention.
        """
        length = int(batch["source_lengths"][i])
        source = batch["source"][i : i + 1, :length]
        target_in = source.new_tensor([[BOS, *tokens]])
        with record_attention(model) as maps:
            model(source, batch["source_lengths"][i : i + 1], target_in)
        names = [name for name in maps if name.endswith("cross_attention") and maps[name]]
        if not names:
            raise UserError(
                f"task.predict.attention: {type(model).__name__} has no module named cross_attention; use false."
            )
        return torch.cat(maps[names[-1]], dim=2)[0].float().cpu()  # a recurrent decoder attends once for each token

    def read(self, input: str) -> Iterator[Batch]:
        """Yield batches of the lines of text files or, for "-", of a pipe or a terminal as soon as lines arrive.

        With method=given, each line contains a sentence, a tab and its translation, and lines that are empty or only
        spaces are skipped. The id of a line is its number. A batch also has two dicts with ids of lines as keys.
        `problems` holds a reason for each line that is not UTF-8 or, with method=given, does not have exactly one tab.
        `origins` holds the file and the number in this file of each line; it is empty if there is only one file.
        """
        for group in lines(input, LINES_PER_BATCH):
            if self.options.method == "given":
                group = [_check_tab(line) for line in group if line.problem or line.text.strip(" ")]
            if group:
                batch = self.data.collate([self._view(line.text, line.number) for line in group])
                yield batch | {
                    "problems": {line.number: line.problem for line in group if line.problem},
                    "origins": {line.number: line.origin for line in group if line.origin},
                }

    def _view(self, text: str, number: int) -> dict[str, Any]:
        if self.options.method != "given":
            return self.data.view(text, id=number)
        source, _, target = text.partition("\t")
        return self.data.view(source, target, number)

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Yield a line of text for each translation, and write pictures of attention as SVG files into `folder`.

        The line is the translation's text or, with candidates > 1 or method=given, the number of its sentence, its
        score and its text, separated by tabs. A sentence that could not be translated gives an empty line or, if lines
        begin with the sentence's number, no line.
        """
        numbered = self.options.candidates > 1 or self.options.method == "given"
        for i, (number, answer) in enumerate(zip(batch["ids"], answers, strict=True)):
            if "attention" in answer:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:06d}.attention.svg").write_text(self._picture(batch, i, answer), encoding="utf-8")
            if "problem" in answer and numbered:
                continue
            for candidate in answer.get("candidates", [answer]):
                text = re.sub(r"[\r\n]", " ", candidate["text"])  # one translation is one line
                yield f"{number}\t{candidate['score']:.4f}\t{text}" if numbered else text

    def _picture(self, batch: Batch, i: int, answer: Answer) -> str:
        source, target = self.data.tokenizers()
        ids = batch["source"][i, : int(batch["source_lengths"][i]) - 1].tolist()
        end = SPECIAL_NAMES[EOS]
        pieces = [*source.pieces(ids), end], [*target.pieces(answer["tokens"]), end]
        return picture(answer["attention"], *pieces, f"{batch['source_texts'][i]} -> {answer['text']}")

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        """Return None, because the log shows no pictures of translations."""

    def metric(self, split: Split) -> TranslationMetric:
        """A metric for BLEU and other scores of `split`. BLEU and chrF ignore case if the tokenizer lowercases text."""
        lowercase = self.data.tokenizers()[1].options.lowercase
        categories = self.data.categories(split)
        return TranslationMetric(self.data.source, self.data.target, self.data.count(split), categories, lowercase)

    def advice(self, pretrained: bool) -> list[str]:
        """Warnings before the first step; this task has none."""
        return []

    def alarms(self, answers: list[Answer]) -> list[str]:
        """A warning if at least ten answers are given and all have the same text."""
        texts = {answer["text"] for answer in answers}
        if len(answers) < 10 or len(texts) > 1:
            return []
        return [
            f'all sentences are translated as "{texts.pop()[:60]}": lower optimizer.lr, or give schedule.warmup more '
            "steps."
        ]


def _problems(model: nn.Module, batch: Batch) -> dict[int, str]:
    """The rows of a batch that cannot be translated, with the reasons.

    In a batch from `read`, these are lines for which `read` states a problem, and lines of more tokens than the model's
    `longest`. In any other batch, a source of more than `longest` tokens raises UserError: if it were skipped, scores
    would not be those of the whole split.
    """
    lengths: list[int] = batch["source_lengths"].tolist()
    longest = getattr(model, "longest", max(lengths))
    by_id = batch.get("problems")
    problems = {}
    for i, (name, length) in enumerate(zip(batch["ids"], lengths, strict=True)):
        limit = (
            f"has {length:,} tokens, more than model.longest={longest:,}; split it into sentences, or raise that limit"
        )
        if length > longest and by_id is None:
            raise UserError(f"Sentence {name} {limit}.")
        if by_id and name in by_id:
            problems[i] = by_id[name]
        elif length > longest:
            problems[i] = f"it {limit}"
    return problems


def _take(batch: Batch, rows: list[int]) -> Batch:
    """The batch of only these `rows`, at least one, with padding cut to their longest sentences.

    Values that are not tensors or lists with one entry per row are dropped.
    """
    count = len(batch["ids"])
    taken: Batch = {
        name: value[rows] if isinstance(value, Tensor) else [value[i] for i in rows]
        for name, value in batch.items()
        if isinstance(value, Tensor | list) and len(value) == count
    }
    for side in ("source", "target"):
        for name in (name for name in (side, f"{side}_in", f"{side}_out") if name in taken):
            taken[name] = taken[name][:, : int(taken[f"{side}_lengths"].max())]
    return taken


def _check_tab(line: Line) -> Line:
    """Return the line, with a `problem` and no text if it is not a sentence, one tab and a translation."""
    tabs = line.text.count("\t")
    if line.problem or tabs == 1:
        return line
    layout = "task.predict.method=given expects a sentence, a tab, and its translation"
    return line._replace(text="", problem=f"it has {tabs or 'no'} {'tabs' if tabs else 'tab'}; {layout}")
