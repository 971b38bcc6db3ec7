"""The fast path against the plain one: outputs in bf16 against fp32, from random weights that nothing hides behind.

Apart means: the norm of the difference as a part of the norm of what varies from answer to answer, since a constant
that all share would hide anything. bf16 keeps 8 bits of each number, so that one product is 0.2 % off; through all
layers 3 % were seen. A wrong fold, cast or kernel is tens of per cent off. Queries of a random ResNet DETR answer so
nearly alike (they vary by 1 %) that it is measured by the whole answers, which were 0.7 % off.
"""

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.machine import device as devices
from common.machine.seeds import generator

APART = 0.06
APART_AS_A_WHOLE = 0.02
CPU = torch.device("cpu")


def redrawn(model: nn.Module) -> nn.Module:
    """Every tensor perturbed at random, norms, biases and what starts as zeros included."""
    draw = generator("precision")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=draw)
            elif tensor.dim() > 1:
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.1 * tensor.std().clamp(min=0.05))
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.2)
            if name.endswith("in_proj.weight"):
                tensor[: 2 * len(tensor) // 3] *= 2  # queries and keys, so that attention chooses
    return model.eval()


def apart(half: Tensor, plain: Tensor, along: int) -> float:
    half, plain = half.double(), plain.double()
    return float((half - plain).norm() / (plain - plain.mean(along, keepdim=True)).norm())


def both(model: nn.Module, *inputs: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    answers = []
    for precision in ("bf16", "fp32"):
        with torch.inference_mode(), devices.autocast(CPU, precision):
            found = model(*inputs)
        if isinstance(found, list):  # of decoder layers
            found = {name: torch.stack([layer[name] for layer in found]) for name in found[-1]}
        answers.append(found if isinstance(found, dict) else {"logits": found})
    return answers[0], answers[1]


@pytest.mark.parametrize("name", ["detr", pytest.param("detr_r50", marks=pytest.mark.slow)])
def test_detectors_answer_in_bf16_as_in_fp32(name: str) -> None:
    overrides = [] if name == "detr" else ["model.backbone.weights=none"]
    torch.manual_seed(0)
    model = redrawn(build(configure("train", [f"model={name}", *overrides])["model"], classes=5))
    side = 64 if name == "detr" else 256
    images = torch.randn(3, 3, side, side, generator=generator("images"))
    sizes = torch.tensor([[side, side], [side - 24, side], [side, side // 2]])
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    with torch.no_grad():
        model.queries.weight *= 3
    half, plain = both(model, images, sizes)
    assert half["logits"].dtype == half["boxes_cxcywh"].dtype == torch.float32
    for output in ("logits", "boxes_cxcywh"):
        assert (half[output] - plain[output]).norm() < APART_AS_A_WHOLE * plain[output].norm(), output
        assert name != "detr" or apart(half[output], plain[output], along=2) < APART, output


@pytest.mark.parametrize("name", ["vit", pytest.param("vit_s16", marks=pytest.mark.slow)])
def test_classifiers_answer_in_bf16_as_in_fp32(name: str) -> None:
    channels, side = (1, 8) if name == "vit" else (3, 224)
    torch.manual_seed(0)
    config = configure("train", [f"model={name}"])
    model = redrawn(build(config["model"], classes=10, channels=channels, image_size=(side, side)))
    images = torch.randn(16, channels, side, side, generator=generator("images"))
    half, plain = both(model, images)
    assert half["logits"].dtype == torch.float32
    assert apart(half["logits"], plain["logits"], along=0) < APART


@pytest.mark.parametrize("name", ["seq2seq", pytest.param("transformer_base", marks=pytest.mark.slow)])
def test_translators_answer_in_bf16_as_in_fp32(name: str) -> None:
    torch.manual_seed(0)
    model = redrawn(build(configure("train", [f"model={name}"])["model"], vocabularies=(50, 50), joint=True))
    draw = generator("sentences")
    source, target = (torch.randint(4, 50, (8, length), generator=draw) for length in (9, 7))
    half, plain = both(model, source, torch.tensor([9, 9, 5, 9, 1, 2, 9, 9]), target)
    assert apart(half["logits"].flatten(0, 1), plain["logits"].flatten(0, 1), along=0) < APART
