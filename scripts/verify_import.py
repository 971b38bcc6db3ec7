"""Does an imported file answer as where it comes from? `python scripts/verify_import.py checkpoint=FILE model=NAME`.

A translator (model=transformer_opus, say) is compared as scripts/verify/translator.py tells; what follows is for a ViT.
Reads the file twice, by our import and by the program that its layout belongs to (torchvision, timm or transformers;
Google's .npz by timm, whose reader is not ours), and compares features and logits on random images of the file's size.
Keys of the config go on top, as for evaluate.py: `model.blocks.activation=gelu_tanh`. Leaves with 0 when both agree,
with 1 when they do not, and with 2 when there is nothing to compare.
"""

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

import torch
from torch import Tensor

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.train.assembly import stored_config
from scripts.verify import translator as verify_translator
from scripts.verify.import_peers import PEERS, Import, peer
from vit.importing import adopt as importing
from vit.importing import google

# What differs is the order of fp32 sums: 7e-7 of the largest logit in ViT-B/16. GELU by tanh instead of exact would
# give 2e-4 there, and eps 1e-5 instead of 1e-6 2e-5, but both sides have the same; a misplaced tensor gives more.
TOLERANCE = 1e-4
COUNT, SEED = 4, 0  # of random images
MODEL = "vit.models.classifier.Classifier"


class Row(NamedTuple):
    """One comparison: the largest difference, and its share of the largest deviation from the mean."""

    what: str
    absolute: float
    relative: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what the command line names and print it; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or {"-h", "--help"} & {*given}:
        print(__doc__)
        return 0 if given else 2
    try:
        config = configure("evaluate", given, stored_config)
        if config["model"]["_target_"] == verify_translator.MODEL:
            said, same = verify_translator.verify(config)
            print(said)
            return 0 if same else 1
        found = read(config)
        rows = compare(found)
    except UserError as error:
        print(str(error).replace("evaluate.py", "verify_import.py"), file=sys.stderr)  # its config is borrowed
        return 2
    print(text(found, rows))
    return 0 if all(row.relative <= TOLERANCE for row in rows) else 1


def read(config: dict[str, Any]) -> Import:
    """The file as adopted; raises UserError when it is ours, no plain ViT, or another one than the config describes."""
    path, options = Path(config["checkpoint"]), config["model"]
    content = checkpoint.load(path)
    if checkpoint.is_ours(content):
        raise UserError(
            f"{path} was written by this program; give a file of another one, which it can be compared with."
        )
    if options["_target_"] != MODEL:
        raise UserError(
            f"model._target_={options['_target_']}: only {MODEL} and {verify_translator.MODEL} take such files; give "
            "model=vit_b16, say, or model=transformer_opus."
        )
    size = config["data"].get("image_size")
    try:
        tensors, _ = importing.unwrap(content)
        adopted = importing.adopt(content, None, (size, size) if isinstance(size, int) else size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    found = Import(path, importing.recognise(tensors), tensors, adopted.weights, adopted.left_out, options)
    wrong = [f"model.{key}={json.dumps(value)}" for key, value in needed(found).items() if value != _at(options, key)]
    if wrong:
        raise UserError(f"{path} holds another model than the config describes; give {' '.join(wrong)}.")
    return found


def needed(found: Import) -> dict[str, Any]:
    """What the file's shapes say about the config, by its keys; the number of heads is told by Google's files alone."""
    weights, first = found.weights, "encoder.blocks.0."
    width = len(weights["patches.weight"])
    pooling = "token" if "class_token" in weights else "mean"
    said = {
        "patch_size": weights["patches.weight"].shape[-1],
        "width": width,
        "layers": sum(name.endswith("in_proj.weight") for name in weights),
        "feedforward": len(weights[f"{first}feed_forward.expand.weight"]),
        "pooling": "mean_then_norm" if "pooled_norm.weight" in weights else pooling,
        "registers": len(weights.get("registers", ())),
        "blocks.qk_norm": f"{first}attention.q_norm.weight" in weights,
    }
    if pooling == "token":
        said["positions.on_token"] = "positions.token" in weights
    if found.classes:
        said["representation"] = len(weights["representation.weight"]) if "representation.weight" in weights else None
    scaled = f"{first}residuals.0.scale" in weights
    if scaled != (_at(found.options, "blocks.layer_scale") is not None):
        said["blocks.layer_scale"] = 1e-5 if scaled else None  # the first value in training, and none in a file
    if found.layout == importing.GOOGLE:
        said["heads"] = google.heads(found.tensors)
    return said


@torch.no_grad()
def compare(found: Import) -> list[Row]:
    """Features and logits of our model and the peer's on the same images; raises UserError without a peer."""
    height, width = found.image_size
    channels = found.weights["patches.weight"].shape[1]
    images = torch.randn(COUNT, channels, height, width, generator=torch.Generator().manual_seed(SEED))
    sizes = {"classes": found.classes or 1, "channels": channels, "image_size": (height, width)}
    ours = build(found.options, **sizes).eval()
    own = ours.state_dict()
    ours.load_state_dict({**own, **{name: t for name, t in found.weights.items() if name in own}})
    theirs = peer(found)(images)
    mine = {"features": ours.features(images), "logits": ours(images)}
    return [_row(what, mine[what], expected) for what, expected in theirs.items()]


def text(found: Import, rows: list[Row]) -> str:
    """What was read, what was compared, and what neither can show."""
    package, (height, width) = PEERS[found.layout], found.image_size
    unused = [name for name in found.left_out if name in found.tensors]
    said = {
        "checkpoint": str(found.path),
        "layout": f"{found.layout}, read for comparison by {package} {metadata.version(package)}",
        "used": f"{len(found.tensors) - len(unused)} tensors of the file, as {len(found.weights)} of ours",
        "left out": ", ".join(found.left_out) or "nothing",
        "images": f"{COUNT} of {height} x {width} pixels, random (seed {SEED}), fp32",
    }
    lines = [f"{name:12}{value}" for name, value in said.items()]
    for what, absolute, relative in rows:
        lines.append(
            f"{what:12}differ by {absolute:.2g} at most, {relative:.2g} of the largest deviation from the mean"
        )
    lines += [f"{'note':12}{note}" for note in notes(found)]
    same = all(row.relative <= TOLERANCE for row in rows)
    lines.append(f"{'same answers' if same else 'OTHER ANSWERS'}: the limit is {TOLERANCE:g}")
    return "\n".join(lines)


def notes(found: Import) -> list[str]:
    """What files do not say, and both sides were therefore told by the config."""
    heads, blocks = found.options["heads"], found.options["blocks"]
    activation, eps = blocks["activation"], blocks["norm_eps"]
    said = [
        f"the file does not say these, so both sides took the config's: heads={heads}, activation={activation}, "
        f"norm_eps={eps:g}; nor does it say data.mean and data.std"
    ]
    if found.layout == importing.GOOGLE:
        said.append("Google's models take gelu_tanh, and images in [-1, 1]: data.mean and data.std 0.5 per channel")
    if found.layout == "transformers":
        said.append("transformers' default norm_eps is 1e-12; config.json beside the file says it, and the activation")
    if found.layout == "timm":
        said.append("timm's models with norms after the sub-layers (rpn) have the same names and are other models")
    if "positions.grid" in found.weights and not any("pos" in name for name in found.tensors):
        said.append("the file holds no positions, since they are fixed; both sides took those that we compute")
    if found.options["representation"] and PEERS[found.layout] == "timm":
        said.append("timm has no representation layer any more, so neither that layer nor the head was compared")
    if not found.classes:
        said.append("the file holds no head that fits ours; a run that starts from it makes one anew")
    return said


def _row(what: str, one: Tensor, other: Tensor) -> Row:
    """`one` against `other`, whose size is measured from its mean: a bias that all share would hide a difference."""
    difference = float((one - other).abs().max()) if one.shape == other.shape else float("inf")
    scale = float((other - other.mean()).abs().max())
    return Row(what, difference, difference / scale if scale else difference)


def _at(options: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        options = options[part]
    return options


if __name__ == "__main__":
    sys.exit(main())
