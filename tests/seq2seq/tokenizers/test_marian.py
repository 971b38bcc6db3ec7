"""Marian's tokenizers against the sentencepiece package and transformers' MarianTokenizer, on models trained here."""

import base64
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from seq2seq.importing import marian
from seq2seq.importing.adopt import adopt
from seq2seq.tokenizers import charsmap as charsmaps
from seq2seq.tokenizers import marian as foreign_tokenizers
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK, Tokenizer, TokenizerOptions
from seq2seq.tokenizers.marian import ForeignSpecialIds, SentencePieces, read_unigram_model, restore, share_vocabulary

sentencepiece = pytest.importorskip("sentencepiece")

LANGUAGES = {
    "source": "the a small old house river garden stands near behind under bridge in on of blue green seven 42 cats,",
    "target": "das ein kleines altes Haus Fluss Garten steht bei hinter unter Brücke in auf von blau grün 42 süße,",
}
TEXTS = [
    "the old house stands near the river",
    "  two  spaces\tand a tab  ",
    "\ufb01ne \uff46\uff55\uff4c\uff4c \u2460 \u00bd \u2122 café cafe\u0301 Ångström",
    "Brücke, süße Häuser!",
    "日本語 is 𝄞 unknown 𝄞𝄞 here",
    "<unk> </s> <s> are no entries",
    "",
    "   ",
    "▁under▁line",
    "a\u00a0b\u200bc\u3000d\u00ad",
    "42,42 cats...",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """source.spm, target.spm, and vocab.json with the pieces of both in Marian's order."""
    path = tmp_path_factory.mktemp("opus")
    for side, words in LANGUAGES.items():
        rng = random.Random(side)
        lines = [" ".join(rng.choices(words.split(), k=8)) for _ in range(300)]
        (path / f"{side}.txt").write_text("\n".join(lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(path / f"{side}.txt"),
            model_prefix=str(path / side),
            vocab_size=80,
            model_type="unigram",
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (path / f"{side}.model").rename(path / f"{side}.spm")
    names = ["</s>", "<unk>", ">>deu<<"]
    for side in LANGUAGES:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path / f"{side}.spm"))
        names += [processor.id_to_piece(i) for i in range(3, len(processor))]
    names = [*dict.fromkeys(names), "<pad>"]
    (path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    return path


def vocabulary(folder: Path) -> dict[str, int]:
    ids: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    return ids


def row_order(folder: Path) -> list[int]:
    ids = vocabulary(folder)
    return marian.row_order(len(ids), ForeignSpecialIds(ids["</s>"], ids["<unk>"], ids["<pad>"]))


def imported(folder: Path) -> list[Any]:
    vocabularies = foreign_tokenizers.vocabularies(folder, joint=True, size=len(vocabulary(folder)))
    assert vocabularies is not None
    row_orders = row_order(folder), row_order(folder)
    return [restore(state) for state in foreign_tokenizers.tokenizer_states(folder, vocabularies, row_orders)]


def test_texts_have_the_ids_of_sentencepiece(folder):
    random_texts = [text for side in LANGUAGES for text in (folder / f"{side}.txt").read_text().split("\n")[:100]]
    for side, tokenizer in zip(LANGUAGES, imported(folder), strict=True):
        peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        for text in TEXTS + random_texts:
            expected = [vocabulary(folder).get(piece, 1) for piece in peer.encode(text, out_type=str)]
            assert [row_order(folder)[id] for id in tokenizer.encode(text)] == expected, text


def test_transformers_tokenizer_gives_the_same_ids_and_texts(folder):
    transformers = pytest.importorskip("transformers")
    paths = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")]
    peer = transformers.MarianTokenizer(*paths)
    source, target = imported(folder)
    for text in [*TEXTS[:4], ">>deu<< the old house"]:
        expected = peer(text).input_ids
        assert [row_order(folder)[id] for id in [*source.encode(text), EOS]] == expected, text
    text = "das alte Haus steht bei der Brücke, 42 süße"
    ids = target.encode(text)
    peer_ids = [row_order(folder)[id] for id in ids]
    if UNK not in ids:
        assert target.decode(ids) == peer.decode(peer_ids, skip_special_tokens=True) == text


def test_the_interface_is_that_of_our_own_tokenizer(folder):
    source, target = imported(folder)
    assert source.size == len(vocabulary(folder)) + 1 == len(source.entries)
    text = "the old house"
    ids = source.encode(text)
    assert source.decode([BOS, *ids, EOS, PAD]) == text and source.decode([UNK]) == "\ufffd"
    assert "".join(source.pieces(ids)) == "▁the▁old▁house" and source.pieces([PAD, EOS]) == ["<pad>", "</s>"]
    rows = source.encode_all([text, "", "42"])
    assert [row.tolist() for row in (rows[0], rows[1], rows[2])] == [[*ids, EOS], [EOS], [*source.encode("42"), EOS]]
    restored = restore(source.state())
    assert isinstance(restored, SentencePieces) and restored.state() == source.state()
    assert restored.encode(text) == ids
    assert share_vocabulary(source, target) and source.options.joint
    assert not {PAD, BOS, EOS} & {*source.encode("</s> <pad>")}


def test_our_own_tokenizers_are_restored_too():
    options = TokenizerOptions(
        kind="bpe", pieces="bytes", vocabulary=260, joint=True, single_digits=True, coverage=1.0, byte_fallback=True,
        normalization="none", lowercase=False,
    )  # fmt: skip
    tokenizer = Tokenizer.train([], options)
    restored = restore(tokenizer.state())
    assert isinstance(restored, Tokenizer) and restored.state() == tokenizer.state()
    assert share_vocabulary(tokenizer, tokenizer) and not share_vocabulary(tokenizer, restored)
    for broken in ("{", "[1]", '{"kind": "other"}'):
        with pytest.raises(UserError, match="was not written by this program"):
            restore(broken)


def marian_tensors(folder: Path, extra_rows: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a file that its embeddings need."""
    rows = len(vocabulary(folder)) + extra_rows
    return {"model.shared.weight": torch.randn(rows, 4), "model.encoder.layers.0.fc2.bias": torch.zeros(4)}


def test_the_tokenizers_beside_a_file_are_imported_with_it(folder, tmp_path):
    adopted = adopt(marian_tensors(folder), folder)
    states = adopted.task_state["tokenizers"]
    assert [restore(state).size for state in states] == [len(adopted.weights["embedding.weight"])] * 2
    assert adopt(marian_tensors(folder), tmp_path).task_state == {}


def test_a_tokenizer_of_another_model_is_refused(folder):
    with pytest.raises(UserError, match="a tokenizer that does not belong to the checkpoint: its vocabulary has"):
        adopt(marian_tensors(folder, extra_rows=3), folder)


def test_separate_embeddings_read_separate_vocabularies(folder, tmp_path):
    ids = vocabulary(folder)
    reversed_ids = {piece: id for id, piece in enumerate(["</s>", "<unk>", *[*ids][-2:1:-1], "<pad>"])}
    for name in ("source.spm", "target.spm", "vocab.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "target_vocab.json").write_text(json.dumps(reversed_ids))
    tensors = {**marian_tensors(folder), "model.decoder.embed_tokens.weight": torch.randn(len(ids), 4)}
    source, target = map(restore, adopt(tensors, tmp_path).task_state["tokenizers"])
    assert isinstance(source, SentencePieces) and isinstance(target, SentencePieces)
    assert source.entries[4:] == target.entries[:3:-1]
    assert not share_vocabulary(source, target) and not source.options.joint


def test_only_reading_the_files_requires_the_sentencepiece_package(folder, monkeypatch):
    source, _ = imported(folder)
    for name in [*sys.modules]:
        if name.split(".")[0] == "sentencepiece":
            monkeypatch.setitem(sys.modules, name, None)
    assert restore(source.state()).encode("the old house") == source.encode("the old house")
    with pytest.raises(
        UserError, match=r"source.spm requires the package sentencepiece: pip install sentencepiece protobuf"
    ):
        adopt(marian_tensors(folder), folder)


def test_broken_files_are_refused(folder, tmp_path):
    intact = (folder / "source.spm").read_bytes()
    path = tmp_path / "source.spm"
    for content in (intact[: len(intact) // 2], b"\xff" * 20, b"", b"not a model"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"source.spm is not a (SentencePiece|unigram) model"):
            read_unigram_model(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "is not a unigram model of SentencePiece"),
        ({"user_defined_symbols": ["<sep>"]}, "has the piece '<sep>' of an unsupported type"),
        ({"byte_fallback": True}, "has the piece '<0x00>' of an unsupported type"),
    ],
)
def test_other_kinds_of_models_are_refused(folder, tmp_path, options, message):
    vocabulary_size = 400 if "byte_fallback" in options else 80
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "source.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=vocabulary_size,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"model_type": "unigram", **options},
    )
    with pytest.raises(UserError, match=message):
        read_unigram_model(tmp_path / "m.model")


def state_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(imported(folder)[0].state())
    return content


def with_charsmap(state: dict[str, Any], charsmap: bytes) -> str:
    return json.dumps({**state, "charsmap": base64.b64encode(charsmap).decode()})


def test_a_malformed_charsmap_is_refused_before_the_library_panics(folder):
    state = state_of(folder)
    charsmap = base64.b64decode(state["charsmap"])
    length = int.from_bytes(charsmap[:4], "little")
    assert length > 100_000 and charsmaps.mistake(charsmap) is None
    malformed = {
        "cut": charsmap[: len(charsmap) // 2],
        "cut in its length": charsmap[:3],
        "without a trie": bytes(4) + charsmap[4 + length :],
        "of another length": (length + 4).to_bytes(4, "little") + charsmap[4:],
        "with a short trie": (8).to_bytes(4, "little") + charsmap[4:12] + charsmap[4 + length :],
        "without replacements": charsmap[: 4 + length],
        "with replacements that are no text": charsmap[: 4 + length] + b"\xff" + charsmap[5 + length :],
    }
    for kind, content in malformed.items():
        with pytest.raises(UserError, match="its charsmap cannot be used"):
            restore(with_charsmap(state, content))
            pytest.fail(kind)


def test_no_charsmap_that_is_accepted_makes_the_library_panic(folder):
    """A panic is no Exception; without the check, one in five of these maps causes one."""
    state = state_of(folder)
    charsmap = base64.b64decode(state["charsmap"])
    text = "".join(map(chr, range(0x20, 0x2000)))
    rng, accepted = random.Random(0), 0
    for _ in range(60):
        altered = bytearray(charsmap)
        for _ in range(rng.choice([1, 3])):
            altered[rng.randrange(4, 150_000)] = rng.randrange(256)
        try:
            tokenizer = restore(with_charsmap(state, bytes(altered)))
        except UserError:
            continue
        tokenizer.encode(text)
        accepted += 1
    assert 5 < accepted < 55


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("entries", ["a", "b", "c", "d"]),
        ("entries", "abcd"),
        ("pieces", [["a", float("nan")], ["b", 0.0]]),
        ("pieces", [["", 0.0], ["b", 0.0]]),
        ("pieces", [["\ud800", 0.0], ["b", 0.0]]),
        ("pieces", [["a"]]),
        ("pieces", []),
        ("unknown", 10**6),
        ("unknown", -1),
        ("charsmap", "no base64"),
        ("charsmap", None),
        ("space_before", "yes"),
        ("joint", None),
    ],
)
def test_a_state_with_another_value_is_refused_in_one_sentence(field, value, folder):
    with pytest.raises(UserError, match="The tokenizer was not imported by this program, or is damaged") as caught:
        restore(json.dumps({**state_of(folder), field: value}))
    assert "\n" not in str(caught.value)
