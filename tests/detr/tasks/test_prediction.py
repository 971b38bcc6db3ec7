"""Pictures of attention in prediction; see test_detection.py for predictions themselves."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from common.config.check import build
from common.config.compose import configure
from common.data.image_objects import to_image
from common.errors import UserError
from common.nn.attention import Attention
from common.report.colours import HEAT, ramp
from common.report.tiles import SPACING
from detr.tasks.detection import PredictOptions

HOT = (0.65 * ramp(torch.tensor(1.0), HEAT)).round().to(torch.uint8)  # the colour of a map's maximum on black


@pytest.fixture
def task(tmp_path):
    few = ["data.train_count=2", "data.val_count=2", "data.test_count=2"]
    config = configure("train", ["model=detr", f"data.root={tmp_path / 'shapes'}", *few])
    task = build(config["task"], data=build(config["data"]))
    task.options = replace(task.options, attention=True)
    return task


class OneCell(nn.Module):
    """A detector whose queries 0, 1 and 2 attend to cells 3, 6 and 1; its encoder's positions attend to themselves.

    A cell has 16 x 16 pixels. Query 1 detects nothing; query 2 has a higher score than query 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"cross_attention": Attention(width=64, heads=1)})
        self.encoder = nn.ModuleDict({"attention": Attention(width=64, heads=1)})
        for attention in (self.decoder["cross_attention"], self.encoder["attention"]):
            with torch.no_grad():
                attention.in_proj.weight.copy_(torch.eye(64).repeat(3, 1))
                attention.in_proj.bias.zero_()

    def memory_grid(self, height, width):
        return -(-height // 16), -(-width // 16)

    def forward(self, images, sizes):
        height, width = self.memory_grid(*images.shape[-2:])
        memory = 100 * torch.eye(64)[None, : height * width]  # (1, M, 64)
        self.encoder["attention"](q=memory, k=memory, v=memory)
        self.decoder["cross_attention"](q=memory[:, [3, 6, 1]], k=memory, v=memory)
        logits = torch.zeros(1, 3, 5)
        logits[0, [0, 1, 2], [2, 4, 0]] = torch.tensor([4.0, 9.0, 9.0])  # a triangle, no object, a circle
        boxes = torch.tensor([[0.2, 0.8, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5], [0.9, 0.2, 0.1, 0.1]])
        return [{"logits": logits, "boxes_cxcywh": boxes[None]}]


def lit(picture, number):
    """The hot region x0, y0, x1, y1 of a tile of a sheet of 3 tiles of 400 x 200 pixels, in two rows."""
    y, x = number // 2 * ((picture.shape[1] + SPACING) // 2), number % 2 * (400 + SPACING)
    rows, columns = (picture[:, y : y + 200, x : x + 400] == HOT[:, None, None]).all(0).nonzero().unbind(1)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_pictures_light_what_each_detection_attends_to_in_order_of_scores(task, tmp_path):
    """The image of 400 x 200 pixels becomes 64 x 32 pixels for the shapes' task: 2 rows of 4 cells."""
    Image.new("RGB", (400, 200)).save(tmp_path / "photo.png")
    (batch,) = task.read(str(tmp_path / "photo.png"))
    height, width = batch["images"].shape[-2:]
    assert width == 2 * height
    (line,) = task.show(batch, task.answers(OneCell(), batch), tmp_path / "answers")
    assert line == "photo.png: 1 triangle, 1 circle (score >= 0.5)"
    columns = -(-width // 16)
    side = 400 / columns
    queries = to_image(tmp_path / "answers/photo.png.attention.png", "auto")
    for number, cell in ((1, 1), (2, 3)):  # the circle of query 2, then the triangle of query 0
        row, column = divmod(cell, columns)
        assert lit(queries, number) == (column * side, row * side, (column + 1) * side, (row + 1) * side)
    encoder = to_image(tmp_path / "answers/photo.png.encoder.png", "auto")
    for number, (x, y) in ((1, (360, 40)), (2, (80, 160))):  # the boxes' centres
        x0, y0, x1, y1 = lit(encoder, number)
        assert x0 <= x < x1 and y0 <= y < y1 and (x1 - x0, y1 - y0) == (side, side)
    assert {file.name for file in (tmp_path / "answers").iterdir()} == {
        f"photo.png.{ending}" for ending in ("boxes.jpg", "boxes.json", "attention.png", "encoder.png")
    }


def test_a_notebook_shows_the_picture_of_the_queries(task, tmp_path):
    Image.new("RGB", (400, 200)).save(tmp_path / "photo.png")
    (batch,) = task.read(str(tmp_path / "photo.png"))
    list(task.show(batch, task.answers(OneCell(), batch), tmp_path / "answers"))
    records = task.predict(OneCell(), tmp_path / "photo.png")
    shown = Image.open(io.BytesIO(records._repr_png_()))
    assert shown.tobytes() == Image.open(tmp_path / "answers/photo.png.attention.png").tobytes()
    assert [record["name"] for record in records] == ["circle", "triangle"]


def test_attention_is_not_recorded_in_evaluation_or_without_the_option(task, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (batch,) = task.read(str(tmp_path / "a.png"))
    assert "attention" in task.answers(OneCell(), batch)[0]
    evaluation = {key: value for key, value in batch.items() if key not in ("names", "originals")}
    assert "attention" not in task.answers(OneCell(), evaluation)[0]
    task.options = PredictOptions(threshold=0.5)
    (answer,) = task.answers(OneCell(), batch)
    assert "attention" not in answer
    list(task.show(batch, [answer], tmp_path / "answers"))
    assert not [*(tmp_path / "answers").glob("*.png")]


def test_a_video_is_refused_before_its_frames_are_read(task, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"attention=true draws the attention in images, and .*clip\.mp4 is a video"):
        next(task.read(str(tmp_path / "clip.mp4")))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert [batch["names"] for batch in task.read(str(tmp_path))] == [["a.png"]]
    assert "clip.mp4 is a video" in task.unanswered[0]


def test_a_batch_of_two_images_is_refused(task, tmp_path):
    samples = [task.data.view(torch.zeros(3, 64, 64, dtype=torch.uint8), Path("a.png"))] * 2
    batch = task.data.collate(samples) | {"names": ["a.png", "b.png"]}
    with pytest.raises(UserError, match=r"one image a batch, and Detection\.read gave 2"):
        task.answers(OneCell(), batch)


def test_a_detector_without_attention_is_refused_in_one_sentence(task, tmp_path):
    class Dense(OneCell):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.weight = nn.Parameter(torch.zeros(()))

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (batch,) = task.read(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"^task\.predict\.attention: Dense has no module named cross_attention"):
        task.answers(Dense(), batch)


@pytest.mark.parametrize("two_stage", [False, True])
@torch.no_grad()
def test_the_sampling_points_of_each_detections_query_are_recorded(tmp_path, two_stage):
    """Of a Deformable DETR with random weights, which may detect several classes by one query.

    The reference points are compared with the guide of the last cross-attention.
    """
    few = ["data.train_count=2", "data.val_count=2", "data.test_count=2", f"data.root={tmp_path / 'shapes'}"]
    keys = [*few, f"model.two_stage={two_stage}", "model.width=16", "model.heads=2", "task.predict.threshold=0"]
    config = configure("train", ["model=deformable_detr", *keys, "task.predict.attention=true"])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build(config["model"], **task.model_arguments()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    pixels = torch.randint(0, 256, (70, 130, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (batch,) = task.read(str(tmp_path / "photo.png"))
    guides = []
    hook = model.decoder.blocks[-1].cross_attention.register_forward_hook(
        lambda module, args, kwargs, output: guides.append(kwargs["guide"]), with_kwargs=True
    )
    (answer,) = task.answers(model, batch)
    hook.remove()
    queries, seen = answer["queries"], answer["attention"]
    assert len(answer["scores"]) == 48 > len(queries.unique()) > 4  # 12 queries, 4 classes: all pairs
    levels = len(guides[0].shapes)
    assert seen.queries.locations.shape == (48, 2 * levels * 2, 2) == seen.centres.locations.shape
    assert torch.allclose(seen.queries.references, guides[0].places[0, queries, 0, :2])
    assert torch.allclose(seen.queries.weights.sum(1), torch.ones(48), atol=1e-5)
    list(task.show(batch, [answer], tmp_path / "answers"))
    assert {file.name for file in (tmp_path / "answers").glob("*.png")} == {
        "photo.png.attention.png",
        "photo.png.encoder.png",
    }
