"""A QueryDetector as a user may write it: refinement, proposals, a mask head and denoising."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import batching
from common.errors import UserError
from common.machine.device import constant
from common.machine.seeds import generator
from common.nn.blocks import BlockOptions, Stack
from common.nn.linear import Linear
from common.nn.positions import sine_2d
from common.train.step import Stepper
from detr.criterion.answers import Matches, Outputs, Targets
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.criterion.terms import Comparison, Term
from detr.models.detector import BoxHead
from detr.models.query_detector import Image, Memory, Queries, QueryDetector
from detr.tasks.detection import Detection, PredictOptions

WIDTH, SIDE, QUERIES, CLASSES, TOKENS, GROUPS, NOISE = 32, 32, 6, 3, 16, 2, 0.3


def inverse_sigmoid(x: Tensor) -> Tensor:
    return torch.logit(x.clamp(1e-5, 1 - 1e-5))


class Toy(QueryDetector):
    """Boxes of a layer are references of the next (Zhu et al. 2020, arXiv 2010.04159, A.4); proposals are the first."""

    guided = True

    def __init__(self, *, classes: int, logits: int):
        super().__init__()
        self.auxiliary = True
        self.backbone = nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1))
        options = BlockOptions(width=WIDTH, heads=4, feedforward=64, pre_norm=False)
        self.decoder = Stack(options, layers=3, final_norm=True, cross=True)
        self.queries = nn.Embedding(QUERIES, WIDTH)
        self.position = nn.Sequential(Linear(4, WIDTH), nn.ReLU(), Linear(WIDTH, WIDTH))
        self.class_head, self.mask_head = Linear(WIDTH, logits), Linear(WIDTH, WIDTH)
        self.box_head = nn.ModuleList(BoxHead(WIDTH) for _ in range(3))
        self.proposal_class, self.proposal_box = Linear(WIDTH, logits), BoxHead(WIDTH)
        self.label = nn.Embedding(classes, WIDTH)

    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        features = self.backbone(images)  # (B, C, 4, 4)
        real = torch.ones(1, *features.shape[-2:], dtype=torch.bool)
        positions = sine_2d(real, WIDTH, 20.0).flatten(1, 2).to(features.dtype)
        memory = features.flatten(2).transpose(1, 2)
        steps = (torch.arange(4, dtype=memory.dtype) + 0.5) / 4
        places = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1).flip(-1)
        return Image(Memory(memory + positions, memory, None), [features], places[None])

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        assert image.places is not None
        memory = image.memory.values
        prior = inverse_sigmoid(torch.cat([image.places, torch.full_like(image.places, 0.3)], -1))
        boxes = (self.proposal_box(memory) + prior).sigmoid()
        proposals = {"logits": self.proposal_class(memory), "boxes_cxcywh": boxes}
        best = proposals["logits"][..., :CLASSES].amax(-1).topk(QUERIES).indices
        guide = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        x = self.queries.weight.expand(len(memory), -1, -1)
        if hints is None:
            return Queries(x, guide, proposals=proposals)
        x = torch.cat([self.label(hints["labels"]), x], 1)
        guide = torch.cat([hints["boxes"].to(guide.dtype), guide], 1)
        count = hints["labels"].shape[1]
        return Queries(x, guide, hints["may_look"], count, hints["real"], proposals)

    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        assert layer is not None
        boxes = (self.box_head[layer](x) + inverse_sigmoid(guide)).sigmoid()
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(x), image.maps[0])
        return {"logits": self.class_head(x), "boxes_cxcywh": boxes, "masks": masks}

    def follow(self, guide: Tensor, outputs: Outputs) -> Tensor:
        boxes: Tensor = outputs["boxes_cxcywh"]
        return boxes.detach()

    def decode(self, block: nn.Module, x: Tensor, guide: Tensor, queries: Queries, image: Image) -> Tensor:
        return super().decode(block, x, self.position(guide), queries, image)


class MaskTerm(Term):
    """Binary cross-entropy of the last layer's matched masks."""

    name = "mask"
    reads = "masks"
    layers = "last"

    def __call__(self, comparison: Comparison) -> Tensor:
        assert comparison.targets.masks is not None
        predicted, truth = comparison.answers("masks"), comparison.objects(comparison.targets.masks)  # (M, H, W)
        nll = F.binary_cross_entropy_with_logits(predicted, truth.to(predicted.dtype), reduction="none")
        return comparison.per_layer(nll.mean((1, 2)))


class Curves(MaskTerm):
    name, reads = "curve", "curves"


class Denoising(Detection):
    """Masks, proposals, and objects with noise as hints (Li et al. 2022, DN-DETR, arXiv 2203.01305)."""

    def __init__(self, *, sigmoid: bool = False, denoising: bool = True):
        super().__init__(
            data=Shapes(),
            queries=QUERIES,
            loss=LossOptions(
                class_weight=1.0,
                box_weight=5.0,
                giou_weight=2.0,
                no_object=0.1,
                classification="sigmoid" if sigmoid else "softmax",
                focal_alpha=0.25,
                focal_gamma=2.0,
            ),
            matcher=MatcherOptions(class_cost=1.0, box_cost=5.0, giou_cost=2.0),
            predict=PredictOptions(threshold=0.5),
            evaluator="pycocotools",
        )
        self.criterion.terms.append(MaskTerm(1.0))
        self.denoising = denoising

    def answer_sets(self, batch: dict[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
        counts = batch["counts"]
        noisy = [GROUPS * count for count in counts]
        sets = {**super().answer_sets(batch), "proposals": (counts, [TOKENS] * len(counts))}
        return {**sets, "hints": (noisy, noisy)} if self.denoising else sets

    def targets(self, batch: dict[str, Any]) -> Targets:
        return super().targets(batch)._replace(masks=batch["masks"])

    def hints(self, batch: dict[str, Any], targets: Targets) -> tuple[dict[str, Tensor], Matches] | None:
        counts = targets.counts
        longest = max(counts)
        if not self.denoising or not longest:
            return None
        rows = GROUPS * longest
        labels = torch.zeros(len(counts), rows, dtype=torch.long)
        boxes, real = torch.full((len(counts), rows, 4), 0.5), torch.zeros(len(counts), rows, dtype=torch.bool)
        pairs, start = [], 0
        for image, (count, seed) in enumerate(zip(counts, batch["seeds"], strict=True)):
            rng = torch.Generator().manual_seed(seed)
            objects = slice(start, start + count)
            for group in range(GROUPS):
                columns = slice(group * longest, group * longest + count)
                noise = NOISE * (torch.rand(count, 4, generator=rng) - 0.5) * targets.boxes[objects, 2:].repeat(1, 2)
                labels[image, columns], real[image, columns] = targets.labels[objects], True
                boxes[image, columns] = (targets.boxes[objects] + noise).clamp(0.01, 0.99)
                pairs += [(0, image, group * longest + i, start + i) for i in range(count)]
            start += count
        group = torch.cat([torch.arange(GROUPS).repeat_interleave(longest), torch.full((QUERIES,), -1)])
        # A hint looks at its group and at the ordinary queries; an ordinary query looks at no hint.
        visible = (group[:, None] == group) | (group == -1)
        exists = torch.cat([real, real.new_ones(len(counts), QUERIES)], 1)
        may_look = visible & exists[:, None, None]  # (B, 1, Q, Q)
        hints = {"labels": labels, "boxes": boxes, "real": real, "may_look": may_look}
        return hints, Matches(*constant(pairs, like=labels).unbind(1))


class Shapes:
    """Images of one to three squares with their class as colour; one image has none."""

    batch_size = 6

    def categories(self) -> list[dict[str, Any]]:
        return [{"id": i, "name": str(i)} for i in range(CLASSES)]

    def count(self, split: str) -> int:
        return 6

    def cost(self, split: str) -> list[int]:
        return [1] * 6

    def sample(self, split: str, index: int, _: torch.Generator | None) -> dict[str, Any]:
        rng, image, masks, boxes, labels = generator("toy", index), torch.zeros(3, SIDE, SIDE), [], [], []
        for _ in range([2, 1, 3, 0, 1, 2][index]):
            label, (x, y) = int(torch.randint(CLASSES, (), generator=rng)), torch.randint(20, (2,), generator=rng)
            image[label, y : y + 10, x : x + 10] = 255
            mask = torch.zeros(SIDE, SIDE)
            mask[y : y + 10, x : x + 10] = 1
            masks.append(F.avg_pool2d(mask[None], 8)[0])
            boxes.append([float(x), float(y), float(x) + 10, float(y) + 10])
            labels.append(label)
        return {
            "id": index,
            "image": image.byte(),
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.long),
            "masks": torch.stack(masks) if masks else torch.zeros(0, 4, 4),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        sizes = torch.tensor([[SIDE, SIDE]] * len(samples))
        batch: dict[str, Any] = {"ids": [s["id"] for s in samples], "sizes": sizes, "padded": False}
        batch["images"] = torch.stack([s["image"] for s in samples])
        batch |= {name: torch.cat([s[name] for s in samples]) for name in ("boxes", "labels", "masks")}
        return {**batch, "original_sizes": sizes, "counts": [len(s["labels"]) for s in samples]}


def task_and_model(**options: bool) -> tuple[Denoising, Toy]:
    task = Denoising(**options)
    torch.manual_seed(1)
    return task, Toy(**task.model_arguments())


def batches(micro_batch: int | None, workers: int = 0) -> list[dict[str, Any]]:
    """The micro-batches of the first step, from the loader."""
    order = batching.Order([1] * 6, 6, seed=0)
    options = {"micro_batch": micro_batch, "rank": 0, "world": 1, "workers": workers, "pin": False}
    ((_, micro_batches),) = batching.steps(Shapes(), order, start=0, stop=1, **options)
    return micro_batches


def step(task: Detection, model: nn.Module, micro_batches: list[dict[str, Any]]) -> tuple[dict[str, float], Tensor]:
    """The parts of a step's loss, and its gradient."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    parts = Stepper(task, model, optimizer, torch.device("cpu"), "fp32", None)(micro_batches, 0)
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    return {name: float(value) for name, value in parts.items()}, gradient


@pytest.mark.parametrize("options", [{}, {"sigmoid": True}, {"denoising": False}], ids=str)
@pytest.mark.parametrize("micro_batch", [2, 1])
def test_a_step_does_not_depend_on_its_split_into_micro_batches(options: dict[str, bool], micro_batch: int) -> None:
    task, model = task_and_model(**options)
    whole, gradient = step(task, model, batches(None))
    assert {"class", "box", "giou", "mask", "auxiliary", "proposals"} <= whole.keys()
    assert ("hints" in whole) is task.denoising
    parts, gradient_of_parts = step(task, model, batches(micro_batch))
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5), name
    assert (gradient - gradient_of_parts).norm() <= 1e-6 * gradient.norm()


def test_the_seed_of_a_sample_does_not_depend_on_its_batch() -> None:
    """Nor on the loader's workers."""
    together, alone, by_worker = (
        {i: s for b in parts for i, s in zip(b["ids"], b["seeds"], strict=True)}
        for parts in (batches(None), batches(1), batches(2, workers=1))
    )
    assert together == alone == by_worker and len(set(together.values())) == 6


def test_hints_change_no_ordinary_query() -> None:
    task, model = task_and_model()
    (batch,) = batches(None)
    built = task.hints(batch, task.targets(batch))
    assert built is not None
    images = batch["images"].float() / 255
    without, hinted = model(images, None), model(images, None, built[0])
    assert [layer.get("set") for layer in hinted] == ["proposals", "hints", "hints", "hints", None, None, None]
    for plain, layer in zip(without[-3:], hinted[-3:], strict=True):
        assert all((plain[name] - layer[name]).abs().max() < 1e-6 for name in plain)
    changed = {**built[0], "boxes": built[0]["boxes"].flip(1)}
    boxes = model(images, None, changed)[3]["boxes_cxcywh"]
    assert (boxes - hinted[3]["boxes_cxcywh"]).abs().max() > 1e-3, "hints must change their own queries"


def test_padding_hints_change_no_loss() -> None:
    task, model = task_and_model()
    (batch,) = batches(None)
    divisors = {name: value or 1.0 for name, value in task.normalisers(batch).items()}
    expected, _ = task.loss(model, batch, divisors)
    hints, matches = task.hints(batch, task.targets(batch)) or ({}, None)
    assert matches is not None and not hints["real"].all()
    hints["boxes"] = torch.where(hints["real"][..., None], hints["boxes"], 0.9)
    hints["labels"] = torch.where(hints["real"], hints["labels"], 2)
    task.hints = lambda batch, targets: (hints, matches)  # type: ignore[assignment,method-assign]
    loss, _ = task.loss(model, batch, divisors)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sigmoid", [False, True])
def test_it_learns_boxes_classes_and_masks(sigmoid: bool) -> None:
    """Of nine objects, some partly hidden, at least seven are among an equal number of best detections."""
    task, model = task_and_model(sigmoid=sigmoid)
    stepper = Stepper(task, model, torch.optim.AdamW(model.parameters(), 2e-3), torch.device("cpu"), "fp32", 1.0)
    (batch,) = batches(None)
    parts = [stepper([batch], number) for number in range(250)]
    assert all(parts[-1][name] < 0.4 * parts[0][name] for name in ("loss", "box", "mask", "hints", "proposals"))
    detected, starts = 0, [sum(batch["counts"][:i]) for i in range(len(batch["counts"]))]
    for answer, start, count in zip(task.predict(model.eval(), batch), starts, batch["counts"], strict=True):
        best = answer["scores"].argsort(descending=True)[:count]
        for i in range(start, start + count):
            near = (answer["boxes"][best] - batch["boxes"][i]).abs().amax(-1) < 3  # pixels
            detected += bool((answer["labels"][best][near] == batch["labels"][i]).any())
    assert detected >= 7


def test_a_set_without_normalisers_and_a_term_without_outputs_are_named() -> None:
    task, model = task_and_model(denoising=False)
    (batch,) = batches(None)
    divisors = {name: value for name, value in task.normalisers(batch).items() if not name.startswith("proposals")}
    with pytest.raises(UserError, match='the answer set "proposals", for which the task has no normalisers'):
        task.loss(model, batch, divisors)
    task.criterion.terms.append(Curves(1.0))
    with pytest.raises(UserError, match=r"the terms \['curve'\], for which the model has no outputs"):
        task.loss(model, batch, task.normalisers(batch))


class Earlier(nn.Module):
    """A detector written for an earlier version: one dict of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2 * QUERIES * 8))

    def forward(self, images: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
        x = self.net(images).unflatten(1, (2, QUERIES, 8)).transpose(0, 1)  # (L, B, Q, 8)
        return {"logits": x[..., :4], "boxes_cxcywh": x[..., 4:].sigmoid()}


class WithSizes(Detection):
    """A task written for an earlier version, in which `normalisers` was called `sizes`."""

    def __getattribute__(self, name: str) -> Any:
        if name == "normalisers":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def sizes(self, batch: dict[str, Any]) -> dict[str, float]:
        return Detection.normalisers(self, batch)


def test_a_task_with_sizes_and_a_detector_that_returns_one_dict_still_train() -> None:
    plain = Denoising()
    plain.criterion.terms.pop()
    task = WithSizes.__new__(WithSizes)
    vars(task).update(vars(plain))
    torch.manual_seed(0)
    model = Earlier()
    stepper = Stepper(task, model, torch.optim.AdamW(model.parameters(), 1e-3), torch.device("cpu"), "fp32", 1.0)
    (batch,) = batches(None)
    losses = [stepper([batch], number) for number in range(60)]
    assert {"class", "box", "giou", "auxiliary"} <= losses[0].keys()
    assert float(losses[-1]["loss"]) < 0.6 * float(losses[0]["loss"])
    assert task.predict(model, batch)[0]["boxes"].shape == (QUERIES, 4)
