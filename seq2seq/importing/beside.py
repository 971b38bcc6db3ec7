"""Files in the folder of an imported checkpoint: JSON objects such as config.json, and the tokenizer."""

from pathlib import Path
from typing import Any

from common.data.opening import read_json
from common.errors import UserError
from seq2seq.tokenizers import files
from seq2seq.tokenizers.vocabulary import VocabularyTokenizer


def read_object(folder: Path | None, name: str) -> dict[str, Any]:
    """The object in a JSON file in `folder`; empty without such a file, or if the file holds no object.

    Raises UserError if the file is not JSON.
    """
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        return {}
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def read_tokenizer(folder: Path | None, entries: int) -> tuple[VocabularyTokenizer | None, list[str]]:
    """The tokenizer in `folder`, None if there is none, and notes on how it was read.

    Raises UserError if its number of entries is not `entries`, the number of rows of the checkpoint's embeddings.
    """
    path = None if folder is None else files.find(folder)
    if path is None:
        return None, []
    tokenizer, notes = files.read(path)
    if tokenizer.size != entries:
        raise UserError(
            f"{path} is the tokenizer of another model: it has {tokenizer.size:,} entries, and the embeddings have "
            f"{entries:,} rows; put the files that were published with the checkpoint beside it."
        )
    return tokenizer, notes
