"""Quantise a model: replace its maps by those of int8.py, with ranges that observing.py has measured.

Quantised are the linear maps of attentions and feed-forwards, ResNet backbones, and the linear maps that the model
lists in `quantised`. All other modules remain as they are: embeddings, norms, softmax, positions, heads, and those that
the model lists in `unquantised`. Where one quantised map follows another, the first writes the uint8 input of the
second. The last map of a sub-layer adds the residual.

A tensor is named after the map whose input it is. Three kinds of names have a suffix: in_proj.q, in_proj.k and
in_proj.v are the inputs of the three projections, X.downsample is the output of a shortcut's convolution, and X.output
that of a backbone's last block.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.nn import int8, kernels
from common.nn.attention import Attention
from common.nn.blocks import Block, FeedForward, Residual
from common.nn.convolution import FrozenBatchNorm
from common.nn.int8 import Int8Convolution, Int8Linear, Int8MaxPool, Int8Projections, Int8Residual, Quantisation
from common.nn.linear import Linear, Projections, Tied
from common.nn.resnet import Backbone, BasicBlock, Bottleneck

PROJECTIONS = ("q", "k", "v")  # the parts of an attention's `in_proj`; their inputs may differ
_MAPS = ("in_proj", "out_proj", "expand", "contract")  # the linear maps of attentions and feed-forwards
CALIBRATE = "python scripts/compress.py checkpoint=FILE quantize=int8"

Ranges = Mapping[str, tuple[float, float]]  # name of a tensor -> its lowest and its highest value


def quantise(model: nn.Module, ranges: Ranges) -> int:
    """Replace maps of `model`, in place, by quantised ones; returns the number of linear maps and convolutions.

    A linear map remains as it is if `ranges` lacks its input, and a backbone if `ranges` lacks one of its tensors.
    Raises UserError if `ranges` has a name that the model lacks, and if this machine cannot compute in int8.
    """
    refuse_unsupported(next(model.parameters()).device)
    if unknown := sorted(ranges.keys() - {*range_names(model)}):
        raise UserError(
            f"the calibration for trainer.precision=int8 is of another model, which has {unknown[0]}; calibrate this "
            f"one: {CALIBRATE}."
        )
    int8.silence_deprecation()
    with torch.no_grad():
        count = sum(_quantise_part(model, part, name, ranges) for name, part in [*quantisable(model)])
    for module in model.modules():
        if isinstance(module, Block):
            _fuse_residuals(module)
    return count


def refuse_unsupported(device: torch.device) -> None:
    """Raise UserError if `device` or this machine's CPU cannot compute in int8."""
    if device.type != "cpu":
        raise UserError(
            f"trainer.precision=int8 is for CPUs, and the device is {device.type}; give trainer.device=cpu, or "
            "trainer.precision=bf16."
        )
    if reason := int8.unsupported():
        raise UserError(f"trainer.precision=int8, but {reason}; use trainer.precision=bf16 or fp32.")


def quantisable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attentions, feed-forwards and ResNet backbones of a model, and the linear maps in its list `quantised`.

    Those in its `unquantised` modules are left out.
    """
    left_out, added = tuple(getattr(model, "unquantised", ())), tuple(getattr(model, "quantised", ()))
    for name, module in model.named_modules():
        if isinstance(module, Attention | FeedForward | Backbone) or name in added:
            if not any(f"{name}.".startswith(f"{part}.") for part in left_out):
                yield name, module


def range_names(model: nn.Module) -> list[str]:
    """The names of all ranges that `quantise` can use."""
    names = []
    for name, part in quantisable(model):
        if isinstance(part, Backbone):
            names += _backbone_names(part, name)
        for path, linear in linear_maps(part, name).items():
            names += input_names(linear, path)
    return names


def linear_maps(part: nn.Module, name: str) -> dict[str, Linear | Tied]:
    """The linear maps of an attention or a feed-forward by their paths, or a linear map by its own path `name`."""
    if isinstance(part, Linear | Tied):
        return {name: part}
    modules = {f"{name}.{attribute}": getattr(part, attribute, None) for attribute in _MAPS}
    return {path: module for path, module in modules.items() if isinstance(module, Linear)}


def input_names(linear: nn.Module, path: str) -> list[str]:
    """The names of the ranges of a linear map's inputs: one, or three for `Projections`."""
    return [f"{path}.{letter}" for letter in PROJECTIONS] if isinstance(linear, Projections) else [path]


def _quantise_part(model: nn.Module, part: nn.Module, name: str, ranges: Ranges) -> int:
    if isinstance(part, Backbone):
        return _quantise_backbone(part, name, ranges)
    linears = {
        path: linear
        for path, linear in linear_maps(part, name).items()
        if ranges.keys() >= {*input_names(linear, path)}
    }
    options: dict[str, dict[str, Any]] = {path: {} for path in linears}
    if isinstance(part, Linear | Tied):  # an output, whose logits would be converted to fp32 next
        options[name] = {"dtype": torch.float32}
    expand, contract = f"{name}.expand", f"{name}.contract"
    if isinstance(part, FeedForward) and linears.keys() >= {expand, contract}:
        if post := kernels.post_operation(part.activation):
            options[expand] = {"target": int8.quantisation(ranges[contract]), "post": post}
            _replace(part, "activation", nn.Identity())
    for path, linear in linears.items():
        owner, _, attribute = path.rpartition(".")
        inputs = [ranges[each] for each in input_names(linear, path)]
        module: nn.Module
        if isinstance(linear, Projections):
            module = Int8Projections(linear, inputs)
        else:
            module = Int8Linear.of(linear, int8.quantisation(*inputs), **options[path])
        _replace(model.get_submodule(owner), attribute, module)
    return len(linears)


def _fuse_residuals(block: Block) -> None:
    """Let the last map of each sub-layer add the residual, where this map is quantised."""
    sublayers = [block.attention, *([block.cross_attention] if block.cross_attention else []), block.feed_forward]
    for i, (residual, sublayer) in enumerate(zip(block.residuals, sublayers, strict=True)):
        # A subclass of Attention may permute the tokens after the last map, as shifted windows do.
        last = sublayer.out_proj if type(sublayer) is Attention else None
        last = sublayer.contract if isinstance(sublayer, FeedForward) else last
        if type(residual) is Residual and residual.scale is None and isinstance(last, Int8Linear):
            block.residuals[i] = Int8Residual(residual, last)


def _quantise_backbone(backbone: Backbone, name: str, ranges: Ranges) -> int:
    """Quantise a backbone, whose maps are uint8 from its first convolution to its last.

    The output of a block has the quantisation of the next block's input. Returns the number of convolutions.
    """
    if not ranges.keys() >= {*_backbone_names(backbone, name)}:
        return 0

    def at(key: str) -> Quantisation:
        return int8.quantisation(ranges[key])

    blocks = blocks_of(backbone, name)
    inputs = [at(f"{path}.conv1") for path, _ in blocks]
    targets = [*inputs[1:], at(f"{blocks[-1][0]}.output")]
    _replace(backbone, "conv1", Int8Convolution(backbone.conv1, backbone.bn1, at(f"{name}.conv1"), inputs[0]))
    _replace(backbone, "bn1", nn.Identity())
    if isinstance(backbone.pool, nn.MaxPool2d):
        _replace(backbone, "pool", Int8MaxPool(backbone.pool))
    count = 1
    for (path, block), target in zip(blocks, targets, strict=True):
        count += _quantise_block(block, path, at, target)
    lengths = [len(getattr(backbone, stage)) for stage, _, _ in backbone.stages]
    outputs = [targets[sum(lengths[: i + 1]) - 1] for i in range(len(lengths))]
    backbone.register_forward_hook(partial(_dequantise_maps, outputs))
    return count


def _quantise_block(
    block: BasicBlock | Bottleneck, path: str, at: Callable[[str], Quantisation], target: Quantisation
) -> int:
    """Quantise a residual block; returns the number of convolutions. `at` returns the quantisation of a name."""
    names = convolutions_of(block)
    sources = [at(f"{path}.{name}") for name in names]
    shortcut = sources[0]
    if block.downsample is not None:
        conv, frozen = block.downsample
        assert isinstance(conv, nn.Conv2d) and isinstance(frozen, FrozenBatchNorm)
        shortcut = at(f"{path}.downsample")
        block.downsample = nn.Sequential(Int8Convolution(conv, frozen, sources[0], shortcut), nn.Identity())
    for i, (name, source, output) in enumerate(zip(names, sources, [*sources[1:], target], strict=True)):
        norm = f"bn{i + 1}"
        added = shortcut if name == names[-1] else None
        _replace(block, name, Int8Convolution(getattr(block, name), getattr(block, norm), source, output, added))
        _replace(block, norm, nn.Identity())
    return len(names) + (block.downsample is not None)


def _dequantise_maps(outputs: list[Quantisation], backbone: nn.Module, arguments: Any, maps: Any) -> Any:
    """A forward hook that converts a backbone's maps to floats; `outputs` are the quantisations of all stages."""
    if isinstance(maps, tuple):
        return int8.dequantise_tensor(maps[0], outputs[-1]), maps[1]
    quantisations = outputs[-len(maps) :]
    return [
        each._replace(features=int8.dequantise_tensor(each.features, source))
        for each, source in zip(maps, quantisations, strict=True)
    ]


def _backbone_names(backbone: Backbone, name: str) -> list[str]:
    blocks = blocks_of(backbone, name)
    names = [f"{name}.conv1", *(f"{path}.{conv}" for path, block in blocks for conv in convolutions_of(block))]
    names += [f"{path}.downsample" for path, block in blocks if block.downsample is not None]
    return [*names, f"{blocks[-1][0]}.output"]


def blocks_of(backbone: Backbone, name: str) -> list[tuple[str, BasicBlock | Bottleneck]]:
    """The blocks of a backbone in the order of their computation, and their names; `name` is that of the backbone."""
    return [
        (f"{name}.{stage}.{i}", block)
        for stage, _, _ in backbone.stages
        for i, block in enumerate(getattr(backbone, stage))
    ]


def convolutions_of(block: BasicBlock | Bottleneck) -> list[str]:
    """The names of a block's convolutions in the order of their computation, without that of the shortcut."""
    return ["conv1", "conv2", *(["conv3"] if isinstance(block, Bottleneck) else [])]


def _replace(owner: nn.Module, name: str, module: nn.Module) -> None:
    setattr(owner, name, module.train(owner.training))
