"""Small sets in memory: samples of views and partners, their order in a batch, for any split into micro-batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional

from common.data import batching
from common.errors import UserError
from common.machine.device import to_device
from common.machine.seeds import generator
from vit.data import augmentation
from vit.data.augmentation import Augmentation
from vit.data.in_memory import Images, InMemory, height_and_width, split_images

CPU = torch.device("cpu")
NOTHING: dict[str, Any] = {
    **{"crop": "none", "scale": (0.5, 1.0), "ratio": (0.75, 4 / 3), "padding": 0, "flip": 0.0, "policy": "none"},
    **{"operations": 2, "magnitude": 9, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "cutmix_share": 0.5, "mix": 1.0},
    "repeats": 1,
}
EVERYTHING = {
    "crop": "resized",
    "flip": 0.5,
    "policy": "trivial",
    "erase": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 2,
}
COUNTS = {"train": 24, "val": 5, "test": 7}


class Toy(InMemory):
    """Noise in three classes; image i of a split has the label i % 3."""

    names = ("ant", "bee", "cat")
    channels = 3

    def __init__(self, *, image_size: Any = (8, 8), flat: bool = False, **changes: Any):
        options = Augmentation(**{**NOTHING, **changes})
        mean, std = ([0.0] * self.channels, [1 / 255] * self.channels) if flat else (MEAN, STD)
        mean, std = mean[: self.channels], std[: self.channels]
        super().__init__(batch_size=8, image_size=image_size, mean=mean, std=std, augmentation=options)
        self.flat, self.loads = flat, 0

    def load(self) -> dict[Any, Images]:
        self.loads += 1
        return {split: (self.pixels(split, count), torch.arange(count) % 3) for split, count in COUNTS.items()}

    def pixels(self, split: str, count: int) -> Tensor:
        """Noise images, or with `flat` images filled with their row number."""
        if self.flat:
            return torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, self.channels, 8, 8)
        shape = (count, self.channels, 8, 8)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator("toy", split))


class Grey(Toy):
    channels = 1


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def samples(data: InMemory, *indices: int, epoch: int = 0) -> list[dict[str, Any]]:
    """Training samples, each with a generator of its own, as a loader makes them."""
    return [data.sample("train", i, generator(0, "sample", epoch, i)) for i in indices]


def training_batch(data: InMemory, *indices: int, epoch: int = 0) -> dict[str, Any]:
    return data.collate(samples(data, *indices, epoch=epoch))


def evaluation_batch(data: InMemory, split: Any, *indices: int) -> dict[str, Any]:
    return data.collate([data.sample(split, i, None) for i in indices])


# Contents.


def test_the_constructor_loads_nothing_and_all_splits_are_loaded_once() -> None:
    data = Toy()
    assert data.classes() == ["ant", "bee", "cat"] and data.loads == 0
    assert [data.count(split) for split in COUNTS] == [24, 5, 7]
    evaluation_batch(data, "test", 0)
    data.inputs(training_batch(data, 1), CPU)
    assert data.loads == 1
    assert data.summary() == [
        "3 classes, images of 8 x 8; train: 24, val: 5, test: 7",
        f"classes: {', '.join(data.classes())}",
    ]


def test_the_cost_of_a_training_image_is_its_number_of_views() -> None:
    data = Toy(repeats=3, mixup=1.0)
    assert [*data.cost("train")] == [3] * 24 and [*data.cost("val")] == [1] * 5
    batches = batching.Order(data.cost("train"), 8, 0).epoch(0)
    assert [len(batch) for batch in batches] == [2] * 12, "a batch of eight holds two images in three views each"


def test_an_image_size_is_one_side_or_height_and_width() -> None:
    assert height_and_width(8) == (8, 8) and height_and_width((6, 9)) == (6, 9)
    assert Toy(image_size=12).image_size == (12, 12)


@pytest.mark.parametrize(("name", "values"), [("mean", [0.5]), ("mean", [0.5] * 4), ("std", [1.0, 2.0]), ("std", [])])
def test_statistics_for_another_number_of_channels_are_refused(name: str, values: list[float]) -> None:
    numbers = {"mean": MEAN, "std": STD, name: values}

    class Three(Toy):
        def __init__(self) -> None:
            InMemory.__init__(self, batch_size=8, image_size=8, augmentation=Augmentation(**NOTHING), **numbers)

    with pytest.raises(UserError) as caught:
        Three()
    assert str(caught.value).startswith(f"data.{name}={values}: expected a list of 3, a number for each channel")


# Evaluation.


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_images_are_only_normalised(split: str) -> None:
    data = Toy(**EVERYTHING)
    batch = evaluation_batch(data, split, 4, 0, 2)
    assert batch["ids"] == [4, 0, 2] and batch["labels"].tolist() == [1, 0, 2]
    assert batch["labels"].dtype == torch.int64 and "uniforms" not in batch and "shares" not in batch
    expected = data.load()[split][0][[4, 0, 2]]
    inputs = data.inputs(batch, CPU)
    assert torch.equal(inputs, augmentation.normalise(expected, MEAN, STD))
    assert torch.equal(data.thumbnails(batch, 2), expected[:2])
    assert torch.equal(data.thumbnails(batch, 9), expected)


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (4, 4)])
def test_images_are_evaluated_at_any_size(size: tuple[int, int]) -> None:
    data = Toy(image_size=size)
    expected = augmentation.evaluation_view(data.load()["test"][0], size, 1.0, "bilinear")
    batch = evaluation_batch(data, "test", *range(7))
    assert torch.equal(data.inputs(batch, CPU), augmentation.normalise(expected, MEAN, STD))
    assert torch.equal(data.thumbnails(batch, 7), expected)


def test_every_sample_is_evaluated_once_for_any_number_of_workers() -> None:
    data = Toy()
    runs = []
    for workers in (0, 2):
        batches = batching.evaluation(data, "test", batch_size=3, rank=0, world=1, workers=workers)
        runs.append([(batch["ids"], data.inputs(batch, CPU)) for batch in batches])
    assert [ids for ids, _ in runs[0]] == [ids for ids, _ in runs[1]] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*runs, strict=True))


# Training.


@pytest.mark.parametrize("size", [(8, 8), (12, 10)])
def test_a_training_batch_is_the_views_of_its_rows(size: tuple[int, int]) -> None:
    data = Toy(image_size=size, **{**EVERYTHING, "mixup": 0.0, "cutmix": 0.0, "repeats": 1})
    parts = samples(data, 20, 3, 11)
    batch = data.collate(parts)
    assert batch["ids"] == batch["rows"].tolist() == [20, 3, 11] and batch["labels"].tolist() == [2, 0, 2]
    assert "shares" not in batch and "other_labels" not in batch
    uniforms = np.concatenate([part["uniforms"].numpy() for part in parts])
    assert isinstance(batch["uniforms"], np.ndarray) and np.array_equal(batch["uniforms"], uniforms)
    views = augmentation.views(data.load()["train"][0][[20, 3, 11]], uniforms, data.augmentation, size)
    expected = augmentation.model_inputs(views, uniforms, data.augmentation, MEAN, STD)
    inputs = data.inputs(batch, CPU)
    assert inputs.shape == (3, 3, *size) and torch.equal(inputs, expected)


def test_every_view_of_an_image_is_augmented_independently() -> None:
    data = Toy(crop="resized", repeats=4)
    batch = training_batch(data, 7, 2)
    assert batch["rows"].tolist() == batch["ids"] == [7] * 4 + [2] * 4 and batch["labels"].tolist() == [1] * 4 + [2] * 4
    assert len(np.unique(batch["uniforms"], axis=0)) == 8
    assert len(data.inputs(batch, CPU).flatten(1).unique(dim=0)) == 8


def test_own_views_precede_the_views_of_partners_in_the_same_order() -> None:
    """Images filled with their row number show the partner and the share of each mixed image."""
    data = Toy(flat=True, mixup=1.0, repeats=3)
    parts = samples(data, 20, 3, 11, epoch=1)
    partners = [part["rows"][1] for part in parts]
    assert len({20, 3, 11, *partners}) == 6, "this seed samples distinct partners"
    batch = data.collate(parts)
    own, partner_rows = [20] * 3 + [3] * 3 + [11] * 3, [row for row in partners for _ in range(3)]
    assert batch["ids"] == own and batch["rows"].tolist() == own + partner_rows
    assert batch["labels"].tolist() == [row % 3 for row in own]
    assert batch["other_labels"].tolist() == [row % 3 for row in partner_rows]
    assert (
        batch["uniforms"].shape == (18, augmentation.UNIFORMS_PER_VIEW)
        and len(np.unique(batch["uniforms"], axis=0)) == 18
    )
    assert np.array_equal(batch["uniforms"][3:6], parts[1]["uniforms"][:3].numpy())
    assert np.array_equal(batch["uniforms"][12:15], parts[1]["uniforms"][3:].numpy())

    shares = batch["shares"]
    assert shares.shape == (9,) and len(shares.unique()) == 9, "each view has a share of its own"
    expected = torch.tensor(own) * shares + torch.tensor(partner_rows) * (1 - shares)
    inputs = data.inputs(batch, CPU)
    torch.testing.assert_close(inputs, expected[:, None, None, None].expand_as(inputs), rtol=0, atol=1e-4)


def test_partners_are_sampled_uniformly_from_all_of_train() -> None:
    data = Toy(cutmix=1.0)
    rows = [data.sample("train", 5, generator(i))["rows"] for i in range(1200)]
    assert {own for own, _ in rows} == {5}
    assert stats.chisquare(np.bincount([partner for _, partner in rows], minlength=24)).pvalue > 0.01


@pytest.mark.parametrize("lengths", [[1] * 8, [3, 1, 4], [5, 3]])
def test_a_sample_does_not_depend_on_the_split_of_its_batch(lengths: list[int]) -> None:
    data, order = Toy(**EVERYTHING), [3, 17, 0, 9, 22, 4, 4, 11]
    whole = training_batch(data, *order)
    parts = [training_batch(data, *part.tolist()) for part in torch.tensor(order).split(lengths)]
    assert [row for part in parts for row in part["ids"]] == whole["ids"]
    for key in ("labels", "other_labels", "shares"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    inputs = data.inputs(whole, CPU)
    assert inputs.shape == (16, 3, 8, 8)
    assert torch.equal(torch.cat([data.inputs(part, CPU) for part in parts]), inputs)


def test_epochs_and_images_are_augmented_differently() -> None:
    data = Toy(crop="resized")
    first, second = (data.inputs(training_batch(data, 3, epoch=epoch), CPU) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, data.inputs(training_batch(data, 3), CPU))
    assert not np.array_equal(*(training_batch(data, i)["uniforms"] for i in (3, 4)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_workers_and_micro_batches_give_the_same_steps(workers: int, micro_batch: int | None) -> None:
    data = Toy(**EVERYTHING)
    order = batching.Order(data.cost("train"), data.batch_size, seed=0)
    span = {"start": 0, "stop": 7, "rank": 0, "world": 1, "pin": False}
    expected = [parts[0] for _, parts in batching.steps(data, order, micro_batch=None, workers=0, **span)]
    all_steps = [parts for _, parts in batching.steps(data, order, micro_batch=micro_batch, workers=workers, **span)]
    for whole, parts in zip(expected, all_steps, strict=True):
        assert len(parts) == (1 if micro_batch is None else 2)
        assert all(isinstance(part["uniforms"], np.ndarray) for part in parts)
        assert torch.equal(torch.cat([data.inputs(part, CPU) for part in parts]), data.inputs(whole, CPU))
        assert torch.equal(torch.cat([part["shares"] for part in parts]), whole["shares"])


def test_uniforms_stay_on_the_host_when_a_batch_moves_to_a_device() -> None:
    data = Toy(**EVERYTHING)
    batch = training_batch(data, 3, 4)
    moved = to_device(batch, torch.device("meta"))
    assert moved["rows"].is_meta and moved["shares"].is_meta
    assert moved["uniforms"] is batch["uniforms"]


def test_thumbnails_of_a_training_batch_are_its_own_images() -> None:
    data = Toy(**EVERYTHING)
    batch = training_batch(data, 5, 9)
    assert torch.equal(data.thumbnails(batch, 4), data.load()["train"][0][[5, 5, 9, 9]])


def test_the_stored_images_are_never_changed() -> None:
    data = Toy(**EVERYTHING)
    before = data.load()["train"][0]
    for epoch in range(3):
        data.inputs(training_batch(data, *range(24), epoch=epoch), CPU)
    assert torch.equal(
        data.inputs(evaluation_batch(data, "train", *range(24)), CPU), augmentation.normalise(before, MEAN, STD)
    )


# A user's images.


@pytest.mark.parametrize("kind", [Toy, Grey])
def test_a_users_images_are_viewed_as_in_evaluation(kind: type[Toy], tmp_path: Path) -> None:
    data = kind(**EVERYTHING)
    photos = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((8, 8), (30, 20), (5, 9))]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    batch = data.collate([data.view(photo, file) for photo, file in zip(photos, files, strict=True)])
    assert data.loads == 0
    assert batch["files"] == batch["ids"] == [str(file) for file in files]
    assert batch["labels"].tolist() == [-1] * 3 and batch["labels"].dtype == torch.int64
    converted = [functional.rgb_to_grayscale(photo) if kind is Grey else photo for photo in photos]
    expected = torch.stack([augmentation.evaluation_view(photo, (8, 8), 1.0, "bilinear") for photo in converted])
    inputs = data.inputs(batch, CPU)
    assert inputs.shape == (3, data.channels, 8, 8)
    assert torch.equal(inputs, augmentation.normalise(expected, data.mean, data.std))
    assert torch.equal(data.thumbnails(batch, 3), expected.expand(-1, 3, -1, -1))


def test_thumbnails_of_grey_images_have_three_channels() -> None:
    data = Grey()
    pictures = data.thumbnails(evaluation_batch(data, "test", 0, 1), 2)
    assert pictures.shape == (2, 3, 8, 8) and torch.equal(pictures[:, 0], data.load()["test"][0][:2, 0])
    assert torch.equal(pictures[:, 0], pictures[:, 2])


# Splitting.


@pytest.mark.parametrize("counts", [(3,), (0,), (3, 4), (0, 4), (9, 10)])
def test_a_split_assigns_every_image_once_and_keeps_the_order(counts: tuple[int, ...]) -> None:
    images, labels = torch.arange(20)[:, None], torch.arange(20) + 100
    parts = split_images(images, labels, counts, "these")
    assert [len(part[1]) for part in parts] == [20 - sum(counts), *counts]
    assert torch.cat([part[0][:, 0] for part in parts]).sort().values.tolist() == [*range(20)]
    for rows, names in parts:
        assert rows[:, 0].tolist() == sorted(rows[:, 0].tolist()) and torch.equal(rows[:, 0] + 100, names)


def test_a_split_depends_on_no_seed_and_its_last_part_on_no_other_count() -> None:
    images = torch.arange(200)
    splits = []
    for seed, counts in ((0, (30, 40)), (1, (30, 40)), (2, (80, 40))):
        torch.manual_seed(seed)
        splits.append(split_images(images, images, counts, "these"))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(splits[0], splits[1], strict=True))
    assert torch.equal(splits[0][2][0], splits[2][2][0]), "test images stay out of train when val grows"
    assert {*splits[0][1][0].tolist()} < {*splits[2][1][0].tolist()}
    assert splits[0][2][0].tolist() != [*range(160, 200)], "the test images are not the last ones"


def test_a_split_that_leaves_no_training_image_is_refused() -> None:
    images = torch.arange(20)
    with pytest.raises(UserError) as caught:
        split_images(images, images, (10, 10), "data.val_count and data.test_count")
    assert str(caught.value) == (
        "data.val_count and data.test_count would leave nothing to train on: the set has 20 images; give less."
    )


def test_a_worker_gets_no_copy_on_the_device() -> None:
    data = Toy()
    data.inputs(evaluation_batch(data, "test", 0), torch.device("cpu"))
    assert data._device_images and not data.__getstate__()["_device_images"] and data.__getstate__()["_splits"]
