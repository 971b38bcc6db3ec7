"""A run resumes on its own data, wherever they lie, and refuses other contents of equal count."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit.data.digits import Digits

RUN = ["run_dir=run", "trainer.steps=2", "trainer.epochs=null", "trainer.workers=0", "trainer.eval_every=2"]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def make_folders(root: Path) -> list[str]:
    """Two classes with three images in each of two splits."""
    for number, path in enumerate(root / s / c / f"{i}.png" for s in ("train", "val") for c in "ab" for i in range(3)):
        write_image(path, number)
    keys = ["model.patch_size=16", "data.image_size=32", "data.batch_size=2", "data.augmentation.repeats=1"]
    return ["model=vit", "data=imagefolder", "data.val_count=0", *keys, f"data.root={root}"]


def make_coco(root: Path) -> list[str]:
    """Three images with a box each in COCO's official layout."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        for number in range(3):
            write_image(root / split / f"{number}.png", number)
        images = [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 32} for i in range(3)]
        boxes = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [4, 4, 9, 9]} for i in range(3)]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    sizes = ["data.augmentation.kind=none", "data.augmentation.sizes=[32]", "data.augmentation.eval_size=32"]
    keys = [*sizes, "data.batch_size=2", "model.width=32"]
    return ["model=detr", "data=coco", "data.val_count=0", *keys, f"data.root={root}"]


def make_text(root: Path) -> list[str]:
    """Thirty pairs, some of which become val and test."""
    root.mkdir()
    pairs = [f"a number {i}\teine Zahl {i}" for i in range(30)]
    (root / "pairs.tsv").write_text("\n".join([*pairs, ""]))
    keys = ["data.val_count=3", "data.test_count=3", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262"]
    return ["model=seq2seq", "data=parallel_text", *keys, f"data.train.pairs={root}/pairs.tsv"]


def swap_images(root: Path) -> None:
    first, second = root / "train/a/0.png", root / "train/b/0.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes() + b"\0")
    second.write_bytes(content)


def edit_box(root: Path) -> None:
    path = root / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("[4, 4, 9, 9]", "[4, 4, 9, 8]", 1))


def replace_image(root: Path) -> None:
    write_image(root / "train2017/1.png", 99)
    with open(root / "train2017/1.png", "ab") as file:
        file.write(b"longer")


def permute_lines(root: Path) -> None:
    path = root / "pairs.tsv"
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))


CASES = [
    (make_folders, swap_images, "the images of train differ"),
    (make_coco, edit_box, "the annotations of test differ"),
    (make_coco, replace_image, "the images of train differ"),
    (make_text, permute_lines, "the en sentences of train differ"),
]


def interrupt(folder: Path) -> None:
    """Make a finished run one that was killed before its end."""
    (folder / "results.json").unlink()


@pytest.mark.parametrize(("make", "change", "reason"), CASES)
def test_other_contents_are_refused_by_name_and_a_moved_folder_is_no_change(
    inside: Callable[..., str], make: Callable[[Path], list[str]], change: Callable[[Path], None], reason: str
) -> None:
    here, there = Path("here").absolute(), Path("there").absolute()
    command = make(here)
    inside("train", *command, *RUN)
    interrupt(Path("run"))
    shutil.move(here, there)
    moved = [word.replace(str(here), str(there)) for word in command]
    assert "the same as before, elsewhere: data." in inside("train", *moved, *RUN, "resume=auto")
    interrupt(Path("run"))
    change(there)
    refusal = inside("train", *moved, *RUN, "resume=auto", code=2)
    assert reason in refusal and refusal.endswith("put them back, or give allow_changes=[data].")
    output = inside("train", *moved, *RUN, "resume=auto", "allow_changes=[data]")
    warning = next(line for line in output.splitlines() if "Resuming with allowed changes: " in line)
    assert reason in warning and warning.endswith("an uninterrupted run would differ.")


def test_the_last_line_promises_only_files_that_exist(inside: Callable[..., str]) -> None:
    command = make_text(Path("here").absolute())
    with_test = inside("train", *command, *RUN).splitlines()[-1]
    assert "predictions/" in with_test and Path("run/predictions").is_dir()
    without = inside("train", *command, *RUN, "data.test_count=0", "run_dir=other").splitlines()[-1]
    assert without.startswith("Everything is in other: checkpoints/, metrics.jsonl")
    assert "predictions" not in without and not Path("other/predictions").exists()


def test_labels_of_a_set_in_memory_are_compared(inside: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    inside("train", "model=vit", *RUN)
    interrupt(Path("run"))
    load = Digits.load

    def swapped(self: Digits) -> dict:
        splits = load(self)
        images, labels = splits["val"]
        return {**splits, "val": (images, labels.flip(0))}

    monkeypatch.setattr(Digits, "load", swapped)
    refusal = inside("train", "model=vit", *RUN, "resume=auto", code=2)
    assert "trained on: the labels of val differ;" in refusal
