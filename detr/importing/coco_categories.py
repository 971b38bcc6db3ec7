"""COCO's classes (Lin et al. 2014, arXiv 1405.0312) in files whose class index is the category id."""

from typing import Any

# COCO's classes by category id, which is the official class index; unused ids are "N/A".
COCO_NAMES = tuple(
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,umbrella,N/A,N/A,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,N/A,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,"
    "remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush".split(",")
)

# Classes of stuff in COCO's panoptic task (Kirillov et al. 2019, arXiv 1801.00868): category id and name.
STUFF = dict(
    part.split(" ", 1)
    for part in (
        "92 banner,93 blanket,95 bridge,100 cardboard,107 counter,109 curtain,112 door-stuff,118 floor-wood,119 flower,"
        "122 fruit,125 gravel,128 house,130 light,133 mirror-stuff,138 net,141 pillow,144 platform,145 playingfield,"
        "147 railroad,148 river,149 road,151 roof,154 sand,155 sea,156 shelf,159 snow,161 stairs,166 tent,168 towel,"
        "171 wall-brick,175 wall-stone,176 wall-tile,177 wall-wood,178 water-other,180 window-blind,181 window-other,"
        "184 tree-merged,185 fence-merged,186 ceiling-merged,187 sky-other-merged,188 cabinet-merged,189 table-merged,"
        "190 floor-other-merged,191 pavement-merged,192 mountain-merged,193 grass-merged,194 dirt-merged,"
        "195 paper-merged,196 food-other-merged,197 building-other-merged,198 rock-merged,199 wall-other-merged,"
        "200 rug-merged"
    ).split(",")
)
PANOPTIC_COUNT = 250  # class indices of official panoptic models; the largest id is 200


def numbered_categories(count: int) -> list[dict[str, Any]]:
    """Return the categories of a file whose class index is the category id.

    With COCO's 91 indices, they have COCO's names; with any other number, they are named "class 0", "class 1" and so
    on.
    """
    names = COCO_NAMES if count == len(COCO_NAMES) else [f"class {i}" for i in range(count)]
    return [{"id": i, "name": name} for i, name in enumerate(names)]


def panoptic_categories() -> list[dict[str, Any]]:
    """Return the categories of an official panoptic model: things up to id 90, then stuff; unused ids are "N/A"."""
    unused = ["N/A"] * (PANOPTIC_COUNT - len(COCO_NAMES))
    names = [STUFF.get(str(i), name) for i, name in enumerate([*COCO_NAMES, *unused])]
    return [{"id": i, "name": name, "isthing": int(i < len(COCO_NAMES))} for i, name in enumerate(names)]
