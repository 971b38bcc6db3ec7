"""Sequence-level distillation: a translator's own translations of its training sources, as text to train on.

Kim and Rush 2016, "Sequence-Level Knowledge Distillation", arXiv 1606.07947, section 3.2. The file replaces the split
train of a student's run (`data.distilled`); val and test stay as they are.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files.lines import as_json, write_atomically
from common.files.output import writing_to
from common.task import Answer, Batch
from common.train import data_identity, teacher
from common.train.assembly import Components
from scripts.compressing.measuring import evaluate
from seq2seq.data.pairs import SentencePairs
from seq2seq.tasks.translation import Translation

TEXT, RECORD = "distilled.tsv", "distilled.json"


def translate_train(parts: Components, folder: Path) -> Path:
    """Write the translations of train's sources, and a record of their origin, into `folder`; returns the text file.

    Existing files are used again if their record has the same teacher, decoding options and sources; otherwise, raises
    UserError. A translation that reaches the maximum length is left out, since its end is not the model's choice, and
    so is an empty one.
    """
    task, data = parts.task, parts.data
    if not isinstance(task, Translation) or not isinstance(data, SentencePairs):
        raise UserError(
            f"distil=sequence: {type(task).__name__} on {type(data).__name__} has no sentences to translate; "
            "give soft or hard."
        )
    file, record = folder / TEXT, folder / RECORD
    origin = _origin(parts, task, data)
    if record.exists() and file.exists():
        if json.loads(record.read_text(encoding="utf-8"))["origin"] != json.loads(as_json(origin)):
            raise UserError(
                f"{file} has translations by another model, with other decoding options or of other sources; name "
                "another folder (output=)."
            )
        print(f"reused    {file}")
        return file
    pairs: dict[int, tuple[str, str] | None] = {}

    def collect(batch: Batch, answers: list[Answer]) -> None:
        limits = task.options.limits(batch["source_lengths"]).tolist()
        for id, source, answer, limit in zip(batch["ids"], batch["source_texts"], answers, limits, strict=True):
            pairs[id] = _pair(source, answer, limit)

    numbers = evaluate(parts, "train", on_answers=collect)
    lines = [pair for _, pair in sorted(pairs.items()) if pair is not None]
    if not lines:
        raise UserError(f"None of the {len(pairs):,} translations of train has an end; give a trained translator.")
    content = {"origin": origin, "pairs": len(lines), "left_out": len(pairs) - len(lines), "against_train": numbers}
    with writing_to(folder):
        write_atomically(file, "".join(f"{source}\t{target}\n" for source, target in lines))
        write_atomically(record, as_json(content, indent=1))
    print(f"wrote     {file}: {len(lines):,} translations of train, {len(pairs) - len(lines):,} left out")
    return file


def refuse_others(config: dict[str, Any]) -> None:
    """Raise UserError if the config's task is none of translation."""
    if "distilled" not in config["data"]:
        name = str(config["data"]["_target_"]).rpartition(".")[2]
        raise UserError(
            f"distil=sequence: {name} has no key data.distilled, the file of translations that a student trains on; "
            "give soft or hard."
        )


def _origin(parts: Components, task: Translation, data: SentencePairs) -> dict[str, Any]:
    """What decides the translations."""
    return {
        "teacher": teacher.digest(parts.model),
        "precision": parts.trainer.precision,
        "decoding": dataclasses.asdict(task.options),
        "longest": data.longest,
        "train": data_identity.fingerprint_of(parts.data, "train"),
        "pairs": parts.data.count("train"),
    }


def _pair(source: str, answer: Answer, limit: int) -> tuple[str, str] | None:
    """The source and its translation without tabs and line breaks; None for a pair to leave out."""
    if len(answer["tokens"]) + 1 >= limit or not answer["text"].strip():
        return None
    return " ".join(source.split("\t")), " ".join(answer["text"].replace("\t", " ").splitlines())
