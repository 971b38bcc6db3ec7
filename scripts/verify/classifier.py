"""Does an imported ViT answer as in the program that its file comes from? A part of scripts/verify_import.py.

Reads the file twice, by our import and by the program that its layout belongs to (torchvision, timm or transformers;
Google's .npz by timm, whose reader is not ours), and compares features and logits on random images of the file's size.
"""

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.config.check import build
from common.errors import UserError
from scripts.verify.classifier_peers import PEERS, Import, peer
from scripts.verify.comparison import TOLERANCE, absolute, foreign, option, refuse_another_model, relative, report
from vit.importing import adopt as importing
from vit.importing import google

MODEL = "vit.models.classifier.Classifier"
COUNT, SEED = 4, 0  # of random images


class Difference(NamedTuple):
    """One comparison: the largest difference, and its share of the largest deviation from the mean."""

    what: str
    absolute: float
    relative: float


def verify(config: dict[str, Any]) -> tuple[str, bool]:
    """What was read and compared, and whether both agree; raises UserError when there is nothing to compare."""
    file = _read(config)
    rows = compare(file)
    same = all(row.relative <= TOLERANCE for row in rows)
    return text(file, rows, same=same), same


def _read(config: dict[str, Any]) -> Import:
    """The file as adopted; raises UserError when it is ours, no plain ViT, or another one than the config describes."""
    path, options = Path(config["checkpoint"]), config["model"]
    content = foreign(path)
    size = config["data"].get("image_size")
    try:
        tensors, _ = importing.unwrap(content)
        adopted = importing.adopt(content, None, (size, size) if isinstance(size, int) else size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    file = Import(path, importing.recognise(tensors), tensors, adopted.weights, adopted.left_out, options)
    refuse_another_model(path, options, needed(file).items())
    return file


def needed(file: Import) -> dict[str, Any]:
    """What the file's shapes say about the config, by its keys; the number of heads is told by Google's files alone."""
    weights, first = file.weights, "encoder.blocks.0."
    width = len(weights["patches.weight"])
    pooling = "token" if "class_token" in weights else "mean"
    needs = {
        "patch_size": weights["patches.weight"].shape[-1],
        "width": width,
        "layers": sum(name.endswith("in_proj.weight") for name in weights),
        "feedforward": len(weights[f"{first}feed_forward.expand.weight"]),
        "pooling": "mean_then_norm" if "pooled_norm.weight" in weights else pooling,
        "registers": len(weights.get("registers", ())),
        "blocks.qk_norm": f"{first}attention.q_norm.weight" in weights,
    }
    if pooling == "token":
        needs["positions.on_token"] = "positions.token" in weights
    if file.classes:
        needs["representation"] = len(weights["representation.weight"]) if "representation.weight" in weights else None
    scaled = f"{first}residuals.0.scale" in weights
    if scaled != (option(file.options, "blocks.layer_scale") is not None):
        needs["blocks.layer_scale"] = 1e-5 if scaled else None  # the first value in training, and none in a file
    if file.layout == importing.GOOGLE:
        needs["heads"] = google.head_count(file.tensors)
    return needs


@torch.no_grad()
def compare(file: Import) -> list[Difference]:
    """Features and logits of our model and the peer's on the same images; raises UserError without a peer."""
    height, width = file.image_size
    channels = file.weights["patches.weight"].shape[1]
    images = torch.randn(COUNT, channels, height, width, generator=torch.Generator().manual_seed(SEED))
    sizes = {"classes": file.classes or 1, "channels": channels, "image_size": (height, width)}
    ours = build(file.options, **sizes).eval()
    own = ours.state_dict()
    ours.load_state_dict({**own, **{name: t for name, t in file.weights.items() if name in own}})
    theirs = peer(file)(images)
    mine = {"features": ours.features(images), "logits": ours(images)}
    return [
        Difference(what, absolute(mine[what], expected), relative(mine[what], expected))
        for what, expected in theirs.items()
    ]


def text(file: Import, rows: list[Difference], *, same: bool) -> str:
    """What was read, what was compared, and what neither can show."""
    package, (height, width) = PEERS[file.layout], file.image_size
    unused = [name for name in file.left_out if name in file.tensors]
    lines = [
        ("checkpoint", str(file.path)),
        ("layout", f"{file.layout}, read for comparison by {package} {metadata.version(package)}"),
        ("used", f"{len(file.tensors) - len(unused)} tensors of the file, as {len(file.weights)} of ours"),
        ("left out", ", ".join(file.left_out) or "nothing"),
        ("images", f"{COUNT} of {height} x {width} pixels, random (seed {SEED}), fp32"),
    ]
    for row in rows:
        share = f"{row.relative:.2g} of the largest deviation from the mean"
        lines.append((row.what, f"differ by {row.absolute:.2g} at most, {share}"))
    return report([*lines, *(("note", note) for note in notes(file))], same=same)


def notes(file: Import) -> list[str]:
    """What files do not say, and both sides were therefore told by the config."""
    heads, blocks = file.options["heads"], file.options["blocks"]
    activation, eps = blocks["activation"], blocks["norm_eps"]
    lines = [
        f"the file does not say these, so both sides took the config's: heads={heads}, activation={activation}, "
        f"norm_eps={eps:g}; nor does it say data.mean and data.std"
    ]
    if file.layout == importing.GOOGLE:
        lines.append("Google's models take gelu_tanh, and images in [-1, 1]: data.mean and data.std 0.5 per channel")
    if file.layout == "transformers":
        lines.append("transformers' default norm_eps is 1e-12; config.json beside the file says it, and the activation")
    if file.layout == "timm":
        lines.append("timm's models with norms after the sub-layers (rpn) have the same names and are other models")
    if "positions.grid" in file.weights and not any("pos" in name for name in file.tensors):
        lines.append("the file holds no positions, since they are fixed; both sides took those that we compute")
    if file.options["representation"] and PEERS[file.layout] == "timm":
        lines.append("timm has no representation layer any more, so neither that layer nor the head was compared")
    if not file.classes:
        lines.append("the file holds no head that fits ours; a run that starts from it makes one anew")
    return lines
