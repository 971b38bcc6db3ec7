"""Observe the ranges of the tensors of a model that quantisation.py quantises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from common.nn.convolution import FusedConvolution, conv_norm, conv_norm_relu
from common.nn.linear import Projections
from common.nn.quantisation import blocks_of, convolutions_of, input_names, linear_maps, quantisable
from common.nn.resnet import Backbone

Record = Callable[[str, Tensor], None]  # receives a tensor under its name


@contextmanager
def observing(model: nn.Module) -> Iterator[dict[str, tuple[float, float]]]:
    """Record the ranges of the tensors that `quantise` would quantise, in a dict: name -> (lowest, highest value).

    Calls of `model` inside the context are recorded.
    """
    ranges: dict[str, tuple[float, float]] = {}
    undo: list[Callable[[], object]] = []

    def record(name: str, x: Tensor) -> None:
        low, high = (float(value) for value in x.detach().aminmax())
        before = ranges.get(name, (low, high))
        ranges[name] = min(low, before[0]), max(high, before[1])

    try:
        for name, part in [*quantisable(model)]:
            if isinstance(part, Backbone):
                undo.append(_observe_backbone(part, name, record))
            for path, linear in linear_maps(part, name).items():
                hook = partial(_record_input, record, input_names(linear, path))
                undo.append(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield ranges
    finally:
        for function in undo:
            function()


class _ObservedConvolution(FusedConvolution):
    """A convolution and its norm that pass each input to `record`, or each output if `of_output`."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, record: Callable[[Tensor], None], of_output: bool = False):
        super().__init__()
        self.conv, self.norm, self.record, self.of_output = conv, norm, record, of_output

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm(self.conv, self.norm, x)
        self.record(y if self.of_output else x)
        return y

    def with_relu(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        self.record(x)
        return conv_norm_relu(self.conv, self.norm, x, shortcut=shortcut)


def _observe_backbone(backbone: Backbone, name: str, record: Record) -> Callable[[], None]:
    """Record the ranges of a backbone's tensors; returns a function that undoes this."""
    blocks = blocks_of(backbone, name)
    former: list[tuple[nn.Module, str, nn.Module]] = []

    def observe(owner: nn.Module, conv: str, norm: str, key: str, of_output: bool = False) -> None:
        modules = getattr(owner, conv), getattr(owner, norm)
        former.extend(zip((owner, owner), (conv, norm), modules, strict=True))
        setattr(owner, conv, _ObservedConvolution(*modules, partial(record, key), of_output))
        setattr(owner, norm, nn.Identity())

    observe(backbone, "conv1", "bn1", f"{name}.conv1")
    for path, block in blocks:
        for i, conv in enumerate(convolutions_of(block)):
            observe(block, conv, f"bn{i + 1}", f"{path}.{conv}")
        if block.downsample is not None:
            observe(block.downsample, "0", "1", f"{path}.downsample", of_output=True)
    last_path, last = blocks[-1]
    hook = last.register_forward_hook(lambda module, arguments, output: record(f"{last_path}.output", output))

    def undo() -> None:
        hook.remove()
        for owner, attribute, module in former:
            setattr(owner, attribute, module)

    return undo


def _record_input(record: Record, names: list[str], linear: nn.Module, arguments: Any, options: Any) -> None:
    """A forward pre-hook that records the input of a linear map, for `Projections` those of the computed rows."""
    (x,), width = arguments, linear.out_features // 3 if isinstance(linear, Projections) else 1
    start, stop, _ = options.get("rows", slice(None)).indices(len(names) * width)
    for name in names[start // width : stop // width]:
        record(name, x)
