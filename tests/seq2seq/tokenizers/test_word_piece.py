"""WordPiece against transformers' tokenizer in the library and its older one in Python, and training."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from common.errors import UserError
from seq2seq.tokenizers import files, vocabulary, word_piece
from seq2seq.tokenizers.stored import restore
from seq2seq.tokenizers.word_piece import SPECIAL_SYMBOLS, WordPiece

TRAINING = [
    "A man is riding a horse, and two women aren't.",
    "Two men ride horses; the woman's horse is running over the bridge.",
    "Ein Mann reitet über die Brücke. Fünf Männer sehen zu.",
    "中文 and 日本語 are written without spaces",
] * 5
TEXTS = [
    "",
    "   ",
    "A Man is riding!! a-horse",
    "Über die BRÜCKE: cafe\u0301 e\u0301t\u00e9 İstanbul ß ẞ",
    "a\u00a0b\u200bc\u3000d\u00ad\ufffd\x00e\tf\ng\r\nh",
    "中文 mixed文字in",
    "👩\u200d🚀 two 🇩🇪 horses",
    "x" * 100 + " " + "a" * 101,
    "##ing a##b # ## unaffable",
    "$5.00 ^_^ «quoted» — dashes…",
]
ALPHABETS = [
    "aeimnrst AEM",
    " \t\n\u00a0\u2028\u200b'.,;-",
    "äöüéñßΩждİ",
    "日本語文字",
    "e\u0301\u0323",
    "0123456789½²",
]


def texts() -> list[str]:
    rng = random.Random(0)
    samples = []
    for _ in range(200):
        alphabet = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
        samples.append("".join(rng.choices(alphabet, k=rng.randint(1, 40))))
    return [*TEXTS, *samples, *TRAINING[:4]]


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def trained(request) -> WordPiece:
    return WordPiece.train(TRAINING, 125, lowercase=request.param)


def write(tokenizer: WordPiece, folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(tokenizer.entries) + "\n", encoding="utf-8")
    return path


def test_ids_and_texts_are_those_of_transformers(trained):
    transformers = pytest.importorskip("transformers")
    ids = {entry: id for id, entry in enumerate(trained.entries)}
    peer = transformers.BertTokenizer(vocab=ids, do_lower_case=trained.settings["lowercase"])
    decoder = decoders.WordPiece("##", cleanup=False)  # transformers also removes spaces before punctuation
    for text in texts():
        expected = peer(text, add_special_tokens=False).input_ids
        assert trained.encode(text) == expected, repr(text)
        known = [id for id in expected if id != peer.unk_token_id]
        assert trained.decode(known) == decoder.decode([trained.entries[id] for id in known]), repr(text)
    blanks = "A man [MASK] riding a [MASK]."
    assert trained.encode_with_blanks(blanks) == peer(blanks, add_special_tokens=False).input_ids
    row = trained.encode_all(["a horse"])[0].tolist()
    assert [trained.special.begin, *row] == peer("a horse").input_ids


def test_ids_are_those_of_transformers_older_tokenizer_in_python(trained, tmp_path):
    """It was written by Google. Marks are removed from a lowercased letter, so that a lowercased U+0130 is the same."""
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    peer = legacy.BertTokenizerLegacy(str(write(trained, tmp_path)), do_lower_case=trained.settings["lowercase"])
    for text in texts():
        assert trained.encode(text) == peer.convert_tokens_to_ids(peer.tokenize(text)), repr(text)


def test_training_is_reproducible_and_restores_words(trained):
    again = WordPiece.train(iter(TRAINING), 125, lowercase=trained.settings["lowercase"])
    assert again.state() == trained.state() and trained.size == 125
    assert trained.entries[:5] == [*SPECIAL_SYMBOLS] and trained.special == (2, 3, (0, 1, 2, 4))
    text = "two men ride horses ; the woman ' s horse is running over the bridge ."
    assert trained.decode(trained.encode(text)) == text
    ids = trained.encode("riding horses.")
    assert "".join(trained.pieces(ids)).replace("##", "") == "ridinghorses."
    words = "".join("|" * trained.begins_word(id) + piece for id, piece in zip(ids, trained.pieces(ids), strict=True))
    assert words.replace("##", "") == "|riding|horses|."
    assert len(trained.encode("man")) == 1 and len(trained.encode("manhorse")) > 1


def test_no_text_is_encoded_to_a_special_entry_but_unknown(trained):
    ids = {*trained.encode("[CLS] [SEP] [PAD] [MASK] [UNK] ☃")}
    assert ids & trained.special_entries.ids == {trained.special_entries.unknown}
    assert trained.decode([2, *trained.encode("man ☃"), 3, 0, 4]) == "man \ufffd"


def test_the_state_gives_the_same_tokenizer(trained):
    restored = restore(trained.state())
    assert isinstance(restored, WordPiece) and restored.state() == trained.state()
    assert [restored.encode(text) for text in texts()] == [trained.encode(text) for text in texts()]


def test_vocab_txt_and_tokenizer_json_give_the_same_tokenizer(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    lowercase = trained.settings["lowercase"]
    tokenizer, notes = files.read(write(trained, tmp_path))
    assert tokenizer.state() == trained.state()
    assert len(notes) == 1 and ("lowercases text" in notes[0]) == lowercase
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not lowercase}))
    tokenizer, notes = files.read(tmp_path)
    assert isinstance(tokenizer, WordPiece) and tokenizer.settings["lowercase"] != lowercase and notes == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase, "strip_accents": False}))
    tokenizer, _ = files.read(tmp_path)
    assert isinstance(tokenizer, WordPiece) and not tokenizer.settings["strip_accents"]
    ids = {entry: id for id, entry in enumerate(trained.entries)}
    transformers.BertTokenizer(vocab=ids, do_lower_case=lowercase).save_pretrained(tmp_path)
    tokenizer, notes = files.read(tmp_path)
    assert files.find(tmp_path) == tmp_path / "tokenizer.json" and notes == []
    assert tokenizer.state() == trained.state()


def test_files_of_other_tokenizers_are_refused(trained, tmp_path):
    path = tmp_path / "vocab.txt"
    for content, reason in {
        "<s>\n</s>\na\n": r"it has no entry \[CLS\]",
        "[CLS]\n[SEP]\na\n": r"it has no entry \[UNK\]",
        "[CLS]\n[SEP]\n[UNK]\na\na\n": "the entry 'a' occurs twice",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=reason):
            files.read(path)
    for key, value in {"entries": ["a"], "settings": {"lowercase": 1}}.items():
        with pytest.raises(UserError, match=r"The checkpoint's tokenizer"):
            restore(json.dumps({**json.loads(trained.state()), key: value}))


def test_settings_of_other_models_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    trained = WordPiece.train(TRAINING, 125, lowercase=True)
    ids = {entry: id for id, entry in enumerate(trained.entries)}
    transformers.BertTokenizer(vocab=ids).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for section, value in [
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("model", {**content["model"], "continuing_subword_prefix": "@@"}),
    ]:
        path.write_text(json.dumps({**content, section: value}))
        with pytest.raises(UserError, match=r"is not that of BERT"):
            files.read(path)


def test_a_vocabulary_that_the_text_does_not_give_is_refused():
    with pytest.raises(UserError, match=r"data.tokenizer.vocabulary=20: expected at least"):
        WordPiece.train(TRAINING, 20, lowercase=True)
    with pytest.raises(UserError, match=r"gives no more than \d+ entries"):
        WordPiece.train(TRAINING, 5000, lowercase=True)


def test_a_long_text_has_the_ids_of_the_whole_text_and_trains_the_same_entries(monkeypatch) -> None:
    whole = WordPiece.train(TRAINING, 120, lowercase=True)
    joined = " ".join(TRAINING)
    ids = whole.encode(joined)
    monkeypatch.setattr(vocabulary, "MAX_PART", 40)
    rows = whole.encode_all([joined, "", joined])
    assert [rows[i].tolist() for i in range(3)] == [[*ids, 3], [3], [*ids, 3]]
    assert WordPiece.train(TRAINING, 120, lowercase=True).entries == whole.entries


def test_training_reads_no_more_than_its_first_characters(monkeypatch) -> None:
    longer = [*TRAINING, "zebra quagga " * 20]
    unlimited, first = (WordPiece.train(texts, 120, lowercase=True).entries for texts in (longer, TRAINING))
    assert unlimited != first
    monkeypatch.setattr(word_piece, "MAX_TRAINING_CHARACTERS", sum(map(len, TRAINING)))
    assert WordPiece.train(longer, 120, lowercase=True).entries == first
