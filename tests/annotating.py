"""Write the same pictures and boxes as COCO, Roboflow, Pascal VOC, YOLO and CSV, as the common tools do.

Nothing here uses the project's readers; boxes are left, top, width, height in pixels.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from PIL import Image

CLASSES = ("RBC", "WBC", "Platelets")  # of the blood cells, in the order of their ids


class Picture(NamedTuple):
    """An image file, its size, and its objects: the name of the class, left, top, width, height."""

    path: Path
    width: int
    height: int
    objects: list[tuple[str, float, float, float, float]]


def blood_cells(folder: Path, count: int = 60) -> list[Picture]:
    """The first `count` of all pictures in the folder bccd, by name."""
    pictures = {}
    for split in ("train", "val", "test"):
        content = json.loads((folder / f"{split}.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
        for box in content["annotations"]:
            objects[box["image_id"]].append((names[box["category_id"]], *box["bbox"]))
        for image in content["images"]:
            path = folder / "images" / image["file_name"]
            pictures[path.name] = Picture(path, image["width"], image["height"], objects[image["id"]])
    return [pictures[name] for name in sorted(pictures)[:count]]


def copy_images(pictures: Sequence[Picture], folder: Path) -> None:
    """Copy the image files."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copy(picture.path, folder / picture.path.name)


def write_coco_json(pictures: Sequence[Picture], path: Path, classes: Sequence[str] = CLASSES) -> None:
    """Write the instances JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, picture in enumerate(pictures, 1):
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": number, "file_name": picture.path.name, **size})
        for name, *box in picture.objects:
            id, area = len(annotations) + 1, box[2] * box[3]
            category = {"category_id": classes.index(name) + 1, "iscrowd": 0, "area": area}
            annotations.append({"id": id, "image_id": number, "bbox": box, **category})
    categories = [{"id": i, "name": name, "supercategory": "cells"} for i, name in enumerate(classes, 1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def coco(pictures: Sequence[Picture], root: Path) -> None:
    """Write train.json beside images/."""
    write_coco_json(pictures, root / "train.json")
    copy_images(pictures, root / "images")


def roboflow(pictures: Sequence[Picture], root: Path) -> None:
    """Write Roboflow's export to COCO: the JSON among the images."""
    write_coco_json(pictures, root / "train/_annotations.coco.json")
    copy_images(pictures, root / "train")


def xml_text(picture: Picture, first_pixel: int = 1, with_size: bool = True, difficult: Sequence[int] = ()) -> str:
    """The XML file of a picture; with `first_pixel` 1, corners are the first and the last pixel inside."""
    width, height = (picture.width, picture.height) if with_size else (0, 0)
    lines = ["<annotation>", "\t<folder>VOC</folder>", f"\t<filename>{escape(picture.path.name)}</filename>"]
    lines += [f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for number, (name, left, top, box_width, box_height) in enumerate(picture.objects):
        corners = {
            "xmin": left + first_pixel,
            "ymin": top + first_pixel,
            "xmax": left + box_width,  # the last of box_width pixels from left + 1; or the right edge from left
            "ymax": top + box_height,
        }
        box = "".join(f"<{key}>{value:g}</{key}>" for key, value in corners.items())
        flags = f"<truncated>0</truncated><difficult>{int(number in difficult)}</difficult>"
        lines += [f"\t<object><name>{escape(name)}</name>{flags}<bndbox>{box}</bndbox></object>"]
    return "\n".join([*lines, "</annotation>", ""])


def write_xml(pictures: Sequence[Picture], folder: Path, **options: Any) -> None:
    """Write the XML files."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.path.stem}.xml").write_text(xml_text(picture, **options), encoding="utf-8")


def voc_devkit(pictures: Sequence[Picture], root: Path) -> None:
    """Write VOCdevkit's folders, with the list trainval.txt."""
    write_xml(pictures, root / "VOC2007/Annotations")
    copy_images(pictures, root / "VOC2007/JPEGImages")
    write_list([picture.path.stem for picture in pictures], root / "VOC2007/ImageSets/Main/trainval.txt")


def voc_beside(pictures: Sequence[Picture], root: Path) -> None:
    """Write XML files beside the images, with corners from 0 and without sizes."""
    write_xml(pictures, root, first_pixel=0, with_size=False)
    copy_images(pictures, root)


def write_list(lines: Iterable[str], path: Path) -> None:
    """Write one line for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_label_files(pictures: Sequence[Picture], folder: Path, classes: Sequence[str] = CLASSES) -> None:
    """Write YOLO's label files with 8 digits after the point."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        lines = []
        for name, left, top, width, height in picture.objects:
            x, y = (left + width / 2) / picture.width, (top + height / 2) / picture.height
            numbers = (x, y, width / picture.width, height / picture.height)
            lines.append(f"{classes.index(name)} " + " ".join(f"{number:.8f}" for number in numbers))
        write_list(lines, folder / f"{picture.path.stem}.txt")


def yolo_yaml(pictures: Sequence[Picture], root: Path) -> None:
    """Write Roboflow's export to YOLO: data.yaml, train/images/, train/labels/."""
    write_label_files(pictures, root / "train/labels")
    copy_images(pictures, root / "train/images")
    lines = ["train: ../train/images", "val: ../valid/images", f"nc: {len(CLASSES)}", f"names: {list(CLASSES)}"]
    write_list(lines, root / "data.yaml")


def yolo_classes(pictures: Sequence[Picture], root: Path) -> None:
    """Write labelImg's files: label files and classes.txt beside the images."""
    write_label_files(pictures, root)
    copy_images(pictures, root)
    write_list(CLASSES, root / "classes.txt")


def csv_corners(pictures: Sequence[Picture], root: Path) -> None:
    """Write Roboflow's TensorFlow table: the size of the image, the class and corners."""
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for path, width, height, objects in pictures:
        rows = [(path.name, width, height, name, x, y, x + w, y + h) for name, x, y, w, h in objects]
        lines += [",".join(map(str, row)) for row in rows]
    write_list(lines, root / "train/_annotations.csv")
    copy_images(pictures, root / "train")


def csv_extents(pictures: Sequence[Picture], root: Path) -> None:
    """Write a table of image, x, y, width, height and label, separated by semicolons, beside images/."""
    lines = ["image;label;x;y;width;height"]
    for picture in pictures:
        lines += [";".join(map(str, (picture.path.name, *thing))) for thing in picture.objects]
    write_list(lines, root / "cells.csv")
    copy_images(pictures, root / "images")


FORMATS: dict[str, tuple[Callable[[Sequence[Picture], Path], None], str, dict[str, Any]]] = {
    # name -> how it is written, the value of data=, and further keys of data
    "coco": (coco, "coco", {}),
    "roboflow": (roboflow, "coco", {}),
    "voc_devkit": (voc_devkit, "voc", {"classes": list(CLASSES)}),
    "voc_beside": (voc_beside, "voc", {"classes": list(CLASSES), "first_pixel": 0}),
    "yolo_yaml": (yolo_yaml, "yolo", {}),
    "yolo_classes": (yolo_classes, "yolo", {}),
    "csv_corners": (csv_corners, "csv", {"classes": list(CLASSES)}),
    "csv_extents": (csv_extents, "csv", {"classes": list(CLASSES)}),
}


def write_small(folder: Path, pictures: Sequence[Picture]) -> None:
    """Draw black pictures of their sizes, and write XML files with corners from 0 beside them."""
    write_xml(pictures, folder, first_pixel=0)
    draw(pictures, folder)


def write_small_as(format: str, pictures: Sequence[Picture], root: Path) -> None:
    """Draw black pictures of their sizes, and write them in one of `FORMATS`."""
    draw(pictures, root.parent / f"{root.name}-drawn")
    pictures = [picture._replace(path=root.parent / f"{root.name}-drawn" / picture.path) for picture in pictures]
    FORMATS[format][0](pictures, root)


def draw(pictures: Sequence[Picture], folder: Path) -> None:
    """Draw black pictures of their sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.new("RGB", (picture.width, picture.height)).save(folder / picture.path.name)
