"""Export a translator to transformers: `python scripts/export_marian.py FILE --output FOLDER`.

FILE is a checkpoint of a seq2seq run. FOLDER receives config.json, generation_config.json, model.safetensors and
triptych.json. `MarianMTModel.from_pretrained(FOLDER)` reads the first three files. With triptych.json, Triptych
restores the exact weights and the tokenizers from FOLDER. The command that does this is printed: `python predict.py
checkpoint=FOLDER/model.safetensors model=transformer_opus ...`. transformers' MarianTokenizer cannot read our
tokenizers.

If transformers is installed, the logits of its model and of ours are compared. The exit code is 0, or 1 if the logits
differ, or 2 if nothing can be exported.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.files.content import TO_RESTORE
from common.files.output import creating
from common.train import assembly
from common.train.state import describe, select_weights
from scripts.exporting.marian_folder import overrides_for, write
from scripts.verify.comparison import TOLERANCE
from scripts.verify.translator import MODEL, compare
from seq2seq.importing import marian


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the checkpoint and compare the exported model with it; returns the exit code."""
    console.guard()
    options = _options(arguments)
    try:
        content = _load(options.checkpoint)
        config = content["config"]
        tensors = select_weights(content, options.weights)
        exported = marian.export(config["model"], config["task"]["predict"], tensors, content["task"])
        with creating(options.output):
            write(exported, options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"read      {describe(options.checkpoint, content, options.weights)}")
    print(f"wrote     {options.output}: {len(exported.tensors)} tensors, {exported.metadata['entries']:,} entries")
    if config["task"]["predict"]["penalty"] == "gnmt":
        print("note      transformers has no GNMT length penalty; its scores are divided by length^alpha instead")
    print(f"use       python predict.py {' '.join(map(shlex.quote, overrides_for(config, options.output)))} input=-")
    return _compare(config["model"], tensors, options.output)


def _compare(model: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> int:
    """Compare the logits of our model with those of the exported model in transformers; returns the exit code.

    `model` is the section `model` of the config, and `tensors` is our model's state dict. Returns 0 if the logits agree
    or if transformers is not installed, and 1 if they differ.
    """
    try:
        peer = _peer(folder)
    except ModuleNotFoundError:
        print("compared  nothing: transformers is not installed (pip install transformers)")
        return 0
    difference = compare(model, tensors, peer, folder)
    agree = difference <= TOLERANCE
    verdict = "outputs agree" if agree else "OUTPUTS DIFFER"
    print(f"compared  {verdict}: logits differ by at most {difference:.2g} of their largest deviation from the mean")
    return 0 if agree else 1


def _peer(folder: Path) -> Any:
    """Load an exported folder with transformers; raises ModuleNotFoundError if transformers is not installed."""
    from transformers import MarianMTModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return MarianMTModel.from_pretrained(folder).eval()


def _load(path: Path) -> dict[str, Any]:
    """Load a checkpoint of a seq2seq run with a model of the class MODEL; raises UserError for any other file."""
    content = checkpoint.load(path, TO_RESTORE)
    if not checkpoint.is_ours(content):
        raise UserError(f"{path} was not written by this program; give a checkpoint of a seq2seq run.")
    target = content["config"]["model"].get("_target_")
    if target != MODEL:  # this also keeps an untrusted file from choosing the class that is built
        raise UserError(f"{path} holds a {target}; only {MODEL} can be exported.")
    assembly.load(path)  # raises UserError if config, tokenizers and weights do not belong together
    return content


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of a seq2seq run")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto (default): ema if the file has it"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start.script(main)
