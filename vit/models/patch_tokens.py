"""What models with a token and a learned position for each patch share: their number, and other image sizes."""

from typing import Any, ClassVar

from torch import Tensor, nn

from common.nn.positions import LearnedGrid

MAX_TOKENS = 2048  # with more, a warning is printed; published models have at most 1,370 (518 pixels, patches of 14)


class PatchTokens(nn.Module):
    """A base class; a subclass sets `patches`, `positions` and `models`, and defines `before_patches`."""

    models: ClassVar[str]  # which models are made for larger images, for a warning
    patches: Any  # a module with the attribute `size`, the side of a patch in pixels
    positions: LearnedGrid

    @property
    def before_patches(self) -> int:
        """The number of tokens that precede the patches."""
        raise NotImplementedError(f"{type(self).__name__} must define before_patches")

    @property
    def tokens(self) -> int:
        """The number of tokens of an image of the configured size."""
        rows, columns, _ = self.positions.grid.shape
        return self.before_patches + rows * columns

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the number of tokens of an image."""
        rows, columns, _ = self.positions.grid.shape
        size = self.patches.size
        return [f"{self.tokens:,} tokens an image: {rows} x {columns} patches of {size} x {size} pixels"]

    def input_advice(self) -> list[str]:
        """Return a warning if an image has more than `MAX_TOKENS` tokens; otherwise an empty list."""
        if self.tokens <= MAX_TOKENS:
            return []
        return [
            f"an image has {self.tokens:,} tokens, and time and memory of attention grow with their square: a larger "
            f"model.patch_size than {self.patches.size} or a smaller data.image_size gives fewer; {self.models}."
        ]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors with the positions resampled to this model's grid of patches."""
        return self.positions.adapt(tensors, "positions")

    def adaptations(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return a sentence on the resampling that `adapt` does for these tensors; an empty list if it does none."""
        return self.positions.adaptations(tensors, "positions")
