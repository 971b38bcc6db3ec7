"""The byte-level BPE of published models against transformers' tokenizers, and against plain merges of bytes."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from common.errors import UserError
from seq2seq.tokenizers import bpe, files
from seq2seq.tokenizers.bpe import byte_alphabet
from seq2seq.tokenizers.byte_bpe import ByteBpe
from seq2seq.tokenizers.stored import restore

TRAINING = [
    "A man is riding a horse, and two women aren't.",
    "Ein Mann reitet; zwei Männer fahren Fahrrad über die Brücke.",
    "The man's 42 dogs were running in 2019\n\n  def f(x):\n    return x",
    "日本語の文 и русский текст",
] * 5
# GPT-2's way of splitting a text.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ALPHABETS = [
    "aeimnrst AEM",
    " \t\n\u00a0\u2028\x00'.,;",
    "äöüéñßΩжд",
    "日本語文字",
    "👩\u200d🚀\ufe0f🇩🇪",
    "0123456789½²",
]
SPECIAL = {"roberta": ["<s>", "<pad>", "</s>", "<unk>"], "gpt2": []}


def texts() -> list[str]:
    rng = random.Random(0)
    samples = ["", " ", "   ", " a", "it's  they'll we'd", "Ġ Ċ"]
    for _ in range(200):
        alphabet = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
        samples.append("".join(rng.choices(alphabet, k=rng.randint(1, 40))))
    return [*samples, *TRAINING[:4]]


@pytest.fixture(scope="module", params=["roberta", "gpt2"])
def folder(request, tmp_path_factory) -> Path:
    """vocab.json and merges.txt of a small tokenizer, with the special entries at the places of the published one."""
    path: Path = tmp_path_factory.mktemp(request.param)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL[request.param],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(TRAINING, trainer)
    model: dict[str, Any] = json.loads(library.to_str())["model"]
    last = "<mask>" if request.param == "roberta" else "<|endoftext|>"
    (path / "vocab.json").write_text(json.dumps({**model["vocab"], last: len(model["vocab"])}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ours(folder: Path) -> ByteBpe:
    tokenizer, notes = files.read(folder)
    assert isinstance(tokenizer, ByteBpe) and notes == []
    return tokenizer


def vocabulary(folder: Path) -> dict[str, int]:
    ids: dict[str, int] = json.loads((folder / "vocab.json").read_text())
    return ids


def peer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = transformers.RobertaTokenizer if "<mask>" in vocabulary(folder) else transformers.GPT2Tokenizer
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    # The published files say that <mask> includes the space before it.
    mask = {"mask_token": tokenizers.AddedToken("<mask>", lstrip=True)} if "<mask>" in vocabulary(folder) else {}
    return kind(vocab=vocabulary(folder), merges=[tuple(line.split(" ")) for line in lines], **mask)


def test_ids_and_texts_are_those_of_transformers(folder):
    tokenizer, reference = ours(folder), peer(folder)
    assert len(reference) == tokenizer.size and tokenizer.options.pieces == "bytes"
    for text in texts():
        expected = reference(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == expected, repr(text)
        decoded = reference.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(expected) == decoded == text, repr(text)
        row = tokenizer.encode_all([text])[0].tolist()
        assert row == [*expected, reference.eos_token_id]


def test_ids_are_those_of_plain_merges(folder):
    regex = pytest.importorskip("regex")
    ids, symbols = vocabulary(folder), {byte: symbol for symbol, byte in byte_alphabet().items()}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}

    def merge(parts: list[str]) -> list[str]:
        while len(parts) > 1:
            first = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if first not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                joins = tuple(parts[i : i + 2]) == first
                merged.append("".join(parts[i : i + 1 + joins]))
                i += 1 + joins
            parts = merged
        return parts

    tokenizer = ours(folder)
    for text in texts():
        words = [[symbols[byte] for byte in word.encode()] for word in regex.findall(PATTERN, text)]
        assert tokenizer.encode(text) == [ids[part] for word in words for part in merge(word)], repr(text)


def test_no_text_is_encoded_to_a_special_entry_but_a_blank_is(folder):
    tokenizer = ours(folder)
    text = "<s> <pad> </s> <unk> <mask> <|endoftext|>"
    assert not tokenizer.special_entries.ids & {*tokenizer.encode(text)}
    assert tokenizer.decode(tokenizer.encode(text)) == text
    special = tokenizer.special
    assert tokenizer.decode([special.begin, *tokenizer.encode("a man"), special.end]) == "a man"
    mask = tokenizer.special_entries.mask
    if mask is None:
        assert special.begin == special.end == tokenizer.size - 1 and special.never == ()
        return
    assert special == (0, 2, (0, 1, 3, mask))
    reference = peer(folder)
    for text in ("A man is riding a <mask>.", "<mask> man  <mask><mask>", "a<mask>b"):
        assert tokenizer.encode_with_blanks(text) == reference(text, add_special_tokens=False).input_ids
    assert tokenizer.decode([3]) == "\ufffd"


def test_words_begin_with_a_space(folder):
    tokenizer = ours(folder)
    ids = tokenizer.encode("A man is riding horses.")
    pieces = tokenizer.pieces(ids)
    assert "".join(pieces) == "A▁man▁is▁riding▁horses."
    assert [tokenizer.begins_word(id) for id in ids] == [piece.startswith("▁") for piece in pieces]
    assert tokenizer.pieces(tokenizer.encode("☃")) == ["<0xE2>", "<0x98>", "<0x83>"], "no merge begins with 0xE2"


def test_the_state_and_tokenizer_json_give_the_same_tokenizer(folder, tmp_path):
    tokenizer = ours(folder)
    restored = restore(tokenizer.state())
    assert isinstance(restored, ByteBpe) and restored.state() == tokenizer.state()
    assert [restored.encode(text) for text in texts()] == [tokenizer.encode(text) for text in texts()]
    peer(folder).save_pretrained(tmp_path)
    assert files.find(tmp_path) == tmp_path / "tokenizer.json"
    assert ours(tmp_path).state() == tokenizer.state()


def test_a_leading_space_is_inserted_if_the_file_says_so(folder, tmp_path):
    reference = peer(folder)
    reference.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = ours(tmp_path)
    assert tokenizer.encode("man is") == ours(folder).encode(" man is")
    assert tokenizer.decode(tokenizer.encode("man is")) == "man is"
    assert ours(tmp_path).encode("man") == restore(tokenizer.state()).encode("man")


def test_files_of_other_tokenizers_are_refused(folder, tmp_path):
    ids, merges = vocabulary(folder), (folder / "merges.txt").read_text(encoding="utf-8")

    def refuse(reason: str, vocabulary: Any = ids, merges: str = merges) -> None:
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
        with pytest.raises(UserError, match=reason) as error:
            files.read(tmp_path / "vocab.json")
        assert "give the" in str(error.value) or "copy" in str(error.value)

    refuse("bytes have no entry", {"▁the": 0, "</s>": 1, "<s>": 2})
    refuse("its content is a list", ["a", "b"])
    refuse("the ids of its .* entries are not 0 to", {**ids, "Ġ": 10_000})
    refuse("line 2 is not two entries", merges="#version: 0.2\na b c\n")
    refuse("which are not all entries", merges="#version: 0.2\nq Ġq\n")
    special = {"<s>", "</s>", "<|endoftext|>"} & ids.keys()
    refuse("it has no entry <s>", {f"{entry}." if entry in special else entry: id for entry, id in ids.items()})


def test_settings_of_other_models_are_refused(folder, tmp_path):
    peer(folder).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for section, key, value, reason in [
        ("model", "ignore_merges", True, "its ignore_merges is not that of GPT-2"),
        ("pre_tokenizer", "use_regex", False, "its pre_tokenizer is not that of GPT-2"),
        ("model", "type", "Unigram", "has a tokenizer of type Unigram"),
        ("model", "vocab", [["a", 0.0]], "is not a file of the package tokenizers"),
    ]:
        path.write_text(json.dumps({**content, section: {**content[section], key: value}}))
        with pytest.raises(UserError, match=reason):
            files.read(path)
    path.write_text(json.dumps({**content, "normalizer": {"type": "NFC"}}))
    with pytest.raises(UserError, match=r"its normalizer is not that of GPT-2"):
        files.read(path)
    with pytest.raises(UserError, match=r"has none of tokenizer.json, vocab.txt"):
        files.read(folder.parent)


def test_a_malformed_state_is_refused(folder):
    content = json.loads(ours(folder).state())
    for key, value in {
        "entries": [*content["entries"], content["entries"][5]],
        "merges": [["a"]],
        "space_before": 1,
    }.items():
        with pytest.raises(UserError, match=r"it is not a byte-level BPE"):
            restore(json.dumps({**content, key: value}))
    with pytest.raises(UserError, match=r"half of a surrogate pair"):
        restore(json.dumps({**content, "entries": [*content["entries"], "\ud800"]}))


def test_a_filling_says_whether_a_space_is_before_it(folder: Path) -> None:
    tokenizer, _ = files.read(folder)
    for id in tokenizer.encode("man") + tokenizer.encode(" man"):
        entry = tokenizer.entries[id]
        expected = entry.removeprefix("\u0120") if entry.startswith("\u0120") else f"##{entry}"
        assert tokenizer.filling(id) == expected


def test_a_long_text_has_the_ids_of_the_whole_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of it are encoded separately. Runs of spaces and signs are no places for a cut."""
    monkeypatch.setattr("seq2seq.tokenizers.vocabulary.MAX_PART", 50)
    monkeypatch.setattr(bpe, "ENCODING_CHARACTERS", 120)
    tokenizer, _ = files.read(folder)
    rng = random.Random(1)
    words = "A man is  riding , a horse\tin 2019 über die   Brücke".split(" ")
    samples = [" ".join(rng.choices(words, k=count)) for count in (3, 200, 1, 41, 0, 90)]
    rows = tokenizer.encode_all(samples)
    assert [rows[i].tolist() for i in range(len(rows))] == [
        [*tokenizer.encode(text), tokenizer.special.end] for text in samples
    ]
    unbroken = "x" * 500
    assert tokenizer.decode(tokenizer.encode_all([unbroken])[0].tolist()).replace(" ", "") == unbroken
