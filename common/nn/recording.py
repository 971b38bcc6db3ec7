"""Record where modules with sampled attention look, such as deformable attention (Zhu et al. 2020, arXiv 2010.04159).

Attention to all keys is recorded by `common.nn.attention.record_attention`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Samples(NamedTuple):
    """The sampling points of N queries, for h heads, L maps (levels) and P points per head and level."""

    locations: Tensor  # (B, N, h, L, P, 2) as x, y relative to the padded map: 0 = left or upper edge, 1 = the opposite
    weights: Tensor  # (B, N, h, L, P), the attention weights; they sum to 1 over L and P
    shapes: Sequence[tuple[int, int]] = ()  # (height, width) of each level, highest resolution first
    references: Tensor | None = None  # (B, N, 2), each query's reference point, relative as `locations`; None = unknown


@contextmanager
def record_samples(model: nn.Module) -> Iterator[dict[str, list[Samples]]]:
    """Record sampling points in a dict: name of a module with the attribute `recorded_samples` -> one entry per call.

        with record_samples(model) as samples:
            model(images, sizes)
        samples["decoder.blocks.5.cross_attention"][0].locations

    The attribute is None outside this context. Inside it, the attribute is a list, and the module appends the `Samples`
    of each call, detached from the graph. The dict may also be read after the context has ended.
    """
    modules: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "recorded_samples")
    }
    samples: dict[str, list[Samples]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.recorded_samples = samples[name]
    try:
        yield samples
    finally:
        for module in modules.values():
            module.recorded_samples = None
