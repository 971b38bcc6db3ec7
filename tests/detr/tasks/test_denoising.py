"""A step of the detectors with references, proposals and denoising does not depend on its split, and tasks refuse."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from common.data.batching import rank_samples
from common.errors import UserError
from common.nn.resnet import BackboneOptions
from common.train import optim
from common.train.step import Stepper, step_normalisers
from detr.criterion.denoising import DenoisingOptions
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.models.deformable_detector import DeformableDetector
from detr.models.detector import Detector, PositionOptions
from detr.models.dino import Dino
from detr.models.levels import SamplingOptions, SinePositionOptions
from detr.tasks.denoising import DenoisingDetection
from detr.tasks.detection import Detection, PredictOptions
from tests.stepping import OPTIMIZER, SPLITS, batches, data, normalise64, samples

QUERIES = 6
KINDS = ("four levels", "refinement", "two stages", "DINO", "DAB-DETR with DN-DETR's noise")


def task(kind: str) -> Detection:
    """The task of a kind of detector; those of DINO and DAB-DETR have denoising queries."""
    arguments: dict[str, Any] = {
        "data": data(),
        "queries": QUERIES,
        "loss": LossOptions(
            class_weight=2,
            box_weight=5,
            giou_weight=2,
            no_object=0.1,
            classification="sigmoid",
            focal_alpha=0.25,
            focal_gamma=2.0,
        ),
        "matcher": MatcherOptions(class_cost=2, box_cost=5, giou_cost=2),
        "predict": PredictOptions(threshold=0.5, detections_per_image=10),
        "evaluator": "pycocotools",
    }
    detection: Detection
    if "D" in kind:
        noise = DenoisingOptions(number=6, contrastive=kind == "DINO", label_noise=0.3, box_noise=0.4)
        detection = DenoisingDetection(**arguments, denoising=noise)
    else:
        detection = Detection(**arguments)
    detection.restore({"categories": [{"id": i, "name": str(i)} for i in range(3)]})
    return detection


def model(kind: str, dtype: torch.dtype) -> nn.Module:
    """A small detector with random sampling offsets.

    Initially, points lie on centres of cells, where the derivative of bilinear interpolation jumps, so that rounding
    decides between the slopes on both sides.
    """
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "classes": 3,
        "logits": 3,
        "backbone": BackboneOptions(name="small", weights="none", dilation=False, frozen=0),
        "sampling": SamplingOptions(maps=2, levels=2, points=2),
        "width": 32,
        "heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward": 64,
        "dropout": 0.0,
        "pre_norm": True,
        "queries": QUERIES,
        "positions": SinePositionOptions(kind="sine", temperature=20.0, at_input=True, centred=True),
        "two_stage": kind in ("two stages", "DINO"),
        "auxiliary": True,
        "official_padding": False,
    }
    if "D" in kind:
        network: nn.Module = Dino(**arguments)
    else:
        network = DeformableDetector(**arguments, refine=kind != "four levels")
    for name, parameter in network.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            nn.init.normal_(parameter)
    return network.to(dtype)


def seeded(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches with a seed for each image, which depends on the image alone."""
    return [batch | {"seeds": [1000 + id for id in batch["ids"]]} for batch in parts]


def stepper(kind: str, dtype: torch.dtype, clip_norm: float | None) -> Stepper:
    network = model(kind, dtype)
    optimizer = optim.build(network, OPTIMIZER)
    return Stepper(task(kind), network, optimizer, torch.device("cpu"), "fp32", clip_norm)


def updated(kind: str, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
    """All fp64 parameters after one clipped AdamW step."""
    step = stepper(kind, torch.float64, 0.1)
    step(seeded(micro_batches), 0)
    return torch.cat([p.detach().flatten() for p in step.parameters])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_after_a_clipped_step_do_not_depend_on_the_split(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr.tasks.detection.normalise", normalise64)
    whole = updated(kind, batches(SPLITS["1x8"]))
    assert (updated(kind, batches(SPLITS["3+1+4"])) - whole).abs().max() <= 1e-10
    before = torch.cat([p.detach().flatten() for p in stepper(kind, torch.float64, 0.1).parameters])
    assert (whole - before).abs().max() > 1e-4, "the step must change the parameters"


def test_the_log_has_the_loss_of_denoising_queries_and_proposals() -> None:
    parts = stepper("DINO", torch.float32, None)(seeded(batches([8])), 0)
    assert parts["hints"] > 0 and parts["selected"] > 0
    assert "proposals" in stepper("two stages", torch.float32, None)(seeded(batches([8])), 0)


def test_terms_of_denoising_queries_are_divided_by_the_number_of_positive_copies() -> None:
    normalisers = step_normalisers(task("DINO"), seeded(batches([8])))
    counts = [len(sample["boxes"]) for sample in samples()]
    assert normalisers["hints.box"] == sum(max(1, 6 // n) * n for n in counts if n)
    assert normalisers["queries.box"] == normalisers["selected.box"] == sum(counts)


def test_a_batch_without_objects_has_a_finite_loss() -> None:
    empty = [sample for sample in samples() if not len(sample["boxes"])]
    parts = stepper("DINO", torch.float32, None)(seeded(batches([len(empty)], empty)), 0)
    assert "hints" not in parts and parts["loss"].isfinite()


def test_evaluation_builds_no_denoising_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenoisingDetection, "hints", lambda *_: pytest.fail("hints are for training"))
    answers = task("DINO").answers(model("DINO", torch.float32).eval(), batches([2])[0])
    assert [len(answer["boxes"]) for answer in answers] == [10, 10]
    assert all((answer["scores"].diff() <= 0).all() for answer in answers)


def test_a_model_without_denoising_queries_is_refused_by_name() -> None:
    network = Detector(
        classes=3,
        logits=3,
        backbone=BackboneOptions(name="small", weights="none", dilation=False, frozen=0),
        width=32,
        heads=4,
        encoder_layers=1,
        decoder_layers=1,
        feedforward=32,
        dropout=0.0,
        pre_norm=True,
        queries=QUERIES,
        positions=PositionOptions(kind="sine", temperature=20.0, at_input=True),
        auxiliary=True,
        official_padding=False,
    )
    detection, batch = task("DINO"), seeded(batches([8]))[0]
    for refused in (network, model("refinement", torch.float32)):
        with pytest.raises(
            UserError, match=f"{type(refused).__name__} has no denoising queries; give a model that has"
        ):
            detection.loss(refused, batch, step_normalisers(detection, [batch]))


@pytest.mark.parametrize("kind", ["two stages", "DINO"])
def test_two_stages_with_softmax_are_refused(kind: str) -> None:
    detection, batch = task(kind), seeded(batches([8]))[0]
    detection.classification = "softmax"
    with pytest.raises(UserError, match=r"has no normalisers with task\.loss\.classification=softmax; use"):
        detection.loss(model(kind, torch.float32), batch, step_normalisers(detection, [batch]))


def step_on_rank(rank: int, folder: str) -> None:
    import detr.tasks.detection

    detr.tasks.detection.normalise = normalise64
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for kind in ("two stages", "DINO"):
        part = rank_samples(samples(), rank, 2)
        torch.save(updated(kind, batches([[3, 1], [4]][rank], part)), f"{folder}/{kind} {rank}.pt")
    everything = [batches([8]), [{**batches([1])[0], "dummy": True}]][rank]
    torch.save(updated("DINO", everything), f"{folder}/dummy {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_same_step_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision", "pycocotools.cocoeval"])
    mp.start_processes(step_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    monkeypatch.setattr("detr.tasks.detection.normalise", normalise64)
    for name in ("two stages", "DINO", "dummy"):
        whole = updated("DINO" if name == "dummy" else name, batches(SPLITS["1x8"]))
        for rank in range(2):
            assert (torch.load(tmp_path / f"{name} {rank}.pt") - whole).abs().max() <= 1e-10, name
