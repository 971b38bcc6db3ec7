"""Messages name config keys in full, as a user must type them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config.check import DOOR_KEYS
from common.config.compose import GROUPS, configure

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(file for room in ("common", "detr", "vit", "seq2seq") for file in sorted((ROOT / room).rglob("*.py"))),
    *(ROOT / f"{door}.py" for door in ("train", "evaluate", "predict")),
]
IN_SECTION = re.compile(r"(?<![\w./])((?:data|model|task|trainer|optimizer|schedule)(?:\.[a-z_0-9]+)+)")
ALONE = re.compile(r"(?<![\w./])([a-z_]+)=(?=[\w\[{])")
FILES = re.compile(r"\.(json|pkl|safetensors|pt|yaml)$")
PLACEHOLDERS = {"key", "group"}


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The texts of a source with their lines, without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    ignored = {id(line.value) for line in docstrings if isinstance(line, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored:
            yield node.lineno, node.value


def keys(config: dict[str, Any], prefix: str = "") -> set[str]:
    """All keys of a config, those of sections as well, with dots."""
    names = {f"{prefix}{name}" for name in config}
    return names.union(*(keys(part, f"{prefix}{name}.") for name, part in config.items() if isinstance(part, dict)))


def test_every_key_that_a_message_names_is_a_key_of_a_config():
    choices = [
        ("deformable_detr", "coco"),
        ("dino", "coco"),
        ("lstr", "tusimple"),
        *(("detr_r50", data) for data in ("coco", "voc", "yolo", "csv")),
        ("detr", "shapes"),
        ("vit", "imagefolder"),
        ("tnt", "digits"),
        ("cnn", "digits"),
        ("mae", "imagefolder"),
    ]
    choices += [("seq2seq", "cldr"), ("seq2seq", "parallel_text"), ("retinanet_r50_fpn", "coco"), ("sam_b", "coco")]
    choices += [("igpt", "digits_plain"), ("igpt", "fashion_mnist")]
    choices += [("swin", "digits"), ("gpt", "text")]
    choices += [("bert", "sentences"), ("bert_classifier", "text_classes")]
    choices += [("rnn_luong", "cldr")]
    choices += [("word2vec", "word_pairs")]
    configs = [configure("train", [f"model={model}", f"data={data}"]) for model, data in choices]
    known = {"model.compressed"}.union(*map(keys, configs))  # which compressed models have
    prediction = [config["task"]["predict"] for config in configs]  # predict.py accepts these names without a prefix
    alone = {*GROUPS, *PLACEHOLDERS, "quantize"}.union(*DOOR_KEYS.values(), *prediction)
    named, unknown = 0, []
    for file in SOURCES:
        for line, text in texts(file):
            keys_in_text = [key for key in IN_SECTION.findall(text) if not FILES.search(key)]
            wrong = [
                key for key in keys_in_text if key not in known and "importing" not in file.parts
            ]  # names of tensors
            if " " in text:
                keys_in_text += ALONE.findall(text)
                wrong += [f"{key}=" for key in ALONE.findall(text) if key not in alone]
            named += len(keys_in_text)
            unknown += [f"{file.relative_to(ROOT)}:{line}: {key} in {text[:80]!r}" for key in wrong]
    assert named > 100
    assert not unknown, "\n".join(unknown)
