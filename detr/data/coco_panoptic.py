"""Detection data in COCO's panoptic format: things and stuff, whose masks are the colours of a PNG for each image."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common.data import fingerprints
from common.data.opening import read_json
from common.task import Split
from detr.data.annotations import CocoJson
from detr.data.arrays import SplitArrays, encode
from detr.data.coco import Coco
from detr.data.layouts import PANOPTIC_LAYOUTS, Layout, find_panoptic_layout
from detr.data.masks import encode_arrays
from detr.data.panoptic import PanopticMasks, PanopticTruth, check_files, panoptic_truth, target_masks
from detr.data.panoptic_json import PNG_KEY, to_coco


@dataclass(kw_only=True, eq=False)
class CocoPanoptic(Coco):
    """A data set in COCO's panoptic format (Kirillov et al. 2019, arXiv:1801.00868).

    Its objects are the segments, of things and of stuff; boxes are those in the JSON, the extents of the masks. A
    split's `annotations` is a panoptic JSON, and the PNGs of its segments are in the folder that has the name of the
    JSON without ".json". PNGs are read only for masks.

    Differs: crowds are no training targets, as in `Coco`; the official code of DETR keeps them.
    """

    layouts: ClassVar[str] = PANOPTIC_LAYOUTS

    def __post_init__(self) -> None:
        """Raise UserError for a split that has only one of its two paths."""
        super().__post_init__()
        self._segmentations: dict[Split, bytes] = {}  # the run-length codes of `ground_truth`, as JSON

    def find_layout(self, root: Path) -> Layout:
        """Find the files of the splits in `root`."""
        return find_panoptic_layout(root)

    def read_annotations(self, split: Split) -> Any:
        """Return the panoptic JSON of `split`, converted to COCO instances JSON but not validated."""
        path = self._required_files(split)[1]
        return to_coco(read_json(path), path)

    def panoptic_truth(self, split: Split) -> PanopticTruth:
        """Return the segments of `split`; raises UserError if a PNG is missing."""
        coco_json = super().ground_truth(split)
        check_files(self._png_folder(split), coco_json)
        return panoptic_truth(coco_json, self._png_folder(split))

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """See `Coco`. After `request_masks`, each annotation has its mask, which is read from the PNG."""
        coco_json = super().ground_truth(split)
        if not self._has_masks or "annotations" not in coco_json:
            return coco_json
        if split not in self._segmentations:
            codes = _encode_segments(coco_json, panoptic_truth(coco_json, self._png_folder(split)))
            self._segmentations[split] = json.dumps(codes).encode()
        codes = json.loads(self._segmentations[split])
        annotations = [a | {"segmentation": c} for a, c in zip(coco_json["annotations"], codes, strict=True)]
        return {**coco_json, "annotations": annotations}

    def target_masks(self, split: Split, coco_json: CocoJson, arrays: SplitArrays) -> PanopticMasks:
        """Return the masks of the targets, which are read from PNGs on demand; raises UserError if one is missing."""
        return target_masks(coco_json, arrays, self._png_folder(split))

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Return the digests of `Coco`, and "segments", of the names and lengths in bytes of the PNGs."""
        images = super().ground_truth(split)["images"]
        names = np.array([encode(image.get(PNG_KEY, "")) for image in images])
        return super().fingerprint(split) | {"segments": fingerprints.digest_files(self._png_folder(split), names)}

    def _png_folder(self, split: Split) -> Path:
        return self._required_files(split)[1].with_suffix("")


def _encode_segments(coco_json: CocoJson, truth: PanopticTruth) -> list[dict[str, Any]]:
    """Return the run-length code of each annotation's segment, with strings for JSON."""
    codes: dict[tuple[int, int], dict[str, Any]] = {}
    for image, segments in truth.segments.items():
        ids = truth.read(image)
        masks = np.array([ids == segment.id for segment in segments]).reshape(-1, *ids.shape)  # (n, H, W)
        codes |= {(image, s.id): code for s, code in zip(segments, encode_arrays(masks), strict=True)}
    return [codes[annotation["image_id"], annotation["id"]] for annotation in coco_json["annotations"]]
