"""Write a translator for transformers: `python scripts/export_marian.py FILE --output FOLDER`.

FILE is a checkpoint of a seq2seq run; FOLDER gets config.json, generation_config.json and model.safetensors, which
`MarianMTModel.from_pretrained(FOLDER)` reads, and triptych.json, with which `checkpoint=FOLDER/model.safetensors` comes
back exactly, tokenizers included. Our tokenizers have no form that transformers' MarianTokenizer reads. Compares the
logits of both at the end when transformers is installed. Leaves with 0, with 1 when they differ, or with 2 when nothing
can be exported.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

import safetensors.torch
import torch
from torch import Tensor

from common.config.check import build
from common.config.compose import configure
from common.config.diff import flat
from common.errors import UserError
from common.files import checkpoint
from common.train.state import describe, weights
from seq2seq.importing import marian
from seq2seq.tokenizers.bpe import BOS

MODEL = "seq2seq.models.transformer.Transformer"
PRESET = "transformer_opus"  # whose keys the exported model is described by, and those that differ
COUNT, LENGTH, SEED = 4, 20, 0  # of random sentences
TOLERANCE = 1e-4  # of the logits' largest deviation from their mean: the order of fp32 sums
WEIGHTS = "model.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what the command line names and compare it; returns the exit code."""
    options = _options(arguments)
    try:
        content = _ours(options.checkpoint)
        config = content["config"]
        tensors = weights(content, options.weights)
        exported = marian.export(config["model"], config["task"]["predict"], tensors, content["task"])
        write(exported, options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.output} cannot be written ({error.strerror}); check its place and the disk.", file=sys.stderr)
        return 2
    print(f"read      {describe(options.checkpoint, content, options.weights)}")
    print(f"wrote     {options.output}: {len(exported.tensors)} tensors, {exported.mark['entries']:,} entries")
    if config["task"]["predict"]["penalty"] == "gnmt":
        print("note      transformers has no GNMT penalty; generation_config.json divides by n^alpha")
    print(f"use       python predict.py {' '.join(map(shlex.quote, use(config, options.output)))} input=-")
    return _compared(config["model"], tensors, options.output)


def write(exported: marian.Export, folder: Path) -> None:
    """The four files of an export; raises UserError when the folder holds another model."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / marian.MARK).is_file()):
        raise UserError(f"--output {folder} holds something else already; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "triptych": marian.FORMAT}
    safetensors.torch.save_file(exported.tensors, folder / WEIGHTS, metadata=metadata)
    texts = {"config.json": exported.config, "generation_config.json": exported.generation, marian.MARK: exported.mark}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def use(config: dict[str, Any], folder: Path) -> list[str]:
    """The command line's words that describe the exported model: a preset, and the keys that differ from it."""
    file = f"checkpoint={folder / WEIGHTS}"
    preset = configure("evaluate", [file, f"model={PRESET}"], lambda path: {})
    described = ("model.", "task.predict.", "data.source", "data.target")
    keys = {
        key: value for key, value in flat(config).items() if key.startswith(described) and not key.endswith("_target_")
    }
    known = flat(preset)
    return [file, f"model={PRESET}", *(f"{k}={_written(v)}" for k, v in keys.items() if known.get(k) != v)]


@torch.no_grad()
def compare(model: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> float:
    """The largest difference of logits on random sentences, as a share of their largest deviation from the mean.

    Raises ModuleNotFoundError without transformers.
    """
    from transformers import MarianMTModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    size = len(tensors["embedding.weight"])
    ours = build(model, vocabularies=(size, size), joint=model["tied"] == "all").eval()
    ours.load_state_dict(tensors)
    theirs = MarianMTModel.from_pretrained(folder).eval()
    drawn = torch.Generator().manual_seed(SEED)
    length = min(LENGTH, model["longest"])
    source, target = torch.randint(4, size, (2, COUNT, length), generator=drawn)
    target[:, 0] = BOS
    there = torch.tensor(marian.order_there(size))
    ids = there.argsort()  # (V,): what each of our ids is there
    found = ours(source, torch.full((COUNT,), length), target)[..., there]  # (B, T, V) in their order
    expected = theirs(input_ids=ids[source], decoder_input_ids=ids[target]).logits
    return float((found - expected).abs().max() / (expected - expected.mean()).abs().max())


def _compared(model: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> int:
    try:
        difference = compare(model, tensors, folder)
    except ModuleNotFoundError:
        print("compared  with nothing: transformers is not installed (pip install transformers)")
        return 0
    same = difference <= TOLERANCE
    words = "same answers" if same else "OTHER ANSWERS"
    print(f"compared  {words}: logits differ from transformers' by {difference:.2g} of their size at most")
    return 0 if same else 1


def _ours(path: Path) -> dict[str, Any]:
    """A checkpoint of a seq2seq run; raises UserError for any other file."""
    content = checkpoint.load(path)
    if not checkpoint.is_ours(content):
        raise UserError(f"{path} was not written by this program; give a checkpoint of a seq2seq run.")
    target = content["config"]["model"].get("_target_")
    if target != MODEL:  # also keeps the file of a stranger from naming a class that is built
        raise UserError(f"{path} holds a {target}; only {MODEL} can be exported.")
    return content


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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
