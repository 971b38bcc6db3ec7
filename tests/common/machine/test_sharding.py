"""A sharded model has the same steps, averages, files and outputs as a model in one process.

Each comparison runs the same function in one process and in several ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.data.batching import Order, steps
from common.files import checkpoint
from common.machine import distributed
from common.nn.linear import Linear
from common.train import optim
from common.train.ema import Average
from common.train.optim import OptimizerOptions
from common.train.step import Stepper

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
WORLDS = (2, 3)
OPTIMIZER = OptimizerOptions(
    name="adamw",
    lr=1e-2,
    weight_decay=1e-2,
    decay_norms=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.0,
    rates={},
    layer_decay=1.0,
    reference_batch=None,
    scaling="linear",
)


class Block(nn.Module):
    """Parameters whose shapes two or three ranks cannot share evenly, and one with a single element."""

    def __init__(self):
        super().__init__()
        self.linear = Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 5) -> (B, 5)."""
        return x + self.scale * self.linear(x).tanh()


class Toy(nn.Module):
    """Layers in a list, a tied matrix, a frozen one, an unused parameter, and a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.frozen = Linear(5, 5).requires_grad_(False)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = Linear(5, 7, bias=False)
        self.out.weight = self.table.weight
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.arange(5.0))

    def encode(self, x: Tensor) -> Tensor:
        """(B,) -> (B, 5)."""
        x = self.frozen(self.table(x)) + self.offset
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B,) -> (B, 7)."""
        return self.out(self.encode(x))


class Sum:
    """A task whose loss is a mean over the step's samples."""

    def normalisers(self, batch: dict) -> dict[str, float]:
        return {"samples": float(len(batch["x"]))}

    def loss(self, model: nn.Module, batch: dict, normalisers: dict) -> tuple[Tensor, dict]:
        return model(batch["x"]).square().sum() / normalisers["samples"], {}


class Tokens:
    """Seven samples of equal cost."""

    def count(self, split: str) -> int:
        return 7

    def cost(self, split: str) -> list[int]:
        return [1] * 7

    def sample(self, split: str, index: int, generator: Any) -> int:
        return index

    def collate(self, samples: list[int]) -> dict:
        return {"x": torch.tensor(samples), "ids": samples}


def toy(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = Toy().to(dtype)
    distributed.shard(model, CPU)
    return model


def take_steps(stepper: Stepper, data: Any, start: int, stop: int, *, micro_batch: int, batch_size: int = 5) -> None:
    """Take the steps from `start` up to but excluding `stop`, as the trainer does."""
    order = Order(data.cost("train"), batch_size, seed=0)
    rank, world = distributed.rank(), distributed.world_size()
    options = {"rank": rank, "world": world, "workers": 0, "pin": False}
    for number, (_, batches) in enumerate(
        steps(data, order, start=start, stop=stop, micro_batch=micro_batch, equal=True, **options)
    ):
        stepper(batches, start + number)


def stepper_of(model: nn.Module, task: Any, clip_norm: float | None) -> Stepper:
    return Stepper(task, model, optim.build(model, OPTIMIZER), CPU, "fp32", clip_norm)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distributed.full_tensors(model.state_dict()).items()}


def assert_equal(result: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Nested dicts of tensors and numbers, with the same keys."""
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(result[name], value, tolerance)
    else:
        assert type(result) is type(expected), "plain tensors"
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


# Copying and loading full tensors.


def round_trips() -> dict[str, Any]:
    """A model's full tensors after values are copied tensor by tensor, and after a state dict is loaded.

    With the values themselves, and the numbers of elements on this rank ("own") and of the model ("all").
    """
    model = toy()
    own = sum(distributed.local_part(p).numel() for p in model.parameters())
    torch.manual_seed(1)
    to_copy = {name: torch.randn_like(value) for name, value in weights(model).items()}
    to_copy["out.weight"] = to_copy["table.weight"]
    for name, value in model.state_dict().items():
        distributed.copy_full(value, to_copy[name])
    copied = weights(model)
    torch.manual_seed(2)
    to_load = {name: value + torch.randn_like(value) for name, value in to_copy.items()}
    to_load["out.weight"] = to_load["table.weight"]
    distributed.load_state_dict(model, to_load)
    counts = {"own": own, "all": sum(p.numel() for p in model.parameters())}
    return {"copied": copied, "to copy": to_copy, "loaded": weights(model), "to load": to_load, **counts}


@pytest.mark.parametrize("world", WORLDS)
def test_values_copied_into_a_sharded_model_are_gathered_unchanged_on_every_rank(world: int, tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, world, round_trips)
    for result in ranks:
        assert_equal(result["copied"], result["to copy"])
        assert_equal(result["loaded"], result["to load"])
        assert result["own"] < 0.7 * result["all"], "a part"
    assert sum(result["own"] for result in ranks) == ranks[0]["all"]


# A step.


def history(micro_batch: int, batch_size: int, count: int, file: Path | None = None) -> dict[str, Any]:
    """The whole state after `count` steps, from the start or from another run's checkpoint."""
    model = toy()
    stepper, average = stepper_of(model, Sum(), 0.1), Average(model, 0.9)
    start = 0
    if file is not None:
        saved = checkpoint.load(file)
        distributed.load_state_dict(model, saved["model"])
        optim.restore(stepper.optimizer, saved["optimizer"])
        average.load_state_dict(saved["average"])
        start = saved["step"]
    for number in range(start, count):
        take_steps(stepper, Tokens(), number, number + 1, micro_batch=micro_batch, batch_size=batch_size)
        average.update(model)
    content = {"model": weights(model), "optimizer": optim.state(stepper.optimizer), "average": average.state_dict()}
    with average.applied(model):
        inside = weights(model)
    return {"step": count, **content, "inside": inside, "after": weights(model)}


@pytest.mark.parametrize(("micro_batch", "batch_size"), [(7, 7), (3, 7), (1, 5), (1, 2)])
def test_weights_average_and_optimizer_are_those_of_one_process(micro_batch, batch_size, tmp_path) -> None:
    """In fp64, because only the order of sums differs.

    Of seven samples in micro-batches of 3, two ranks have 3 and 3 + 1, so that one needs a dummy. Of two samples, a
    third rank has none.
    """
    alone = history(micro_batch, batch_size, 3)
    assert_equal(alone["inside"], alone["average"]["weights"])
    assert "unused" not in alone["optimizer"] and "frozen.weight" not in alone["optimizer"]
    for world in WORLDS:
        for result in run_ranks(tmp_path, world, history, micro_batch, batch_size, 3):
            assert_equal(result, alone, 1e-10)
            assert_equal(result["after"], result["model"])


def test_ranks_and_one_process_resume_from_each_others_files(tmp_path: Path) -> None:
    """A checkpoint that is loaded and written again without a step is the same, bit for bit."""

    def saved(content: dict[str, Any], name: str) -> Path:
        checkpoint.save(tmp_path / name, content)
        return tmp_path / name

    alone = history(2, 5, 6)
    of_two = run_ranks(tmp_path, 2, history, 2, 5, 2)[0]
    file = saved(of_two, "two.pt")
    assert_equal(run_ranks(tmp_path, 3, history, 2, 5, 2, file)[0], of_two)
    assert_equal(history(2, 5, 2, file), of_two)
    of_three = saved(run_ranks(tmp_path, 3, history, 2, 5, 4, file)[0], "three.pt")
    assert_equal(history(2, 5, 6, of_three), alone, 1e-10)
    of_one = saved(history(2, 5, 4, file), "one.pt")
    assert_equal(run_ranks(tmp_path, 2, history, 2, 5, 6, of_one)[0], alone, 1e-10)


# Outputs.


def outputs() -> list[Tensor]:
    """Outputs of the initial model, after each step, with other weights and with the average; in fp32, which is packed.

    Each rank calls the model a different number of times, without the others. No packed copy of gathered weights may
    remain, because the next ones may lie at the same address.
    """
    model = toy(torch.float32)
    stepper, average, results = stepper_of(model, Sum(), None), Average(model, 0.5), []

    def compute() -> None:
        model.eval()
        with torch.no_grad(), distributed.unsharded(model):
            for _ in range(distributed.rank()):
                model(torch.arange(3))
            results.extend([model(torch.arange(7)), model.encode(torch.arange(7))])
            maps = [module for module in model.modules() if isinstance(module, Linear)]
            assert distributed.world_size() == 1 or not any(linear.weight_cache._entries for linear in maps)
        model.train()

    compute()
    take_steps(stepper, Tokens(), 0, 1, micro_batch=2)
    compute()
    take_steps(stepper, Tokens(), 1, 2, micro_batch=2)
    compute()
    distributed.load_state_dict(model, {name: value / 2 for name, value in weights(model).items()})
    compute()
    with average.applied(model):
        compute()
    compute()
    return results


@pytest.mark.parametrize("world", WORLDS)
def test_an_unsharded_model_is_called_by_one_rank_alone_and_has_its_newest_weights(world: int, tmp_path: Path) -> None:
    """1e-5: fp32 rounding over two steps; each change of the weights changes the outputs by far more."""
    expected = outputs()
    for before, after in zip(expected, expected[2:], strict=False):
        assert (before - after).abs().max() > 1e-2
    for results in run_ranks(tmp_path, world, outputs):
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)


# The three models.

TINY = {
    "detr": [
        *("model=detr", "model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=1"),
        *("model.decoder_layers=2", "model.queries=5", "model.dropout=0", "model.backbone.frozen=1"),
        *("data.image_size=48", "data.train_count=10", "data.val_count=1", "data.test_count=1"),
    ],
    "vit": ["model=vit", "model.width=16", "model.layers=2", "model.heads=2", "data.augmentation.mixup=0.8"],
    "seq2seq": [
        *("model=seq2seq", "data=parallel_text", "model.width=16", "model.heads=2", "model.feedforward=24"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "model.blocks.dropout=0", "data.tokenizer.pieces=bytes"),
        *("data.tokenizer.vocabulary=262", "data.val_count=0", "data.test_count=0", "data.longest=60"),
    ],
}
BATCHES = {"detr": (5, 2), "vit": (8, 3), "seq2seq": (60, 30)}


def config(task: str, folder: Path) -> dict[str, Any]:
    paths = {"detr": [f"data.root={folder / 'shapes'}"], "seq2seq": [f"data.train.pairs={folder / 'pairs.tsv'}"]}
    return configure("train", [*TINY[task], *paths.get(task, [])])


def as_type(x: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point inputs, such as images in fp32."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def one_step(task: str, folder: Path, dtype: str, clip_norm: float | None) -> dict[str, dict[str, Tensor]]:
    """The gradients and the weights after one step of several micro-batches."""
    composed = config(task, folder)
    data = build(composed["data"])
    problem = build(composed["task"], data=data)
    torch.manual_seed(0)
    model = build(composed["model"], **problem.model_arguments()).to(getattr(torch, dtype))
    model.register_forward_pre_hook(lambda _, inputs: tuple(as_type(x, getattr(torch, dtype)) for x in inputs))
    distributed.shard(model, CPU)
    batch_size, micro_batch = BATCHES[task]
    stepper = stepper_of(model, problem, clip_norm)
    take_steps(stepper, data, 0, 1, micro_batch=micro_batch, batch_size=batch_size)
    gradients = {name: distributed.full_tensors(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "weights": weights(model)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pairs = [f"{'ab ' * (1 + number % 4)}\t{'x y ' * (1 + number % 3)}" for number in range(20)]
    (folder / "pairs.tsv").write_text("\n".join(pairs), encoding="utf-8")
    return folder


@pytest.mark.parametrize("task", TINY)
def test_a_sharded_model_has_the_gradients_of_one_process(task: str, folder: Path, tmp_path: Path) -> None:
    """Unclipped in fp32: a relative difference of 1e-6 in norm; parameters in fp64 after AdamW: 1e-10."""
    expected = one_step(task, folder, "float32", None)["gradients"]
    after = one_step(task, folder, "float64", 0.1)["weights"]
    for world in WORLDS:
        for result in run_ranks(tmp_path, world, one_step, task, folder, "float32", None):
            gradients = result["gradients"]
            assert gradients.keys() == expected.keys()
            sharded, single = (torch.cat([by_name[n].flatten() for n in expected]) for by_name in (gradients, expected))
            assert (sharded - single).norm() <= 1e-6 * single.norm()
        for result in run_ranks(tmp_path, world, one_step, task, folder, "float64", 0.1):
            assert_equal(result["weights"], after, 1e-10)
