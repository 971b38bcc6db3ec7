"""Magnitude pruning: the schedule, the threshold, zeros that stay zero through momentum and resuming."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.files import checkpoint
from common.nn.blocks import BlockOptions, Stack
from common.train.sparsity import Sparsifier, SparsityOptions, prunable_weights, zero_smallest

OPTIONS = SparsityOptions(fraction=0.6, ramp=0.75, every=2)


class Sums(nn.Module):
    """A small encoder that maps a number to a number."""

    def __init__(self) -> None:
        super().__init__()
        options = BlockOptions(width=8, heads=2, feedforward=12, pre_norm=True)
        self.first, self.last = nn.Linear(1, 8), nn.Linear(8, 1)
        self.encoder = Stack(options, layers=2, final_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x)[:, None])[:, 0])


def test_the_share_of_zeros_rises_as_a_cubic() -> None:
    """Zhu and Gupta 2017, equation 1, with s_i = 0: after half of the ramp, s_f (1 - 1/8)."""
    sparsifier = Sparsifier(Sums(), OPTIONS, total=40)
    assert [sparsifier.fraction(step) for step in (0, 15, 30, 40)] == pytest.approx([0, 0.6 * 7 / 8, 0.6, 0.6])
    assert [sparsifier.is_complete(step) for step in (29, 30)] == [False, True]


def test_one_threshold_applies_to_all_matrices_but_leaves_a_twentieth_of_each() -> None:
    small, large = torch.full((10, 10), 0.01), torch.full((10, 10), 1.0)
    small += torch.arange(100.0).view(10, 10) * 1e-5
    large += torch.arange(100.0).view(10, 10) * 1e-5
    zero_smallest([small, large], 0.25)
    assert int((small == 0).sum()) == 50 and bool((small.flatten()[:50] == 0).all()) and bool((large != 0).all())
    zero_smallest([small, large], 0.5)
    assert int((small == 0).sum()) == 95 and int((large == 0).sum()) == 5
    before = small.clone()
    zero_smallest([small, large], 0.0)
    assert torch.equal(small, before)


def test_embeddings_norms_biases_and_heads_are_no_candidates() -> None:
    names = prunable_weights(Sums())
    assert len(names) == 8 and all(name.startswith("encoder.blocks.") and name.endswith(".weight") for name in names)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_zeros_stay_zero_through_steps_with_momentum_and_so_does_the_momentum(name: str) -> None:
    torch.manual_seed(0)
    model = Sums()
    optimizers: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1, momentum=0.9),
    }
    optimizer = optimizers[name](list(model.parameters()))
    sparsifier = Sparsifier(model, OPTIONS, total=4)

    def step() -> None:
        optimizer.zero_grad()
        (model(torch.randn(6, 1)) - 1).square().mean().backward()
        with sparsifier.keeping_zeros(optimizer):
            optimizer.step()

    step()  # momentum is not zero when the weights become zero
    sparsifier.increase(2)
    masks = {key: weight == 0 for key, weight in prunable_weights(model).items()}
    before = {key: weight.detach().clone() for key, weight in prunable_weights(model).items()}
    for _ in range(3):
        step()
    for key, weight in prunable_weights(model).items():
        assert masks[key].any() and bool((weight[masks[key]] == 0).all()), key
        assert not torch.equal(weight, before[key]), "the others move"
        moments = [m for m in optimizer.state[weight].values() if isinstance(m, Tensor) and m.shape == weight.shape]
        assert moments and all(bool((moment[masks[key]] == 0).all()) for moment in moments)


def test_without_the_mask_momentum_moves_a_zero() -> None:
    """So the test above can fail."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    weight.data.zero_()
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert bool((weight != 0).all())


RUN = [
    *("model=vit", "model.width=16", "model.layers=2", "model.heads=2", "data.batch_size=32", "trainer.workers=0"),
    *("trainer.device=cpu", "trainer.precision=fp32", "trainer.steps=8", "schedule.warmup=1", "trainer.ema_decay=0.5"),
    *("trainer.save_every=3", "trainer.eval_every=2", "trainer.log=[]", "trainer.keep_best=4"),
    "trainer.sparsity={fraction:0.6,ramp:0.7,every:2}",
]


def shares_of_zeros(tensors: dict[str, Tensor]) -> tuple[float, float]:
    """The shares of zeros in the prunable weights of a state dict, and in its other matrices."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            parts["encoder.blocks." not in name].append(tensor.flatten())
    shares = [float((torch.cat(part) == 0).float().mean()) for part in parts]
    return shares[0], shares[1]


def test_a_resumed_run_has_the_same_zeros_and_weights_to_the_last_bit(inside: Any) -> None:
    inside("train", *RUN, "run_dir=whole")
    whole = checkpoint.load("whole/checkpoints/step_00000008.pt")
    for tensors in (whole["model"], whole["average"]["weights"]):
        blocks, others = shares_of_zeros(tensors)
        assert blocks == pytest.approx(0.6, abs=1e-3) and others == 0
    assert whole["ranking"][0][1] in (6, 8), "the checkpoints before the last increase, at step 6, are not ranked"
    shutil.copytree("whole", "resumed")
    for name in ("results.json", "checkpoints/best.pt", "checkpoints/step_00000008.pt"):
        Path("resumed", name).unlink()
    steps = sorted(Path("resumed/checkpoints").glob("step_*.pt"))
    first = checkpoint.load(steps[-1])
    assert 0.3 < shares_of_zeros(first["model"])[0]
    inside("train", *RUN, "run_dir=resumed", "resume=auto")
    resumed = checkpoint.load("resumed/checkpoints/step_00000008.pt")
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
        assert torch.equal(whole["average"]["weights"][name], resumed["average"]["weights"][name]), name


def test_mistakes_end_in_one_sentence(inside: Any) -> None:
    sparsity = "trainer.sparsity={fraction:0.5,ramp:0.5,every:1}"
    assert "use trainer.strategy=ddp" in inside("train", *RUN, "trainer.strategy=fsdp", code=2)
    sentence = inside("train", *RUN, "trainer.sparsity={fraction:0.99,ramp:0.5,every:1}", code=2)
    assert "trainer.sparsity.fraction=0.99: expected a number above 0 up to 0.95" in sentence
    cnn = ["model=cnn", "model.widths=[8,16,24]", "trainer.device=cpu", "trainer.steps=2", "trainer.log=[]"]
    assert "of which ResNet trains none; give null" in inside("train", *cnn, sparsity, code=2)
