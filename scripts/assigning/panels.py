"""The panels of the sheet: each draws an assignment on the image and counts the positives of each object."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detr.criterion.boxes import to_xyxy
from detr.evaluation.pictures import colour
from scripts.assigning import anchors, grid_cells, points, pyramid
from scripts.assigning.canvas import GREY, Canvas
from scripts.assigning.grid_cells import Slots
from scripts.assigning.hungarian import UNMATCHED, Matching
from scripts.assigning.scene import Scene
from scripts.assigning.sheet import Panel

# the years of the papers, for the titles
SOURCES = {"RPN": "Faster R-CNN, 2015", "RetinaNet": "2017", "FCOS": "2019", "YOLOv1": "2016", "YOLOv2": "2017"}
SOURCES |= {"YOLOv3": "2018", "FreeAnchor": "2019", "AutoAssign": "2020", "DETR": "2020"}


@dataclass
class Assignment:
    """An assignment on the scene's image, drawn on a canvas.

    name: the method, for the table.
    counts: the number of positives of each object.
    candidates: the number of anchors, points, slots or queries from which the positives are chosen.
    details: for each object, a text that is shown beside its count; empty = none.
    noun: what is counted: "positives", or "candidates" among which training chooses.
    """

    name: str
    counts: list[int]
    candidates: int
    caption: str
    canvas: Canvas
    details: list[str] = field(default_factory=list)
    noun: str = "positives"

    def panel(self, scene: Scene) -> Panel:
        """Make the panel, with the number of positives of each object below the picture."""
        details = self.details or [""] * len(self.counts)
        texts = [
            f"{number} {name}: {count}{detail}"
            for number, (name, count, detail) in enumerate(zip(scene.names, self.counts, details, strict=True), 1)
        ]
        counts = [(colour(index), text) for index, text in enumerate(texts)]
        caption = f"{sum(self.counts):,} {self.noun} of {self.candidates:,}. {self.caption}"
        return Panel(f"{self.name} ({SOURCES[self.name]})", self.canvas.picture, counts, caption)


def objects_panel(scene: Scene) -> Panel:
    """Make the panel with the image and its objects alone."""
    canvas = Canvas(scene.image, dimmed=False)
    for index, box in enumerate(scene.boxes):
        canvas.box(box, colour(index), width=3)
    for index, box in enumerate(scene.boxes):
        canvas.text(box[:2], f"{index + 1} {scene.names[index]}", colour(index))
    height, width = scene.size
    counts = [(colour(i), f"{i + 1} {name}") for i, name in enumerate(scene.names)]
    return Panel("Objects", canvas.picture, counts, f"{width} x {height} pixels. A colour is an object in all panels.")


def by_iou(scene: Scene, name: str) -> Assignment:
    """Assign anchors by IoU, as RPN or RetinaNet (`name`) do."""
    scale = pyramid.divisor(scene.size)
    is_retina = name == "RetinaNet"
    strides = anchors.RETINA_STRIDES if is_retina else anchors.PROPOSAL_STRIDES
    sizes = anchors.RETINA_SIZES if is_retina else anchors.PROPOSAL_SIZES
    high, low = anchors.RETINA_THRESHOLDS if is_retina else anchors.PROPOSAL_THRESHOLDS
    boxes = torch.cat(anchors.make_anchors(scene.size, strides, sizes, scale))
    owners = anchors.assign_by_iou(boxes, scene.boxes, high, low)
    ious = box_iou(scene.boxes, boxes)  # (T, A)
    canvas, counts, weak = _canvas(scene), [], []
    ignored = owners == anchors.IGNORED
    canvas.dots(_centres(boxes[ignored]).unique(dim=0), GREY, 2, alpha=170)
    for index in range(len(scene.boxes)):
        positive = owners == index
        is_weak = positive & (ious[index] < high)
        counts.append(int(positive.sum()))
        weak.append(int(is_weak.sum()))
        for box in boxes[positive][:: max(1, counts[-1] // 12)]:  # a dozen outlines; more would hide the picture
            canvas.box(box, colour(index), width=1, alpha=110)
        canvas.dots(_centres(boxes[positive & ~is_weak]), colour(index), 4)
        canvas.dots(_centres(boxes[is_weak]), colour(index), 5, hollow=True)
    caption = (
        f"Anchors with an IoU of at least {high} (discs at their centres, outlines of about a dozen) and each object's "
        f"best anchors below it (circles, the number in brackets); {int(ignored.sum()):,} with an IoU from {low} are "
        f"ignored (grey). {_levels(strides, scale)}, "
        f"{len(sizes[0]) * len(anchors.RATIOS)} anchors each."
    )
    return Assignment(name, counts, len(boxes), caption, canvas, [f" ({number})" for number in weak])


def fcos(scene: Scene) -> Assignment:
    """Assign points in boxes, as FCOS does."""
    scale = pyramid.divisor(scene.size)
    strides = [stride // scale for stride in points.STRIDES]
    levels = pyramid.make_points(scene.size, strides)
    owners = points.assign_points(levels, strides, scene.boxes)
    places, level = torch.cat(levels), pyramid.level_of([len(part) for part in levels])
    canvas, counts, details = _canvas(scene), [], []
    for index, box in enumerate(scene.boxes):
        positive = owners == index
        counts.append(int(positive.sum()))
        used = sorted({*(level[positive] + 3).tolist()})
        details.append(f" (P{', P'.join(map(str, used))})" if used else "")
        centerness = points.centerness(places[positive], box.expand(counts[-1], -1))
        _weighted_dots(canvas, places[positive], level[positive], centerness, index)
    low, high = points.RANGE
    caption = (
        f"Points inside the box, less than {points.RADIUS} strides from its centre, whose farthest side is {low} to "
        f"{high} strides away (the level in brackets); the smallest object wins. Larger discs are coarser levels, "
        f"lighter ones have a lower centerness. {_levels(points.STRIDES, scale)}."
    )
    return Assignment("FCOS", counts, len(places), caption, canvas, details)


def yolo(scene: Scene, version: int, shapes: Sequence[Tensor], source: str) -> Assignment:
    """Assign grid cells and anchor shapes, as YOLO's `version` 1, 2 or 3 does.

    `shapes` are the anchor shapes of each grid, a single unused one in version 1; `source` says where they are from.
    """
    grids = {1: (grid_cells.V1_GRID,), 2: (grid_cells.V2_GRID,), 3: grid_cells.V3_GRIDS}[version]
    slots = grid_cells.assign_slots(scene.boxes_cxcywh, grids, shapes, first_holds=version == 1)
    canvas = _canvas(scene)
    if version < 3:
        canvas.grid(grids[0], grids[0])
    caption = {
        1: f"The cell of a {grids[0]} x {grids[0]} grid that holds the centre. A cell has one object: of several, the "
        "first. Of its two boxes, training then chooses the one that predicts the higher IoU.",
        2: f"The cell of a {grids[0]} x {grids[0]} grid that holds the centre, and there the best of "
        f"{grid_cells.V2_SHAPES} anchor shapes by IoU (dashed).",
        3: f"The best of {grid_cells.V3_SHAPES} anchor shapes by IoU (dashed), three on each of the grids "
        f"{', '.join(map(str, grids))}, in the cell that holds the centre (the grid in brackets).",
    }[version]
    candidates = sum(side * side * len(part) for side, part in zip(grids, shapes, strict=True))
    if version == 3:
        ignored = grid_cells.ignored_priors(scene.boxes_cxcywh, grids, shapes, slots)
        priors = grid_cells.make_priors(grids, shapes)[ignored] * _extent(scene)
        canvas.dots(_centres(priors).unique(dim=0), GREY, 2, alpha=170)
        caption += f" {int(ignored.sum())} others with an IoU above {grid_cells.IGNORE_THRESHOLD} are ignored (grey)."
    _draw_slots(canvas, scene, slots, grids, None if version == 1 else torch.cat([*shapes]))
    caption += "" if version == 1 else f" Of two objects with the same cell and shape, the last one holds it. {source}"
    details = [f" ({grids[grid]})" for grid in slots.grids.tolist()] if version == 3 else []
    return Assignment(f"YOLOv{version}", slots.holds.int().tolist(), candidates, caption, canvas, details)


def free_anchor(scene: Scene) -> Assignment:
    """Show FreeAnchor's bags of candidates, of RetinaNet's anchors."""
    scale = pyramid.divisor(scene.size)
    boxes = torch.cat(anchors.make_anchors(scene.size, anchors.RETINA_STRIDES, anchors.RETINA_SIZES, scale))
    bags = anchors.candidate_bags(boxes, scene.boxes, anchors.BAG_SIZE)
    canvas = _canvas(scene)
    ious = box_iou(scene.boxes, boxes)
    for index, bag in enumerate(bags):
        canvas.box(boxes[bag[0]], colour(index), width=1, dashed=True)
        canvas.dots(_centres(boxes[bag]), colour(index), 4, alpha=150)
    lowest = [f" (IoU {float(iou[bag[-1]]):.2f})" for iou, bag in zip(ious, bags, strict=True)]
    caption = (
        f"The {anchors.BAG_SIZE} of RetinaNet's anchors with the highest IoU (discs; the lowest IoU in "
        "brackets; the best anchor dashed). Training learns which of them match: the likelihood of an object is a mean "
        "over its bag of classification times localisation, weighted to approach the best anchor alone (mean-max)."
    )
    return Assignment("FreeAnchor", [len(bag) for bag in bags], len(boxes), caption, canvas, lowest, "candidates")


def auto_assign(scene: Scene) -> Assignment:
    """Show AutoAssign's candidates with their initial centre prior."""
    scale = pyramid.divisor(scene.size)
    strides = [stride // scale for stride in points.STRIDES]
    levels = pyramid.make_points(scene.size, strides)
    prior = points.centre_prior(levels, strides, scene.boxes)  # (P, T)
    places, level = torch.cat(levels), pyramid.level_of([len(part) for part in levels])
    canvas = _canvas(scene)
    for index in range(len(scene.boxes)):
        inside = prior[:, index] > 0
        _weighted_dots(canvas, places[inside], level[inside], prior[inside, index], index)
    counts = (prior > 0).sum(0).tolist()
    caption = (
        "All points of all levels inside the box (larger discs are coarser levels), with the initial "
        "centre prior as opacity (mean 0, deviation 1 stride; its sum in brackets). Training learns mean and deviation "
        "of each class, and multiplies the prior by a weight that grows with the predicted confidence."
    )
    sums = [f" ({total:.1f})" for total in prior.sum(0).tolist()]
    return Assignment("AutoAssign", counts, len(places), caption, canvas, sums, "candidates")


def detr(scene: Scene, matching: Matching, names: Sequence[str], weights: str) -> Assignment:
    """Join each object to the box of its matched query.

    `names` are those of the classes, and `weights` says which model predicts the boxes.
    """
    canvas = _canvas(scene)
    queries = matching.queries.tolist()
    for box in matching.boxes:
        canvas.box(box, GREY, width=1, alpha=120)
    for index, query in enumerate(queries):
        if query != UNMATCHED:
            canvas.box(matching.boxes[query], colour(index), width=2, dashed=True)
            ends = _centres(torch.stack([scene.boxes[index], matching.boxes[query]]))
            canvas.line(ends[0], ends[1], colour(index))
            canvas.dots(ends[:1], colour(index), 5)
            canvas.dots(ends[1:], colour(index), 5, hollow=True)
    for index, query in enumerate(queries):
        if query != UNMATCHED:
            name, score = names[int(matching.labels[query])], float(matching.scores[query])
            canvas.text(matching.boxes[query][:2], f"q{query} {name} {score:.2f}", colour(index))
    details = ["" if query == UNMATCHED else f" (q{query})" for query in queries]
    counts = [int(query != UNMATCHED) for query in queries]
    caption = (
        "One query for each object, by the lowest total cost of class, L1 and GIoU (Hungarian matching): its box "
        "(dashed, with its most probable class) is joined to the object (disc); boxes of other queries are grey. "
        f"{weights}"
    )
    return Assignment("DETR", counts, len(matching.boxes), caption, canvas, details)


def _canvas(scene: Scene) -> Canvas:
    """Make a canvas with the image and the outlines of its objects."""
    canvas = Canvas(scene.image)
    for index, box in enumerate(scene.boxes):
        canvas.box(box, colour(index), width=2)
    return canvas


def _weighted_dots(canvas: Canvas, places: Tensor, level: Tensor, weights: Tensor, index: int) -> None:
    """Draw points whose size grows with the level and whose opacity grows with the weight in [0, 1]."""
    for place, number, weight in sorted(
        zip(places, level.tolist(), weights.tolist(), strict=True), key=lambda x: -x[1]
    ):
        canvas.dots(place[None], colour(index), 3 + 1.5 * number, alpha=round(30 + 225 * weight))


def _draw_slots(canvas: Canvas, scene: Scene, slots: Slots, grids: Sequence[int], shapes: Tensor | None) -> None:
    """Fill the cells that hold objects, draw their anchor shapes dashed; a cell that another object took is hollow."""
    sides = torch.tensor(grids)[slots.grids]
    extent = _extent(scene)
    for index, (cell, side, holds) in enumerate(zip(slots.cells, sides, slots.holds.tolist(), strict=True)):
        box = torch.cat([cell, cell + 1]) / side * extent
        if holds:
            canvas.fill(box, colour(index), 170)
        canvas.box(box, colour(index), width=1)
        if shapes is not None:
            prior = to_xyxy(torch.cat([(cell + 0.5) / side, shapes[slots.shapes[index]]]))
            canvas.box(prior * extent, colour(index), width=1, dashed=True)
        canvas.dots(_centres(scene.boxes[index][None]), colour(index), 3)


def _extent(scene: Scene) -> Tensor:
    """Return width, height, width, height of the image."""
    return torch.tensor(scene.size).flip(0).repeat(2).float()


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _levels(strides: Sequence[int], scale: int) -> str:
    """Describe the levels and how they were scaled."""
    scaled = f"; as the image is small, lengths are those of the paper divided by {scale}" if scale > 1 else ""
    return f"Strides {', '.join(str(stride // scale) for stride in strides)}{scaled}"
