"""Rebuild a tokenizer of any kind from the state in a checkpoint."""

import json
from collections.abc import Callable
from typing import Any

from seq2seq.tokenizers import marian
from seq2seq.tokenizers.byte_bpe import ByteBpe
from seq2seq.tokenizers.characters import Characters
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.word_piece import WordPiece

# The classes of states by their key "kind"; those of other kinds are read by `marian.restore`.
KINDS: dict[str, Callable[[dict[str, Any]], TextTokenizer]] = {
    ByteBpe.kind: ByteBpe,
    WordPiece.kind: WordPiece,
    Characters.kind: Characters,
}


def restore(state: str) -> TextTokenizer:
    """Rebuild a tokenizer from a text that its method `state` returned.

    Raises UserError for a text that is not JSON, and for a malformed state.
    """
    try:
        content = json.loads(state)
    except (ValueError, RecursionError):
        content = None  # `marian.restore` raises the UserError
    kind = KINDS.get(str(content.get("kind"))) if isinstance(content, dict) else None
    return kind(content) if kind else marian.restore(state)
