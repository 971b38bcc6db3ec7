"""Compare one of our models of images with that of another program, on weights from a file of that program.

scripts/verify_import.py calls `verify`. The file is loaded into our model and into its peer, which is the model of
torchvision, timm or transformers that reads files of this layout. What the two models compute for random inputs is
compared. A `Kind` states how this is done for a class of our models.
"""

from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.config.check import build
from common.errors import UserError
from common.task import Adopted
from common.weights import fetching, unwrapping
from scripts.verify.comparison import (
    TOLERANCE,
    absolute_difference,
    check_options,
    load_foreign,
    option,
    relative_difference,
    report,
)
from vit.importing.adopt import unwrap

IMAGES, SEED = 4, 0
STEMS = ("patches.weight", "patches.convolution.weight", "conv1.weight")  # (C, channels, p, p), of the first layer
NORMALISATION = "a wrong data.mean or data.std is not noticed, since the file does not hold them"

Size = tuple[int, int]  # height and width, in pixels
Outputs = dict[str, Tensor]  # by name, such as "features" (B, C) and "logits" (B, K)


class ForeignFile(NamedTuple):
    """A file of another program: its tensors, and the weights to which our import converts them."""

    path: Path
    layout: str  # a key of `Kind.peers`
    tensors: dict[str, Tensor]  # by the file's names
    weights: dict[str, Tensor]  # by our names
    left_out: list[str]  # names of the file's tensors and other content that the import does not use
    options: dict[str, Any]  # the section `model` of the config
    configured_size: Size | None  # data.image_size of the config

    @property
    def classes(self) -> int:
        """The number of classes of the head; 0 without a head."""
        return len(self.weights.get("head.weight", ()))

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return next(self.weights[name] for name in STEMS if name in self.weights).shape[1]

    @property
    def used_tensors(self) -> dict[str, Tensor]:
        """The tensors that the import uses, by the file's names; half precision is converted to fp32."""
        return unwrapping.floats({name: t for name, t in self.tensors.items() if name not in self.left_out})


class Peer(NamedTuple):
    """The package that reads a layout, and a function that computes its model's outputs for our model's inputs."""

    package: str
    outputs: Callable[..., Outputs]  # of the file, the size of the images, and the inputs


class Difference(NamedTuple):
    """The largest difference between the two models in one of their outputs."""

    output: str
    absolute: float
    relative: float  # the absolute difference divided by the largest deviation of the peer's output from its mean


def sample_images(file: ForeignFile, size: Size) -> tuple[Tensor, ...]:
    """Sample normalised images (B, channels, H, W), the input of most models."""
    return (torch.randn(IMAGES, file.channels, *size, generator=torch.Generator().manual_seed(SEED)),)


def classifier_arguments(file: ForeignFile, size: Size) -> dict[str, Any]:
    """Return the arguments of a classifier that the data determine."""
    return {"classes": file.classes or 1, "channels": file.channels, "image_size": size}


def classifier_outputs(model: Any, images: Tensor) -> Outputs:
    """Compute the features and logits of one of our classifiers."""
    return {"features": model.features(images), "logits": model(images)}


class Kind(NamedTuple):
    """How the files of one of our models are read and compared.

    Attributes:
        adopt: converts a file's content, from the file's folder and the config's image size.
        recognise: names the layout of a file's unwrapped tensors; None if they are those of another model.
        peers: by layout.
        required_options: the options of the config's `model` that are known from the file: key -> required value. They
            follow from its tensors or from the program that wrote it.
        undecided: keys of `model` whose values a file may not hold; our model and its peer get them from the config.
        image_size: the size of the images on which outputs are compared.
        notes: sentences for the report about what the comparison does not cover.
        arguments: those of our model that the data determine.
        inputs: random inputs of our model.
        outputs: what our model computes for these inputs, by name.
    """

    adopt: Callable[[dict[str, Any], Path, Size | None], Adopted]
    recognise: Callable[[dict[str, Tensor]], str | None]
    peers: dict[str, Peer]
    required_options: Callable[[ForeignFile], dict[str, Any]]
    undecided: tuple[str, ...]
    image_size: Callable[[ForeignFile], Size]
    notes: Callable[[ForeignFile], list[str]]
    arguments: Callable[[ForeignFile, Size], dict[str, Any]] = classifier_arguments
    inputs: Callable[[ForeignFile, Size], tuple[Tensor, ...]] = sample_images
    outputs: Callable[..., Outputs] = classifier_outputs

    def assumptions(self, file: ForeignFile) -> dict[str, Any]:
        """Return key -> value for the options that both models have from the config.

        The comparison does not notice wrong values of these.
        """
        required = self.required_options(file)
        values = {key: option(file.options, key) for key in self.undecided if key not in required}
        return {key: f"{value:g}" if key.endswith("eps") else value for key, value in values.items()}


def verify(kind: Kind, config: dict[str, Any]) -> tuple[str, bool]:
    """Compare the models on the file that `config` names; returns a report, and whether the outputs agree.

    Raises UserError if nothing can be compared.
    """
    file = _read(kind, config)
    differences = compare(kind, file)
    agree = all(difference.relative <= TOLERANCE for difference in differences)
    return text(kind, file, differences, agree=agree), agree


def _read(kind: Kind, config: dict[str, Any]) -> ForeignFile:
    """Read the file that the config names.

    Raises UserError if the file was written by this project, if it does not hold a model of this kind, or if it holds
    another model than the config describes.
    """
    path, options = fetching.locate(config).path, config["model"]
    content = load_foreign(path, config["weights"])
    side = config["data"].get("image_size")
    size = (side, side) if isinstance(side, int) else tuple(side) if side else None
    try:
        tensors, _ = unwrap(content)
        layout = kind.recognise(tensors)
        if layout is None:
            raise UserError(
                f"the file does not hold a {options['_target_']}; name the model that it holds (model=...)."
            )
        adopted = kind.adopt(content, path.parent, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    file = ForeignFile(path, layout, tensors, adopted.weights, adopted.left_out, options, size)
    check_options(path, options, kind.required_options(file).items())
    return file


@torch.no_grad()
def compare(kind: Kind, file: ForeignFile) -> list[Difference]:
    """Compare the outputs of our model and its peer; raises UserError if one of them cannot be loaded."""
    size = kind.image_size(file)
    model = build(file.options, **kind.arguments(file, size)).eval()
    state = model.state_dict()
    try:
        model.load_state_dict({**state, **{name: t for name, t in file.weights.items() if name in state}})
    except RuntimeError as error:
        raise UserError(
            f"{file.path} does not fit the config's model ({_first_words(error)}); override further keys of model."
        ) from error
    inputs = kind.inputs(file, size)
    theirs = _peer_outputs(kind.peers[file.layout], file, size, inputs)
    ours = kind.outputs(model, *inputs)
    return [
        Difference(name, absolute_difference(ours[name], expected), relative_difference(ours[name], expected))
        for name, expected in theirs.items()
    ]


def _peer_outputs(peer: Peer, file: ForeignFile, size: Size, inputs: tuple[Tensor, ...]) -> Outputs:
    """Load the file into its peer and compute; raises UserError if the package is missing or cannot read the file."""
    package = peer.package
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{file.path} has the layout {file.layout}, whose reader {package} is not installed; pip install {package}."
        ) from error
    try:
        return peer.outputs(file, size, *inputs)
    except (AssertionError, RuntimeError, LookupError, ValueError) as error:
        raise UserError(
            f"{package} {metadata.version(package)} cannot read {file.path} ({_first_words(error)}), although our code "
            "can; so nothing can be compared."
        ) from error


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def text(kind: Kind, file: ForeignFile, differences: list[Difference], *, agree: bool) -> str:
    """Format the report: what was read, the differences, and what the comparison does not cover."""
    package, (height, width) = kind.peers[file.layout].package, kind.image_size(file)
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
    assumed = ", ".join(f"model.{key}={value}" for key, value in kind.assumptions(file).items())
    notes = kind.notes(file)
    if assumed:
        notes.insert(0, "our model and its peer both have the options in the last line from the config, so a wrong "
                        "value of these is not noticed")  # fmt: skip
    condition = f", provided that the original model has {assumed}, which the file does not hold" if assumed else ""
    return report([*lines, *(("note", note) for note in notes)], agree=agree) + (condition if agree else "")
