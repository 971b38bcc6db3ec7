"""Swin Transformer: attention within windows, on maps whose resolution is halved from stage to stage.

Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn import windows
from common.nn.blocks import Block, BlockOptions
from common.nn.dropout import Dropout
from common.nn.linear import Linear
from common.nn.patches import Form, Patches
from common.nn.positions import Resampling, resample
from common.nn.windows import Move, ShiftedWindowAttention, Size, WindowLayout
from common.types import Fraction, Layers, Positive, PositiveFloat, Side

RESAMPLING: Resampling = "bicubic"  # of a table of biases to another window, as in the official code


@dataclass(frozen=True, kw_only=True)
class SwinBlockOptions:
    """Options of all blocks; see common.nn.blocks.BlockOptions."""

    dropout: Fraction
    attention_dropout: Fraction
    drop_path: Fraction  # rate in the last block of the last stage; rates increase linearly from 0 in the first block
    norm_eps: PositiveFloat


class StagePlan(NamedTuple):
    """How the tokens of a stage are arranged, for one size of its map."""

    layouts: tuple[WindowLayout, WindowLayout]  # of the blocks with an even number, and with an odd one: shifted
    entry: Move  # from the map of patches, or from the previous stage's last layout
    swaps: tuple[Move, Move] | None  # from an even block to an odd one, and back; None if the two layouts are the same

    def last(self, depth: int) -> WindowLayout:
        """The layout of the last of `depth` blocks."""
        return self.layouts[(depth - 1) % 2]


class Stage(nn.Module):
    """Blocks on a map of one resolution. The windows of every second block are shifted."""

    def __init__(self, blocks: list[BlockOptions], window: Size):
        super().__init__()
        self.window, self.depth = window, len(blocks)
        self.blocks = nn.ModuleList(
            Block(
                options,
                attention=ShiftedWindowAttention(
                    width=options.width, heads=options.heads, window=window, dropout=options.attention_dropout
                ),
            )
            for options in blocks
        )

    def forward(self, x: Tensor, plan: StagePlan) -> Tensor:
        """x (B, N, C), arranged as the first block needs it -> (B, N, C), as the last block leaves it."""
        for i, block in enumerate(self.blocks):
            if i and plan.swaps:
                x = windows.move(x, plan.swaps[(i - 1) % 2])
            x = block(x, guide=plan.layouts[i % 2])
        return x


class Merging(nn.Module):
    """Patch merging: a LayerNorm over four neighbours, and a linear map to twice the width (section 3.1)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=eps)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 4 N, C), with neighbours one after another -> (B, N, 2 C)."""
        x = self.reduction(self.norm(x.reshape(x.shape[0], -1, 4 * x.shape[-1])))
        return x


class Swin(nn.Module):
    """A patch embedding, stages of blocks with patch merging between them, and a head on the mean over all tokens.

    If a map is not larger than the window, the stage's window is the map. At other image sizes than `image_size`, the
    windows stay as they are. A map that whole windows do not fit is padded for attention, and an image or a map that
    cannot be cut into whole patches or merged is padded with zeros. Tokens do not attend to padding.

    Differs: torchvision's and timm's models attend to the padding. On maps that are not square, the window is cut to
    the map along each axis separately, as in timm; the official code makes it a square.
    """

    decided_by_data = ("head",)  # not loaded from a checkpoint with other classes, even if their number is the same

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        patch_size: Side,
        embedding: Form,
        width: Positive,
        depths: list[Layers],
        heads: list[Positive],
        window: Side,
        mlp_ratio: PositiveFloat,
        blocks: SwinBlockOptions,
    ):
        """Build the classifier. The data determine `classes`, `channels` and `image_size`.

        Args:
            classes: number of classes K.
            channels: number of image channels: 1 (grey) or 3 (RGB).
            image_size: (H, W) in pixels; it determines the size of windows on small maps.
            patch_size: side of a patch in pixels.
            embedding: how a patch is projected to a token: "convolution" or "multiply"; see common/nn/patches.py.
            width: C, the width of a token in the first stage; each stage has twice the width of the stage before.
            depths: number of blocks of each stage.
            heads: number of heads of each stage.
            window: side of a window, in tokens.
            mlp_ratio: hidden width of a feed-forward network, as a multiple of the width of its stage.
            blocks: see SwinBlockOptions.

        Raises UserError when `heads` and `depths` differ in length, a stage's width is not divisible by its heads, or
        `mlp_ratio` leaves no hidden channel.
        """
        super().__init__()
        _check_stages(width, depths, heads)
        if int(width * mlp_ratio) < 1:
            raise UserError(
                f"model.mlp_ratio={mlp_ratio} of model.width={width} leaves no hidden channel in feed-forwards; give a "
                "larger ratio, such as 4."
            )
        self.patches = Patches(channels=channels, size=patch_size, width=width, form=embedding)
        self.patch_norm = nn.LayerNorm(width, eps=blocks.norm_eps)
        self.dropout = Dropout(blocks.dropout)
        self.window, self.grid = window, self._grid(*image_size)
        self.stages = nn.ModuleList()
        rest = _block_options(width, depths, heads, mlp_ratio, blocks)
        size = self.grid
        for depth in depths:
            stage_window = min(window, size[0]), min(window, size[1])
            self.stages.append(Stage([next(rest) for _ in range(depth)], stage_window))
            size = _halved(size)
        widths = [width * 2**i for i in range(len(depths))]
        self.mergings = nn.ModuleList(Merging(stage_width, blocks.norm_eps) for stage_width in widths[:-1])
        self.norm = nn.LayerNorm(widths[-1], eps=blocks.norm_eps)
        self.head = Linear(widths[-1], classes)
        self.undecayed = tuple(name for name, _ in self.named_parameters() if name.endswith("attention.table"))
        self._plans: list[StagePlan] = []  # of the last size of the map of patches
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) of any size -> logits (B, K)."""
        x = self.features(images)
        # The head is computed in full precision: in bf16 (8 significant bits), the two highest logits are often equal.
        with full_precision(images.device):
            logits: Tensor = self.head(x.to(images.dtype))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Compute the mean over all tokens of the last stage: images (B, channels, H, W) -> (B, C)."""
        x = self.embed(images)  # (B, hw, C)
        plans = self.plans(self._grid(images.shape[-2], images.shape[-1]), x)
        for i, (stage, plan) in enumerate(zip(self._stages(), plans, strict=True)):
            x = windows.move(x, plan.entry)
            x = stage(self.mergings[i - 1](x) if i else x, plan)
        last = plans[-1].last(self._stages()[-1].depth)
        x = self.norm(x[:, last.slots] if last.padded else x)
        pooled: Tensor = x.mean(dim=1)  # (B, N, C) -> (B, C)
        return pooled

    def embed(self, images: Tensor) -> Tensor:
        """Embed images (B, channels, H, W) -> tokens (B, hw, C), row by row."""
        height, width = (-side % self.patches.size for side in images.shape[-2:])
        if height or width:
            images = F.pad(images, (0, width, 0, height))
        x: Tensor = self.dropout(self.patch_norm(self.patches(images)))
        return x

    def plans(self, grid: Size, x: Tensor) -> list[StagePlan]:
        """The plans of all stages for a map of `grid` (h, w) patches, on the device of x; the last ones are stored."""
        if type(x) is not Tensor or torch.compiler.is_compiling():  # a tracer's tensors have no values to be stored
            return list(self._make_plans(grid, x.device))
        stored = self._plans[0].layouts[0] if self._plans else None
        if stored is None or stored.size != grid or stored.slots.device != x.device:
            with torch.inference_mode(False):  # autograd cannot use inference tensors as indices
                self._plans = list(self._make_plans(grid, x.device))
        return self._plans

    def _make_plans(self, size: Size, device: torch.device) -> Iterator[StagePlan]:
        previous: WindowLayout | None = None
        for stage in self._stages():
            shift = windows.shifts(size, stage.window)
            even = odd = windows.divide(size, stage.window, (0, 0), device)
            swaps = None
            if not windows.is_known(size) or any(shift):
                odd = windows.divide(size, stage.window, shift, device)
                swaps = windows.between(even, odd), windows.between(odd, even)
            entry = windows.from_map(even) if previous is None else windows.merging(previous, even)
            plan = StagePlan((even, odd), entry, swaps)
            yield plan
            previous, size = plan.last(stage.depth), _halved(size)

    def _stages(self) -> list[Stage]:
        stages: list[Any] = [*self.stages]
        return stages

    def _grid(self, height: int, width: int) -> Size:
        """The rows and columns of patches of an image, rounded up."""
        size = self.patches.size
        return (height + size - 1) // size, (width + size - 1) // size

    def window_layout(self, layer: int, height: int, width: int, device: torch.device) -> WindowLayout:
        """The windows of block number `layer`, counted from 0 over all stages, for images of `height` x `width`."""
        for stage, plan in zip(self._stages(), self._make_plans(self._grid(height, width), device), strict=True):
            if layer < stage.depth:
                return plan.layouts[layer % 2]
            layer -= stage.depth
        raise IndexError("the model has no block of this number")

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the numbers of tokens and the windows of the stages."""
        size, parts = self.grid, []
        for stage in self._stages():
            parts.append(f"{size[0]} x {size[1]} in windows of {stage.window[0]} x {stage.window[1]}")
            size = _halved(size)
        return [f"{self.grid[0] * self.grid[1]:,} tokens an image; the stages' maps are {', '.join(parts)}"]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors with the tables of biases cut or resampled to this model's windows.

        A table is cut to the distances that occur if the map is smaller than the checkpoint's window: the model then
        computes the same function. Otherwise it is resampled for each head, as in the official code.
        """
        adapted = dict(tensors)
        for name, target in self._changed_tables(tensors).items():
            table, (rows, columns) = tensors[name], self._margins(tensors[name], target)
            table = table[rows : len(table) - rows, columns : table.shape[1] - columns]
            adapted[name] = resample(table, (target[0], target[1]), RESAMPLING)
        return adapted

    def adaptations(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return a sentence on what `adapt` does for each pair of windows; an empty list if it does nothing."""
        sentences: dict[str, None] = {}
        for name, target in self._changed_tables(tensors).items():
            table = tensors[name]
            left = [side - 2 * margin for side, margin in zip(table.shape, self._margins(table, target), strict=False)]
            how = "cut" if left == target else f"resampled by {RESAMPLING} interpolation"
            old, new = (" x ".join(str((side + 1) // 2) for side in sides) for sides in (table.shape[:2], target))
            sentences[f"relative position biases of windows of {old} tokens are {how} to {new}"] = None
        return [*sentences]

    def _changed_tables(self, tensors: dict[str, Tensor]) -> dict[str, list[int]]:
        """The tables in a checkpoint that belong to windows of another size: name -> rows and columns in this model."""
        tables = [name for name in self.undecayed if name in tensors and tensors[name].ndim == 3]
        targets = {name: [*self.get_parameter(name).shape[:2]] for name in tables}
        return {name: target for name, target in targets.items() if [*tensors[name].shape[:2]] != target}

    def _margins(self, table: Tensor, target: list[int]) -> list[int]:
        """The rows and columns to cut off at each end, where the map is smaller than the window that a table is for."""
        largest = 2 * self.window - 1
        pairs = zip(table.shape[:2], target, strict=True)
        return [(old - new) // 2 if new < old <= largest and new < largest else 0 for old, new in pairs]

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates.

        As in SimMIM (Xie et al. 2022, arXiv 2111.09886), patch merging belongs to the block before it.
        """
        result: list[tuple[str, ...]] = [("patches", "patch_norm")]
        for i, stage in enumerate(self._stages()):
            result += [(f"stages.{i}.blocks.{j}",) for j in range(stage.depth)]
            result[-1] += (f"mergings.{i}",) if i < len(self.mergings) else ()
        return [*result, ("norm", "head")]

    def _initialise(self) -> None:
        """Initialise parameters as the official code does; tables and norms already are."""
        fan_in = self.patches.weight[0].numel()
        for tensor in (self.patches.weight, self.patches.bias):  # PyTorch's initial values of a convolution
            nn.init.uniform_(tensor, -(fan_in**-0.5), fan_in**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _check_stages(width: int, depths: list[int], heads: list[int]) -> None:
    if not depths or len(depths) != len(heads):
        raise UserError(
            f"model.depths={depths} and model.heads={heads} must name the same number of stages, at least one."
        )
    for i, count in enumerate(heads):
        if width * 2**i % count:
            raise UserError(
                f"model.heads={heads}: the width of stage {i} is {width * 2**i} (model.width={width}), which must be "
                f"divisible by its number of heads, {count}."
            )


def _block_options(
    width: int, depths: list[int], heads: list[int], mlp_ratio: float, blocks: SwinBlockOptions
) -> Iterator[BlockOptions]:
    """Yield the options of all blocks in order, with a rate of stochastic depth that increases over all of them."""
    stages = [i for i, depth in enumerate(depths) for _ in range(depth)]
    options = BlockOptions(
        width=width,
        heads=heads[0],
        feedforward=int(width * mlp_ratio),
        pre_norm=True,
        dropout=blocks.dropout,
        attention_dropout=blocks.attention_dropout,
        hidden_dropout=blocks.dropout,
        activation=nn.GELU,
        norm_eps=blocks.norm_eps,
    )
    for number, i in enumerate(stages):
        stage_width, rate = width * 2**i, blocks.drop_path * number / max(1, len(stages) - 1)
        hidden = int(stage_width * mlp_ratio)
        yield replace(options, width=stage_width, heads=heads[i], feedforward=hidden, drop_path=rate)


def _halved(size: Size) -> Size:
    return (size[0] + 1) // 2, (size[1] + 1) // 2
