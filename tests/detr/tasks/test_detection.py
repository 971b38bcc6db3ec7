"""What the task says to the trainer, the evaluator and the user."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError


@pytest.fixture
def task(tmp_path):
    config = configure(
        "train", ["model=detr", f"data.root={tmp_path}", "data.train_count=12", "data.val_count=3", "data.test_count=3"]
    )
    return build(config["task"], data=build(config["data"]))


class Answers(torch.nn.Module):
    """A model that gives one answer to whatever it sees."""

    def __init__(self, queries: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.queries = queries

    def forward(self, images, sizes):
        logits = torch.zeros(2, len(images), self.queries, 5)
        logits[..., 0, 2], logits[..., 1:, 4] = 9.0, 9.0
        boxes = torch.tensor([0.5, 0.25, 0.5, 0.5]).expand(2, len(images), self.queries, 4)
        return {"logits": logits + self.weight, "boxes_cxcywh": boxes}


def test_answers_are_pixels_of_the_original_image(task, tmp_path):
    Image.new("RGB", (200, 100), (9, 9, 9)).save(tmp_path / "wide.png")
    (batch,) = task.read(str(tmp_path / "wide.png"))
    (answer,) = task.predict(Answers(3), batch)
    assert answer["boxes"][0].tolist() == pytest.approx([50, 0, 150, 50])
    assert answer["labels"][0] == 2 and answer["scores"][0] > 0.99 > 0.01 > answer["scores"][1]


def test_pictures_and_json_never_take_the_name_of_the_users_own_file(task, tmp_path):
    source = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64), (9, 9, 9)).save(source)
    before = source.read_bytes()
    (batch,) = task.read(str(source))
    (line,) = task.show(batch, task.predict(Answers(3), batch), tmp_path)
    assert source.read_bytes() == before
    assert "1 triangle" in line
    (found,) = json.loads((tmp_path / "photo.jpg.boxes.json").read_text())["objects"]
    assert found["name"] == "triangle" and found["box"] == pytest.approx([16, 0, 48, 32])
    assert Image.open(tmp_path / "photo.jpg.boxes.jpg").size[0] >= 64


def test_a_fresh_start_on_few_images_is_warned_of_but_not_on_the_drawn_set(task, monkeypatch):
    assert task.advice(pretrained=False) == []
    monkeypatch.setattr(type(task.data), "drawn", False)
    (advice,) = task.advice(pretrained=False)
    assert "only 12 training images" in advice and "checkpoint=FILE" in advice
    assert task.advice(pretrained=True) == []


def test_queries_that_give_nearly_one_box_raise_an_alarm(task):
    one = torch.tensor([[10.0, 10, 50, 50]]).repeat(20, 1)
    assert "nearly the same box" in task.alarms([{"boxes": one + 0.01 * torch.rand(20, 4)}])[0]
    assert task.alarms([{"boxes": torch.rand(20, 4) * 60}]) == []


def test_data_of_other_classes_are_not_evaluated(task):
    assert task.metric("test").categories[0]["name"] == "circle"
    task.restore({"categories": [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "cow", "emu"), 1)]})
    with pytest.raises(UserError, match=r'category \d "\w+", and this model knows "\w+" by that id'):
        task.metric("test")
    task.restore({"categories": [{"id": 1, "name": "circle"}]})
    with pytest.raises(UserError, match="knows none by that id"):
        task.metric("test")


def test_another_number_of_queries_than_the_models_is_refused(task):
    batch = task.data.collate([task.data.sample("train", 0, None)])
    with pytest.raises(UserError, match=r"task.queries=12, but the model has 7 queries"):
        task.loss(Answers(7), batch, task.normalisers(batch))


def test_sigmoid_classification_needs_a_logit_for_each_class(task):
    task.classification = "sigmoid"
    assert task.model_arguments() == {"classes": 4, "logits": 4}
    batch = task.data.collate([task.data.sample("train", 0, None)])
    with pytest.raises(UserError, match=r"classification=sigmoid needs a logit for each of the 4 classes.* has 5"):
        task.loss(Answers(12), batch, task.normalisers(batch))


def test_the_divisors_count_matched_and_unmatched_queries(task):
    """Q = 12, weight of "no object" 0.1: images with 2, 0 and 20 objects give 2 + 1.0, 1.2 and 12."""
    expected = {"queries.class": pytest.approx(16.2), "queries.box": 22.0, "queries.giou": 22.0}
    assert task.normalisers({"counts": [2, 0, 20]}) == expected


def test_state_is_all_that_prediction_needs(task, tmp_path):
    state = json.loads(json.dumps(task.state()))
    config = configure("train", ["model=detr", f"data.root={tmp_path / 'nowhere'}"])
    bare = build(config["task"], data=build(config["data"]))
    bare.restore(state)
    assert bare.model_arguments() == {"classes": 4, "logits": 5} and not Path(tmp_path / "nowhere").exists()
