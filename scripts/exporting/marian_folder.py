"""Write the folder of a translator exported to transformers, and list the arguments with which predict.py reads it."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from common.config.compose import configure
from common.config.diff import flatten
from common.errors import UserError
from scripts.verify.comparison import override
from seq2seq.importing import marian

PRESET = "transformer_opus"  # predict.py reads an export with model=PRESET
WEIGHTS = "model.safetensors"


def write(exported: marian.Export, folder: Path) -> None:
    """Write the four files of an export to `folder`.

    Raises UserError if `folder` is a file, or is not empty and does not hold an earlier export.
    """
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / marian.METADATA_FILE).is_file()
    ):
        raise UserError(f"--output {folder} is a file, or a folder with other content; give a new folder.")
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


def overrides_for(config: dict[str, Any], folder: Path) -> list[str]:
    """Return the arguments with which predict.py reads an export in `folder`.

    `config` is the config of the exported checkpoint. The arguments are checkpoint=FILE and model=PRESET, and KEY=VALUE
    for each key of the model, of decoding and of the languages whose value in `config` differs from the preset's value.
    """
    file = f"checkpoint={folder / WEIGHTS}"
    preset = flatten(configure("evaluate", [file, f"model={PRESET}"], lambda path: {}))
    sections = ("model.", "task.predict.", "data.source", "data.target")
    keys = {key: value for key, value in flatten(config).items() if key.startswith(sections) and "._target_" not in key}
    return [file, f"model={PRESET}", *(override(key, value) for key, value in keys.items() if preset.get(key) != value)]
