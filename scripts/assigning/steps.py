"""The picture of non-maximum suppression, step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detr.evaluation.pictures import colour
from scripts.assigning import anchors, pyramid
from scripts.assigning.canvas import GREY, Canvas
from scripts.assigning.hungarian import Matching
from scripts.assigning.scene import Scene
from scripts.assigning.sheet import Panel
from scripts.assigning.suppression import Suppression

MIN_SCORE = 0.05  # of the candidates of a model, as in Faster R-CNN's evaluation
ANCHORS_PER_OBJECT = 8
MAX_STEPS = 6  # panels of single steps; further steps are only in the last panel and in the table


class Candidates:
    """Boxes (N, 4) xyxy in pixels, scores (N,) and labels (N,), with a sentence on what they are."""

    def __init__(self, boxes: Tensor, scores: Tensor, labels: Tensor, origin: str):
        self.boxes, self.scores, self.labels, self.origin = boxes, scores, labels, origin


def detections(matching: Matching) -> Candidates:
    """Take a model's detections with a score of at least `MIN_SCORE`."""
    chosen = matching.scores >= MIN_SCORE
    origin = f"The candidates are the model's detections with a score of at least {MIN_SCORE}."
    return Candidates(matching.boxes[chosen], matching.scores[chosen], matching.labels[chosen], origin)


def anchors_near_objects(scene: Scene) -> Candidates:
    """Take the anchors with the highest IoU with each object; the score is the IoU, the class that of the object."""
    scale = pyramid.divisor(scene.size)
    boxes = torch.cat(anchors.make_anchors(scene.size, anchors.RETINA_STRIDES, anchors.RETINA_SIZES, scale))
    chosen = anchors.candidate_bags(boxes, scene.boxes, ANCHORS_PER_OBJECT).unique()
    origin = (
        f"There is no trained model, so the candidates are the {ANCHORS_PER_OBJECT} of RetinaNet's anchors with the "
        "highest IoU with each object; the score of an anchor is its highest IoU."
    )
    if not len(scene.boxes):
        return Candidates(boxes[:0], torch.zeros(0), scene.labels, origin)
    scores, owners = box_iou(scene.boxes, boxes[chosen]).max(0)
    return Candidates(boxes[chosen], scores, scene.labels[owners], origin)


def panels(scene: Scene, candidates: Candidates, suppression: Suppression, names: Sequence[str]) -> list[Panel]:
    """Make a panel of all candidates, one for each of the first steps, and one of the result.

    `names` are those of the classes.
    """
    texts = [
        f"{names[label]} {score:.2f}"
        for label, score in zip(candidates.labels.tolist(), candidates.scores.tolist(), strict=True)
    ]
    canvas = Canvas(scene.image)
    for box in candidates.boxes:
        canvas.box(box, GREY, width=1)
    count = len(candidates.boxes)
    result = [Panel("Candidates", canvas.picture, [], f"{count} boxes. {candidates.origin}")]
    kept = suppression.kept
    for step in range(min(len(kept), MAX_STEPS)):
        result.append(_step(scene, candidates, suppression, step, texts))
    canvas = Canvas(scene.image, dimmed=False)
    for number, candidate in enumerate(kept):
        canvas.box(candidates.boxes[candidate], colour(number), width=2)
    for number, candidate in enumerate(kept):
        canvas.text(candidates.boxes[candidate][:2], texts[candidate], colour(number))
    return [*result, Panel("Kept", canvas.picture, [], f"{len(kept)} of {count} boxes are kept.")]


def _step(scene: Scene, candidates: Candidates, suppression: Suppression, step: int, texts: Sequence[str]) -> Panel:
    """Draw the step that keeps the box of rank `step` and drops those that overlap it; the rest is grey.

    `texts` are the class and the score of each candidate.
    """
    canvas, kept = Canvas(scene.image), suppression.kept
    current, shade = kept[step], colour(step)
    handled = {*kept[: step + 1]} | {i for k in kept[: step + 1] for i in suppression.dropped_by(k)}
    for index, box in enumerate(candidates.boxes):
        if index not in handled:
            canvas.box(box, GREY, width=1)
    for number, earlier in enumerate(kept[:step]):
        canvas.box(candidates.boxes[earlier], colour(number), width=2, alpha=110)
    centres = (candidates.boxes[:, :2] + candidates.boxes[:, 2:]) / 2
    dropped = suppression.dropped_by(current)
    for index in dropped:
        canvas.box(candidates.boxes[index], shade, width=1, dashed=True)
        canvas.line(centres[index], centres[current], shade, width=1)
        canvas.dots(centres[index][None], shade, 4, hollow=True)
    canvas.box(candidates.boxes[current], shade, width=3)
    canvas.dots(centres[current][None], shade, 5)
    canvas.text(candidates.boxes[current][:2], texts[current], shade)
    caption = f"Kept: {texts[current]}, the highest score that is left. Dropped: {len(dropped)}"
    if dropped:
        overlaps = suppression.overlaps[dropped]
        caption += f", with IoU {float(overlaps.min()):.2f} to {float(overlaps.max()):.2f} (dashed, joined to it)"
    return Panel(f"Step {step + 1}", canvas.picture, [], f"{caption}. Left: {len(candidates.boxes) - len(handled)}.")
