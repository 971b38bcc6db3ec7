"""COCO's ground truth, as the evaluators read it: with ids counted from 1, and with every key that they need.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv:1405.0312; the format is defined at
cocodataset.org/#format-data.
"""

from typing import Any, Literal, NamedTuple

from common.errors import UserError
from detr.data import masks
from detr.data.annotations import area, is_crowd, things

IouType = Literal["bbox", "segm"]  # whether boxes or masks are compared
# A COCO JSON with images, categories and annotations. Ids count from 1, and every key that evaluators read is present.
Dataset = dict[str, Any]


class GroundTruth(NamedTuple):
    """A ground truth with new ids, counted from 1 in the order of the original ids."""

    dataset: Dataset
    images: dict[Any, int]  # original id -> new id
    categories: dict[Any, int]  # original id -> new id
    names: list[str]  # of the categories, in the order of their ids


def renumber(ground_truth: dict[str, Any], iou_type: IouType) -> GroundTruth:
    """Copy a COCO JSON with new ids.

    Evaluators get a copy, because pycocotools modifies the ground truth. The copy has new ids, because pycocotools
    misreads some ids: an annotation with id 0 counts as not matched, and only one of several annotations with equal ids
    counts. The copy has no names of files or categories, because hotcoco refuses names that are not UTF-8. A missing or
    unusable area or iscrowd is replaced as in `detr.data.annotations.complete`.

    Raises UserError if masks are compared and an annotation's segmentation cannot be read.
    """
    images, categories = _new_ids(ground_truth["images"]), _new_ids(ground_truth["categories"])
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in ground_truth["images"]}
    annotations = [a for a in ground_truth["annotations"] if a["image_id"] in images and a["category_id"] in categories]
    if iou_type == "segm" and not any(annotation.get("segmentation") for annotation in annotations):
        annotations = []  # the ground truth has only boxes, so every mask metric is -1
    dataset: Dataset = {
        "images": [
            {"id": images[image["id"]]} | {key: image[key] for key in ("height", "width") if key in image}
            for image in ground_truth["images"]
        ],
        "categories": [{"id": number, "name": str(number)} for number in categories.values()],
        "annotations": [
            {
                "id": number,
                "image_id": images[annotation["image_id"]],
                "category_id": categories[annotation["category_id"]],
                "bbox": annotation["bbox"],
                "area": area(annotation, *sizes[annotation["image_id"]]),
                "iscrowd": int(is_crowd(annotation)),
            }
            for number, annotation in enumerate(annotations, start=1)
        ],
    }
    if iou_type == "segm":
        _add_masks(dataset, annotations, sizes)
    return GroundTruth(dataset, images, categories, [names[id] for id in categories])


def check_masks(ground_truth: dict[str, Any]) -> None:
    """Raise UserError if the metrics of masks could not be computed; masks of stuff are not needed.

    A ground truth without annotations, or without any mask, is valid: it gives no numbers, or -1.
    """
    if "annotations" in ground_truth:
        renumber(things(ground_truth), "segm")


def _new_ids(entries: list[dict[str, Any]]) -> dict[Any, int]:
    return {id: number for number, id in enumerate(sorted({entry["id"] for entry in entries}), start=1)}


def _add_masks(dataset: Dataset, originals: list[dict[str, Any]], sizes: dict[Any, tuple[Any, Any]]) -> None:
    """Add a run-length code to each annotation of `dataset`, from the polygons or the code in `originals`.

    `sizes` are the (height, width) of images by original id. Raises UserError if a segmentation is missing, invalid or
    wholly outside its image.
    """
    for annotation, original in zip(dataset["annotations"], originals, strict=True):
        try:
            annotation["segmentation"] = masks.encode(original.get("segmentation"), *sizes[original["image_id"]])
        except masks.MaskFault as fault:
            raise UserError(
                f"The annotation {original.get('id')} of image {original['image_id']} {fault}; the metrics of masks "
                "need every mask."
            ) from None
