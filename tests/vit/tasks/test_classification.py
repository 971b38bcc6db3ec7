"""The task's loss, answers, metric and checkpoints, and the files and pictures that it writes for users."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.task import Adopted
from common.train import assembly
from vit.tasks.classification import Classification

CPU = torch.device("cpu")
SMALL = ["model=vit", "model.width=32", "model.layers=3", "model.heads=2", "data.batch_size=16"]
MIXED = ["data.augmentation.mixup=0.8", "data.augmentation.cutmix=1.0", "data.augmentation.mix=0.7"]


def built(*keys: str) -> tuple[Classification, nn.Module]:
    """The task of a command line, and its model in evaluation mode with a non-zero head."""
    config = configure("train", [*SMALL, *keys])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build(config["model"], **task.model_arguments())
    nn.init.normal_(model.head.weight)
    return task, model.eval()


def training_batch(task: Classification, count: int = 6) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    return task.data.collate([task.data.sample("train", i, rng) for i in range(count)])


def evaluation_batch(task: Classification, count: int = 6, split: str = "test") -> dict[str, Any]:
    return task.data.collate([task.data.sample(split, i, None) for i in range(count)])


class ConstantModel(nn.Module):
    """A model that predicts the same class for every image, without features or patches."""

    def __init__(self, label: int, classes: int = 10):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.label, self.classes = label, classes

    def forward(self, images: Tensor) -> Tensor:
        one_hot = F.one_hot(torch.full((len(images),), self.label), self.classes)
        return self.weight + 9 * one_hot.to(self.weight.dtype)  # (B, K)


# Training.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_with_soft_targets(smoothing: float) -> None:
    """K = 10: a target is `shares` of the label and the rest of its partner's; torch smooths the soft targets."""
    task, model = built(*MIXED, f"task.loss.smoothing={smoothing}")
    batch = training_batch(task)
    own, partner = (F.one_hot(batch[key], 10) for key in ("labels", "other_labels"))
    targets = batch["shares"][:, None] * own + (1 - batch["shares"])[:, None] * partner
    logits = model(task.data.inputs(batch, CPU))
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert parts == {} and 0 < batch["shares"].min() < 1


def test_without_mixing_the_loss_is_that_of_the_labels() -> None:
    task, model = built("task.loss.smoothing=0.2")
    batch = training_batch(task)
    expected = F.cross_entropy(model(task.data.inputs(batch, CPU)), batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(task.loss(model, batch, {"images": 6.0})[0], expected, rtol=1e-5, atol=0)
    half = task.loss(model, batch, {"images": 12.0})[0]
    torch.testing.assert_close(half, expected / 2, rtol=1e-5, atol=0)


def test_the_loss_of_half_logits_is_fp32_and_that_of_double_logits_is_double() -> None:
    task, _ = built()
    batch = training_batch(task)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert task.loss(ConstantModel(3).to(dtype), batch, {"images": 1.0})[0].dtype == expected


def test_the_normaliser_of_a_step_is_its_number_of_views() -> None:
    task, _ = built("data.augmentation.repeats=3", *MIXED)
    assert task.normalisers(training_batch(task, 4)) == {"images": 12.0}


@pytest.mark.parametrize(("key", "what"), [("labels", "sample 2"), ("other_labels", "the partner of sample 2")])
@pytest.mark.parametrize("label", [-1, 10])
def test_a_sample_with_a_label_that_is_no_class_is_named_before_the_step(key: str, what: str, label: int) -> None:
    task, _ = built(*MIXED)
    batch = training_batch(task)
    batch[key][2] = label
    with pytest.raises(UserError, match=f"^{what}: its label is {label}, and the classes are numbered from 0 to 9"):
        task.normalisers(batch)


def test_training_from_scratch_on_few_photographs_is_warned_of_but_not_on_small_images() -> None:
    task, _ = built()
    assert task.advice(pretrained=False) == []
    task.data.image_size = (224, 224)
    (advice,) = task.advice(pretrained=False)
    assert f"only {task.data.count('train'):,} training images" in advice and "checkpoint=FILE" in advice
    assert task.advice(pretrained=True) == []


def test_one_class_for_all_images_raises_an_alarm_and_two_do_not() -> None:
    task, _ = built()
    answers = task.predict(ConstantModel(3), evaluation_batch(task, 12))
    (alarm,) = task.alarms(answers)
    assert alarm.startswith('all images are classified as "3"')
    assert task.alarms([*answers, *task.predict(ConstantModel(4), evaluation_batch(task, 1))]) == []
    assert task.alarms(answers[:9]) == [], "a few images may well be of one class"


# Answers.


def test_the_models_input_is_the_same_at_any_precision() -> None:
    task, model = built("data.augmentation.crop=resized", "data.augmentation.scale=[0.3,0.8]")
    batch = training_batch(task)
    plain = task._images(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task._images(model, batch), plain)


def test_an_answer_holds_the_most_probable_class_and_all_log_probabilities() -> None:
    task, model = built()
    batch = evaluation_batch(task)
    expected = model(task.data.inputs(batch, CPU)).detach().double().softmax(dim=1)
    answers = task.predict(model, batch)
    assert len(answers) == 6 and len({answer["label"] for answer in answers}) > 1
    for answer, probabilities in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer["log_probabilities"].double().exp(), probabilities, rtol=1e-5, atol=1e-7)
        assert answer["label"] == int(probabilities.argmax()) and answer["name"] == str(answer["label"])
        assert answer["probability"] == pytest.approx(float(probabilities.max()), rel=1e-5)
        assert answer.keys() == {"log_probabilities", "label", "name", "probability"}
        assert not answer["log_probabilities"].requires_grad


POOLINGS = {
    "token": ["model.pooling=token"],
    "token and registers": ["model.pooling=token", "model.registers=3"],
    "mean": ["model.pooling=mean"],
    "mean of norms and registers": ["model.pooling=mean_then_norm", "model.registers=2"],
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("size", ["8", "[4,6]"])
def test_attention_maps_cover_the_patches_in_every_layer(pooling: str, size: str) -> None:
    task, model = built(*POOLINGS[pooling], f"data.image_size={size}", "task.predict.attention=maps")
    batch, recorded = evaluation_batch(task, 2), []
    for layer in range(-3, 3):
        task.options = _options(task, layer=layer)
        maps = torch.stack([answer["maps"] for answer in task.predict(model, batch)])
        height, width = (side // 2 for side in task.data.image_size)
        assert maps.shape == (2, 2, height, width) and maps.dtype == torch.float32
        total = maps.sum(dim=(-1, -2))
        assert (maps >= 0).all() and (total <= 1 + 1e-5).all()
        assert bool((total > 1 - 1e-5).all()) == (pooling == "mean"), "only patches to look at"
        recorded.append(maps)
    assert all(torch.equal(recorded[i], recorded[i + 3]) for i in range(3)), "layer -3 of three is layer 0"
    assert not torch.allclose(recorded[0], recorded[1]) and not torch.allclose(recorded[1], recorded[2])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_rollout_is_one_map_up_to_any_layer(pooling: str) -> None:
    task, model = built(*POOLINGS[pooling], "task.predict.attention=rollout")
    batch, recorded = evaluation_batch(task, 2), []
    for layer in (0, 1, 2, -1):
        task.options = _options(task, layer=layer)
        recorded.append(torch.stack([answer["maps"] for answer in task.predict(model, batch)]))
        assert (
            recorded[-1].shape == (2, 1, 4, 4)
            and (recorded[-1] >= 0).all()
            and (recorded[-1].sum(dim=(1, 2, 3)) <= 1.00001).all()
        )
    assert torch.equal(recorded[2], recorded[3]) and not torch.allclose(recorded[0], recorded[2])


def test_maps_do_not_change_the_rest_of_the_answer() -> None:
    task, model = built()
    batch = evaluation_batch(task)
    plain = task.predict(model, batch)
    task.options = _options(task, attention="maps")
    for answer, answer_with_maps in zip(plain, task.predict(model, batch), strict=True):
        assert torch.equal(answer["log_probabilities"], answer_with_maps["log_probabilities"])


def test_a_missing_layer_is_refused() -> None:
    task, model = built("task.predict.attention=maps", "task.predict.layer=3")
    with pytest.raises(UserError, match="there is no layer 3: this model has 3 layers; give a number from 0 to 2"):
        task.predict(model, evaluation_batch(task))


@pytest.mark.parametrize("attention", ["maps", "rollout"])
def test_maps_of_a_model_without_patches_are_refused(attention: str) -> None:
    task, _ = built(f"task.predict.attention={attention}")
    with pytest.raises(
        UserError, match=rf"attention={attention}: ConstantModel lacks patches, .*use task\.predict\.attention=none\.$"
    ):
        task.predict(ConstantModel(3), evaluation_batch(task))


@pytest.mark.parametrize("model", ["vit", "cnn"])
def test_words_and_maps_of_a_model_without_them_are_refused(model: str) -> None:
    config = configure("train", [f"model={model}"])
    task = build(config["task"], data=build(config["data"]))
    network = build(config["model"], **task.model_arguments()).eval()
    task.options = _options(task, attention="words")
    with pytest.raises(UserError, match=r"the patches of [A-Za-z]+ have no words, as those of a TNT have"):
        task.answers(network, evaluation_batch(task, 1))
    task.options = _options(task, attention="maps")
    if model == "cnn":
        with pytest.raises(UserError, match="ResNet lacks patches"):
            task.answers(network, evaluation_batch(task, 1))


@pytest.mark.parametrize("attention", ["maps", "rollout", "words"])
@pytest.mark.parametrize("size", ["8", "[8,12]"])
def test_outer_and_inner_attention_of_a_tnt_are_drawn(tmp_path: Path, attention: str, size: str) -> None:
    keys = ["model=tnt", f"task.predict.attention={attention}", f"data.image_size={size}", "task.predict.layer=0"]
    config = configure("train", keys)
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    network = build(config["model"], **task.model_arguments()).eval()
    Image.new("RGB", (30, 20), (200, 30, 30)).save(tmp_path / "red.png")
    (batch,) = task.read(str(tmp_path / "red.png"))
    (answer,) = task.answers(network, batch)
    grid = tuple(side // 4 for side in task.data.image_size)
    assert answer["maps"].shape == {"maps": (4, *grid), "rollout": (1, *grid), "words": (16, 4, 4)}[attention]
    assert ("place" in answer) == (attention == "words")
    [*task.show(batch, [answer], tmp_path / "out")]
    shown = Image.open(io.BytesIO(task.predict(network, str(tmp_path / "red.png"))._repr_png_()))
    with Image.open(tmp_path / "out/red.png.attention.png") as picture:
        assert min(*picture.size, *shown.size) > 100 and picture.mode == "RGB"


def test_neighbours_are_training_images_and_are_computed_again_for_new_weights() -> None:
    task, model = built("task.predict.neighbours=1", "data.val_count=1350")  # which leaves 47 in train
    batch = evaluation_batch(task, 47, "train")
    task.metric("test")
    nearest = [answer["nearest"] for answer in task.predict(model, batch)]
    assert nearest == batch["labels"].tolist(), "the nearest of a training image is itself"
    with torch.no_grad():
        model.patches.weight.zero_()  # now all images look alike
    task.metric("test")
    assert len({answer["nearest"] for answer in task.predict(model, batch)}) == 1


def test_neighbours_are_training_images_without_augmentation() -> None:
    """With strong augmentation, an augmented or mixed training image would not be its own nearest neighbour."""
    task, model = built("task.predict.neighbours=1", "data.augmentation.erase=1", "data.augmentation.repeats=2", *MIXED)
    batch = evaluation_batch(task, 30, "train")
    assert [answer["nearest"] for answer in task.predict(model, batch)] == batch["labels"].tolist()


def test_neighbours_of_a_model_without_features_are_refused() -> None:
    task, _ = built("task.predict.neighbours=5")
    with pytest.raises(UserError, match=r"neighbours: ConstantModel has no method features\(images\); use 0\.$"):
        task.predict(ConstantModel(3), evaluation_batch(task))


def _options(task: Classification, **changed: Any) -> Any:
    return type(task.options)(**{**vars(task.options), **changed})


# Evaluation and checkpoints.


def test_evaluation_on_data_of_other_classes_is_refused() -> None:
    task, _ = built()
    assert task.metric("test").classes == list("0123456789")
    task.restore({"classes": ["cat", "dog"]})
    with pytest.raises(
        UserError, match=r"The data have 10 classes \(0, 1, 2, 3, 4, \.\.\.\), .* learnt 2 \(cat, dog\);"
    ):
        task.metric("test")
    task.restore({"classes": list("1234567890")})
    with pytest.raises(UserError, match="evaluate it on data of its own classes"):
        task.metric("test")


def test_classes_in_another_order_are_refused_with_the_key_and_unicode_forms_are_equal(tmp_path: Path) -> None:
    for name in ("1", "2", "10", "caf\u00e9"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "x.png")
    task, _ = _folder_task(tmp_path, "data.val_count=0")
    task.restore({"classes": ["1", "10", "2", "cafe\u0301"]})
    assert task.metric("train").classes == ["1", "10", "2", "caf\u00e9"]
    task.restore({"classes": ["1", "2", "10", "caf\u00e9"]})
    with pytest.raises(UserError, match=r"in another order \(1, 10, 2, .* instead of 1, 2, 10, .*data.class_order"):
        task.metric("train")


def test_the_order_that_an_imported_head_is_taken_to_have_is_shown(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "x.png")
    task, _ = _folder_task(tmp_path)
    task.restore({"classes": ["class 0", "class 1", "class 2"]})
    names, warning = task.evaluation_notes()
    assert names == "classes: 1, 10, 2" and "data.class_order=natural" in warning
    task.restore({"classes": ["1", "10", "2"]})
    assert task.evaluation_notes() == []


def test_an_imported_model_without_class_names_is_evaluated_on_as_many_classes() -> None:
    task, _ = built()
    task.restore({"classes": [f"class {i}" for i in range(10)]})
    assert task.metric("test").classes == list("0123456789")
    task.restore({"classes": [f"class {i}" for i in range(9)]})
    with pytest.raises(UserError, match=r"10 classes .* learnt 9 \(class 0, class 1"):
        task.metric("test")


def test_prediction_from_a_file_without_a_head_is_refused() -> None:
    task, _ = built()
    with pytest.raises(UserError, match="has no head"):
        task.restore({"classes": []})


def test_prediction_needs_only_the_stored_state(tmp_path: Path) -> None:
    state = json.loads(json.dumps(built()[0].state()))
    bare, _ = _folder_task(tmp_path / "nowhere")
    bare.restore(state)
    assert bare.model_arguments() == {"classes": 10, "channels": 3, "image_size": (8, 12)}
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("count", "head_is_kept"), [(10, True), (7, False)])
def test_an_imported_head_of_as_many_classes_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, head_is_kept: bool
) -> None:
    """As many classes are assumed to be the same classes; otherwise the head is re-initialised."""
    task, model = built()
    theirs = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    theirs |= {"head.weight": torch.full((count, 32), 0.25), "head.bias": torch.full((count,), 0.25)}

    def adopt(tensors: dict[str, Any], classes: list[str] | None, image_size: tuple[int, int]) -> Adopted:
        assert classes == list("0123456789") and image_size == (8, 8)
        names = classes if count == len(classes) else [f"class {i}" for i in range(count)]
        return Adopted(theirs, {"classes": names}, ["their.extra"])

    monkeypatch.setattr("vit.tasks.classification.importing.adopt", adopt)
    torch.save({"theirs": torch.zeros(1)}, tmp_path / "theirs.pth")
    message = assembly.load_initial_weights(model, task, tmp_path / "theirs.pth")
    assert message.endswith("unused: their.extra") and ("re-initialised: head.weight, head.bias;" in message) == (
        not head_is_kept
    )
    assert bool((model.head.weight == 0.25).all()) == head_is_kept and (model.patches.weight == 0.25).all()


# A user's own images.


def _folder_task(root: Path, *keys: str) -> tuple[Classification, Callable[[], nn.Module]]:
    config = configure("train", [*SMALL, "data=imagefolder", f"data.root={root}", "data.image_size=[8,12]", *keys])
    task = build(config["task"], data=build(config["data"]))
    return task, lambda: build(config["model"], **task.model_arguments()).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "red.jpg")
    Image.new("L", (9, 50), 90).save(folder / "a=grey.png")
    return folder


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_a_users_images_of_any_size_and_mode_are_read_one_by_one(kind: str, photos: Path) -> None:
    task, model = built() if kind == "grey" else _folder_task(photos)
    if kind == "colour":
        task.restore({"classes": ["a", "b"]})
        model = model()
    batches = [*task.read(str(photos))]
    assert [Path(batch["files"][0]).name for batch in batches] == ["a=grey.png", "red.jpg"]
    for batch in batches:
        assert batch["labels"].tolist() == [-1] and len(task.predict(model, batch)) == 1
    assert len([*task.read(str(photos / "red.jpg"))]) == 1
    with pytest.raises(UserError, match="neither an image nor a folder of images, nor a pattern"):
        [*task.read(str(photos / "nothing"))]


def test_an_answer_is_a_line_and_a_json_file_and_changes_no_other_file(photos: Path) -> None:
    task, _ = built("task.predict.top=2")
    before = {file: file.read_bytes() for file in photos.iterdir()}
    (batch,) = task.read(str(photos / "red.jpg"))
    (line,) = task.show(batch, task.predict(ConstantModel(3), batch), photos)
    assert line == "red.jpg: 3 0.999, 0 0.000"
    content = json.loads((photos / "red.jpg.classes.json").read_text())
    assert content == {
        "file": str(photos / "red.jpg"),
        "classes": [{"name": "3", "probability": 0.9989}, {"name": "0", "probability": 0.0001}],
    }
    assert all(file.read_bytes() == content for file, content in before.items())
    assert {file.name for file in photos.iterdir()} == {"red.jpg", "a=grey.png", "red.jpg.classes.json"}


def test_the_class_by_neighbours_is_shown_beside_the_predicted_class(photos: Path) -> None:
    task, model = built("task.predict.neighbours=3")
    (batch,) = task.read(str(photos / "red.jpg"))
    answers = task.predict(model, batch)
    (line,) = task.show(batch, answers, photos)
    assert line.endswith(f"; nearest training images: {answers[0]['nearest']}")
    assert json.loads((photos / "red.jpg.classes.json").read_text())["nearest"] == str(answers[0]["nearest"])


def test_predictions_of_an_image_are_named_records_in_any_of_its_forms(photos: Path) -> None:
    task, model = built("task.predict.top=3")
    (batch,) = task.read(str(photos / "red.jpg"))
    shares = task.answers(model, batch)[0]["log_probabilities"].exp()
    expected = [
        {"name": str(label), "share": float(shares[label])} for label in shares.argsort(descending=True)[:3].tolist()
    ]
    with Image.open(photos / "red.jpg") as image:
        array = np.array(image)
        forms = [photos / "red.jpg", str(photos / "red.jpg"), image, array, torch.tensor(array).permute(2, 0, 1)]
        for form in forms:
            assert task.predict(model, form) == expected
        several = task.predict(model, [image, str(photos)])
    assert several[0] == expected and len(several[1]) == 2 and several[1][1] == expected
    assert several[1][0] == task.predict(model, photos / "a=grey.png") != expected


def test_a_prediction_shows_itself_as_the_image_with_its_classes_or_its_attention(photos: Path, tmp_path: Path) -> None:
    image = Image.open(photos / "red.jpg")
    task, model = built("task.predict.top=1")
    records = pickle.loads(pickle.dumps(task.predict(ConstantModel(3), image)))
    shown = np.array(Image.open(io.BytesIO(records._repr_png_())))
    assert records == [{"name": "3", "share": pytest.approx(0.9989, abs=1e-4)}]
    assert shown.shape[:2] > (300, 400) and np.abs(shown[100, 100] - (200.0, 30, 30)).max() < 5
    assert (shown[-2, -2] == 225).all(), "the caption"
    task, model = built("task.predict.attention=rollout")
    (batch,) = task.read(str(photos / "red.jpg"))
    list(task.show(batch, task.answers(model, batch), tmp_path / "out"))
    png = task.predict(model, image)._repr_png_()
    written = Image.open(tmp_path / "out/red.jpg.attention.png")
    assert np.array_equal(np.array(Image.open(io.BytesIO(png))), np.array(written))


def test_no_more_classes_are_shown_than_exist(photos: Path, tmp_path: Path) -> None:
    task, model = _folder_task(photos)
    task.restore({"classes": ["cat", "Übergröße"]})
    (batch,) = task.read(str(photos / "red.jpg"))
    (line,) = task.show(batch, task.predict(model(), batch), tmp_path / "out" / "deeper")
    assert line.count(", ") == 1 and "cat 0.5" in line and "Übergröße 0.5" in line


@pytest.mark.parametrize("attention", ["maps", "rollout"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_attention_is_written_as_a_picture(photos: Path, tmp_path: Path, attention: str, pooling: str) -> None:
    task, model = _folder_task(photos, f"task.predict.attention={attention}", *POOLINGS[pooling])
    task.restore({"classes": ["cat", "dog"]})
    network = model()
    for batch in task.read(str(photos)):
        [*task.show(batch, task.predict(network, batch), tmp_path / "out")]
    for name in ("red.jpg", "a=grey.png"):
        with Image.open(tmp_path / f"out/{name}.attention.png") as picture:
            assert min(picture.size) > 100 and picture.mode == "RGB"


def test_pictures_for_the_log_are_of_one_size_for_class_names_of_any_length() -> None:
    task, model = built()
    task.restore({"classes": [f"{'a very long name of many words ' * i}{i}" for i in range(10)]})
    batch = evaluation_batch(task, 12)
    pictures = task.pictures(batch, task.predict(model, batch), 8)
    assert pictures.shape[:2] == (8, 3) and pictures.dtype == torch.uint8
    assert len(task.pictures(evaluation_batch(task, 3), task.predict(model, evaluation_batch(task, 3)), 8)) == 3


def test_the_colour_of_a_caption_says_correct_wrong_or_unknown(photos: Path) -> None:
    task, _ = built()
    batch = evaluation_batch(task, 12)
    (unknown,) = task.read(str(photos / "red.jpg"))
    label = int(batch["labels"][0])
    correct = batch["labels"] == label

    def colours(batch: dict[str, Any]) -> list[tuple[int, ...]]:
        """Colours of the captions, at the right end of each."""
        pictures = task.pictures(batch, task.predict(ConstantModel(label), batch), 12)
        return [tuple(picture[:, -2, -2].tolist()) for picture in pictures]

    assert 0 < correct.sum() < 12
    colour_by_correctness = dict(zip(correct.tolist(), colours(batch), strict=True))  # the last colour for each
    assert colours(batch) == [colour_by_correctness[is_correct] for is_correct in correct.tolist()]
    assert len({*colour_by_correctness.values(), *colours(unknown)}) == 3
