"""Convert a detection data set to COCO JSON: `python scripts/convert.py data=FORMAT data.root=FOLDER --output FOLDER`.

FORMAT is voc, yolo or csv. Further arguments are the data keys of train.py, such as data.classes=[cat,dog] or
data.first_pixel=0. Each split is written to its own file: train.json, val.json or test.json. A val or test split that
the data set lacks is cut from train, as in training; data.val_count=0 data.test_share=0 prevents this. The images are
not copied.

A report says how the files were read and what was left out. Its last line is the command that trains on the result.
Existing files are overwritten only with --overwrite. The exit code is 0, or 2 after an error.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.cli.command import to_run
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.files import names
from common.files.lines import write_atomically
from common.files.output import creating
from common.types import SPLITS, Split
from detr.data.converted import Converted


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert the data set and print the report; returns the exit code."""
    console.guard()
    options, overrides = _options(sys.argv[1:] if arguments is None else list(arguments))
    try:
        data = make_data(overrides)
        splits: list[Split] = [split for split in SPLITS if data.count(split)]
        files = {split: options.output / f"{split}.json" for split in splits}
        _check_output(options.output, splits, options.overwrite)
        images = {split: [Path(data.where(split, i)) for i in range(data.count(split))] for split in splits}
        folders = image_folders(images, options.output)
        texts = {s: json.dumps(coco_json(data.ground_truth(s), images[s], folders[s])) for s in splits}
        with creating(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
            for split, file in files.items():
                write_atomically(file, texts[split])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    warnings = [warning for split in splits for warning in data.advice(split)]
    lines = [*(f"read      {line}" for line in data.summary()), *(f"warning   {line}" for line in warnings)]
    lines += [f"wrote     {file}: {data.count(split)} images" for split, file in files.items()]
    print("\n".join([*lines, f"train     {training_command(data, folders, files, options.output)}"]))
    return 0


def make_data(overrides: Sequence[str]) -> Converted:
    """Build the data set that the arguments data=... and data.KEY=... describe.

    Raises UserError if there is another argument, if the format is missing, or if the format needs no conversion.
    """
    if other := next((word for word in overrides if not word.startswith(("data=", "data."))), None):
        raise UserError(f"{other} is no key of the data; give data=voc, yolo or csv, data.root=FOLDER and so on.")
    if not any(word.startswith("data=") for word in overrides):
        raise UserError("The format is missing; give data=voc, data=yolo or data=csv.")
    data = build(configure("train", ["model=detr", *overrides])["data"])
    if not isinstance(data, Converted):
        name = next(word for word in overrides if word.startswith("data="))
        raise UserError(f"{name} needs no conversion; give data=voc, data=yolo or data=csv.")
    return data


def image_folders(images: dict[Split, list[Path]], output: Path) -> dict[Split, Path]:
    """Return for each split the folder to which the image names in its JSON file are relative.

    For each split, this is the folder images/ in `output`, if that folder contains all images of all splits. Otherwise,
    this is the deepest folder that contains all images of the split.
    """
    beside = Path(os.path.abspath(output / "images"))
    parents = {split: [os.path.abspath(path.parent) for path in paths] for split, paths in images.items()}
    if all(Path(parent).is_relative_to(beside) for folders in parents.values() for parent in set(folders)):
        return dict.fromkeys(images, beside)
    return {split: Path(os.path.commonpath(set(folders))) for split, folders in parents.items()}


def coco_json(truth: dict[str, Any], images: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Make the content of a split's JSON file.

    The content is the ground truth `truth` in COCO's JSON with two changes. The file names of the images are replaced
    by the paths in `images`, relative to `folder`. The ids of the annotations are replaced by 1, 2, 3 and so on.
    """
    files = [os.path.relpath(os.path.abspath(path), folder) for path in images]
    content = {**truth, "images": [{**image, "file_name": f} for image, f in zip(truth["images"], files, strict=True)]}
    if "annotations" in truth:
        content["annotations"] = [{**box, "id": id} for id, box in enumerate(truth["annotations"], 1)]
    return content


def training_command(data: Converted, folders: dict[Split, Path], files: dict[Split, Path], output: Path) -> str:
    """Return the command line that trains on the converted files."""
    keys = [f"data.root={output}"]
    if {*folders.values()} != {Path(os.path.abspath(output / "images"))}:
        keys = [f"data.{split}.images={folder}" for split, folder in folders.items()]
        keys += [f"data.{split}.annotations={file}" for split, file in files.items()]
    keys += [f"data.exif={data.exif}"] if data.exif != "auto" else []
    cuts = [] if "val" in files else ["data.val_count=0"]
    cuts += [] if "test" in files else ["data.test_share=0"]
    return f"{to_run('train.py')} model=detr_r50 data=coco {names.shell_command([*keys, *cuts])}"


def _check_output(output: Path, splits: Sequence[Split], overwrite: bool) -> None:
    """Raise UserError if `output` contains JSON files that would be overwritten, or read by mistake.

    The files of `splits` would be overwritten; `overwrite` permits this. The files of other splits would be read in
    training, although the data set lacks these splits.
    """
    existing = [split for split in SPLITS if (output / f"{split}.json").exists()]
    if stale := [split for split in existing if split not in splits]:
        raise UserError(f"--output holds {output / stale[0]}.json, but the data have no {stale[0]}; remove that file.")
    if existing and not overwrite:
        listed = ", ".join(f"{split}.json" for split in existing)
        raise UserError(f"--output {output} holds {listed}; give another folder, or --overwrite to replace them.")


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s data=voc|yolo|csv data.root=FOLDER [data.KEY=value ...] --output FOLDER [--overwrite]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True, help="the folder of the JSON files")
    parser.add_argument("--overwrite", action="store_true", help="replace JSON files that exist in it")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    start.script(main)
