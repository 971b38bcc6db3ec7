"""The detection task's predictions, messages and normalisers."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config.check import build
from common.config.compose import configure
from common.data.video import read_frames
from common.errors import UserError
from detr.evaluation.pictures import colour
from detr.tasks.detection import PredictOptions


@pytest.fixture
def task(tmp_path):
    config = configure(
        "train", ["model=detr", f"data.root={tmp_path}", "data.train_count=12", "data.val_count=3", "data.test_count=3"]
    )
    return build(config["task"], data=build(config["data"]))


class ConstantModel(torch.nn.Module):
    """A model with the same outputs for every image."""

    def __init__(self, queries: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.queries = queries

    def forward(self, images, sizes):
        logits = torch.zeros(2, len(images), self.queries, 5)
        logits[..., 0, 2], logits[..., 1:, 4] = 9.0, 9.0
        boxes = torch.tensor([0.5, 0.25, 0.5, 0.5]).expand(2, len(images), self.queries, 4)
        return {"logits": logits + self.weight, "boxes_cxcywh": boxes}


def test_predicted_boxes_are_in_pixels_of_the_original_image(task, tmp_path):
    Image.new("RGB", (200, 100), (9, 9, 9)).save(tmp_path / "wide.png")
    (batch,) = task.read(str(tmp_path / "wide.png"))
    (answer,) = task.predict(ConstantModel(3), batch)
    assert answer["boxes"][0].tolist() == pytest.approx([50, 0, 150, 50])
    assert answer["labels"][0] == 2 and answer["scores"][0] > 0.99 > 0.01 > answer["scores"][1]


def test_pictures_and_json_never_overwrite_the_users_file(task, tmp_path):
    source = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64), (9, 9, 9)).save(source)
    before = source.read_bytes()
    (batch,) = task.read(str(source))
    (line,) = task.show(batch, task.predict(ConstantModel(3), batch), tmp_path)
    assert source.read_bytes() == before
    assert "1 triangle" in line
    (detection,) = json.loads((tmp_path / "photo.jpg.boxes.json").read_text())["objects"]
    assert detection["name"] == "triangle" and detection["box"] == pytest.approx([16, 0, 48, 32])
    assert Image.open(tmp_path / "photo.jpg.boxes.jpg").size[0] >= 64


@pytest.mark.parametrize("name", [f"{'x' * 251}.png", "caf\udce9.png"], ids=["as long as a name may be", "not UTF-8"])
def test_images_of_any_name_are_answered(task, name, tmp_path):
    try:
        with open(tmp_path / name, "wb") as file:
            Image.new("RGB", (64, 64), (9, 9, 9)).save(file, "PNG")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    (batch,) = task.read(str(tmp_path / name))
    (line,) = task.show(batch, task.predict(ConstantModel(3), batch), tmp_path / "answers")
    line.encode()
    (answer,) = (tmp_path / "answers").glob("*.boxes.json")
    assert json.loads(answer.read_text("utf-8"))["file"] == str(tmp_path / name)


def test_each_frame_of_a_video_is_answered_with_its_time(task, tmp_path):
    from tests.video_files import write_video

    clips = tmp_path / "clips"
    (clips / "sub").mkdir(parents=True)
    write_video(clips / "sub/a.mp4", [0, 40, 500])
    (clips / "broken.mkv").write_text("no video")
    Image.new("RGB", (64, 64)).save(clips / "z.png")
    for _ in range(2):  # what was written the first time is not read the second time
        lines = []
        for batch in task.read(str(clips)):
            lines += task.show(batch, task.answers(ConstantModel(3), batch), clips / "answers")
        times = [f"sub/a.mp4 frame {i} at {time} s" for i, time in enumerate(("0.000", "0.040", "0.500"))]
        assert lines == [f"{what}: 1 triangle (score >= 0.5)" for what in (*times, "z.png")]
    assert len(task.unanswered) == 2 and "broken.mkv is broken or no video" in task.unanswered[0]
    answers = [json.loads(line) for line in (clips / "answers/sub/a.mp4.boxes.jsonl").read_text().splitlines()]
    assert [(answer["frame"], answer["time"]) for answer in answers] == [(0, 0.0), (1, 0.04), (2, 0.5)]
    assert all(answer["file"] == str(clips / "sub/a.mp4") for answer in answers)
    assert answers[0]["objects"] == [{"box": [16.0, 0.0, 48.0, 24.0], "name": "triangle", "score": 0.9995}]
    frames = list(read_frames(clips / "answers/sub/a.mp4.boxes.mp4"))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.04, 0.5], abs=1e-3)
    assert frames[0].image.shape == (3, 336, 448), "enlarged, so that labels are legible"


def test_a_users_image_is_turned_by_exif_as_data_exif_says(task, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg", exif=exif)
    for choice, shape in (("auto", [60, 40]), ("apply", [60, 40]), ("ignore", [40, 60])):
        monkeypatch.setattr(task.data, "exif", choice)
        (batch,) = task.read(str(tmp_path / "photo.jpg"))
        assert batch["original_sizes"].tolist() == [shape]
        list(task.show(batch, task.predict(ConstantModel(3), batch), tmp_path))
        width, height = Image.open(tmp_path / "photo.jpg.boxes.jpg").size
        assert (height > width) == (shape == [60, 40])


class RandomModel(ConstantModel):
    """A model with many overlapping boxes, the same for every image."""

    def forward(self, images, sizes):
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(1, 1, self.queries, 5, generator=random).repeat(2, len(images), 1, 1)
        boxes = torch.rand(1, 1, self.queries, 4, generator=random).repeat(2, len(images), 1, 1)
        return {"logits": logits + self.weight, "boxes_cxcywh": 0.4 + 0.2 * boxes}


def intersection_over_union(a, b):
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.6])
def test_suppression_keeps_the_best_of_overlapping_boxes_of_a_class(task, limit):
    """Boxes in descending order of score are kept unless they overlap with a kept box of their class."""
    task.options = replace(task.options, threshold=0.1)
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    every = task.predict(RandomModel(40), image)
    kept = []
    for record in every:  # the highest score first
        others = [other["box"] for other in kept if other["name"] == record["name"]]
        if all(intersection_over_union(record["box"], box) <= limit for box in others):
            kept.append(record)
    task.options = replace(task.options, nms=limit)
    assert task.predict(RandomModel(40), image) == kept and len({r["name"] for r in kept}) == 4 <= len(kept) < len(
        every
    )


def test_suppression_leaves_the_answers_for_metrics_as_they_are(task, tmp_path):
    task.options = replace(task.options, threshold=0.0, nms=0.3)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (batch,) = task.read(str(tmp_path / "a.png"))
    (answer,) = task.answers(RandomModel(40), batch)
    list(task.show(batch, [answer], tmp_path / "out"))
    objects = json.loads((tmp_path / "out/a.png.boxes.json").read_text())["objects"]
    assert len(answer["boxes"]) == 40 > len(objects) > 0


def test_options_of_a_users_yaml_without_suppression_keep_all_boxes():
    assert PredictOptions(threshold=0.5).nms is None


def test_predictions_of_an_image_are_named_records_in_any_of_its_forms(task, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 200, 3), dtype=np.uint8))
    photos = tmp_path / "photos"
    photos.mkdir()
    image.save(photos / "a.png")
    array = np.array(image)
    forms = [
        str(photos / "a.png"),
        photos / "a.png",
        image,
        array,
        array / 255,
        torch.tensor(array).permute(2, 0, 1),
    ]
    task.options = replace(task.options, threshold=0.2)
    expected = task.predict(RandomModel(9), forms[0])
    assert [{*record} for record in expected] == [{"box", "name", "score"}] * len(expected) and len(expected) > 2
    assert sorted(expected, key=lambda record: -record["score"]) == expected
    answer = task.answers(RandomModel(9), next(task.read(forms[0])))[0]
    (best,) = (answer["scores"] == answer["scores"].max()).nonzero()[:, 0].tolist()
    assert expected[0]["box"] == answer["boxes"][best].tolist()
    assert expected[0]["name"] == task.categories[int(answer["labels"][best])]["name"]
    for form in forms:
        records = task.predict(RandomModel(9), form)
        assert records == expected and isinstance(records, list)
    assert task.predict(RandomModel(9), forms) == [expected] * len(forms)
    for several in (photos, str(photos), f"{photos}/*.png"):
        assert task.predict(RandomModel(9), several) == [expected]


def test_predictions_show_themselves_as_the_picture_that_predict_writes(task, tmp_path):
    Image.fromarray(np.full((480, 640, 3), 90, dtype=np.uint8)).save(tmp_path / "a.png")
    (batch,) = task.read(str(tmp_path / "a.png"))
    list(task.show(batch, task.answers(ConstantModel(3), batch), tmp_path / "out"))
    records = pickle.loads(pickle.dumps(task.predict(ConstantModel(3), str(tmp_path / "a.png"))))
    shown, written = Image.open(io.BytesIO(records._repr_png_())), Image.open(tmp_path / "out/a.png.boxes.jpg")
    assert shown.size == written.size == (640, 480)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(written)).mean() < 2, "JPEG"
    assert shown.getpixel((320, 240)) == colour(2), "the box's lower edge"


def test_a_photo_held_as_an_object_is_turned_by_exif_as_data_exif_says(task, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg", exif=exif)
    for choice, width in (("auto", 40), ("apply", 40), ("ignore", 60)):
        monkeypatch.setattr(task.data, "exif", choice)
        with Image.open(tmp_path / "photo.jpg") as image:
            (record,) = task.predict(ConstantModel(1), image)
            assert record["box"][2] == pytest.approx(0.75 * width) and image.size == (60, 40), "unchanged"


def test_training_from_scratch_on_few_images_is_warned_of_unless_the_set_is_drawn(task, monkeypatch):
    assert task.advice(pretrained=False) == []
    monkeypatch.setattr(type(task.data), "drawn", False)
    (advice,) = task.advice(pretrained=False)
    assert "only 12 training images" in advice and "checkpoint=FILE" in advice
    assert task.advice(pretrained=True) == []


def test_doubts_about_annotations_are_advice_whether_pretrained_or_not(task):
    task.queries = 1
    for pretrained in (True, False):
        lines = task.advice(pretrained)
        assert [line.split(":")[0] for line in lines] == ["train", "val", "test"]
        assert all("have more objects than the model has queries (1)" in line for line in lines)


def test_queries_with_nearly_the_same_box_raise_an_alarm(task):
    boxes = torch.tensor([[10.0, 10, 50, 50]]).repeat(20, 1)
    assert "nearly the same box" in task.alarms([{"boxes": boxes + 0.01 * torch.rand(20, 4)}])[0]
    assert task.alarms([{"boxes": torch.rand(20, 4) * 60}]) == []


def test_data_with_other_classes_are_not_evaluated(task):
    assert task.metric("test").categories[0]["name"] == "circle"
    task.restore({"categories": [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "cow", "emu"), 1)]})
    with pytest.raises(UserError, match=r'category \d "\w+", but the model has "\w+" with that id'):
        task.metric("test")
    shifted = [{"id": c["id"] - 1, "name": c["name"]} for c in task.data.categories()]
    task.restore({"categories": shifted})
    with pytest.raises(
        UserError, match=r'category \d "\w+", but the model has "\w+" with that id and "\w+" under id \d;'
    ):
        task.metric("test")
    task.restore({"categories": [{"id": 1, "name": "circle"}]})
    with pytest.raises(UserError, match="has no class with that id"):
        task.metric("test")


def test_only_the_names_that_imported_files_without_names_get_fit_any_data(task):
    task.restore({"categories": [{"id": i, "name": f"class {i}"} for i in range(5)]})
    assert task.metric("test").categories[1]["name"] == "class 1"
    task.restore({"categories": [{"id": i, "name": f"class {name}"} for i, name in enumerate("abcde")]})
    with pytest.raises(UserError, match=r'the model has "class \w" with that id'):
        task.metric("test")


def test_classes_of_model_and_data_are_compared_in_either_form_of_unicode(task, monkeypatch):
    truth = task.data.ground_truth("test")
    monkeypatch.setattr(task.data, "ground_truth", lambda split: truth)
    truth["categories"][0]["name"] = "caf\u00e9"
    task.restore({"categories": [{"id": 1, "name": "cafe\u0301"}, *task.categories[1:]]})
    assert task.metric("test").categories[0]["name"] == "cafe\u0301"


def test_another_number_of_queries_than_the_models_is_refused(task):
    batch = task.data.collate([task.data.sample("train", 0, None)])
    with pytest.raises(UserError, match=r"task.queries=12, but the model has 7 queries"):
        task.loss(ConstantModel(7), batch, task.normalisers(batch))


def test_sigmoid_classification_needs_a_logit_for_each_class(task):
    task.classification = "sigmoid"
    assert task.model_arguments() == {"classes": 4, "logits": 4}
    batch = task.data.collate([task.data.sample("train", 0, None)])
    with pytest.raises(UserError, match=r"classification=sigmoid needs a logit for each of the 4 classes.* has 5"):
        task.loss(ConstantModel(12), batch, task.normalisers(batch))


def test_normalisers_count_matched_and_unmatched_queries(task):
    """Q = 12 and "no object" weighs 0.1: images with 2, 0 and 20 objects give 2 + 1.0, 1.2 and 12."""
    expected = {"queries.class": pytest.approx(16.2), "queries.box": 22.0, "queries.giou": 22.0}
    assert task.normalisers({"counts": [2, 0, 20]}) == expected


def test_prediction_needs_the_state_and_no_data(task, tmp_path):
    state = json.loads(json.dumps(task.state()))
    config = configure("train", ["model=detr", f"data.root={tmp_path / 'nowhere'}"])
    restored = build(config["task"], data=build(config["data"]))
    restored.restore(state)
    assert restored.model_arguments() == {"classes": 4, "logits": 5} and not Path(tmp_path / "nowhere").exists()
