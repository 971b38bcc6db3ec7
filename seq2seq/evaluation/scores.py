"""From translations to numbers, once over a whole split: BLEU (Papineni et al. 2002), chrF (Popović 2015), exact match.

Counted by sacreBLEU (Post 2018, arXiv 1804.08771) on raw text, so that the numbers compare with others' of the same
signature.
"""

import csv
import importlib.metadata
import importlib.util
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import _bootstrap_resample, estimate_ci

from common.machine.distributed import broadcast, gather_samples, is_main
from common.task import Answer, Batch

CHINESE = {"zh", "zho", "cmn", "yue"}
UNSPACED = {"ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"}  # counted by characters
RESAMPLES = 1000  # of the bootstrap, sacreBLEU's own default
MAX_BOOTSTRAP_SENTENCES = (
    10_000  # sentences up to which it is done: sacreBLEU holds all resamples at once, 10 to 18 floats each
)


class TranslatedSample(NamedTuple):
    """What is kept of one sample."""

    sample: Any  # its id
    source: str
    reference: str
    translation: str
    score: float | None  # the model's own
    log_probability: float | None  # of the reference, in nats
    tokens: int | None  # of the reference, with EOS


class Scorer(NamedTuple):
    """A metric of sacreBLEU and what is done to a line before."""

    metric: BLEU | CHRF
    prepare: Callable[[str], str] = str
    prepared: str = ""  # how, as an end of the signature


class CorpusScore(NamedTuple):
    """A number of a whole split; `mean` and `plus_minus` are of its bootstrap, None without."""

    value: float
    mean: float | None
    plus_minus: float | None
    signature: str
    line: str  # as sacreBLEU says it, with precisions and lengths


def scorers(target: str, lowercase: bool = False) -> dict[str, Scorer]:
    """What translations into a language are measured with, by the number's name; `lowercase`: whatever their case.

    `bleu` has sacreBLEU's default tokenizer 13a, for Chinese its tokenizer zh, and for Japanese, Korean, Thai and
    others that it has none for without further packages, characters; `bleu_char` (characters) is there for Chinese
    beside it. `bleu_lc_tok`, where sacremoses is installed and knows words, is what papers on Multi30k report: of
    lowercased, normalised, Moses-tokenised lines.
    """
    language = re.split("[-_]", target.lower())[0]
    tokenizer = "zh" if language in CHINESE else "char" if language in UNSPACED else "13a"
    found = {"bleu": Scorer(BLEU(tokenize=tokenizer, lowercase=lowercase))}
    if language in CHINESE:
        found["bleu_char"] = Scorer(BLEU(tokenize="char", lowercase=lowercase))
    found["chrf"] = Scorer(CHRF(lowercase=lowercase))
    if tokenizer == "13a" and importlib.util.find_spec("sacremoses"):
        # `force`: lines that end in a tokenised full stop are meant to
        prepared = f"|input:lc.norm.tok by sacremoses {importlib.metadata.version('sacremoses')}"
        found["bleu_lc_tok"] = Scorer(BLEU(tokenize="none", force=True), moses(language), prepared)
    return found


def moses(language: str) -> Callable[[str], str]:
    """The preparation of Multi30k's published `lc.norm.tok` files, line by line."""
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalizer, tokenizer = MosesPunctNormalizer(language), MosesTokenizer(language)

    def prepare(line: str) -> str:
        words: str = tokenizer.tokenize(normalizer.normalize(line.lower()), escape=True, return_str=True)
        return words

    return prepare


class TranslationMetric:
    """Translations of one split, every sample exactly once over all ranks, to corpus scores.

    Args:
        source: the code of the language translated from: en, zh_Hant ...
        target: that of the language translated into, which decides what is a token.
        expected: the number of samples in the split, to be sure that none is missing; None where it is not known.
        categories: of each sample, by its id, if there are any.
        lowercase: whether the translations have no case, so that case is not counted; the signatures say so.
    """

    def __init__(
        self,
        source: str,
        target: str,
        expected: int | None = None,
        categories: Sequence[str] | Mapping[Any, str] | None = None,
        lowercase: bool = False,
    ) -> None:
        self.source, self.target, self.expected, self.categories = source, target, expected, categories
        self.scorers = scorers(target, lowercase)
        self.seen: list[TranslatedSample] = []
        self.gathered = False

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Take in each sample's "text", and if there "score", and of the reference "reference_log_probability" (nats).

        The last comes with "reference_tokens", their number with EOS. `batch` holds "ids" and, raw, "source_texts" and
        "target_texts".
        """
        rows = zip(batch["ids"], batch["source_texts"], batch["target_texts"], answers, strict=True)
        for sample, source, reference, answer in rows:
            likelihood = (answer.get("reference_log_probability"), answer.get("reference_tokens"))
            self.seen.append(
                TranslatedSample(sample, source, reference, answer["text"], answer.get("score"), *likelihood)
            )

    def gather(self) -> None:
        """Join the ranks' samples on all ranks, by rising id; every sample must have been seen, and only once."""
        self.seen = gather_samples(self.seen, self.expected)
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """`bleu`, `chrf` and others of `scorers` (0 to 100), `exact_match` (0 to 1), and of references `loss` in nats.

        `loss` is per token, not smoothed, and stands there with `perplexity` when the references were scored. Rank 0
        counts, the others wait for its numbers.

        Two samples, "a b c d e" for the same and "a b" for "a b c": all 7 words, 5 pairs, 3 triples and 2 quadruples
        are right, and 7 words for 8 give a `bleu` of 100 exp(1 - 8 / 7) = 86.69; `exact_match` is 0.5.
        """
        assert self.gathered, "gather() comes before compute()"
        assert self.seen, "a split without samples has no scores"
        numbers: dict[str, float] = {}
        if is_main():
            numbers = {name: self._measure(scale, bootstrap=False).value for name, scale in self.scorers.items()}
            numbers["exact_match"] = _exact(self.seen)
            numbers |= self._likelihood()
        numbers = broadcast(numbers)
        return numbers

    def _measure(self, scale: Scorer, bootstrap: bool) -> CorpusScore:
        hypotheses = [scale.prepare(translated.translation) for translated in self.seen]
        references = [scale.prepare(translated.reference) for translated in self.seen]
        score = scale.metric.corpus_score(hypotheses, [references])
        mean, plus_minus = _bootstrap(scale.metric, hypotheses, references) if bootstrap else (None, None)
        signature = f"{scale.metric.get_signature()}{scale.prepared}"
        return CorpusScore(score.score, mean, plus_minus, signature, score.format(signature=signature))

    def _likelihood(self) -> dict[str, float]:
        """Mean negative log probability of the references' tokens in nats, and what it is as a perplexity."""
        logs = [translated.log_probability for translated in self.seen if translated.log_probability is not None]
        tokens = [translated.tokens for translated in self.seen if translated.tokens is not None]
        assert len(logs) == len(tokens) and len(logs) in (0, len(self.seen)), f"{len(logs)} of {len(self.seen)} scored"
        if not logs:
            return {}
        loss = -math.fsum(logs) / sum(tokens)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def details(self) -> list[tuple[Any, ...]]:
        """Each score with its signature and bootstrap interval; then the exact match of each category.

        The interval is `mean` plus or minus `plus_minus`; it is left out over `MAX_BOOTSTRAP_SENTENCES` sentences.
        """
        assert self.gathered, "gather() comes before details()"
        rows: list[tuple[Any, ...]] = [("score", "value", "mean", "plus_minus", "sentences", "signature")]
        for name, measured in self._intervals().items():
            numbers = ("" if number is None else number for number in measured[:3])
            rows.append((name, *numbers, len(self.seen), measured.signature))
        rows.append(("exact_match", _exact(self.seen), "", "", len(self.seen), ""))
        for category, members in self._by_category().items():
            rows.append((f"exact_match of {category}", _exact(members), "", "", len(members), ""))
        return rows

    def _intervals(self) -> dict[str, CorpusScore]:
        bootstrap = len(self.seen) <= MAX_BOOTSTRAP_SENTENCES
        return {name: self._measure(scale, bootstrap) for name, scale in self.scorers.items()}

    def _by_category(self) -> dict[str, list[TranslatedSample]]:
        """The samples of each category, by the alphabet."""
        groups: dict[str, list[TranslatedSample]] = defaultdict(list)
        if self.categories is not None:
            for translated in self.seen:
                groups[self.categories[translated.sample]].append(translated)
        return dict(sorted(groups.items()))

    def write(self, folder: Path) -> None:
        """Write `translations.tsv`, a line for each sample by rising id, and `scores.json`, with signatures.

        Columns: id, source, reference, translation, score (the model's own, empty where it has none). A text that
        holds a tab, a quote or a line's end stands in quotes, and its quotes are doubled.
        """
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "translations.tsv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, "excel-tab", lineterminator="\n")
            table.writerow(("id", "source", "reference", "translation", "score"))
            for translated in self.seen:
                score = "" if translated.score is None else f"{translated.score:.6g}"
                table.writerow((*translated[:4], score))
        categories = {name: _exact(members) for name, members in self._by_category().items()}
        content: dict[str, Any] = {"source": self.source, "target": self.target, "sentences": len(self.seen)}
        content |= {name: measured._asdict() for name, measured in self._intervals().items()}
        content["exact_match"] = {"value": _exact(self.seen), "categories": categories}
        content |= {name: {"value": x if math.isfinite(x) else None} for name, x in self._likelihood().items()}
        (folder / "scores.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _exact(samples: Sequence[TranslatedSample]) -> float:
    """The share of translations that are the reference, character by character."""
    return sum(translated.translation == translated.reference for translated in samples) / len(samples)


def _bootstrap(metric: BLEU | CHRF, hypotheses: list[str], references: list[str]) -> tuple[float, float]:
    """sacreBLEU's interval: the mean of the resamples' scores, and half the width of the 95 % in their middle.

    Put together from its parts, because `corpus_score(n_bootstrap=...)` of sacreBLEU 2.6 fails (TypeError: don't know
    how to coerce float and float32) as soon as one resample of several scores exactly zero.
    """
    statistics = metric._extract_corpus_statistics(hypotheses, [references])
    metric.n_bootstrap = RESAMPLES  # these two are for the signature
    metric.seed, scores = _bootstrap_resample(statistics, metric, RESAMPLES)
    mean, plus_minus = estimate_ci(np.array([float(score.score) for score in scores]))
    return float(mean), float(plus_minus)
