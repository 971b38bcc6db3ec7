"""Corpus scores of translations: BLEU (Papineni et al. 2002), chrF (Popović 2015), exact match, perplexity.

sacreBLEU (Post 2018, arXiv 1804.08771) computes BLEU and chrF on raw text, so that they can be compared with published
scores of the same signature. Only `bleu_lc_tok` is computed on preprocessed text.
"""

import csv
import importlib.metadata
import importlib.util
import io
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

from common.files.names import escape
from common.machine.distributed import broadcast, gather_samples, is_main
from common.task import Answer, Batch
from seq2seq.evaluation.lengths import LengthScore, scores_by_length, source_length

CHINESE = {"zh", "zho", "cmn", "yue"}
UNSPACED = {"ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"}  # scored by characters
RESAMPLES = 1000  # number of bootstrap resamples; sacreBLEU's default
MAX_BOOTSTRAP_SENTENCES = 10_000  # sacreBLEU holds all resamples in memory, each with 10 to 18 floats per sentence


class TranslatedSample(NamedTuple):
    """A sample with its translation."""

    id: Any
    source: str
    reference: str
    translation: str
    score: float | None  # the model's score of the translation; None if the answer has none
    log_probability: float | None  # of the reference, in nats; None if the reference was not scored
    tokens: int | None  # of the reference, including EOS; None if the reference was not scored


class Scorer(NamedTuple):
    """A metric of sacreBLEU, and the preprocessing of the sentences that it compares."""

    metric: BLEU | CHRF
    preprocess: Callable[[str], str] = str
    preprocessing: str = ""  # describes `preprocess`; appended to the signature


class CorpusScore(NamedTuple):
    """A score of a whole split. `mean` and `plus_minus` are its bootstrap interval; None if it was not computed."""

    value: float
    mean: float | None
    plus_minus: float | None
    signature: str
    line: str  # the score as sacreBLEU prints it; for BLEU with n-gram precisions and lengths


def scorers(target: str, lowercase: bool = False) -> dict[str, Scorer]:
    """The scorers for translations into the language `target`, by the name of the score.

    `bleu` uses sacreBLEU's default tokenizer 13a, and for Chinese its tokenizer zh. For the languages in UNSPACED
    (Japanese, Korean, Thai, ...), it compares characters, because their tokenizers need further packages. `bleu_char`,
    which compares characters, exists only for Chinese. `chrf` is chrF. `bleu_lc_tok` is the score reported on Multi30k:
    the BLEU of lowercased, normalised, Moses-tokenised lines. It requires the package sacremoses and a language for
    which `bleu` uses 13a. With `lowercase`, all scores ignore case.
    """
    language, tokenizer = _language(target), _tokenizer(target)
    by_name = {"bleu": Scorer(BLEU(tokenize=tokenizer, lowercase=lowercase))}
    if language in CHINESE:
        by_name["bleu_char"] = Scorer(BLEU(tokenize="char", lowercase=lowercase))
    by_name["chrf"] = Scorer(CHRF(lowercase=lowercase))
    if tokenizer == "13a" and importlib.util.find_spec("sacremoses"):
        # `force` silences sacreBLEU's warning that the lines are tokenised
        preprocessing = f"|input:lc.norm.tok by sacremoses {importlib.metadata.version('sacremoses')}"
        by_name["bleu_lc_tok"] = Scorer(BLEU(tokenize="none", force=True), moses(language), preprocessing)
    return by_name


def _language(code: str) -> str:
    """The first part of a language's code: zh for zh_Hant."""
    return re.split("[-_]", code.lower())[0]


def _tokenizer(target: str) -> str:
    """The name of sacreBLEU's tokenizer for a target language."""
    language = _language(target)
    return "zh" if language in CHINESE else "char" if language in UNSPACED else "13a"


def moses(language: str) -> Callable[[str], str]:
    """A function that preprocesses a line as in Multi30k's files `lc.norm.tok`: lowercased, normalised, tokenised."""
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalizer, tokenizer = MosesPunctNormalizer(language), MosesTokenizer(language)

    def preprocess(line: str) -> str:
        words: str = tokenizer.tokenize(normalizer.normalize(line.lower()), escape=True, return_str=True)
        return words

    return preprocess


class TranslationMetric:
    """Corpus scores of the translations of one split. Each sample must be added once, on one of the ranks.

    Args:
        source: the code of the source language: en, zh_Hant ...
        target: the code of the target language, which decides the tokenizers of the scores.
        expected: the number of samples in the split, to detect missing ones; None if it is unknown.
        categories: the category of each sample, by the sample's id; None if the data have no categories.
        lowercase: whether BLEU and chrF ignore case. Their signatures record this.
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
        self.short_bleu = BLEU(tokenize=_tokenizer(target), lowercase=lowercase, effective_order=True)
        self.samples: list[TranslatedSample] = []
        self.gathered = False

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the answers to a batch, which holds "ids" and untokenised "source_texts" and "target_texts".

        An answer holds "text" and optionally "score". If references are scored, it also holds
        "reference_log_probability" (in nats) and "reference_tokens" (the number of tokens of the reference, including
        EOS).
        """
        rows = zip(batch["ids"], batch["source_texts"], batch["target_texts"], answers, strict=True)
        for id, source, reference, answer in rows:
            scores = answer.get("score"), answer.get("reference_log_probability"), answer.get("reference_tokens")
            self.samples.append(TranslatedSample(id, source, reference, answer["text"], *scores))

    def restrict(self, count: int) -> None:
        """Expect only `count` samples of the split."""
        self.expected = count

    def gather(self) -> None:
        """Gather the samples of all ranks, sorted by id; asserts that each sample occurs exactly once."""
        self.samples = gather_samples(self.samples, self.expected)
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """The values of all `scorers` (0 to 100) and `exact_match` (0 to 1), computed by rank 0 and sent to all ranks.

        If the references were scored, the values also include their `loss`, in nats per token and without smoothing,
        and `perplexity`.

        Example: translations "a b c d e" and "a b" of references "a b c d e" and "a b c". All 7 words, 5 bigrams, 3
        trigrams and 2 4-grams are correct. The 7 words are fewer than the reference's 8, which gives a brevity penalty
        of exp(1 - 8 / 7) and a `bleu` of 86.69. `exact_match` is 0.5.
        """
        assert self.gathered, "gather() comes before compute()"
        assert self.samples, "a split without samples has no scores"
        numbers: dict[str, float] = {}
        if is_main():
            numbers = {name: self._score(scorer, bootstrap=False).value for name, scorer in self.scorers.items()}
            numbers["exact_match"] = _exact(self.samples)
            numbers |= self._likelihood()
        numbers = broadcast(numbers)
        return numbers

    def _score(self, scorer: Scorer, bootstrap: bool) -> CorpusScore:
        hypotheses = [scorer.preprocess(sample.translation) for sample in self.samples]
        references = [scorer.preprocess(sample.reference) for sample in self.samples]
        score = scorer.metric.corpus_score(hypotheses, [references])
        mean, plus_minus = _bootstrap(scorer.metric, hypotheses, references) if bootstrap else (None, None)
        signature = f"{scorer.metric.get_signature()}{scorer.preprocessing}"
        return CorpusScore(score.score, mean, plus_minus, signature, score.format(signature=signature))

    def _likelihood(self) -> dict[str, float]:
        """`loss`, the references' mean negative log probability per token in nats, and its exponential, `perplexity`.

        The result is empty if no references were scored.
        """
        logs = [sample.log_probability for sample in self.samples if sample.log_probability is not None]
        tokens = [sample.tokens for sample in self.samples if sample.tokens is not None]
        assert len(logs) == len(tokens) and len(logs) in (0, len(self.samples)), (
            f"{len(logs)} of {len(self.samples)} scored"
        )
        if not logs:
            return {}
        loss = -math.fsum(logs) / sum(tokens)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def details(self) -> list[tuple[Any, ...]]:
        """A table of each score with its interval and signature, and of scores by category and by source length.

        A category has its exact match; sources of similar length have BLEU and exact match. The interval is `mean` plus
        or minus `plus_minus`; for more than MAX_BOOTSTRAP_SENTENCES sentences, these two are empty.
        """
        assert self.gathered, "gather() comes before details()"
        rows: list[tuple[Any, ...]] = [("score", "value", "mean", "plus_minus", "sentences", "signature")]
        for name, score in self._scores().items():
            numbers = ("" if number is None else number for number in score[:3])
            rows.append((name, *numbers, len(self.samples), score.signature))
        rows.append(("exact_match", _exact(self.samples), "", "", len(self.samples), ""))
        for category, members in self._by_category().items():
            rows.append((f"exact_match of {category}", _exact(members), "", "", len(members), ""))
        for part in self._by_length():
            prefix, signature = f"sources of {part.lengths} {self._length_unit()}", self.short_bleu.get_signature()
            rows.append((f"{prefix}: bleu", part.bleu, "", "", part.sentences, str(signature)))
            rows.append((f"{prefix}: exact_match", part.exact_match, "", "", part.sentences, ""))
        return rows

    def _scores(self) -> dict[str, CorpusScore]:
        bootstrap = len(self.samples) <= MAX_BOOTSTRAP_SENTENCES
        return {name: self._score(scorer, bootstrap) for name, scorer in self.scorers.items()}

    def _by_category(self) -> dict[str, list[TranslatedSample]]:
        """The samples of each category; the categories are in alphabetical order."""
        groups: dict[str, list[TranslatedSample]] = defaultdict(list)
        if self.categories is not None:
            for sample in self.samples:
                groups[self.categories[sample.id]].append(sample)
        return dict(sorted(groups.items()))

    def _length_unit(self) -> str:
        return "characters" if _language(self.source) in CHINESE | UNSPACED else "words"

    def _by_length(self) -> list[LengthScore]:
        """The scores of the samples by the length of their sources."""
        by_characters = self._length_unit() == "characters"
        lengths = [source_length(sample.source, by_characters) for sample in self.samples]
        translations = [sample.translation for sample in self.samples]
        return scores_by_length(lengths, translations, [sample.reference for sample in self.samples], self.short_bleu)

    def write(self, folder: Path) -> None:
        """Write `translations.tsv`, a table of the samples sorted by id, and `scores.json`, scores with signatures.

        Only rank 0 writes. The table's columns are id, source, reference, translation, and the model's score of the
        translation (empty if there is none). A text with a tab, a quote, a line feed or a carriage return is quoted,
        and its quotes are doubled, so that Python's csv and pandas read it back. Bytes that are not UTF-8 are escaped
        (common/files/names.py).
        """
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "translations.tsv").open("w", encoding="utf-8", newline="") as file:
            file.write(_tabbed_row(("id", "source", "reference", "translation", "score")))
            for sample in self.samples:
                score = "" if sample.score is None else f"{sample.score:.6g}"
                file.write(_tabbed_row((*sample[:4], score)))
        categories = {name: _exact(members) for name, members in self._by_category().items()}
        content: dict[str, Any] = {"source": self.source, "target": self.target, "sentences": len(self.samples)}
        content |= {name: score._asdict() for name, score in self._scores().items()}
        content["exact_match"] = {"value": _exact(self.samples), "categories": categories}
        content["by_source_length"] = {
            "unit": self._length_unit(),
            "groups": [part._asdict() for part in self._by_length()],
            "signature": str(self.short_bleu.get_signature()),
        }
        content |= {name: {"value": x if math.isfinite(x) else None} for name, x in self._likelihood().items()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / "scores.json").write_text(text, encoding="utf-8", errors="backslashreplace")


def _tabbed_row(fields: Sequence[Any]) -> str:
    """A line of a tab-separated file, with a line feed at its end."""
    line = io.StringIO(newline="")
    # Before Python 3.13, a csv.writer with lineterminator="\n" does not quote carriage returns, at which readers would
    # end a row. With "\r\n" it quotes them.
    csv.writer(line, "excel-tab", lineterminator="\r\n").writerow(escape(str(field)) for field in fields)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _exact(samples: Sequence[TranslatedSample]) -> float:
    """The fraction of translations that equal their reference in every character."""
    return sum(sample.translation == sample.reference for sample in samples) / len(samples)


def _bootstrap(metric: BLEU | CHRF, hypotheses: list[str], references: list[str]) -> tuple[float, float]:
    """sacreBLEU's interval: the mean of the resamples' scores, and half the width of their central 95 %.

    This calls sacreBLEU's internal functions, because `corpus_score(n_bootstrap=...)` of sacreBLEU 2.6 fails if one of
    several resamples scores exactly zero (TypeError: don't know how to coerce float and float32).
    """
    statistics = metric._extract_corpus_statistics(hypotheses, [references])
    metric.n_bootstrap = RESAMPLES  # the signature contains `n_bootstrap` and `seed`
    metric.seed, scores = _bootstrap_resample(statistics, metric, RESAMPLES)
    mean, plus_minus = estimate_ci(np.array([float(score.score) for score in scores]))
    return float(mean), float(plus_minus)
