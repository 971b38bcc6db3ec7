"""Muon with AdamW: which parameters belong to which, the update of the papers, and resuming."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build, construct
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.nn.blocks import BlockOptions, Stack
from common.train import optim
from common.train.optim import OptimizerOptions

CONFIG = configure("train", ["model=vit", "optimizer=muon"])["optimizer"]
OPTIONS = replace(
    construct(OptimizerOptions, CONFIG), lr=0.02, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3, momentum=0.9
)
# Of the updates' norm. torch orthogonalises in bf16: 15 matrix products, each rounded by up to 2^-9, and an iteration
# multiplies the errors of small singular values by up to 3.44: sqrt(15) * 2^-9 * 3.44 = 0.026.
UPDATE_ERROR = 0.04


class Network(nn.Module):
    """An embedding, a table that does not decay, one block, and a head."""

    undecayed = ("encoder.table",)

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 8)
        self.encoder = Stack(BlockOptions(width=8, heads=2, feedforward=16, pre_norm=True), layers=1, final_norm=True)
        self.encoder.table = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(8, 2)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def muon_names(model: nn.Module, options: OptimizerOptions = OPTIONS) -> set[str]:
    optimizer = optim.build(model, options)
    every = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(every) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return {name for group in optimizer.param_groups if group["muon"] for name in group["param_names"]}


def test_muon_updates_the_matrices_of_blocks_alone():
    assert muon_names(Network(0)) == {
        "encoder.blocks.0.attention.in_proj.weight",
        "encoder.blocks.0.attention.out_proj.weight",
        "encoder.blocks.0.feed_forward.expand.weight",
        "encoder.blocks.0.feed_forward.contract.weight",
    }


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        (["model=vit"], {"classes": 10, "channels": 1, "image_size": (8, 8)}),
        (["model=seq2seq"], {"vocabularies": (50, 50), "joint": True}),
    ],
)
def test_in_our_models_embeddings_and_heads_are_left_to_adamw(line, sizes):
    model = build(configure("train", line)["model"], **sizes)
    names = muon_names(model)
    stacks = ("encoder.blocks.", "decoder.blocks.")
    assert names == {name for name, p in model.named_parameters() if name.startswith(stacks) and p.ndim == 2}
    assert len(names) >= 16


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five steps of the iteration of Jordan et al., in float64, written on the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def test_the_updates_are_those_of_the_papers():
    """Muon: algorithm 1 of Liu et al. 2025 with Nesterov momentum. AdamW: arXiv:1711.05101, algorithm 2."""
    model = Network(0)
    optimizer = optim.build(model, OPTIONS)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    first, second = ({n: torch.zeros_like(p) for n, p in expected.items()} for _ in range(2))
    (b1, b2), lr, decay = OPTIONS.betas, OPTIONS.lr, OPTIONS.weight_decay
    for step in range(1, 4):
        give_gradients(model, step)
        before = {n: p.detach().double() for n, p in model.named_parameters()}
        optimizer.step()
        for n, p in model.named_parameters():
            gradient, w = p.grad.double(), before[n]
            if n.startswith("encoder.blocks") and p.ndim == 2:
                first[n] = OPTIONS.momentum * first[n] + gradient
                update = orthogonalised(gradient + OPTIONS.momentum * first[n])
                update = 0.2 * max(p.shape) ** 0.5 * update + decay * w
                tolerance = UPDATE_ERROR * update.norm()
            else:
                first[n] = b1 * first[n] + (1 - b1) * gradient
                second[n] = b2 * second[n] + (1 - b2) * gradient**2
                update = (first[n] / (1 - b1**step)) / ((second[n] / (1 - b2**step)).sqrt() + OPTIONS.eps)
                update = update + decay * w if p.ndim == 2 and "table" not in n else update
                tolerance = 1e-4 * update.norm()  # the float32 rounding of weights of size 1 in updates of size 0.02
            assert ((w - p.detach()) / lr - update).norm() < tolerance, n


def test_rates_and_schedules_apply_to_the_matrices():
    model = Network(0)
    optimizer = optim.build(model, replace(OPTIONS, rates={"encoder.blocks.0.feed_forward": 0.0}))
    optim.set_rate(optimizer, 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    give_gradients(model, 0)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == {
        n for n in before if "feed_forward" in n
    }
    assert {group["lr"] for group in optimizer.param_groups} == {0.0, 0.01}


def test_a_restored_optimizer_continues_bit_for_bit(tmp_path: Path):
    whole, first = Network(0), Network(0)
    whole_optimizer, first_optimizer = optim.build(whole, OPTIONS), optim.build(first, OPTIONS)
    for step in range(3):
        for model, optimizer in ((whole, whole_optimizer), (first, first_optimizer)):
            give_gradients(model, step)
            optimizer.step()
    checkpoint.save(tmp_path / "a.pt", {"model": first.state_dict(), "optimizer": optim.state(first_optimizer)})
    content = checkpoint.load(tmp_path / "a.pt")
    second = Network(1)
    second.load_state_dict(content["model"])
    second_optimizer = optim.build(second, OPTIONS)
    optim.restore(second_optimizer, content["optimizer"])
    for step in range(3, 6):
        for model, optimizer in ((whole, whole_optimizer), (second, second_optimizer)):
            give_gradients(model, step)
            optimizer.step()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_without_the_momentum_of_a_matrix_is_refused(tmp_path: Path):
    model = Network(0)
    optimizer = optim.build(model, OPTIONS)
    give_gradients(model, 0)
    optimizer.step()
    saved = optim.state(optimizer)
    optim.refuse_incomplete(optimizer, saved, tmp_path)
    del saved["encoder.blocks.0.attention.in_proj.weight"]["momentum_buffer"]
    with pytest.raises(UserError, match=r"momentum_buffer of encoder\.blocks\.0\.attention\.in_proj\.weight"):
        optim.refuse_incomplete(optimizer, saved, tmp_path)
    del saved["encoder.blocks.0.attention.in_proj.weight"], saved["head.weight"]["exp_avg"]
    with pytest.raises(UserError, match=r"exp_avg of head\.weight"):
        optim.refuse_incomplete(optimizer, saved, tmp_path)


def test_a_strategy_that_shards_matrices_is_refused_for_any_number_of_processes():
    with pytest.raises(UserError, match=r"optimizer\.name=muon needs whole matrices; use trainer\.strategy=ddp"):
        optim.refuse_sharding(OPTIONS)
    optim.refuse_sharding(replace(OPTIONS, name="adamw"))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"which Linear does not have; use optimizer\.name=adamw"):
        optim.build(nn.Linear(2, 2), OPTIONS)


@pytest.mark.parametrize("frozen", ["encoder.blocks", "embedding"])
def test_the_trained_part_may_have_no_matrix_of_a_block_or_nothing_else(frozen):
    model = Network(0)
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("encoder.blocks") and parameter.ndim == 2
        parameter.requires_grad_(is_matrix != (frozen == "encoder.blocks"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optim.build(model, OPTIONS)
    give_gradients(model, 0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad


def test_a_step_is_never_deferred_with_muon_which_cannot_skip_an_update_on_the_device():
    model = Network(0)
    assert optim.can_skip_update(optim.build(model, replace(OPTIONS, name="adamw")))
    assert not optim.can_skip_update(optim.build(model, OPTIONS))
    model.encoder.requires_grad_(False)
    assert not optim.can_skip_update(optim.build(model, OPTIONS)), "AdamW's groups alone"
