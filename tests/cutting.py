"""SimCut's loss in a plain loop over tokens, with cuts made by hooks, and small translators to compare it with."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.data.loading import Loader
from common.machine.seeds import generator
from common.task import Batch
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, PAD

PAIRS = [5, 0, 11, 7, 2, 9, 14, 3]  # indices in train, in the order of a step
WEIGHT, CUTOFF, SMOOTHING = 3.0, 0.3, 0.1
SIMCUT = [f"task.loss.simcut.weight={WEIGHT}", f"task.loss.simcut.cutoff={CUTOFF}", f"task.loss.smoothing={SMOOTHING}"]


def make(folder: Path, *keys: str) -> tuple[Translation, nn.Module]:
    """The task of a command line and a model with random weights; the texts are numbers of 1 to 9 digits in words."""
    english = "zero one two three four five six seven eight nine".split()
    german = "null eins zwei drei vier fünf sechs sieben acht neun".split()
    rng = generator("numbers", 0)
    rows = [torch.randint(10, (1 + i % 9,), generator=rng).tolist() for i in range(40)]
    lines = ["\t".join(" ".join(names[digit] for digit in row) for names in (english, german)) for row in rows]
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    files = [f"data.train.pairs={folder}/pairs.tsv", "data.val_count=0", "data.test_count=0", "data.batch_size=120"]
    limits = ["data.longest=60", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262"]
    config = configure("train", ["data=parallel_text", *files, *limits, *keys])
    task: Translation = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model: nn.Module = build(config["model"], **task.model_arguments())
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return task, model


def batches(task: Translation, counts: list[int]) -> list[Batch]:
    """Micro-batches of these numbers of pairs, made by the trainer's loader."""
    indices = iter(PAIRS)
    keys = [(0, tuple(next(indices) for _ in range(count))) for count in counts]
    return [*Loader(task.data, "train", seed=3, workers=0, pin=False)(keys)]


def kept(batch: Batch, name: str) -> Tensor:
    """1 for each token that is not cut, from random numbers for the sample's own tokens alone: (B, N) float64."""
    factors = torch.ones(batch[name].shape, dtype=torch.float64)
    for b, row in enumerate(batch[name].tolist()):
        length = sum(token != PAD for token in row)
        numbers = torch.rand(length, generator=generator(batch["seeds"][b], "simcut", name))
        for n in range(length):
            if numbers[n] < CUTOFF and row[n] not in (BOS, EOS):
                factors[b, n] = 0
    return factors


def masking(factors: list[Tensor]) -> Callable[..., Tensor]:
    """A hook that multiplies the outputs of an embedding's calls by these factors, in this order."""
    rest: Iterator[Tensor] = iter(factors)
    return lambda module, arguments, output: output * next(rest)[..., None]


def plain_loss(logits: Tensor, cut_logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and the divergence per token, of logits (B, T, V) without and with cut tokens."""
    total = torch.zeros((), dtype=torch.float64)
    of_cut = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for b, row in enumerate(batch["target_out"].tolist()):
        for t, target in enumerate(row):
            if target == PAD:
                continue
            p, q = torch.softmax(logits[b, t], 0), torch.softmax(cut_logits[b, t], 0)
            total = total - (1 - SMOOTHING) * p[target].log() - SMOOTHING * p.log().mean()
            of_cut = of_cut + (p * (p.log() - q.log())).sum()
            tokens += 1
    return (total + WEIGHT * of_cut) / tokens, of_cut / tokens


def hooked_logits(model: Any, batch: Batch, calls: dict[str, list[Tensor]]) -> Tensor:
    """The logits of a model whose embeddings' outputs are multiplied by these factors, a tensor for each call."""
    with ExitStack() as hooks:
        for name, factors in calls.items():
            hooks.callback(model.get_submodule(name).register_forward_hook(masking(factors)).remove)
        logits: Tensor = model(batch["source"], batch["source_lengths"], batch["target_in"])
    return logits


def check_loss(task: Translation, model: nn.Module, batch: Batch, calls: dict[str, list[Tensor]]) -> None:
    """Check that loss, divergence and all gradients of the fp64 model are those of the plain loop."""
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    expected, of_cut = plain_loss(hooked_logits(model, batch, {}), hooked_logits(model, batch, calls), batch)
    assert float(of_cut.detach()) > 1e-5 and float((kept(batch, "source") == 0).sum()) > 3
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts["simcut"], of_cut.detach(), rtol=0, atol=1e-10)
    assert parts.keys() == {"nll", "simcut"} and not parts["simcut"].requires_grad
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-10)
        assert reference.abs().max() > 1e-6
