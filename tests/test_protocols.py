"""The data sets and tokenizers of each wing have the members of their protocols."""

import pytest

from common.config.check import build
from common.config.compose import configure
from detr.data.protocol import LaneData
from seq2seq.data.protocol import LabelledTextData, LanguageData, SentenceData, TextData, WordData
from seq2seq.tokenizers.bpe import Tokenizer
from seq2seq.tokenizers.byte_bpe import ByteBpe
from seq2seq.tokenizers.characters import Characters
from seq2seq.tokenizers.marian import SentencePieces
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.word_piece import WordPiece
from vit.data.protocol import ImageData, NormalisedImages

SETS = {
    ("seq2seq", TextData): ("cldr", "multi30k data.root=folder", "parallel_text"),
    ("bert", SentenceData): ("sentences", "sentences_512"),
    ("bert_classifier", LabelledTextData): ("text_classes",),
    ("gpt", LanguageData): ("text",),
    ("word2vec", WordData): ("word_pairs",),
    ("detr", LaneData): ("lanes", "tusimple data.root=folder"),
    ("vit", ImageData): ("digits", "fashion_mnist", "cifar10", "imagefolder", "photos"),
    ("vit", NormalisedImages): ("digits_plain", "fashion_mnist", "cifar10", "imagefolder_32"),
}


def members(protocol: type) -> set[str]:
    """The public names of a protocol and of the protocols that it extends."""
    names = {name for part in protocol.__mro__ for name in (*vars(part), *vars(part).get("__annotations__", ()))}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(("model", "protocol", "data"), [(*key, name) for key, names in SETS.items() for name in names])
def test_a_data_set_has_the_members_of_its_protocol(model: str, protocol: type, data: str) -> None:
    config = configure("train", [f"model={model}", *f"data={data}".split()])
    data_set = build(config["data"])
    assert len(members(protocol)) > 8 and [name for name in members(protocol) if not hasattr(data_set, name)] == []


@pytest.mark.parametrize("tokenizer", [Tokenizer, SentencePieces, Characters, ByteBpe, WordPiece])
def test_a_tokenizer_has_the_members_of_its_protocol(tokenizer: type) -> None:
    missing = {name for name in members(TextTokenizer) if not hasattr(tokenizer, name)}
    assert missing <= {"options", "special"}  # the constructor sets them
