"""Draw which anchors, points, cells or queries detectors assign to the objects of an image.

    python scripts/assignments.py checkpoint=runs/detr-shapes/.../checkpoints/best.pt image=12
    python scripts/assignments.py model=detr data=coco data.root=FOLDER split=val image=000000000139.jpg
    python scripts/assignments.py checkpoint=runs/detr-shapes/.../checkpoints images=200

assignments.png shows the image under nine label assignments: Faster R-CNN's proposal network, RetinaNet, FCOS, YOLOv1
to v3, FreeAnchor, AutoAssign and DETR. suppression.png shows non-maximum suppression step by step. Without checkpoint=,
DETR's matching is that of the initial model, and suppression gets anchors in place of detections.

If checkpoint= names several files, separated by commas, or a folder of step checkpoints, then stability.png shows the
share of objects whose matched query changed from one checkpoint to the next, over the first images of the split; the
other pictures are those of the last checkpoint. The numbers are printed, and written to assignments.json.

Further arguments are those of evaluate.py, such as weights=raw, and without checkpoint= those of train.py. The exit
code is 0, or 2 after an error.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

import torch
from PIL import Image
from torch import Tensor

from common.config.check import did_you_mean
from common.config.compose import configure
from common.errors import UserError
from common.files.lines import as_json
from common.files.names import printable
from common.files.output import create_output, writing_to
from common.files.retention import CheckpointFolder
from common.files.table import table
from common.task import Split
from common.train.assembly import Components, assemble, restore, stored_config
from common.types import SPLITS
from detr.tasks.detection import Detection
from scripts.assigning import grid_cells, panels, stability, steps
from scripts.assigning.hungarian import Matching, match_batch
from scripts.assigning.panels import Assignment
from scripts.assigning.scene import MAX_NAME, Scene, load_scene, relative_sizes
from scripts.assigning.sheet import draw_curve, make_sheet
from scripts.assigning.steps import Candidates
from scripts.assigning.suppression import Suppression, suppress

KEYS = {
    "image": "id or file name of the image (default: the first image with an object)",
    "split": "train, val or test (default: val, or test if there is no val)",
    "images": "number of images, from the first of the split, for the stability of matching (default 200)",
    "nms": "IoU above which suppression drops the box with the lower score (default 0.5)",
    "output": "folder for the pictures and assignments.json (default: assignments)",
}
COLUMNS = 5  # panels side by side
MAX_ROWS = 40  # of the printed table of suppression; the file has all


@dataclass
class Options:
    """The script's own arguments, and the overrides of the config."""

    checkpoints: list[Path]
    overrides: list[str]
    image: str | None
    split: Split | None
    images: int
    nms: float
    output: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures and print the tables; returns the exit code."""
    console.guard()
    words = _overrides(sys.argv[1:] if arguments is None else list(arguments))
    try:
        options = read_options(words)
        loaded = load(options.overrides, options.checkpoints[-1] if options.checkpoints else None)
        split = options.split or ("val" if loaded.data.count("val") else "test")
        task = detection_task(loaded)
        scene = load_scene(task.data, split, options.image, task.categories)
        create_output(options.output)
        print(loaded.weights_line)
        print(f"image     {scene.file} (id {scene.id} of {split}), {len(scene.boxes)} objects")
        record, pictures = draw_image(loaded, task, scene, split, options)
        if len(options.checkpoints) > 1:
            rows, pictures["stability.png"] = draw_stability(options, split)
            record["stability"] = rows
        with writing_to(options.output):
            for name, picture in pictures.items():
                picture.save(options.output / name)
            (options.output / "assignments.json").write_text(as_json(record, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        # The config is composed as for evaluate.py, so the error messages name evaluate.py, which is replaced here.
        print(str(error).replace("evaluate.py", "assignments.py"), file=sys.stderr)
        return 2
    print(f"wrote     {options.output}: {', '.join([*pictures, 'assignments.json'])}")
    return 0


def read_options(words: Sequence[str]) -> Options:
    """Split the command line into the script's own keys and overrides of the config; raises UserError for a mistake."""
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in (*KEYS, "checkpoint")}
    overrides = [word for word in words if word.partition("=")[0] not in (*KEYS, "checkpoint")]
    if any(word.startswith("input=") for word in words):
        raise UserError("input=: a photo has no objects to assign; give image=ID or image=FILE_NAME, and split=.")
    split = own.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"split={split} is no split{did_you_mean(split, SPLITS)}; give train, val or test.")
    checkpoints = find_checkpoints(own["checkpoint"]) if own.get("checkpoint") else []
    return Options(
        checkpoints=checkpoints,
        overrides=overrides,
        image=own.get("image"),
        split=split,
        images=_number("images", own.get("images", "200"), int, 1, 10**9),
        nms=_number("nms", own.get("nms", "0.5"), float, 0, 1),
        output=Path(own.get("output") or "assignments"),
    )


def find_checkpoints(text: str) -> list[Path]:
    """Return the files that checkpoint= names: one or several, or the step checkpoints of a run by ascending step.

    Raises UserError for a folder with fewer than two step checkpoints.
    """
    path = Path(text).expanduser()
    if not path.is_dir():
        names = [text] if path.is_file() else [name for name in text.split(",") if name]
        return [Path(name).expanduser() for name in names]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = CheckpointFolder(folder, writes=False).last(10**9)
    if len(files) < 2:
        raise UserError(
            f"checkpoint={text}: {folder} holds {len(files)} step checkpoints (such as step_00001000.pt), but matching "
            "is compared between at least two; train with trainer.average_last=N to keep the last N, or name a file."
        )
    return files


def load(overrides: list[str], file: Path | None) -> Components:
    """Load a checkpoint's model, or build the initial model of the config; the model is in evaluation mode."""
    if file is not None:
        return restore(configure("evaluate", [f"checkpoint={file}", *overrides], stored_config))
    if not any(word.startswith(("model=", "experiment=")) for word in overrides):
        raise UserError("Neither a checkpoint nor a model is given; give checkpoint=FILE, or model=detr data=NAME.")
    parts = assemble(configure("train", overrides))
    return parts._replace(model=parts.model.to(parts.device).eval())


def detection_task(parts: Components) -> Detection:
    """Return the task; raises UserError if it is not detection."""
    if not isinstance(parts.task, Detection):
        raise UserError(f"The task {type(parts.task).__name__} has no boxes; give a detector, such as model=detr.")
    return parts.task


def draw_image(
    parts: Components, task: Detection, scene: Scene, split: Split, options: Options
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """Draw the two pictures of one image and print their tables; returns the numbers, and the pictures by file name."""
    (matching,) = match_batch(task, parts.model, scene.batch)
    names = [printable(str(category["name"]))[:MAX_NAME] for category in task.categories]
    trained = bool(options.checkpoints)
    weights = f"Weights: {options.checkpoints[-1].name}." if trained else "Weights: the initial model, not trained."
    assignments = assign_all(scene, matching, names, weights, relative_sizes(task.data, split))
    print(table("positives of each object (FreeAnchor, AutoAssign: candidates)", counts_table(scene, assignments)))
    heading = f"Label assignments: {Path(scene.file).name} ({split})"
    sheets = [panels.objects_panel(scene), *(assignment.panel(scene) for assignment in assignments)]
    candidates = steps.detections(matching) if trained else steps.anchors_near_objects(scene)
    result = suppress(candidates.boxes, candidates.scores, candidates.labels, options.nms)
    rows = suppression_rows(task, candidates, result)
    more = f" (the first {MAX_ROWS})" if len(rows) > MAX_ROWS else ""
    print(table(f"suppression above IoU {options.nms:g}, by score{more}", _suppression_table(rows[:MAX_ROWS])))
    title = f"Non-maximum suppression within each class, above IoU {options.nms:g}: {Path(scene.file).name} ({split})"
    pictures = {
        "assignments.png": make_sheet(heading, sheets, COLUMNS),
        "suppression.png": make_sheet(title, steps.panels(scene, candidates, result, names), 4),
    }
    objects = [
        {
            "object": number,
            "name": name,
            "box": box,
            "positives": {part.name: part.counts[number - 1] for part in assignments},
        }
        for number, (name, box) in enumerate(zip(scene.names, scene.boxes.tolist(), strict=True), 1)
    ]
    record = {"file": scene.file, "id": scene.id, "split": split, "weights": weights, "objects": objects}
    return {**record, "nms": options.nms, "suppression": rows}, pictures


def assign_all(
    scene: Scene, matching: Matching, names: Sequence[str], weights: str, sizes: tuple[Tensor, Split]
) -> list[Assignment]:
    """Make all assignments.

    `names` are those of the classes, `weights` is a sentence on the model, and `sizes` are the boxes' sizes for the
    anchor shapes, with the split they are from.
    """
    extents, source = sizes
    note = f"Shapes: k-means with 1 - IoU over {len(extents):,} boxes of {source}."
    five = grid_cells.cluster_shapes(extents, grid_cells.V2_SHAPES)
    nine = grid_cells.cluster_shapes(extents, grid_cells.V3_SHAPES).split(3)
    return [
        panels.by_iou(scene, "RPN"),
        panels.by_iou(scene, "RetinaNet"),
        panels.fcos(scene),
        panels.free_anchor(scene),
        panels.yolo(scene, 1, [torch.ones(1, 2)], note),
        panels.yolo(scene, 2, [five], note),
        panels.yolo(scene, 3, nine, note),
        panels.auto_assign(scene),
        panels.detr(scene, matching, names, weights),
    ]


def counts_table(scene: Scene, assignments: Sequence[Assignment]) -> list[list[Any]]:
    """Make the rows of the table of positives: a header, a row for each object, and three sums."""
    header = ["object", "width", "height", *(part.name for part in assignments)]
    extents = (scene.boxes[:, 2:] - scene.boxes[:, :2]).round().int().tolist()
    rows = [
        [f"{index + 1} {name}", *extents[index], *(part.counts[index] for part in assignments)]
        for index, name in enumerate(scene.names)
    ]
    totals = ["all", "", "", *(sum(part.counts) for part in assignments)]
    without = ["objects without", "", "", *(part.counts.count(0) for part in assignments)]
    return [header, *rows, totals, without, ["of", "", "", *(part.candidates for part in assignments)]]


def suppression_rows(task: Detection, candidates: Candidates, result: Suppression) -> list[dict[str, Any]]:
    """Return a row for each candidate by descending score; "dropped by" is a number of a row, or None."""
    rank = {candidate: number for number, candidate in enumerate(result.order.tolist(), 1)}
    rows = []
    for candidate, number in rank.items():
        suppressor = int(result.suppressors[candidate])
        name = str(task.categories[int(candidates.labels[candidate])]["name"])
        box = [round(side, 2) for side in candidates.boxes[candidate].tolist()]
        row = {"box": number, "class": name, "score": round(float(candidates.scores[candidate]), 4), "xyxy": box}
        row["dropped by"] = rank.get(suppressor)
        row["IoU"] = round(float(result.overlaps[candidate]), 4) if suppressor in rank else None
        rows.append(row)
    return rows


def _suppression_table(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    header = ["box", "class", "score", "result", "IoU"]
    results = ["kept" if row["dropped by"] is None else f"dropped by {row['dropped by']}" for row in rows]
    ious = [float("nan") if row["IoU"] is None else row["IoU"] for row in rows]
    cells = zip(rows, results, ious, strict=True)
    return [header, *([row["box"], row["class"], row["score"], text, iou] for row, text, iou in cells)]


def draw_stability(options: Options, split: Split) -> tuple[list[dict[str, Any]], Image.Image]:
    """Compare the matchings of successive checkpoints, print the table, and draw the curve."""
    first, *others = options.checkpoints
    loaded = load(options.overrides, first)
    task, before = detection_task(loaded), _queries(loaded, options, split)
    rows: list[dict[str, Any]] = []
    for file in others:
        parts = load(options.overrides, file)
        if parts.task.state() != task.state() or detection_task(parts).queries != task.queries:
            raise UserError(f"{file} has other classes or queries than {first}; give checkpoints of one run.")
        after = _queries(parts, options, split)
        change = stability.compare(before, after)
        names = {"from": _step(options.checkpoints[len(rows)]), "to": _step(file)}
        rows.append({**names, **change._asdict(), "share": change.share})
        before = after
    header = ["from", "to", "images", "objects", "changed", "share", "instability"]
    print(
        table(
            f"matching from one checkpoint to the next ({split})", [header, *([r[key] for key in header] for r in rows)]
        )
    )
    caption = (
        f"Share of the {rows[0]['objects']:,} objects in {rows[0]['images']:,} images of {split} whose matched query "
        "differs from that of the checkpoint before (last decoder layer, images not augmented)."
    )
    instability = [row["instability"] for row in rows]
    caption += (
        f" DN-DETR's instability, the mean number of queries of an image whose object differs, is {instability[0]:.2f} "
        f"at first and {instability[-1]:.2f} at last. Horizontal axis: step of the later checkpoint."
    )
    shares = [0.0 if math.isnan(row["share"]) else row["share"] for row in rows]  # NaN without objects
    return rows, draw_curve("Instability of matching", [str(row["to"]) for row in rows], shares, caption)


def _queries(parts: Components, options: Options, split: Split) -> list[Tensor]:
    """Return the query of each object, for each of the first images of the split."""
    count = min(parts.data.count(split), options.images)
    task = detection_task(parts)
    return list(stability.match_split(task, parts.model, task.data, split, count))


def _step(file: Path) -> str:
    """Return the step of a checkpoint by its name, such as step_00001000.pt, or the name of any other file."""
    match = re.fullmatch(r"step_0*(\d+)", file.stem)
    return f"{int(match[1]):,}" if match else file.stem


def _number(key: str, text: str, kind: type, low: float, high: float) -> Any:
    """Convert the value of a key to a number; raises UserError unless it lies between `low` and `high`."""
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        name = "a whole number" if kind is int else "a number"
        limits = f"of at least {low:g}" if high >= 10**9 else f"from {low:g} to {high:g}"
        raise UserError(f"{key}={text} is not {name} {limits}.")
    return number


def _overrides(arguments: list[str]) -> list[str]:
    summary, _, rest = str(__doc__).partition("\n\n")
    keys = "".join(f"  {key + '=':9} {text}\n" for key, text in KEYS.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s checkpoint=FILE|model=NAME [image=ID] [split=SPLIT] [output=FOLDER] [key=value ...]",
        description=summary,
        epilog=f"{rest}\nkeys of this script:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser.parse_known_args(arguments)[1]


if __name__ == "__main__":
    start.script(main)
