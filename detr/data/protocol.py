"""What detection requires of a data set beyond `common.task.Data`."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from common.task import Data, Split
from detr.data.panoptic import PanopticTruth


class DetectionData(Data, Protocol):
    """A data set of images with boxes. `collate` returns a batch with the keys of `detr.data.coco.Coco.collate`.

    The following members are optional and looked up by name; `common.task.OptionalData` lists further ones.

    query_advice(split, queries): returns a warning if images of `split` have more objects than a detector has queries.
    drawn: True for generated pictures, which a detector learns without pretrained weights.
    augmentation: has `eval_size` and `max_size`, which an exported model records as its preprocessing.
    exif: whether users' images are turned by their EXIF tags; see `common.data.images.read_image`.
    """

    def categories(self) -> list[dict[str, Any]]:
        """Return the classes as {"id", "name"}, in the order of class indices.

        For panoptic data, a class also has "isthing", 1 for things and 0 for stuff.
        """

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """Return the COCO JSON of this split, including crowds and boxes without area.

        The key "annotations" is missing if the split is not labelled.
        """

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample without targets from a user's image uint8 (3, H, W), resized as in evaluation."""


class MaskData(DetectionData, Protocol):
    """A data set of images with boxes and masks, in which `ground_truth` has a segmentation for each annotation."""

    def request_masks(self) -> None:
        """Add masks to the samples and batches from now on; a task that reads masks calls this in its constructor.

        A batch then has the key `masks`: bool (T, H, W), aligned with `boxes` and `labels`, where H and W are the
        height and width of the padded images. Masks are resized to the nearest pixel, and are False in the padding. The
        mask of an object may be empty, for example after a crop.
        """


class PanopticData(MaskData, Protocol):
    """A data set of images whose pixels belong to segments: things, which are countable, and stuff.

    The boxes of a sample are those of all segments but crowds.
    """

    def panoptic_truth(self, split: Split) -> PanopticTruth:
        """Return the segments of this split, whose pixels are read on demand."""
