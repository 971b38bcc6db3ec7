"""A step of the classifier does not depend on how its batch is split, with all random augmentation.

Mixup, CutMix, erasing, RandAugment, two views of each image and rates by layer are on; dropout and drop path are off.
"""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from common.data.batching import Loader, Order, rank_samples, steps
from common.task import Batch
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from vit.criterion.cross_entropy import LossOptions
from vit.data.augmentation import Augmentation, _mixing
from vit.data.digits import Digits
from vit.data.folder import ImageFolder
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions
from vit.tasks.classification import Classification, PredictOptions

SEED = 3  # with it the eight images hold all kinds of mixing
IMAGES = [5, 0, 11, 7, 2, 9, 14, 3]  # of train, in a step's order
SPLITS = {"1x8": [8], "3+1+4": [3, 1, 4], "8x1": [1] * 8}  # images, of two views each
OPTIMIZER = OptimizerOptions(
    name="adamw",
    lr=1e-3,
    weight_decay=1e-2,
    decay_norms=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.0,
    rates={},
    layer_decay=0.7,
    reference_batch=None,
    scaling="linear",
)
AUGMENTATION = Augmentation(
    crop="resized",
    scale=(0.3, 1.0),
    ratio=(0.75, 4 / 3),
    padding=0,
    flip=0.5,
    policy="rand",
    operations=2,
    magnitude=9,
    erase=0.5,
    mixup=0.8,
    cutmix=1.0,
    cutmix_share=0.5,
    mix=0.8,
    repeats=2,
)


def draw_images(folder: Path) -> None:
    """Write sixteen noise images of unequal size in three classes."""
    rng = np.random.default_rng(0)
    for number in range(16):
        target = folder / "train" / "abc"[number % 3] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(12, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(target)


def build_data(kind: str, folder: Path) -> Any:
    if kind == "digits":
        return Digits(
            val_count=200,
            test_count=400,
            batch_size=16,
            image_size=8,
            mean=[0.3],
            std=[0.4],
            augmentation=AUGMENTATION,
        )
    return ImageFolder(
        root=str(folder),
        train=None,
        val=None,
        test=None,
        val_count=0,
        batch_size=16,
        image_size=(8, 12),
        crop_ratio=0.875,
        interpolation="bicubic",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        augmentation=AUGMENTATION,
    )


def build_task(kind: str, folder: Path) -> Classification:
    return Classification(
        data=build_data(kind, folder),
        loss=LossOptions(smoothing=0.1),
        predict=PredictOptions(top=5, attention="none", layer=-1, neighbours=0),
    )


def build_model(task: Classification, dtype: torch.dtype) -> Classifier:
    """A model with a non-zero head: behind the zeros of a run's start no gradient would reach the encoder."""
    torch.manual_seed(0)
    blocks = VitBlockOptions(
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        layer_scale=0.5,
        qk_norm=True,
        norm_eps=1e-6,
        activation="gelu",
    )
    network = Classifier(
        **task.model_arguments(),
        patch_size=4,
        embedding="convolution",
        width=32,
        heads=4,
        layers=2,
        feedforward=48,
        pooling="token",
        registers=2,
        positions=PositionOptions(resample="bicubic", on_token=True),
        representation=None,
        blocks=blocks,
    )
    torch.nn.init.normal_(network.head.weight, std=0.2)
    # Inputs are fp32, bit for bit the same in any batch (see below); a model of fp64 gets them in its own type.
    network.register_forward_pre_hook(lambda _, images: (images[0].to(dtype),))
    return network.to(dtype)


def load_batches(task: Classification, lengths: list[int], images: list[int] | None = None) -> list[Batch]:
    """Micro-batches of the trainer's loader, with these numbers of images."""
    rest = iter(IMAGES if images is None else images)
    keys = [(0, tuple(next(rest) for _ in range(count))) for count in lengths]
    return [*Loader(task.data, "train", seed=SEED, workers=0, pin=False)(keys)]


def build_stepper(task: Classification, dtype: torch.dtype, clip_norm: float | None) -> Stepper:
    network = build_model(task, dtype)
    return Stepper(task, network, optim.build(network, OPTIMIZER), torch.device("cpu"), "fp32", clip_norm)


def compute_gradient(task: Classification, lengths: list[int]) -> torch.Tensor:
    """The fp32 gradient of a step that is not clipped, all parameters in one vector."""
    stepper = build_stepper(task, torch.float32, None)
    stepper(load_batches(task, lengths), 0)
    return torch.cat([p.grad.flatten() for p in stepper.parameters])


def flat_parameters(stepper: Stepper) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in stepper.parameters])


def parameters_after_step(task: Classification, micro_batches: list[Batch]) -> torch.Tensor:
    """All fp64 parameters after one clipped AdamW step."""
    stepper = build_stepper(task, torch.float64, 0.1)
    stepper(micro_batches, 0)
    return flat_parameters(stepper)


@pytest.fixture(params=["digits", "folder"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    draw_images(tmp_path)
    return str(request.param)


def test_the_step_holds_blended_pasted_and_unmixed_images_and_a_gradient_for_every_parameter(
    kind: str, tmp_path: Path
) -> None:
    """A check of the setting in which the tests below run."""
    task = build_task(kind, tmp_path)
    (batch,) = load_batches(task, SPLITS["1x8"])
    images = task.data.inputs(batch, torch.device("cpu"))
    share, box = _mixing(batch["uniforms"][:16], AUGMENTATION, images.shape[-2:])
    pastes, blends = box.any(axis=1), share < 1
    assert pastes.any() and blends.any() and (~pastes & ~blends).any() and not (pastes & blends).any()
    assert (batch["labels"] != batch["other_labels"]).any()
    assert len(images) == 16 and all((a != b).any() for a, b in zip(images[::2], images[1::2], strict=True))
    stepper = build_stepper(task, torch.float32, None)
    stepper([batch], 0)
    idle = {name for name, p in stepper.model.named_parameters() if p.grad is None or p.grad.norm() < 1e-4}
    assert idle == {f"encoder.blocks.{i}.attention.k_norm.bias" for i in range(2)}, (
        "softmax ignores an offset common to all keys"
    )


@pytest.mark.parametrize("split", ["3+1+4", "8x1"])
def test_inputs_are_the_same_to_the_bit_for_any_split(kind: str, tmp_path: Path, split: str) -> None:
    task, cpu = build_task(kind, tmp_path), torch.device("cpu")
    (whole,), pieces = load_batches(task, SPLITS["1x8"]), load_batches(task, SPLITS[split])
    assert torch.equal(task.data.inputs(whole, cpu), torch.cat([task.data.inputs(piece, cpu) for piece in pieces]))
    for name in ("labels", "other_labels", "shares"):
        assert torch.equal(whole[name], torch.cat([piece[name] for piece in pieces])), name
    assert whole["ids"] == [i for piece in pieces for i in piece["ids"]]


def test_micro_batches_are_counted_in_views_and_hold_whole_images(kind: str, tmp_path: Path) -> None:
    task = build_task(kind, tmp_path)
    order = Order(task.data.cost("train")[:16], batch_size=16, seed=SEED)

    def first(micro_batch: int | None) -> list[Batch]:
        split = steps(task.data, order, start=0, stop=1, micro_batch=micro_batch, rank=0, world=1, workers=0, pin=False)
        return next(split)[1]

    for micro_batch, lengths in ((None, [16]), (6, [6, 6, 4]), (5, [4, 4, 4, 4]), (1, [2] * 8)):
        micro_batches = first(micro_batch)
        assert [len(batch["labels"]) for batch in micro_batches] == lengths
        assert [i for batch in micro_batches for i in batch["ids"]] == first(None)[0]["ids"]


@pytest.mark.parametrize("split", ["3+1+4", "8x1"])
def test_gradients_do_not_depend_on_the_split(kind: str, tmp_path: Path, split: str) -> None:
    task = build_task(kind, tmp_path)
    whole, pieces = compute_gradient(task, SPLITS["1x8"]), compute_gradient(task, SPLITS[split])
    assert (whole - pieces).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("split", ["3+1+4", "8x1"])
def test_parameters_after_a_clipped_step_do_not_depend_on_the_split(kind: str, tmp_path: Path, split: str) -> None:
    task = build_task(kind, tmp_path)
    whole = parameters_after_step(task, load_batches(task, SPLITS["1x8"]))
    assert (parameters_after_step(task, load_batches(task, SPLITS[split])) - whole).abs().max() <= 1e-10
    assert (whole - flat_parameters(build_stepper(task, torch.float64, 0.1))).abs().max() > 1e-4, (
        "the step did something"
    )


def test_a_mean_of_means_is_another_step(kind: str, tmp_path: Path) -> None:
    """The control: an average of the micro-batches' means gives other gradients."""
    task = build_task(kind, tmp_path)
    whole = compute_gradient(task, SPLITS["1x8"])
    task.normalisers = lambda batch: {"images": 0.0}  # type: ignore[method-assign]
    loss, wrong = task.loss, build_stepper(task, torch.float32, None)
    task.loss = lambda m, b, s: loss(m, b, {"images": 3.0 * len(b["labels"])})  # type: ignore[method-assign]
    wrong(load_batches(task, SPLITS["3+1+4"]), 0)
    assert (torch.cat([p.grad.flatten() for p in wrong.parameters]) - whole).norm() > 1e-2 * whole.norm()


def step_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for kind in ("digits", "folder"):
        task = build_task(kind, Path(folder))
        for name, splits in {"4+4": ([4], [4]), "3+1 and 4": ([3, 1], [4])}.items():
            local = load_batches(task, splits[rank], rank_samples(IMAGES, rank, 2))
            torch.save(parameters_after_step(task, local), f"{folder}/{kind} {name} {rank}.pt")
        # A rank without samples must neither hang nor change the step.
        local = [load_batches(task, [8]), [{**load_batches(task, [1])[0], "dummy": True}]][rank]
        torch.save(parameters_after_step(task, local), f"{folder}/{kind} 8+0 {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_same_step_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_images(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision", "scipy.special", "sklearn.datasets"])
    mp.start_processes(step_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for kind in ("digits", "folder"):
        task = build_task(kind, tmp_path)
        whole = parameters_after_step(task, load_batches(task, SPLITS["1x8"]))
        for name in ("4+4", "3+1 and 4", "8+0"):
            for rank in range(2):
                assert (torch.load(tmp_path / f"{kind} {name} {rank}.pt") - whole).abs().max() <= 1e-10, (kind, name)
