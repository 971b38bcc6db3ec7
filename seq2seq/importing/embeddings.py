"""Word vectors from a file of word2vec as the first values of a translator's embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from seq2seq.importing.word2vec import read_vectors
from seq2seq.tokenizers.bpe import SPECIAL_NAMES
from seq2seq.tokenizers.protocol import TextTokenizer

SPACE = "\u2581"  # stands for the space before a word in an entry's readable form


@torch.no_grad()
def load_embeddings(model: nn.Module, path: Path, tokenizers: tuple[TextTokenizer, TextTokenizer]) -> str:
    """Copy word vectors to the rows of a new model's embeddings; returns a line for the log.

    `tokenizers` are those of source and target. A row gets the vector of the word that equals its entry, with or
    without the mark of a preceding space; special entries and all others keep their values. Vectors are not scaled.
    Raises UserError if the vectors have another width than the embeddings, or no entry of a vocabulary is in the file.
    """
    words, vectors = read_vectors(path)
    rows = {word: row for row, word in enumerate(words)}
    tables: dict[str, TextTokenizer] = {"embedding": tokenizers[1]}
    if "source_embedding" in dict(model.named_children()):
        tables["source_embedding"] = tokenizers[0]
    parts = []
    for name, tokenizer in tables.items():
        weight: Any = model.get_submodule(name).weight
        if weight.shape[1] != vectors.shape[1]:
            raise UserError(
                f"model.embedding_weights={path} has vectors of width {vectors.shape[1]}, and the embeddings have the "
                f"width {weight.shape[1]}; set model.embedding_width={vectors.shape[1]}, or give another file."
            )
        matches = [(i, rows[word]) for i, word in _words(tokenizer, rows)]
        if not matches:
            raise UserError(
                f"model.embedding_weights={path} has none of the {weight.shape[0]:,} entries of the vocabulary of "
                f"{name}; give vectors of its language, or raise data.tokenizer.vocabulary, so that words are entries."
            )
        entries, found = zip(*matches, strict=True)
        weight[torch.tensor(entries)] = torch.from_numpy(vectors[[*found]]).to(weight)
        parts.append(f"{len(matches):,} of {weight.shape[0]:,} rows of {name}")
    return f"weights   initialised at random, except {' and '.join(parts)} from {path}"


def _words(tokenizer: TextTokenizer, known: dict[str, int]) -> Sequence[tuple[int, str]]:
    """The entries that are known words, each with its id."""
    ids = range(len(SPECIAL_NAMES), tokenizer.size)
    spellings = [(i, (piece, piece.removeprefix(SPACE))) for i, piece in zip(ids, tokenizer.pieces(ids), strict=True)]
    return [(i, next(word for word in pair if word in known)) for i, pair in spellings if known.keys() & {*pair}]
