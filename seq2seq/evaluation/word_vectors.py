"""Word vectors: nearest neighbours, analogies, similarities as people judge them, and the loss on held-out text."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.machine.distributed import broadcast, gather_samples, is_main
from common.task import Answer, Batch
from seq2seq.tokenizers.text import read_lines

QUESTIONS_AT_ONCE = 500  # analogies whose cosines with all words are computed at once
GRAMMATICAL = "gram"  # word2vec's questions-words.txt begins the names of its syntactic sections with it
SEPARATORS = re.compile(r"[\t,]")
SCORE_COLUMNS = ("SimLex999", "Human (mean)")  # headings in the files of SimLex-999 and WordSim-353


class Section(NamedTuple):
    """Analogies of one kind, such as capitals and countries."""

    name: str
    questions: list[tuple[str, str, str, str]]  # a is to b as c is to d


class Judgements(NamedTuple):
    """Pairs of words, and how similar people find them, on any scale."""

    pairs: list[tuple[str, str]]
    scores: list[float]


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide each vector (V, C) by its norm, in fp32 at least; a vector of zeros stays zero."""
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    norms: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / norms.clamp(min=torch.finfo(vectors.dtype).tiny)


def nearest(units: Tensor, queries: Tensor, excluded: Sequence[Sequence[int]], count: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and indices of the `count` words whose vectors are nearest to each query: (Q, count) each.

    `units` (V, C) have norm 1, `queries` (Q, C) any norm; `excluded` lists the words that are left out, per query.
    """
    cosines = unit_vectors(queries) @ units.T  # (Q, V)
    for row, words in zip(cosines, excluded, strict=True):
        row[list(words)] = -math.inf
    best: tuple[Tensor, Tensor] = torch.topk(cosines, min(count, len(units)), dim=1)
    return best


def read_questions(path: Path) -> list[Section]:
    """Read analogies in the format of questions-words.txt: ": NAME" begins a section, other lines are four words.

    Raises UserError if the file cannot be read, is empty or has another line.
    """
    sections: list[Section] = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if line.startswith(":"):
            sections.append(Section(line.removeprefix(":").strip(), []))
        elif len(words) == 4 and sections:
            sections[-1].questions.append((words[0], words[1], words[2], words[3]))
        elif words:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}; expected four words, or a colon and the name of a section, "
                "which comes first; correct the line."
            )
    return sections


def read_judgements(path: Path) -> Judgements:
    """Read similarities in the format of WordSim-353 or SimLex-999: two words and a score, with tabs or commas between.

    Lines that begin with # are skipped. A first line without a number is a heading; the score is then in the column
    that is named as in one of the two files, otherwise in the third. Raises UserError if the file cannot be read or a
    line has no score.
    """
    result, column = Judgements([], []), 2
    rows = [(n, SEPARATORS.split(line)) for n, line in enumerate(read_lines(path), 1) if not line.startswith("#")]
    rows = [(n, [field.strip() for field in fields]) for n, fields in rows if any(field.strip() for field in fields)]
    if rows and not any(map(_is_number, rows[0][1])):
        heading = rows.pop(0)[1]
        column = next((heading.index(name) for name in SCORE_COLUMNS if name in heading), column)
    for number, fields in rows:
        if len(fields) <= column or not _is_number(fields[column]):
            raise UserError(
                f"{path}: line {number} has no number in column {column + 1}; expected two words and their similarity, "
                "separated by tabs or commas; correct the line."
            )
        result.pairs.append((fields[0], fields[1]))
        result.scores.append(float(fields[column]))
    if not result.pairs:
        raise UserError(f"{path} holds no pair of words; give a file as WordSim-353 or SimLex-999 are published.")
    return result


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def upper_index(words: Sequence[str]) -> dict[str, int]:
    """Return the index of each word in upper case, in which word2vec compares words; the more frequent word counts."""
    return {word.upper(): index for index, word in reversed(list(enumerate(words)))}


def answer_analogies(vectors: Tensor, words: Sequence[str], sections: Sequence[Section]) -> list[tuple[str, int, int]]:
    """Return the numbers of correct answers and of answered questions of each section.

    A question "a b c d" is answered by the word whose unit vector has the largest cosine with b - a + c, without a, b
    and c. Words are compared in upper case. A question with an unknown word is not answered. As in compute-accuracy.c.
    """
    index = upper_index(words)
    candidates = torch.tensor(sorted(index.values()))  # one word of each spelling
    units = unit_vectors(vectors)[candidates]
    row = {int(word): i for i, word in enumerate(candidates)}
    results = []
    for name, questions in sections:
        known = [[row[index[w.upper()]] for w in q] for q in questions if all(w.upper() in index for w in q)]
        parts = [known[i : i + QUESTIONS_AT_ONCE] for i in range(0, len(known), QUESTIONS_AT_ONCE)]
        results.append((name, sum(_correct(units, torch.tensor(part)) for part in parts), len(known)))
    return results


def _correct(units: Tensor, questions: Tensor) -> int:
    a, b, c, d = questions.T
    _, answers = nearest(units, units[b] - units[a] + units[c], questions[:, :3].tolist(), 1)
    return int((answers[:, 0] == d).sum())


def similarity(vectors: Tensor, words: Sequence[str], judgements: Judgements) -> tuple[float, int]:
    """Return Spearman's rank correlation of cosines and judgements over the pairs of known words, and their number.

    Words are compared in upper case. The correlation is NaN for fewer than two different values on either side.
    """
    from scipy.stats import rankdata  # slow to import

    index = upper_index(words)
    pairs = [(index.get(a.upper(), -1), index.get(b.upper(), -1)) for a, b in judgements.pairs]
    known = [i for i, pair in enumerate(pairs) if min(pair) >= 0]
    if len(known) < 2:
        return math.nan, len(known)
    units = unit_vectors(vectors)
    first, second = torch.tensor([pairs[i] for i in known]).T
    cosines = (units[first] * units[second]).sum(1).tolist()
    ranks = np.stack([rankdata(cosines), rankdata([judgements.scores[i] for i in known])])
    if (ranks.std(1) == 0).any():
        return math.nan, len(known)
    return float(np.corrcoef(ranks)[0, 1]), len(known)


class WordVectorMetric:
    """The loss on one split and, if there are files for them, analogies and similarities.

    Args:
        words: the vocabulary, the most frequent word first.
        expected: number of passages of the split.
        sections: analogies, or None.
        judgements: similarities by name, the name of a file.
        most_frequent: analogies use only this number of the most frequent words; 0 = all.
        write_vectors: a function that writes the vectors (V, C) to a folder, for `write`; None = nothing is written.
    """

    def __init__(
        self,
        words: Sequence[str],
        expected: int | None = None,
        sections: Sequence[Section] | None = None,
        judgements: Mapping[str, Judgements] | None = None,
        most_frequent: int = 0,
        write_vectors: Callable[[Path, Tensor], None] | None = None,
    ):
        self.words, self.expected, self.sections = words, expected, sections
        self.judgements, self.most_frequent, self.write_vectors = judgements or {}, most_frequent, write_vectors
        self.rows: list[tuple[int, float | None, int]] = []  # (passage, nats, pairs)
        self.vectors: Tensor | None = None
        self.analogies: list[tuple[str, int, int]] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add a batch; answers have "nats" (None if it cannot be computed) and "pairs", the first "vectors" (V, C)."""
        self.rows += [(i, a["nats"], a["pairs"]) for i, a in zip(batch["ids"], answers, strict=True)]
        self.vectors = answers[0]["vectors"]

    def restrict(self, count: int) -> None:
        """Expect only `count` passages of the split."""
        self.expected = count

    def gather(self) -> None:
        """Gather the losses of all ranks on every rank; the vectors are those of rank 0."""
        self.rows = gather_samples(self.rows, self.expected)
        self.vectors = broadcast(self.vectors)

    def compute(self) -> dict[str, float]:
        """Compute `loss`, the nats per pair, and from files `analogies` and `similarity_NAME`.

        `analogies` is the share of correct answers, `analogies_semantic` and `analogies_syntactic` those of the two
        kinds, and `analogies_known` the share of questions that the vocabulary permits to answer; `similarity_NAME` is
        Spearman's correlation, and `similarity_NAME_known` the share of pairs of known words. A share of no question or
        pair is left out, and so is a loss that cannot be computed.
        """
        pairs = sum(pairs for _, _, pairs in self.rows)
        losses = [nats for _, nats, _ in self.rows if nats is not None]
        numbers = {"loss": math.fsum(losses) / pairs if pairs else math.nan} if len(losses) == len(self.rows) else {}
        if self.vectors is None:
            return numbers
        if self.sections is not None:
            numbers |= self._analogies(self.vectors, self.sections)
        for name, judgements in self.judgements.items():
            correlation, known = similarity(self.vectors, self.words, judgements)
            numbers |= {} if math.isnan(correlation) else {f"similarity_{name}": correlation}
            numbers[f"similarity_{name}_known"] = known / len(judgements.pairs)
        return numbers

    def _analogies(self, vectors: Tensor, sections: Sequence[Section]) -> dict[str, float]:
        used = self.most_frequent or len(self.words)
        self.analogies = answer_analogies(vectors[:used], self.words[:used], sections)
        kinds = {
            "analogies": self.analogies,
            "analogies_semantic": [row for row in self.analogies if not row[0].startswith(GRAMMATICAL)],
            "analogies_syntactic": [row for row in self.analogies if row[0].startswith(GRAMMATICAL)],
        }
        sums = {name: (sum(row[1] for row in rows), sum(row[2] for row in rows)) for name, rows in kinds.items()}
        numbers = {name: correct / answered for name, (correct, answered) in sums.items() if answered}
        count = sum(len(section.questions) for section in sections)
        return {**numbers, "analogies_known": sums["analogies"][1] / max(1, count)}

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and a row for each section of analogies, or for each passage if there are none.

        `compute` answers the analogies.
        """
        if self.analogies:
            rows = [
                (name, answered, correct / answered if answered else "") for name, correct, answered in self.analogies
            ]
            return [("section", "questions", "correct"), *rows]
        losses = [(i, pairs, "" if nats is None else nats / max(1, pairs)) for i, nats, pairs in self.rows]
        return [("passage", "pairs", "loss"), *losses]

    def write(self, folder: Path) -> None:
        """Write the vectors, if there is a function for it; only rank 0 writes."""
        if self.write_vectors is None or self.vectors is None or not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.write_vectors(folder, self.vectors)
