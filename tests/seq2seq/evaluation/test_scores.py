import csv
import gzip
import importlib.util
import json
import math
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from sacrebleu.metrics import BLEU, CHRF

from common.files.names import unescape
from seq2seq.evaluation import scores
from seq2seq.evaluation.scores import TranslationMetric, moses, scorers

PAIRS = [  # translation, reference
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("A dog is running over the green grass", "A dog runs over the green grass."),
    ("two men, one of them tall, are talking", "Two men, one of them tall, are talking to a woman."),
    ("", "Nothing at all is said here."),
    ("Nothing at all is said here, or is it?", "Nothing at all is said there."),
]


def batch(pairs: list[tuple[str, str]], ids: list | None = None, **more) -> tuple[dict, list[dict]]:
    """A batch with its answers; `more` is a list for each key of answers."""
    answers = [{"text": text} | {key: more[key][i] for key in more} for i, (text, _) in enumerate(pairs)]
    ids = list(range(len(pairs))) if ids is None else ids
    texts = {"source_texts": [f"source {i}" for i in ids], "target_texts": [reference for _, reference in pairs]}
    return {"ids": ids, **texts}, answers


def gathered(pairs: list[tuple[str, str]], target: str = "en", categories=None, **more) -> TranslationMetric:
    metric = TranslationMetric("de", target, len(pairs), categories)
    metric.update(*batch(pairs, **more))
    metric.gather()
    return metric


def plain_bleu(pairs: list[tuple[list[str], list[str]]]) -> float:
    """Papineni's equation in plain loops; every precision must be above zero."""
    logs = []
    for n in range(1, 5):
        correct = total = 0
        for words, reference in pairs:
            grams = [Counter(tuple(line[i : i + n]) for i in range(len(line) - n + 1)) for line in (words, reference)]
            correct, total = correct + (grams[0] & grams[1]).total(), total + grams[0].total()
        logs.append(math.log(correct / total))
    lengths = [sum(len(pair[side]) for pair in pairs) for side in (0, 1)]
    return 100 * math.exp(sum(logs) / 4 + min(0, 1 - lengths[1] / lengths[0]))


def test_two_samples_counted_by_hand():
    numbers = gathered([("a b c d e", "a b c d e"), ("a b", "a b c")]).compute()
    assert numbers["bleu"] == pytest.approx(100 * math.exp(1 - 8 / 7))
    assert numbers["exact_match"] == 0.5
    assert not {*numbers} & {"loss", "perplexity", "bleu_char"}


def test_bleu_is_that_of_papineni_over_the_corpus():
    """On words that the tokenizer does not change; the mean over sentences differs."""
    pairs = [("a b c d e f", "a b c d f e"), ("x a b c d", "y a b c d"), ("b c d e f g h", "b c d e")]
    words = [(text.split(), reference.split()) for text, reference in pairs]
    bleu = gathered(pairs).compute()["bleu"]
    assert bleu == pytest.approx(plain_bleu(words))
    assert abs(bleu - sum(plain_bleu([pair]) for pair in words) / 3) > 1


def test_scores_do_not_depend_on_batches_or_their_order():
    whole = gathered(PAIRS).compute()
    metric = TranslationMetric("de", "en", 5)
    for ids in ([4], [0, 2], [3, 1]):
        metric.update(*batch([PAIRS[i] for i in ids], ids))
    metric.gather()
    assert metric.compute() == whole and 10 < whole["bleu"] < 90


@pytest.mark.parametrize(
    ("target", "tokenizers"),
    [
        ("de", {"bleu": "13a"}),
        ("en_GB", {"bleu": "13a"}),
        ("zh", {"bleu": "zh", "bleu_char": "char"}),
        ("zh_Hant_TW", {"bleu": "zh", "bleu_char": "char"}),
        ("ZH-cn", {"bleu": "zh", "bleu_char": "char"}),
        ("ja", {"bleu": "char"}),
        ("th_TH", {"bleu": "char"}),
        ("tl", {"bleu": "13a"}),
    ],
)
def test_the_language_decides_the_tokenizer_and_the_signature_records_it(target, tokenizers):
    table = gathered([("今天 3 天", "今天3天")], target).details()[1:]
    signatures = {name: signature for name, *_, signature in table if name.startswith("bleu") and name != "bleu_lc_tok"}
    assert {name: signature.split("tok:")[1].split("|")[0] for name, signature in signatures.items()} == tokenizers
    assert ("bleu_lc_tok" in dict(row[:2] for row in table)) <= (tokenizers["bleu"] == "13a")


def test_one_wrong_character_of_ten_leaves_most_n_grams_of_a_chinese_sentence_correct():
    """9 of 10 characters, 8 of 9 bigrams, 7 of 8 trigrams and 6 of 7 4-grams are correct; as one word, none."""
    pair = ("两个男人正在街上骑车", "两个男人正在路上骑车")
    expected = plain_bleu([tuple(list(line) for line in pair)])
    numbers = gathered([pair], "zh").compute()
    assert numbers["bleu"] == pytest.approx(expected) and numbers["bleu_char"] == pytest.approx(expected)
    assert gathered([pair], "de").compute()["bleu"] == 0


def test_the_chinese_tokenizer_keeps_foreign_words_and_characters_do_not():
    numbers = gathered([("我有三台computer在家里", "我有三台computers在家里")], "zh").compute()
    assert numbers["bleu"] < numbers["bleu_char"] - 10


def test_exact_match_depends_on_case_and_spaces():
    pairs = [("Ja", "Ja"), ("ja", "Ja"), ("Ja ", "Ja"), ("1\u00a0000", "1 000"), ("", "")]
    assert gathered(pairs).compute()["exact_match"] == 2 / 5


@pytest.mark.parametrize("lowercase", [False, True])
def test_scores_may_ignore_case_and_the_signature_records_it(lowercase):
    pairs = [("ein hund läuft im park", "Ein Hund läuft im Park")]
    metric = TranslationMetric("en", "de", 1, lowercase=lowercase)
    metric.update(*batch(pairs))
    metric.gather()
    numbers = metric.compute()
    assert (numbers["bleu"] > 99, numbers["chrf"] > 99, numbers["exact_match"]) == (lowercase, lowercase, 0)
    assert f"case:{'lc' if lowercase else 'mixed'}" in metric.details()[1][-1]


def test_perplexity_is_that_of_the_tokens_of_references():
    """Four tokens of probability 1/2 and one of 1/4: 6 ln 2 / 5."""
    scored = {"reference_log_probability": [4 * math.log(0.5), math.log(0.25)], "reference_tokens": [4, 1]}
    numbers = gathered(PAIRS[:2], **scored).compute()
    assert numbers["loss"] == pytest.approx(1.2 * math.log(2)) and numbers["perplexity"] == pytest.approx(2**1.2)


def test_the_loss_of_an_impossible_reference_is_infinite(tmp_path):
    metric = gathered(PAIRS[:1], reference_log_probability=[-math.inf], reference_tokens=[3])
    assert metric.compute()["loss"] == metric.compute()["perplexity"] == math.inf
    metric.write(tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["loss"] == {"value": None}


def test_scoring_only_some_references_is_an_error():
    metric = gathered(PAIRS[:2], reference_log_probability=[-1.0, None], reference_tokens=[3, None])
    with pytest.raises(AssertionError, match="1 of 2"):
        metric.compute()


def test_an_interval_contains_its_score_and_is_narrower_with_more_sentences():
    few, many = gathered(PAIRS * 4), gathered(PAIRS * 40)
    widths = []
    for metric in (few, many):
        header, bleu, chrf, *_ = metric.details()
        assert header == ("score", "value", "mean", "plus_minus", "sentences", "signature")
        assert bleu[0] == "bleu" and chrf[0] == "chrf" and bleu[4] == len(metric.samples)
        assert (bleu[1], chrf[1]) == (metric.compute()["bleu"], metric.compute()["chrf"])
        assert abs(bleu[1] - bleu[2]) < bleu[3] and "bs:1000|seed:" in bleu[5] and "nc:6|nw:0" in chrf[5]
        widths.append(bleu[3])
        assert metric.details() == [header, bleu, chrf, *_]
    assert widths[1] < widths[0] / 2


def test_the_interval_is_that_of_sacrebleu():
    rows = gathered(PAIRS * 10).details()[1:3]
    translations, references = zip(*PAIRS * 10, strict=True)
    for (_, _, mean, plus_minus, _, signature), peer in zip(rows, (BLEU(), CHRF()), strict=True):
        score = peer.corpus_score(translations, [references], n_bootstrap=1000)
        assert str(peer.get_signature()) == signature
        expected = json.loads(score.format(width=6, signature=signature, is_json=True))
        assert (mean, plus_minus) == pytest.approx((expected["confidence_mean"], expected["confidence_var"]), abs=1e-4)


def test_an_interval_may_include_zero():
    """Resamples with the correct sentence score above 0, the others exactly 0."""
    _, bleu, *_ = gathered([("a b c d e", "a b c d e"), ("", "f g"), ("", "h i")]).details()
    assert 0 < bleu[2] < bleu[1] + bleu[3]


def test_a_large_set_has_no_interval(monkeypatch):
    monkeypatch.setattr(scores, "MAX_BOOTSTRAP_SENTENCES", 4)
    _, bleu, *_ = gathered(PAIRS).details()
    assert bleu[2:5] == ("", "", 5) and "bs:" not in bleu[5]


@pytest.mark.parametrize("kind", [list, lambda names: dict(enumerate(names))])
def test_each_category_has_its_own_exact_match(kind):
    pairs = [("a", "a"), ("b", "c"), ("d", "d"), ("e", "f"), ("g", "h")]
    metric = gathered(pairs, categories=kind(["time", "date", "date", "date", "time"]))
    rows = {name: (value, count) for name, value, *_, count, _ in metric.details()[1:] if name.startswith("exact")}
    expected = {"exact_match": (0.4, 5), "exact_match of date": (1 / 3, 3), "exact_match of time": (0.5, 2)}
    assert rows == expected and list(rows) == list(expected)


def test_translations_are_written_with_sources_and_references(tmp_path):
    pairs = [('say "no"\tnow', "línea\u2028una"), ("two\nlines", "两行")]
    metric = gathered(pairs, ids=[7, 2], score=[-0.25, None], categories={7: "x", 2: "y"})
    metric.write(tmp_path / "new")
    with (tmp_path / "new" / "translations.tsv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file, dialect="excel-tab")
    assert first == {"id": "2", "source": "source 2", "reference": "两行", "translation": "two\nlines", "score": ""}
    assert list(second.values()) == ["7", "source 7", *reversed(pairs[0]), "-0.25"]
    content = json.loads((tmp_path / "new" / "scores.json").read_text(encoding="utf-8"))
    assert (content["source"], content["target"], content["sentences"]) == ("de", "en", 2)
    assert content["exact_match"] == {"value": 0.0, "categories": {"x": 0.0, "y": 0.0}}
    assert content["chrf"]["value"] == metric.compute()["chrf"]
    assert content["bleu"]["signature"] == metric.details()[1][-1] and "tok:13a" in content["bleu"]["signature"]


@pytest.mark.parametrize(
    "character", ["\r", "\n", "\r\n", "\t", '"', "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\\", "\\r"]
)
def test_no_character_of_a_sentence_breaks_rows_or_columns(tmp_path, character):
    """Read back by csv, whose rows end at any of "\\n", "\\r" and "\\r\\n" outside quotes, like those of pandas."""
    pairs = [(f"a{character}b", f"c{character}"), (f"{character}d", "e")]
    metric = gathered(pairs)
    metric.samples = [sample._replace(source=f"{character}{sample.source}{character}") for sample in metric.samples]
    metric.write(tmp_path)
    with (tmp_path / "translations.tsv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, "excel-tab")
    sources = [f"{character}source {i}{character}" for i in range(2)]
    assert [row[1:4] for row in rows] == [
        [source, reference, translation] for source, (translation, reference) in zip(sources, pairs, strict=True)
    ]
    assert all(len(row) == len(header) == 5 for row in rows)


def test_texts_and_categories_that_are_not_utf8_are_written_with_escapes(tmp_path):
    """The byte 0xE9, which a data set read with surrogateescape, is U+DCE9 in Python."""
    gathered([("caf\udce9", "caf\udce9")], categories=["men\udce9"]).write(tmp_path)
    with (tmp_path / "translations.tsv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file, dialect="excel-tab")
    assert row["reference"] == "caf\\udce9" and unescape(row["translation"]) == "caf\udce9"
    content = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert content["exact_match"]["categories"] == {"men\udce9": 1.0}, "JSON restores it"


def test_plain_lines_are_written_without_quotes(tmp_path):
    gathered(PAIRS[:1], score=[-1.5]).write(tmp_path)
    line = "0\tsource 0\tThe cat sat on the mat.\tThe cat sat on the mat.\t-1.5\n"
    assert (tmp_path / "translations.tsv").read_bytes().decode().split("\n", 1)[1] == line


def test_a_repeated_and_a_missing_sample_are_errors():
    for ids, message in (([3, 3], r"more than once: \[3\]"), ([3, 4], "2 of 3 samples")):
        metric = TranslationMetric("de", "en", 3)
        metric.update(*batch(PAIRS[:2], ids))
        with pytest.raises(AssertionError, match=message):
            metric.gather()


def test_scores_before_gathering_are_an_error(tmp_path):
    metric = TranslationMetric("de", "en")
    metric.update(*batch(PAIRS))
    for method in (metric.compute, metric.details, lambda: metric.write(tmp_path)):
        with pytest.raises(AssertionError, match="gather"):
            method()


# The convention of publications on Multi30k.


def test_without_sacremoses_its_score_is_absent(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacremoses" else real(name))
    assert {*scorers("de")} == {"bleu", "chrf"}


def test_the_multi30k_convention_ignores_case_and_the_space_before_a_full_stop():
    pytest.importorskip("sacremoses")
    metric = gathered([("ein Mann , der « läuft » .", "Ein Mann, der »läuft«.")], "de")
    numbers = metric.compute()
    assert numbers["bleu_lc_tok"] == pytest.approx(100) and numbers["bleu"] < 60
    (row,) = [row for row in metric.details() if row[0] == "bleu_lc_tok"]
    assert "tok:none" in row[-1] and "input:lc.norm.tok by sacremoses" in row[-1]
    assert moses("fr")("Il court sur l'herbe.") == "il court sur l&apos; herbe ."


def test_german_test_references_have_the_published_number_of_tokens(real_data):
    """12,103 is the reference length in published logs of the tokenised test set of 2016."""
    pytest.importorskip("sacremoses")
    with gzip.open(real_data("multi30k_task1") / "test_2016_flickr.de.gz", "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) == 1000 and sum(len(line.split()) for line in map(moses("de"), lines)) == 12103


def evaluate_on_ranks(rank: int, folder: str) -> None:
    """Evaluate on three ranks: rank 0 has four samples, rank 1 one, rank 2 none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    metric = TranslationMetric("de", "en", 5, list("xyxyx"))
    for sample in [[4, 1, 2, 3], [0], []][rank]:
        metric.update(*batch([PAIRS[sample]], [sample], reference_log_probability=[-1.0], reference_tokens=[1]))
    metric.gather()
    Path(folder, f"{rank}.json").write_text(json.dumps([metric.compute(), metric.details()]))
    metric.write(Path(folder, f"files-{rank}"))
    dist.destroy_process_group()


def test_three_ranks_give_the_numbers_and_files_of_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))  # so that a new process can import this file
    multiprocessing.set_forkserver_preload(["torch.distributed", "sacrebleu"])  # once for all processes
    mp.start_processes(evaluate_on_ranks, (str(tmp_path),), nprocs=3, start_method="forkserver")
    metric = gathered(PAIRS, categories=list("xyxyx"), reference_log_probability=[-1.0] * 5, reference_tokens=[1] * 5)
    expected = json.loads(json.dumps([metric.compute(), metric.details()]))
    metric.write(tmp_path / "alone")
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
        assert (tmp_path / f"files-{rank}").exists() == (rank == 0)
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "files-0" / file.name).read_bytes() == file.read_bytes()
