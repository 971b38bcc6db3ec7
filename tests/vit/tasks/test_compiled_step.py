"""trainer.compile=true: the loss and the gradients of the image models are those of the uncompiled ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.check import build, build_model
from common.config.compose import configure
from common.data.batching import Loader
from common.machine.seeds import generator

SMALL = ["model.width=16", "model.heads=2", "model.layers=2", "model.feedforward=24"]
MODELS = {
    "vit": ["model=vit", *SMALL, "model.distillation_token=true"],
    "swin": ["model=swin", "model.width=16", "model.depths=[2,1]", "model.heads=[2,2]", "model.window=3"],
    "tnt": ["model=tnt", *SMALL],
    "cnn": ["model=cnn", "model.widths=[8,16,24]"],
    "igpt": ["model=igpt", *SMALL, "model.dropout=0.0"],
    "igpt, masked": ["model=igpt", *SMALL, "model.dropout=0.0", "task.loss.objective=masked"],
    "mae": ["model=mae", *SMALL],
}
SPLIT = (5, 3)  # images in each micro-batch: the second one is compiled for another length


def gradients(model: Any, task: Any, batches: list[Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of each batch, and the gradients of their sum."""
    model.zero_grad()
    losses = [task.loss(model, batch, task.normalisers(batch))[0] for batch in batches]
    torch.stack(losses).sum().backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_has_the_loss_and_the_gradients_of_the_model(name: str) -> None:
    torch._dynamo.reset()
    config = configure("train", [*MODELS[name], "data.augmentation.mixup=0.0"])
    task = build(config["task"], data=build(config["data"]))
    model, random = build_model(config["model"], task).eval(), generator("compiled")  # without stochastic depth
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=random)
    keys = [(0, tuple(range(start, start + count))) for start, count in zip((0, SPLIT[0]), SPLIT, strict=True)]
    batches = [*Loader(task.data, "train", seed=3, workers=0, pin=False)(keys)]
    losses, expected = gradients(model, task, batches)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model.compile(backend=backend)
    compiled_losses, compiled = gradients(model, task, batches)
    assert graphs, "the loss called the model's own forward pass"
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-5, atol=1e-6)
    assert compiled.keys() == expected.keys() and len(expected) > 5
    for key, gradient in expected.items():
        torch.testing.assert_close(compiled[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1))
