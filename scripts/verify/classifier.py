"""Compare our ViT with that of another program, on weights from a file of that program.

scripts/verify_import.py calls this module. The file is loaded into our model and into its peer, which is the model of
torchvision, timm or transformers. The layout of the file decides which of these three models is used; for Google's .npz
files, it is timm's. The features and logits of the two models are compared for random images. The images have as many
patches as the file has position embeddings for patches. If the file has no position embeddings, the images have the
config's size.
"""

from importlib import metadata
from typing import Any, NamedTuple

import torch

from common.config.check import build
from common.errors import UserError
from common.weights import fetching
from scripts.verify.classifier_peers import PEERS, ForeignFile, load_peer
from scripts.verify.comparison import (
    TOLERANCE,
    absolute_difference,
    check_options,
    load_foreign,
    option,
    relative_difference,
    report,
)
from vit.importing import adopt as importing
from vit.importing import google

MODEL = "vit.models.classifier.Classifier"
IMAGES, SEED = 4, 0


class Difference(NamedTuple):
    """The largest difference between the two models in one of their outputs."""

    output: str  # "features" or "logits"
    absolute: float
    relative: float  # the absolute difference divided by the largest deviation of the peer's output from its mean


def verify(config: dict[str, Any]) -> tuple[str, bool]:
    """Compare the models on the file that `config` names; returns a report, and whether the outputs agree.

    Raises UserError if nothing can be compared.
    """
    file = _read(config)
    differences = compare(file)
    agree = all(difference.relative <= TOLERANCE for difference in differences)
    return text(file, differences, agree=agree), agree


def _read(config: dict[str, Any]) -> ForeignFile:
    """Read the file that the config names.

    Raises UserError if the file was written by this project, if it does not hold a plain ViT, or if it holds another
    model than the config describes.
    """
    path, options = fetching.locate(config).path, config["model"]
    content = load_foreign(path, config["weights"])
    image_size = config["data"].get("image_size")
    try:
        tensors, _ = importing.unwrap(content)
        adopted = importing.adopt(
            content, None, (image_size, image_size) if isinstance(image_size, int) else image_size
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    file = ForeignFile(path, importing.recognise(tensors), tensors, adopted.weights, adopted.left_out, options)
    check_options(path, options, required_options(file).items())
    return file


def required_options(file: ForeignFile) -> dict[str, Any]:
    """Return the options of the config's `model` that are known from the file: key -> required value.

    An option is known if it follows from the file's tensors or from the program that wrote the file. The number of
    heads and the activation are known only for Google's files: their tensors have a dimension for the heads, and all of
    Google's models have the same activation.
    """
    weights, first = file.weights, "encoder.blocks.0."
    width = len(weights["patches.weight"])
    pooling = "token" if "class_token" in weights else "mean"
    required = {
        "patch_size": weights["patches.weight"].shape[-1],
        "width": width,
        "layers": sum(name.endswith("in_proj.weight") for name in weights),
        "feedforward": len(weights[f"{first}feed_forward.expand.weight"]),
        "pooling": "mean_then_norm" if "pooled_norm.weight" in weights else pooling,
        "registers": len(weights.get("registers", ())),
        "distillation_token": "distillation_token" in weights,
        "blocks.qk_norm": f"{first}attention.q_norm.weight" in weights,
    }
    if pooling == "token":
        required["positions.on_token"] = "positions.token" in weights
    if file.classes:
        required["representation"] = (
            len(weights["representation.weight"]) if "representation.weight" in weights else None
        )
    scaled = f"{first}residuals.0.scale" in weights
    if scaled != (option(file.options, "blocks.layer_scale") is not None):
        required["blocks.layer_scale"] = 1e-5 if scaled else None  # an initial value, which loading overwrites
    if file.layout == importing.GOOGLE:
        required["heads"] = google.head_count(file.tensors)
        required["blocks.activation"] = "gelu_tanh"
    return required


@torch.no_grad()
def compare(file: ForeignFile) -> list[Difference]:
    """Compare the features and logits of our model and its peer; raises UserError if the peer cannot be loaded."""
    height, width = file.image_size
    channels = file.weights["patches.weight"].shape[1]
    images = torch.randn(IMAGES, channels, height, width, generator=torch.Generator().manual_seed(SEED))
    arguments = {"classes": file.classes or 1, "channels": channels, "image_size": (height, width)}
    model = build(file.options, **arguments).eval()
    state = model.state_dict()
    model.load_state_dict({**state, **{name: t for name, t in file.weights.items() if name in state}})
    theirs = load_peer(file)(images)
    ours = {"features": model.features(images), "logits": model(images)}
    return [
        Difference(name, absolute_difference(ours[name], expected), relative_difference(ours[name], expected))
        for name, expected in theirs.items()
    ]


def text(file: ForeignFile, differences: list[Difference], *, agree: bool) -> str:
    """Format the report: what was read, the differences, and what the comparison does not cover."""
    package, (height, width) = PEERS[file.layout], file.image_size
    unused = [name for name in file.left_out if name in file.tensors]
    lines = [
        ("checkpoint", str(file.path)),
        ("layout", f"{file.layout}, read for comparison by {package} {metadata.version(package)}"),
        ("used", f"{len(file.tensors) - len(unused)} tensors of the file, as {len(file.weights)} of ours"),
        ("left out", ", ".join(file.left_out) or "nothing"),
        ("images", f"{IMAGES} of {height} x {width} pixels, random (seed {SEED}), fp32"),
    ]
    for difference in differences:
        relative = f"{difference.relative:.2g} of the largest deviation from the mean"
        lines.append((difference.output, f"differ by {difference.absolute:.2g} at most, {relative}"))
    assumed = ", ".join(f"model.{key}={value}" for key, value in assumptions(file).items())
    condition = f", provided that the original model has {assumed}, which the file does not hold" if agree else ""
    return report([*lines, *(("note", note) for note in notes(file))], agree=agree) + condition


def assumptions(file: ForeignFile) -> dict[str, Any]:
    """Return heads, activation and norm_eps as key -> value, without the options that are known from the file.

    Our model and its peer both get these options from the config, so the comparison does not notice wrong values.
    """
    required = required_options(file)
    values = {key: option(file.options, key) for key in ("heads", "blocks.activation", "blocks.norm_eps")}
    return {key: f"{value:g}" if key.endswith("eps") else value for key, value in values.items() if key not in required}


def notes(file: ForeignFile) -> list[str]:
    """Return sentences for the report about what the comparison does not cover."""
    lines = [
        "our model and its peer both have the options in the last line from the config, so a wrong value of these is "
        "not noticed; nor is a wrong data.mean or data.std, which the file does not hold"
    ]
    if file.layout == importing.GOOGLE:
        lines.append("Google's models take images in [-1, 1]: data.mean and data.std must be 0.5 for each channel")
    if file.layout == "transformers":
        lines.append("transformers' default norm_eps is 1e-12; a config.json of the file holds norm_eps and activation")
    if file.layout == "timm":
        lines.append(
            "timm's models with norms after the sub-layers (rpn) have the same tensor names but are different models"
        )
    if "positions.grid" in file.weights and not any("pos" in name for name in file.tensors):
        lines.append("the file holds no positions, since they are fixed; both models have those that we compute")
    if file.options["representation"] and PEERS[file.layout] == "timm":
        lines.append("timm no longer has a representation layer, so neither that layer nor the head was compared")
    if not file.classes:
        lines.append("the file holds no head that fits ours; a run that starts from it initialises a new head")
    return lines
