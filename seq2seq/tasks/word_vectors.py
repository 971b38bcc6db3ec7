"""The task of learning word vectors with word2vec: the loss, neighbours and analogies, and evaluation with files.

Mikolov et al. 2013 (arXiv 1301.3781 and 1310.4546). What one step computes is in the model's file.
"""

import difflib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.files import inputs
from common.files.checkpoint import WORD_VECTORS
from common.machine.seeds import generator
from common.report.records import Records, check_batch
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import Count, Positive
from seq2seq.criterion.word_targets import Targets, WordLossOptions, WordTargets, word_targets
from seq2seq.data.protocol import WordData
from seq2seq.evaluation.word_vectors import WordVectorMetric, nearest, read_judgements, read_questions, unit_vectors
from seq2seq.importing.word2vec import read_vectors, write_vectors
from seq2seq.tasks.fitting_data import refuse_other_data
from seq2seq.tasks.reading import LINES_PER_BATCH, lines
from seq2seq.tokenizers.words import Vocabulary

MAX_SPELLINGS = 100_000  # the most frequent words, among which the spelling of an unknown word is searched
SIGNS = {"+": 1, "-": -1}
SIMILAR = "~"  # between two words or sums of words whose cosine is asked for
VECTOR_FILES = {"text": "vectors.txt", "binary": "vectors.bin"}
# Limit on the rate times the expected number of decisions on the most frequent row in a block. Summed updates of one
# row overshoot if this number, times the mean of p (1 - p) |v|^2 over the row's decisions, is not well below 1. Between
# 1 and 16, neighbours on Multi30k hardly depend on it; on Python's documentation, they are worse above 2 (RESULTS.md).
MAX_SUMMED_RATE = 2.0


class WordVectorsState(TypedDict):
    """The task's part of a checkpoint."""

    words: list[str]  # the most frequent first
    counts: list[Count]  # numbers of occurrences in train


@dataclass(frozen=True, kw_only=True)
class NeighbourOptions:
    """What prediction shows."""

    neighbours: Positive  # number of words that are nearest to a word, or answer an analogy
    most_frequent: Count  # only among this number of the most frequent words; 0 = all


@dataclass(frozen=True, kw_only=True)
class WordEvaluationOptions:
    """What evaluation computes besides the loss, and writes."""

    analogies_file: str | None  # questions in the format of word2vec's questions-words.txt
    similarity_file: str | None  # pairs of words with a score, in the format of WordSim-353 or SimLex-999
    most_frequent: Count  # analogies use only this number of the most frequent words, as compute-accuracy.c; 0 = all
    vectors: Literal["none", "text", "binary"]  # format of a file of all word vectors


class WordVectors:
    """The prediction of words from the words around them, which gives every word a vector."""

    goal = Goal("loss", higher_is_better=False, undefined=None)
    handed_on: ClassVar[tuple[str, ...]] = ("words", "architecture")
    state_schema = WordVectorsState

    def __init__(
        self, *, data: WordData, loss: WordLossOptions, predict: NeighbourOptions, evaluation: WordEvaluationOptions
    ):
        """Make the task; prediction reads no file of `data`."""
        refuse_other_data(data, "window", "words with their contexts, which word2vec needs", "data=word_pairs")
        self.data, self.loss_options, self.options, self.evaluation = data, loss, predict, evaluation
        self.unanswered: list[str] = []
        self.rate: float | None = None
        self._targets: WordTargets | None = None

    @property
    def targets(self) -> WordTargets:
        """The binary decisions that predict a word of the vocabulary."""
        if self._targets is None:
            self._targets = word_targets(self.loss_options, self.data.vocabulary.counts)
        return self._targets

    def set_rate(self, rate: float) -> None:
        """Receive the learning rate of the next step, with which the model descends within the step."""
        self.rate = rate

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of words, and the architecture."""
        return {"words": len(self.data.vocabulary), "architecture": self.loss_options.architecture}

    def state(self) -> dict[str, Any]:
        """Return the words and their counts; see WordVectorsState."""
        vocabulary = self.data.vocabulary
        return {"words": vocabulary.words, "counts": vocabulary.counts.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the vocabulary of a checkpoint; raises UserError for one that was altered."""
        words, counts = state["words"], np.array(state["counts"], np.int64)
        if len(words) != len(counts) or len({*words}) != len(words) or len(words) < 2 or (np.diff(counts) > 0).any():
            raise UserError(
                f"The checkpoint holds {len(words)} words and {len(counts)} counts, expected at least two different "
                "words and a count of each, the largest first; give another checkpoint."
            )
        self.data.use(Vocabulary(words, counts))
        self._targets = None

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert a file of word vectors, in a format of word2vec, to answer queries, analogies and similarities.

        Such a file has neither counts of words, which become 0, nor output vectors, so that there is no loss. Raises
        UserError for any other file.
        """
        if WORD_VECTORS not in tensors:
            raise UserError(
                "This is neither a checkpoint of model=word2vec nor a file of word vectors in word2vec's format; give "
                "one of these."
            )
        words, vectors = read_vectors(Path(tensors[WORD_VECTORS]))
        inputs = torch.from_numpy(vectors)
        weights = {"inputs": inputs, "outputs": torch.zeros_like(inputs)}
        note = f"{len(words):,} words; the file has no output vectors, so there is no loss"
        return Adopted(weights, {"words": words, "counts": [0] * len(words)}, [], (note,))

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return {"pairs": the number of pairs in the batch}; see `_pairs`."""
        return {"pairs": float(self._pairs(batch["left"], batch["right"]))}

    def _pairs(self, left: Tensor, right: Tensor) -> int:
        """The number of context words of all centres (skip-gram), or of centres with context words (CBOW)."""
        context = left + right
        return int((context > 0).sum() if self.loss_options.architecture == "cbow" else context.sum())

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of the pairs in nats, with the gradient of a descent over each passage.

        The gradient is that of the loss's sum, as word2vec.c applies the rate to each pair; see `Word2Vec.forward`.
        Each passage descends from the step's weights, and their updates are added: passages of one step are to each
        other as the threads of word2vec.c, and a step does not depend on how it is split.
        """
        assert self.rate is not None, "the trainer calls `set_rate` before each step"
        block, losses = self._block(self.rate), []
        for text, seed in zip(_passages(batch), batch["seeds"], strict=True):
            targets = self._sample_targets(text, generator(seed))
            options = {"block": block, "shared": self.targets.shared, "rate": self.rate}
            losses.append(model(*text, *targets, **options, divisor=normalisers["pairs"]))
        return torch.stack(losses).sum(), {}

    def _sample_targets(self, text: tuple[Tensor, ...], random: torch.Generator) -> Targets:
        words = text[0]
        return Targets(*(tensor.to(words.device) for tensor in self.targets(words.cpu(), random)))

    def _block(self, rate: float) -> int:
        """The number of words that are updated at once: at most `loss.block`, and fewer if a row is very frequent.

        If a row of a table occurred often in a block, the sum of its updates would be far from their sequence. A row of
        the input table occurs in each decision on the words around it.
        """
        shares, targets = self.data.shares, self.targets
        context = 1.0 if self.loss_options.architecture == "cbow" else self.data.window + 1.0  # mean number of pairs
        row = max(targets.most_frequent_row(shares), targets.decisions(shares) * float(shares.max()))
        limit = MAX_SUMMED_RATE / (rate * context * row)
        return int(min(self.loss_options.block, max(1.0, limit)))

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return one answer (a dict) for each passage, or for each query of `read`.

        For a passage, it has nats (or None) and pairs; the first answer also has vectors (V, C). For a query, it has
        neighbours, a list of {"word", "cosine"}, or "problem", a sentence.
        """
        network: Any = model
        if "queries" in batch:
            units = unit_vectors(network.vectors())
            return [self._answer(units, query) for query in batch["queries"]]
        answers: list[Answer] = []
        for number, text in zip(batch["ids"], _passages(batch), strict=True):
            answers.append({"nats": self._nats(network, number, text), "pairs": self._pairs(*text[1:])})
        answers[0]["vectors"] = network.vectors().detach().cpu()
        return answers

    def _nats(self, network: Any, number: int, text: tuple[Tensor, ...]) -> float | None:
        """The loss of a passage; None for the vectors of a file that has no output vectors (see `adopt`)."""
        if not self.data.vocabulary.counts.any():
            return None
        targets = self._sample_targets(text, generator("negatives", number))
        return float(network(*text, *targets, block=self.loss_options.block, shared=self.targets.shared))

    def _answer(self, units: Tensor, query: str) -> Answer:
        """The neighbours of a query, or its problem; units (V, C) are the vectors of all words, of norm 1."""
        try:
            terms, *others = map(self._parse, _sides(query))
        except UserError as error:
            return {"problem": str(error)}
        target = _sum(units, terms)
        if others:
            cosine = F.cosine_similarity(target, _sum(units, others[0]), 0)
            return {"neighbours": [{"word": _sides(query)[1], "cosine": float(cosine)}]}
        used = self.options.most_frequent or len(self.data.vocabulary)
        words = [word for _, word in terms]
        excluded = [word for word in words if word < used]
        cosines, indices = nearest(units[:used], target[None], [excluded], self.options.neighbours)
        pairs = zip(cosines[0].tolist(), indices[0].tolist(), strict=True)
        names = self.data.vocabulary.words
        # With few words, the excluded ones, whose cosine is -inf, are among the nearest.
        return {"neighbours": [{"word": names[i], "cosine": cosine} for cosine, i in pairs if cosine > -math.inf]}

    def _parse(self, query: str) -> list[tuple[int, int]]:
        """Parse "king - man + woman" to [(1, index of king), (-1, index of man), (1, index of woman)].

        Raises UserError for a word that is not in the vocabulary, and for another form.
        """
        tokens = query.split()
        tokens = tokens if tokens and tokens[0] in SIGNS else ["+", *tokens]
        signs, words = tokens[::2], tokens[1::2]
        if len(signs) != len(words) or not {*signs} <= SIGNS.keys() or not words:
            raise UserError(
                f"{query!r} is no query; expected a word, or words with + and - between them, such as 'king - man + "
                f"woman', or two of these with {SIMILAR} between them, such as 'king {SIMILAR} queen'."
            )
        return [(SIGNS[sign], self._index(word)) for sign, word in zip(signs, words, strict=True)]

    def _index(self, word: str) -> int:
        index = self.data.vocabulary.index
        spelling = word.lower() if self.data.options.lowercase else word
        if spelling not in index:
            near = difflib.get_close_matches(spelling, self.data.vocabulary.words[:MAX_SPELLINGS], n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else "give a word of the text that it was trained on."
            raise UserError(f"The word {word!r} is not among the {len(index):,} words of the vocabulary; {remedy}")
        return index[spelling]

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Return the neighbours of a word, or the answers of an analogy, as a list of {"word", "cosine"}.

        `input` is a query as for predict.py ("king", "king - man + woman", or "king ~ queen", whose result is the
        cosine of the two), or a list of queries, for which the result is a list of such lists. Raises UserError for an
        unknown word. For a batch (a dict), the result is `answers(model, input)`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        is_list = isinstance(input, list | tuple)
        answers = self.answers(model, {"queries": [str(query) for query in (input if is_list else [input])]})
        if problem := next((answer["problem"] for answer in answers if "problem" in answer), None):
            raise UserError(problem)
        records = [Records(answer["neighbours"]) for answer in answers]
        return Records(records) if is_list else records[0]

    def read(self, input: str) -> Iterator[Batch]:
        """Yield batches of queries: `input` itself or, if it is a file, a pattern of files or "-", their lines.

        Raises UserError if `input` itself is a query with an unknown word. For a line, the reason is added to
        `unanswered`.
        """
        is_file = os.path.isfile(input) or (inputs.is_pattern(input) and inputs.matches(input))
        if input != inputs.STANDARD_INPUT and not is_file:
            for side in _sides(input):
                self._parse(side)
            yield {"ids": [1], "queries": [input]}
            return
        for group in lines(input, LINES_PER_BATCH):
            filled = [line for line in group if line.text.strip() or line.problem]
            self.unanswered += [f"Line {line.number}: {line.problem}." for line in filled if line.problem]
            queries = [line for line in filled if not line.problem]
            if queries:
                yield {"ids": [line.number for line in queries], "queries": [line.text for line in queries]}

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Yield a line for each query: the query, and the words with their cosines."""
        for number, query, answer in zip(batch["ids"], batch["queries"], answers, strict=True):
            if "problem" in answer:
                self.unanswered.append(f"Line {number}: {answer['problem']}")
                continue
            neighbours = ", ".join(f"{record['word']} {record['cosine']:.3f}" for record in answer["neighbours"])
            yield f"{query.strip()}: {neighbours}"

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        """Return None, because the log shows no pictures of words."""

    def metric(self, split: Split) -> WordVectorMetric:
        """Return an empty metric for `split`; raises UserError for a file of analogies or similarities without any."""
        options = self.evaluation
        judgements = {}
        if options.similarity_file is not None:
            path = Path(options.similarity_file)
            judgements[path.stem] = read_judgements(path)
        return WordVectorMetric(
            self.data.vocabulary.words,
            self.data.count(split),
            None if options.analogies_file is None else read_questions(Path(options.analogies_file)),
            judgements,
            options.most_frequent,
            None if options.vectors == "none" else self._write_vectors,
        )

    def _write_vectors(self, folder: Path, vectors: Tensor) -> None:
        kind = self.evaluation.vectors
        path = folder / VECTOR_FILES[kind]
        write_vectors(path, self.data.vocabulary.words, vectors.float().cpu().numpy(), binary=kind == "binary")

    def advice(self, pretrained: bool) -> list[str]:
        """A warning if the vectors will not be written, because evaluation writes them and there is no test split."""
        if self.evaluation.vectors == "none" or self.data.count("test"):
            return []
        return [
            f"There is no test split, whose evaluation writes {VECTOR_FILES[self.evaluation.vectors]}; give data.test, "
            "or a smaller data.passage, so that the text has enough passages to cut test from train."
        ]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return an empty list."""
        return []


def _sides(query: str) -> list[str]:
    """The part of a query before `SIMILAR` and, if there is one, the part after it."""
    tokens = query.split()
    if SIMILAR not in tokens:
        return [query]
    position = tokens.index(SIMILAR)
    return [" ".join(tokens[:position]), " ".join(tokens[position + 1 :])]


def _sum(units: Tensor, terms: list[tuple[int, int]]) -> Tensor:
    """The sum of the vectors (V, C) of words, with their signs: (C,)."""
    signs = torch.tensor([sign for sign, _ in terms], dtype=units.dtype, device=units.device)
    return signs @ units[[word for _, word in terms]]


def _passages(batch: Batch) -> Iterator[tuple[Tensor, ...]]:
    """Yield (words, left, right) of each passage of a batch."""
    lengths = batch["lengths"].tolist()
    return zip(*(batch[name].split(lengths) for name in ("words", "left", "right")), strict=True)
