"""The mask head against transformers' DETR for segmentation, an image alone against one in a batch, and freezing."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.resnet import BackboneOptions
from detr.models import mask_head
from detr.models.deformable_detector import DeformableDetector
from detr.models.detector import Detector, PositionOptions
from detr.models.dino import Dino
from detr.models.levels import SamplingOptions, SinePositionOptions
from detr.models.query_detector import QueryDetector
from tests.detecting import batch, pictures
from tests.detr.models.test_detector import LEARNED, SINE, detector, names_in_transformers

SMALL: dict[str, Any] = {
    "classes": 5,
    "backbone": BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=0),
    "width": 64,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 64,
    "dropout": 0.0,
    "pre_norm": True,
    "queries": 6,
    "auxiliary": True,
    "official_padding": False,
    "masks": True,
}
LEVELS: dict[str, Any] = {
    "sampling": SamplingOptions(maps=2, levels=3, points=2),
    "positions": SinePositionOptions(kind="sine", temperature=20.0, at_input=False, centred=True),
    "logits": 5,
}


def model(kind: str, **changed: Any) -> QueryDetector:
    """A small detector with masks in which every tensor is random."""
    torch.manual_seed(0)
    positions = PositionOptions(kind="sine", temperature=20.0, at_input=True)
    detectors: dict[str, Any] = {
        "detr": lambda: Detector(**{**SMALL, "positions": positions, **changed}),
        "deformable": lambda: DeformableDetector(**{**SMALL, **LEVELS, "refine": False, "two_stage": False, **changed}),
        "refined": lambda: DeformableDetector(**{**SMALL, **LEVELS, "refine": True, "two_stage": True, **changed}),
        "dino": lambda: Dino(**{**SMALL, **LEVELS, "two_stage": True, **changed}),
    }
    built: QueryDetector = detectors[kind]()
    randomise(built)
    return built.eval()


def randomise(built: nn.Module) -> None:
    rng = generator("masks")
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=rng))
            elif any(part in name for part in ("sampling_offsets", "attention_weights")):
                tensor.normal_(std=0.1, generator=rng)


def name_in_transformers(ours: str) -> list[str]:
    """The names of the tensor in transformers' DetrForSegmentation."""
    if not ours.startswith("mask_head."):
        return [f"detr.{name}" for name in names_in_transformers(ours)]
    for pattern, replacement in (
        (r"^mask_head\.attention\.query\.", "bbox_attention.q_proj."),
        (r"^mask_head\.attention\.key\.", "bbox_attention.k_proj."),
        (r"\.output\.", ".output_conv."),
        (r"\.adapters\.(\d)\.", r".fpn_stages.\1.fpn_adapter."),
    ):
        ours = re.sub(pattern, replacement, ours)
    if match := re.fullmatch(r"mask_head\.(conv|norm)s\.(\d)\.(\w+)", ours):
        part, number, leaf = match[1], int(match[2]), match[3]
        block = f"conv{number + 1}" if number < 2 else f"fpn_stages.{number - 2}.refine"
        return [f"mask_head.{block}.{part}.{leaf}"]
    return [ours]


def test_masks_and_gradients_are_those_of_transformers() -> None:
    """In float64 with learned positions, since sines are fp32; images of unequal sizes."""
    from transformers import DetrConfig, DetrForSegmentation

    ours = detector(official_padding=True, positions=LEARNED, masks=True, queries=7)
    config = DetrConfig(
        num_labels=91, num_queries=7, encoder_layers=2, decoder_layers=2, position_embedding_type="learned"
    )
    theirs = DetrForSegmentation(config).eval()
    tensors: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        names = name_in_transformers(name)
        tensors |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    theirs.load_state_dict(tensors)
    ours.double(), theirs.double()
    images, sizes = batch(pictures((64, 97), (90, 60)))
    real = torch.zeros(len(images), *images.shape[2:], dtype=torch.long)
    for row, (height, width) in zip(real, sizes.tolist(), strict=True):
        row[:height, :width] = 1
    actual = ours(images.double(), sizes)[-1]["masks"]
    expected = theirs(pixel_values=images.double(), pixel_mask=real).pred_masks
    assert actual.shape == expected.shape == (2, 7, 23, 25)
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    direction = torch.randn(actual.shape, generator=generator("direction"))
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    of_theirs = dict(theirs.named_parameters())
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert {name for name in trained if name.startswith("mask_head.")} and any("backbone" in name for name in trained)
    norm = torch.stack([parameter.grad.norm() for parameter in trained.values()]).norm()
    for name, parameter in trained.items():
        reference = torch.cat([of_theirs[x].grad for x in name_in_transformers(name)])
        # Where the true gradient is zero (a key's bias), the reference is rounding error; hence the norm of all.
        assert (parameter.grad - reference).norm() < 1e-9 * reference.norm() + 1e-12 * norm, name


@pytest.mark.parametrize("kind", ["detr", "deformable", "refined", "dino"])
def test_an_image_alone_has_the_masks_that_it_has_beside_a_larger_one(kind: str) -> None:
    built = model(kind).double()
    images = [image.double() for image in pictures((70, 101), (133, 90), (66, 160))]
    together = built(*batch(images))[-1]["masks"]
    for image, masks in zip(images, together, strict=True):
        alone = built(image[None], None)[-1]["masks"][0]
        assert alone.shape[0] == 6 and alone.std() > 1e-3
        torch.testing.assert_close(masks[:, : alone.shape[1], : alone.shape[2]], alone, rtol=0, atol=1e-10)


def test_masks_are_equal_for_any_number_of_queries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("dino").double()
    images, sizes = batch([image.double() for image in pictures((70, 101), (133, 90))])
    results = []
    for count in (1, 4, 1000):
        monkeypatch.setattr(mask_head, "MAPS_AT_ONCE", count)
        with torch.no_grad():
            results.append(built(images, sizes)[-1]["masks"])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["detr", "refined", "dino"])
def test_masks_of_chosen_queries_and_their_gradients_are_those_among_all(kind: str) -> None:
    """In training, the loss reads the masks of matched queries alone; an image without objects has none."""
    built = model(kind).double()
    images, sizes = batch([image.double() for image in pictures((70, 101), (133, 90), (60, 60))])
    rows = (torch.tensor([0, 1, 1, 1]), torch.tensor([5, 2, 0, 2]))
    every = built(images, sizes)[-1]["masks"][rows]
    built.train()
    outputs = built(images, sizes)[-1]
    assert "masks" not in outputs
    chosen = built.read_masks(outputs["mask_queries"], rows)
    torch.testing.assert_close(chosen, every, rtol=0, atol=1e-12)
    direction = torch.randn(every.shape, dtype=torch.float64, generator=generator("direction"))
    parameters = [parameter for parameter in built.parameters() if parameter.requires_grad]
    pairs = zip(*(_gradients((x * direction).sum(), parameters) for x in (chosen, every)), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    none = torch.zeros(0, dtype=torch.long)
    assert built.read_masks(built(images, sizes)[-1]["mask_queries"], (none, none)).shape == (0, *every.shape[1:])


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    assert len(used) > len(parameters) // 2
    return [torch.zeros(()) if gradient is None else gradient for gradient in gradients]


def test_the_weights_of_all_heads_and_positions_of_a_query_sum_to_one_and_are_zero_in_padding() -> None:
    torch.manual_seed(0)
    attention = mask_head.MaskAttention(16, 4).double()
    rng = generator("weights")
    x, memory = (torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in ((2, 3, 16), (2, 16, 5, 6)))
    real = torch.ones(2, 5, 6, dtype=torch.bool)
    real[1, 3:] = False
    weights = attention(x, memory, real)
    torch.testing.assert_close(weights.sum((2, 3, 4)), torch.ones(2, 3, dtype=torch.float64))
    assert (weights[1, :, :, 3:] == 0).all() and (weights[0] > 0).all()
    # A plain loop for one query: softmax over heads and positions of the scaled products.
    query = attention.query(x[0, 1]).view(4, 4)
    keys = torch.stack([attention.key(memory[0, :, i, j]).view(4, 4) for i in range(5) for j in range(6)])
    scores = torch.stack([(query[h] * key[h]).sum() / 2 for h in range(4) for key in keys])
    torch.testing.assert_close(weights[0, 1].flatten(), scores.softmax(0), rtol=0, atol=1e-14)


def test_the_numbers_of_parameters_are_the_official_models() -> None:
    arguments: dict[str, Any] = {
        "classes": 91,
        "backbone": BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=2),
        "width": 256,
        "heads": 8,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "feedforward": 2048,
        "queries": 100,
        "dropout": 0.1,
        "pre_norm": False,
        "positions": SINE,
        "auxiliary": True,
        "official_padding": False,
    }
    with torch.device("meta"):
        built = Detector(**arguments, masks=True)
    assert sum(parameter.numel() for parameter in built.parameters()) == 42_858_425
    assert built.mask_head is not None
    attention = sum(parameter.numel() for parameter in built.mask_head.attention.parameters())
    assert attention == 131_584
    assert sum(parameter.numel() for parameter in built.mask_head.parameters()) - attention == 1_202_073


@pytest.mark.parametrize("kind", ["detr", "dino"])
def test_a_frozen_detector_trains_its_mask_head_alone_and_without_dropout(kind: str) -> None:
    built = model(kind, frozen=True, dropout=0.5)
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in built.named_parameters() if name.startswith("mask_head.")}
    images, sizes = batch(pictures((64, 97), (90, 60)))
    built.train()
    assert built.training and built.mask_head.training
    first, second = (built(images, sizes)[-1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("logits", "boxes_cxcywh"))
    masks, again = (built.read_masks(outputs["mask_queries"]) for outputs in (first, second))
    assert torch.equal(masks, again) and masks.requires_grad and not first["boxes_cxcywh"].requires_grad


def test_freezing_needs_masks_and_a_checkpoint() -> None:
    with pytest.raises(UserError, match=r"model\.frozen=true .* needs model\.masks=true"):
        model("detr", frozen=True, masks=False)
    with pytest.raises(UserError, match="add checkpoint=FILE"):
        model("detr", frozen=True).fetch_weights()
