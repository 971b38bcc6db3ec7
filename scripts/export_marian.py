"""Write a translator for transformers: `python scripts/export_marian.py FILE --output FOLDER`.

FILE is a checkpoint of a seq2seq run; FOLDER gets config.json, generation_config.json and model.safetensors, which
`MarianMTModel.from_pretrained(FOLDER)` reads, and triptych.json, with which `checkpoint=FOLDER/model.safetensors` comes
back exactly, tokenizers included. Our tokenizers have no form that transformers' MarianTokenizer reads. Compares the
logits of both at the end when transformers is installed. Leaves with 0, with 1 when they differ, or with 2 when nothing
can be exported.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.train.state import describe, select_weights
from scripts.exporting.marian_folder import use, write
from scripts.verify.comparison import TOLERANCE
from scripts.verify.translator import MODEL, compare
from seq2seq.importing import marian


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what the command line names and compare it; returns the exit code."""
    options = _options(arguments)
    try:
        content = _ours(options.checkpoint)
        config = content["config"]
        tensors = select_weights(content, options.weights)
        exported = marian.export(config["model"], config["task"]["predict"], tensors, content["task"])
        write(exported, options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.output} cannot be written ({error.strerror}); check its place and the disk.", file=sys.stderr)
        return 2
    print(f"read      {describe(options.checkpoint, content, options.weights)}")
    print(f"wrote     {options.output}: {len(exported.tensors)} tensors, {exported.metadata['entries']:,} entries")
    if config["task"]["predict"]["penalty"] == "gnmt":
        print("note      transformers has no GNMT penalty; generation_config.json divides by n^alpha")
    print(f"use       python predict.py {' '.join(map(shlex.quote, use(config, options.output)))} input=-")
    return _compared(config["model"], tensors, options.output)


def _compared(model: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> int:
    try:
        peer = _peer(folder)
    except ModuleNotFoundError:
        print("compared  with nothing: transformers is not installed (pip install transformers)")
        return 0
    difference = compare(model, tensors, peer, folder)
    same = difference <= TOLERANCE
    words = "same answers" if same else "OTHER ANSWERS"
    print(f"compared  {words}: logits differ from transformers' by {difference:.2g} of their size at most")
    return 0 if same else 1


def _peer(folder: Path) -> Any:
    """transformers' model of an exported folder; raises ModuleNotFoundError without transformers."""
    from transformers import MarianMTModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return MarianMTModel.from_pretrained(folder).eval()


def _ours(path: Path) -> dict[str, Any]:
    """A checkpoint of a seq2seq run; raises UserError for any other file."""
    content = checkpoint.load(path)
    if not checkpoint.is_ours(content):
        raise UserError(f"{path} was not written by this program; give a checkpoint of a seq2seq run.")
    target = content["config"]["model"].get("_target_")
    if target != MODEL:  # also keeps the file of a stranger from naming a class that is built
        raise UserError(f"{path} holds a {target}; only {MODEL} can be exported.")
    return content


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of a seq2seq run")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="averaged ones where there are"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
