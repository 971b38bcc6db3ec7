"""A step of the detector, on padded images, does not depend on its split into micro-batches and ranks."""

import copy
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.data.batching import rank_samples
from common.errors import UserError
from common.nn.resnet import BackboneOptions
from common.train import optim
from common.train.step import Stepper, step_normalisers
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.models.detector import Detector, PositionOptions
from detr.tasks.detection import Detection, PredictOptions
from tests.stepping import OPTIMIZER, SPLITS, batches, data, normalise64, samples

SINE = PositionOptions(kind="sine", temperature=10000.0, at_input=False)

QUERIES = 5


def task() -> Detection:
    detection = Detection(
        data=data(),
        queries=QUERIES,
        loss=LossOptions(
            class_weight=1,
            box_weight=5,
            giou_weight=2,
            no_object=0.1,
            classification="softmax",
            focal_alpha=0.25,
            focal_gamma=2.0,
        ),
        matcher=MatcherOptions(class_cost=1, box_cost=5, giou_cost=2),
        predict=PredictOptions(threshold=0.5),
        evaluator="pycocotools",
    )
    detection.restore({"categories": [{"id": i, "name": str(i)} for i in range(3)]})
    return detection


def model(dtype: torch.dtype, backbone: str = "small") -> Detector:
    torch.manual_seed(0)
    return Detector(
        classes=3,
        backbone=BackboneOptions(name=backbone, weights="none", dilation=False, frozen=0),
        width=32,
        heads=4,
        encoder_layers=1,
        decoder_layers=3,
        feedforward=64,
        dropout=0.0,
        pre_norm=False,
        queries=QUERIES,
        positions=SINE,
        auxiliary=True,
        official_padding=False,
    ).to(dtype)


def make_stepper(dtype: torch.dtype, clip_norm: float | None, backbone: str = "small") -> Stepper:
    network = model(dtype, backbone)
    return Stepper(task(), network, optim.build(network, OPTIMIZER), torch.device("cpu"), "fp32", clip_norm)


def gradient(counts: list[int]) -> torch.Tensor:
    """The fp32 gradient of a step that is not clipped, all parameters in one vector."""
    stepper = make_stepper(torch.float32, None)
    stepper(batches(counts), 0)
    return torch.cat([p.grad.flatten() for p in stepper.parameters])


def updated(micro_batches: list[dict], backbone: str = "small") -> torch.Tensor:
    """All fp64 parameters after one clipped AdamW step."""
    stepper = make_stepper(torch.float64, 0.1, backbone)
    stepper(micro_batches, 0)
    return torch.cat([p.detach().flatten() for p in stepper.parameters])


@pytest.mark.parametrize("split", ["3+1+4", "8x1"])
def test_gradients_do_not_depend_on_the_split(split):
    whole, in_parts = gradient(SPLITS["1x8"]), gradient(SPLITS[split])
    assert (whole - in_parts).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("backbone", ["small", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_parameters_after_a_clipped_step_do_not_depend_on_the_split(monkeypatch, backbone):
    monkeypatch.setattr("detr.tasks.detection.normalise", normalise64)
    whole = updated(batches(SPLITS["1x8"]), backbone)
    assert (updated(batches(SPLITS["3+1+4"]), backbone) - whole).abs().max() <= 1e-10
    before = torch.cat([p.detach().flatten() for p in make_stepper(torch.float64, 0.1, backbone).parameters])
    assert (whole - before).abs().max() > 1e-4, "the step must change the parameters"


def test_a_mean_of_means_is_another_step():
    """The control: each micro-batch with its own normalisers, averaged."""
    whole = gradient(SPLITS["1x8"])
    stepper = make_stepper(torch.float32, None)
    wrong = []
    for batch in batches([3, 1, 4]):
        normalisers = step_normalisers(task(), [batch])
        stepper.model.zero_grad()
        stepper.task.loss(stepper.model, batch, normalisers)[0].backward()
        wrong.append(torch.cat([p.grad.flatten() for p in stepper.parameters]))
    assert (torch.stack(wrong).mean(0) - whole).norm() > 1e-3 * whole.norm()


def step_on_rank(rank: int, folder: str) -> None:
    import detr.tasks.detection

    detr.tasks.detection.normalise = normalise64
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for name, counts in {"4+4": ([4], [4]), "3+1 and 4": ([3, 1], [4])}.items():
        part = rank_samples(samples(), rank, 2)
        torch.save(updated(batches(counts[rank], part)), f"{folder}/{name} {rank}.pt")
    # A rank without samples must neither hang nor change the step.
    everything = [batches([8]), [{**batches([1])[0], "dummy": True}]][rank]
    torch.save(updated(everything), f"{folder}/8+0 {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_same_step_as_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision", "pycocotools.cocoeval"])
    mp.start_processes(step_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    monkeypatch.setattr("detr.tasks.detection.normalise", normalise64)
    whole = updated(batches(SPLITS["1x8"]))
    for name in ("4+4", "3+1 and 4", "8+0"):
        for rank in range(2):
            assert (torch.load(tmp_path / f"{name} {rank}.pt") - whole).abs().max() <= 1e-10, name


def test_a_loss_that_is_not_finite_changes_no_weights():
    stepper = make_stepper(torch.float32, 0.1)
    before = copy.deepcopy(stepper.model.state_dict())
    with torch.no_grad():
        stepper.model.class_head.bias[0] = torch.nan
    broken = copy.deepcopy(stepper.model.state_dict())
    with pytest.raises(UserError, match=r"Step 7 .*not finite: loss nan.*gradient norm nan, on samples \[0, 1, 2"):
        stepper(batches([3, 5]), 7)
    after = stepper.model.state_dict()
    assert all(torch.equal(after[name], broken[name]) for name in after if name != "class_head.bias")
    assert not torch.equal(before["class_head.bias"], after["class_head.bias"])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_checking_a_step_one_step_later_as_on_a_gpu_changes_no_weights_or_optimizer_state(name):
    def trained(late: bool) -> Stepper:
        network = model(torch.float32)
        optimizer = optim.build(network, replace(OPTIMIZER, name=name))
        stepper = Stepper(task(), network, optimizer, torch.device("cpu"), "fp32", 0.1)
        stepper.deferred = late
        for number in range(3):
            stepper(batches([3, 5]), number)
        hook = network.queries.weight.register_hook(lambda grad: grad * torch.nan)
        refused = pytest.raises(UserError, match=r"Step 3 .*not finite: loss \d.*gradient norm nan, on samples \[0, 1")
        if late:
            stepper(batches([8]), 3)
            hook.remove()
            with refused:
                stepper(batches([8]), 4)
            stepper.check_last_step()  # the error has been raised already
        else:
            with refused:
                stepper(batches([8]), 3)
            hook.remove()
        stepper(batches([8]), 4)
        stepper.check_last_step()
        return stepper

    steppers = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters for each in steppers), strict=True))
    states = [optim.state(each.optimizer) for each in steppers]
    assert states[0].keys() == states[1].keys()
    for parameter, values in states[0].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][parameter][key])), (parameter, key)


def test_the_last_step_is_checked_on_request():
    stepper = make_stepper(torch.float32, 0.1)
    stepper.deferred = True
    stepper.model.queries.weight.register_hook(lambda grad: grad * torch.inf)
    before = copy.deepcopy(stepper.model.state_dict())
    stepper(batches([8]), 5)
    assert all(torch.equal(value, before[name]) for name, value in stepper.model.state_dict().items())
    with pytest.raises(UserError, match="Step 5 was not taken"):
        stepper.check_last_step()


def test_an_infinite_gradient_with_a_finite_loss_stops_the_run_too():
    stepper = make_stepper(torch.float32, 0.1)
    stepper.model.queries.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(UserError, match="Step 0 was not taken"):
        stepper(batches([8]), 0)


def test_an_fp16_overflow_skips_the_step_and_halves_the_scale_and_only_ten_in_a_row_stop():
    """With an image of 16 x 16 pixels, because a CPU is slow in fp16."""
    first = samples()[0]
    boxes = torch.tensor([[1.0, 2.0, 9.0, 12.0], [4.0, 4.0, 15.0, 15.0]])
    small = {**first, "image": first["image"][:, :16, :16], "original_size": (16, 16), "boxes": boxes}
    network = model(torch.float32)
    stepper = Stepper(task(), network, optim.build(network, OPTIMIZER), torch.device("cpu"), "fp16", 0.1)
    hook = network.queries.weight.register_hook(lambda grad: grad * torch.inf)
    before = copy.deepcopy(network.state_dict())
    scale = stepper.scaler.get_scale()
    for number in range(9):
        stepper(batches([1], [small]), number)
        assert stepper.scaler.get_scale() == scale * 0.5 ** (number + 1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    hook.remove()
    stepper(batches([1], [small]), 9)
    assert stepper.overflows == 0 and not torch.equal(network.queries.weight, before["queries.weight"])
    network.queries.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(UserError, match="Step 19 was not taken"):
        for number in range(10, 30):
            stepper(batches([1], [small]), number)
