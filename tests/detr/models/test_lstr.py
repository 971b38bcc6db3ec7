"""LSTR: the paper's number of parameters, shared curves, and independence from padding and precision."""

from typing import Any

import pytest
import torch

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine import device as devices
from common.machine.seeds import generator
from detr.models.lstr import Lstr
from tests.detecting import batch, pictures


def lstr(name: str = "lstr", *overrides: str) -> Lstr:
    """A configured model with perturbed weights; norms and biases would otherwise be ones and zeros."""
    torch.manual_seed(0)
    model: Lstr = build(configure("train", [f"model={name}", *overrides])["model"])
    rng = generator("lstr")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.05 * torch.randn(tensor.shape, generator=rng)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.clamp_(min=0.1)
    return model.eval()


def stacked(model: Lstr, *inputs: Any) -> dict[str, torch.Tensor]:
    layers = model(*inputs)
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def test_the_papers_network_has_765_754_parameters():
    """The official network for TuSimple, counted with its two classes."""
    model = build(configure("train", ["model=lstr"])["model"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 765_754
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.memory_grid(360, 640) == (12, 20)


def test_outputs_have_a_curve_and_two_logits_for_each_query_and_layer():
    outputs = stacked(lstr(), torch.randn(2, 3, 90, 160, generator=generator("x")), None)
    assert outputs["logits"].shape == (2, 2, 7, 2) and outputs["curves"].shape == (2, 2, 7, 8)


@torch.no_grad()
def test_the_road_is_the_mean_over_queries_and_ends_and_slopes_are_a_lanes_own():
    model = lstr("lanes")
    recorded = []
    hooks = [
        head.register_forward_hook(lambda _, __, y: recorded.append(y)) for head in (model.lane_head, model.road_head)
    ]
    curves = stacked(model, torch.randn(2, 3, 64, 64, generator=generator("x")), None)["curves"]
    for hook in hooks:
        hook.remove()
    lane, road = recorded  # (L, B, Q, 4) each
    assert torch.equal(curves[..., [0, 1, 6, 7]], lane)
    assert torch.allclose(curves[..., 2:6], road.mean(2, keepdim=True).expand_as(road))
    assert (curves[..., 2:6] == curves[:, :, :1, 2:6]).all() and (lane.std(2) > 0).all() and (road.std(2) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["lstr", "lanes"])
def test_an_image_beside_a_larger_one_has_the_lanes_that_it_has_alone(name):
    model = lstr(name).double()
    images = [picture.double() for picture in pictures((70, 100), (130, 150))]
    padded, sizes = batch(images)
    together = stacked(model, padded, sizes)
    for i, image in enumerate(images):
        for output, value in stacked(model, image[None], None).items():
            # Observed: 3e-8, because the sines of positions are computed in fp32.
            assert torch.allclose(together[output][:, [i]], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_heads_compute_in_fp32_under_bf16():
    model = lstr("lanes")
    with devices.autocast(torch.device("cpu"), "bf16"):
        outputs = model(torch.randn(1, 3, 64, 64, generator=generator("x")), None)
    assert all(layer["curves"].dtype == layer["logits"].dtype == torch.float32 for layer in outputs)


def test_hints_and_a_width_that_does_not_fit_are_refused():
    with pytest.raises(UserError, match="has no denoising queries"):
        lstr("lanes")(torch.zeros(1, 3, 64, 64), None, {})
    with pytest.raises(UserError, match=r"model.width=30 must be divisible"):
        lstr("lanes", "model.width=30")
