"""A translator as a folder for transformers, and the command line that reads it back."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from common.config.compose import configure
from common.config.diff import flatten
from common.errors import UserError
from scripts.verify.comparison import override
from seq2seq.importing import marian

PRESET = "transformer_opus"  # whose keys the exported model is described by, and those that differ
WEIGHTS = "model.safetensors"


def write(exported: marian.Export, folder: Path) -> None:
    """The four files of an export; raises UserError when the folder holds another model."""
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / marian.METADATA_FILE).is_file()
    ):
        raise UserError(f"--output {folder} holds something else already; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "triptych": marian.FORMAT}
    safetensors.torch.save_file(exported.tensors, folder / WEIGHTS, metadata=metadata)
    texts = {
        "config.json": exported.config,
        "generation_config.json": exported.generation,
        marian.METADATA_FILE: exported.metadata,
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def use(config: dict[str, Any], folder: Path) -> list[str]:
    """The command line's words that describe the exported model: a preset, and the keys that differ from it."""
    file = f"checkpoint={folder / WEIGHTS}"
    preset = configure("evaluate", [file, f"model={PRESET}"], lambda path: {})
    sections = ("model.", "task.predict.", "data.source", "data.target")
    keys = {key: value for key, value in flatten(config).items() if key.startswith(sections) and "._target_" not in key}
    known = flatten(preset)
    return [file, f"model={PRESET}", *(override(key, value) for key, value in keys.items() if known.get(key) != value)]
