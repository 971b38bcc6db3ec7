"""A step with masks, on padded images, does not depend on its split; answers have masks of the original images."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.resnet import BackboneOptions
from common.task import Batch
from common.train import optim
from common.train.step import Stepper
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.models.detector import Detector, PositionOptions
from detr.tasks.detection import Detection, PredictOptions
from tests.stepping import OPTIMIZER, SPLITS, batches, data, normalise64

QUERIES = 5


def task(**options: Any) -> Detection:
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
            mask_weight=1,
            dice_weight=1,
        ),
        matcher=MatcherOptions(class_cost=1, box_cost=5, giou_cost=2),
        predict=PredictOptions(threshold=0.5, **options),
        evaluator="pycocotools",
        masks=True,
    )
    detection.restore({"categories": [{"id": i, "name": str(i)} for i in range(3)]})
    return detection


def model(frozen: bool = False) -> Detector:
    torch.manual_seed(0)
    return Detector(
        classes=3,
        backbone=BackboneOptions(name="small", weights="none", dilation=False, frozen=0),
        width=32,
        heads=4,
        encoder_layers=1,
        decoder_layers=2,
        feedforward=64,
        dropout=0.0,
        pre_norm=False,
        queries=QUERIES,
        positions=PositionOptions(kind="sine", temperature=20.0, at_input=True),
        auxiliary=True,
        official_padding=False,
        masks=True,
        frozen=frozen,
    ).double()


def with_masks(batch: Batch) -> Batch:
    """The batch with the masks of its objects: ellipses in their boxes."""
    height, width = batch["images"].shape[-2:]
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    masks = torch.zeros(len(batch["boxes"]), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, batch["boxes"].tolist(), strict=True):
        across, down = (2 * columns - x0 - x1) / max(x1 - x0, 1), (2 * rows - y0 - y1) / max(y1 - y0, 1)
        mask[:] = across**2 + down**2 < 1
    return {**batch, "masks": masks}


def updated(counts: list[int], frozen: bool = False) -> dict[str, Tensor]:
    """The parameters after one clipped step in float64."""
    network = model(frozen)
    stepper = Stepper(task(), network, optim.build(network, OPTIMIZER), torch.device("cpu"), "fp32", 0.1)
    stepper([with_masks(batch) for batch in batches(counts)], 0)
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_with_masks_does_not_depend_on_its_split(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    monkeypatch.setattr("detr.tasks.detection.normalise", normalise64)
    whole, parts, before = updated(SPLITS["1x8"], frozen), updated(SPLITS["3+1+4"], frozen), model().named_parameters()
    for name, start in before:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-10)
        moves = name.startswith("mask_head.") or not frozen
        assert torch.equal(whole[name], start) != moves, name


def test_answers_have_the_masks_of_their_queries_at_the_original_size() -> None:
    """A stand-in model: query q has its mask in the q-th column of cells, and the image is padded."""

    class Columns(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images: Tensor, sizes: Tensor | None) -> list[dict[str, Tensor]]:
            count = len(images)
            masks = torch.full((count, QUERIES, images.shape[2] // 4, images.shape[3] // 4), -9.0)
            for query in range(QUERIES):
                masks[:, query, :, query] = 9.0
            logits = torch.randn(count, QUERIES, 4, generator=generator("columns"))
            return [{"logits": logits, "boxes_cxcywh": torch.full((count, QUERIES, 4), 0.5), "masks": masks}]

    batch = {
        "images": torch.zeros(2, 3, 32, 40, dtype=torch.uint8),
        "sizes": torch.tensor([[32, 40], [16, 20]]),
        "padded": True,
        "original_sizes": torch.tensor([[64, 80], [16, 20]]),
    }
    without = Columns()
    without.forward = lambda images, sizes: [{k: v for k, v in Columns()(images, sizes)[0].items() if k != "masks"}]
    with pytest.raises(UserError, match=r"give model\.masks=true, or neither"):
        task().answers(without, batch)
    for limit in (None, 7):
        first, second = task(detections_per_image=limit).answers(Columns(), batch)
        count = QUERIES if limit is None else limit
        assert first["masks"].shape == (count, 64, 80) and second["masks"].shape == (count, 16, 20)
        assert first["masks"].dtype == torch.bool
        for answer, cell in ((first, 8), (second, 4)):  # pixels of the original image in a cell
            for mask, query in zip(answer["masks"], answer["queries"].tolist(), strict=True):
                inside = torch.zeros_like(mask)
                inside[:, query * cell : (query + 1) * cell] = True
                assert (mask & inside).sum() > 0.9 * inside.sum() and (mask & ~inside).sum() < 0.3 * inside.sum()
