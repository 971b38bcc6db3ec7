"""What detection asks of a data set beside `common.task.Data`."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from common.task import Data, Split


class DetectionData(Data, Protocol):
    """Images with boxes. `collate` returns what `detr.data.coco.Coco.collate` does.

    Looked for by name, and optional: `drawn`, true for a set that is made for small models, which needs no advice; and
    `augmentation` with `eval_size` and `max_size`, which an exported model's preprocessing states.
    """

    def categories(self) -> list[dict[str, Any]]:
        """The classes, {"id", "name"} each, in the order of class indices."""

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """The COCO JSON of exactly this split's images, crowds and degenerate boxes included."""

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """A user's image, uint8 (3, H, W), as a sample without targets, resized as in evaluation."""
