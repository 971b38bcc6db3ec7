"""SimCut in the translator's loss: parity with a plain loop, the same step for any cut, any model, and old configs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.config.migrations import migrate_config
from common.data.loading import Loader
from common.errors import UserError
from common.machine.seeds import generator
from common.nn.embedding import TokenEmbedding
from common.task import Batch
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.criterion.cross_entropy import LossOptions, cross_entropy
from seq2seq.tasks.simcut import cut_at_random
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, PAD

PAIRS = [5, 0, 11, 7, 2, 9, 14, 3]  # indices in train, in the order of a step
WEIGHT, CUTOFF, SMOOTHING = 3.0, 0.3, 0.1
SIMCUT = [f"task.loss.simcut.weight={WEIGHT}", f"task.loss.simcut.cutoff={CUTOFF}", f"task.loss.smoothing={SMOOTHING}"]
TINY = ["model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=2", "model.decoder_layers=2"]
SEPARATE = ["data.tokenizer.joint=false", "data.tokenizer.vocabulary=261", "model.tied=none"]
Built = Callable[..., tuple[Translation, nn.Module]]


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Returns a function that makes the task and model of a command line; the texts are numbers of 1 to 9 digits."""
    english = "zero one two three four five six seven eight nine".split()
    german = "null eins zwei drei vier fünf sechs sieben acht neun".split()
    rng = generator("numbers", 0)
    rows = [torch.randint(10, (1 + i % 9,), generator=rng).tolist() for i in range(40)]
    lines = ["\t".join(" ".join(names[digit] for digit in row) for names in (english, german)) for row in rows]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    files = [f"data.train.pairs={tmp_path}/pairs.tsv", "data.val_count=0", "data.test_count=0", "data.batch_size=120"]
    limits = ["data.longest=60", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262"]

    def make(*keys: str) -> tuple[Translation, nn.Module]:
        config = configure("train", ["model=seq2seq", "data=parallel_text", *TINY, *files, *limits, *keys])
        task: Translation = build(config["task"], data=build(config["data"]))
        torch.manual_seed(0)
        model: nn.Module = build(config["model"], **task.model_arguments())
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
        return task, model

    return make


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


def plain_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and the divergence per token, in a loop over tokens, with cuts made by hooks on the embeddings."""
    arguments = batch["source"], batch["source_lengths"], batch["target_in"]
    factors = [kept(batch, "source"), kept(batch, "target_in")]
    logits = model(*arguments)
    with ExitStack() as hooks:
        if model.source_embedding is None:
            hooks.callback(model.embedding.register_forward_hook(masking(factors)).remove)
        else:
            hooks.callback(model.source_embedding.register_forward_hook(masking(factors[:1])).remove)
            hooks.callback(model.embedding.register_forward_hook(masking(factors[1:])).remove)
        cut_logits = model(*arguments)
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


@pytest.mark.parametrize("keys", [[], SEPARATE, ["model.blocks.pre_norm=false"]], ids=["joint", "separate", "post"])
def test_it_is_the_loss_of_a_plain_loop_with_its_gradients(built: Built, keys: list[str]) -> None:
    task, model = built(*SIMCUT, *keys)
    model.double()
    (batch,) = batches(task, [8])
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    expected, of_cut = plain_loss(model, batch)
    assert float(of_cut.detach()) > 0.01 and float((kept(batch, "source") == 0).sum()) > 3
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts["simcut"], of_cut.detach(), rtol=0, atol=1e-10)
    assert parts.keys() == {"nll", "simcut"} and not parts["simcut"].requires_grad
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-10)
        assert reference.abs().max() > 1e-6


@pytest.mark.parametrize("options", ["weight 0", "none"])
def test_without_simcut_no_bit_of_the_loss_and_of_the_random_numbers_changes(built: Built, options: str) -> None:
    task, model = built("model.blocks.dropout=0.3")
    assert task.loss_options.simcut is not None and task.loss_options.simcut.weight == 0, "off by default"
    if options == "none":
        task.loss_options = LossOptions(smoothing=SMOOTHING)
    (batch,) = batches(task, [8])
    torch.manual_seed(1)
    loss, parts = task.loss(model, batch, {"tokens": 77.0})
    state = torch.get_rng_state()
    torch.manual_seed(1)
    logits = model(batch["source"], batch["source_lengths"], batch["target_in"])
    smoothed, plain = cross_entropy(LossOptions(smoothing=SMOOTHING), logits, batch["target_out"])
    assert torch.equal(loss, smoothed / 77) and torch.equal(parts["nll"], plain / 77) and parts.keys() == {"nll"}
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("counts", [[3, 1, 4], [1] * 8])
def test_a_step_with_simcut_does_not_depend_on_the_micro_batches(built: Built, counts: list[int]) -> None:
    steps = []
    for split in ([8], counts):
        task, model = built(*SIMCUT)
        options = OptimizerOptions(
            **{"name": "adamw", "lr": 1e-3, "weight_decay": 1e-2, "decay_norms": False, "betas": (0.9, 0.98)},
            **{"eps": 1e-8, "momentum": 0.0, "rates": {}, "layer_decay": 1.0, "reference_batch": None},
            scaling="linear",
        )
        model.double()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        stepper = Stepper(task, model, optim.build(model, options), torch.device("cpu"), "fp32", 0.1)
        parts = stepper(batches(task, split), 0)
        steps.append((parts, torch.cat([p.detach().flatten() for p in stepper.parameters])))
    (whole, expected), (pieces, result) = steps
    for name in ("loss", "nll", "simcut", "gradient_norm"):
        assert float(whole[name]) == pytest.approx(float(pieces[name]), rel=1e-6), name  # sums in fp32
    assert (expected - result).abs().max() <= 1e-10 and (expected - before).abs().max() > 1e-4


def test_the_cuts_of_a_sample_depend_on_its_seed_alone(built: Built) -> None:
    """Not on padding, the other samples or the width; 5 and 40 tokens are on both sides of a vector's length."""
    rows = [torch.arange(4, 4 + length) for length in (5, 40, 17)]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    together = cut_at_random(tokens, 0.5, [10, 11, 12], "source")
    for b, row in enumerate(rows):
        alone = cut_at_random(row[None], 0.5, [10 + b], "source")[0]
        assert torch.equal(together[b, : len(row)], alone) and (together[b, len(row) :] == PAD).all()
    assert not torch.equal(together, cut_at_random(tokens, 0.5, [11, 11, 12], "source"))
    assert not torch.equal(together, cut_at_random(tokens, 0.5, [10, 11, 12], "target_in"))


def test_a_share_of_the_words_is_cut_and_no_special_token() -> None:
    tokens = torch.randint(0, 30, (300, 50), generator=generator("tokens", 0))
    cut = cut_at_random(tokens, CUTOFF, [*range(300)], "source")
    special = (tokens == PAD) | (tokens == BOS) | (tokens == EOS)
    assert torch.equal(cut[special], tokens[special]) and torch.equal(torch.where(cut < 0, ~cut, cut), tokens)
    words = int((~special).sum())
    share = float((cut < 0).sum()) / words
    assert abs(share - CUTOFF) < 5 * (CUTOFF * (1 - CUTOFF) / words) ** 0.5
    assert torch.equal(cut_at_random(tokens, 0.0, [*range(300)], "source"), tokens)
    assert (cut_at_random(tokens, 1.0, [*range(300)], "source")[~special] < 0).all()


def test_without_cuts_only_dropout_makes_the_divergence(built: Built) -> None:
    for dropout in (0.0, 0.3):
        task, model = built(*SIMCUT, "task.loss.simcut.cutoff=0", f"model.blocks.dropout={dropout}")
        (batch,) = batches(task, [8])
        of_cut = float(task.loss(model, batch, task.normalisers(batch))[1]["simcut"])
        assert of_cut > 0.01 if dropout else of_cut == pytest.approx(0, abs=1e-5)


class Recurrent(nn.Module):
    """A GRU translator that embeds its target token by token, in the class `embedding`."""

    def __init__(self, vocabulary: int, embedding: type[nn.Embedding]):
        super().__init__()
        self.source, self.target = embedding(vocabulary, 8), embedding(vocabulary, 8)
        self.encoder, self.decoder = nn.GRU(8, 8, batch_first=True), nn.GRUCell(8, 8)
        self.output = nn.Linear(8, vocabulary)

    def forward(self, source: Tensor, lengths: Tensor, target_in: Tensor) -> Tensor:
        outputs, _ = self.encoder(self.source(source))
        state = outputs[torch.arange(len(source)), lengths - 1]
        logits = []
        for t in range(target_in.shape[1]):
            state = self.decoder(self.target(target_in[:, t]), state)
            logits.append(self.output(state))
        return torch.stack(logits, dim=1)


def test_a_recurrent_model_that_embeds_token_by_token_has_the_same_term(built: Built) -> None:
    task, _ = built(*SIMCUT)
    torch.manual_seed(0)
    model = Recurrent(262, TokenEmbedding).double()
    (batch,) = batches(task, [8])
    arguments = batch["source"], batch["source_lengths"], batch["target_in"]
    _, parts = task.loss(model, batch, task.normalisers(batch))
    original = model(*arguments).log_softmax(-1)
    targets = kept(batch, "target_in")
    with ExitStack() as hooks:
        hooks.callback(model.source.register_forward_hook(masking([kept(batch, "source")])).remove)
        hooks.callback(model.target.register_forward_hook(masking([*targets.unbind(1)])).remove)
        cut = model(*arguments).log_softmax(-1)
    real = batch["target_out"] != PAD
    expected = (original.exp() * (original - cut)).sum(-1)[real].mean()
    assert expected > 1e-4
    torch.testing.assert_close(parts["simcut"], expected.detach(), rtol=0, atol=1e-10)


def test_a_model_with_another_embedding_is_refused(built: Built) -> None:
    task, _ = built(*SIMCUT)
    (batch,) = batches(task, [2])
    model = Recurrent(262, nn.Embedding)
    with pytest.raises(UserError, match=r"TokenEmbedding, and source of Recurrent is not one; use it in place of"):
        task.loss(model, batch, {"tokens": 1.0})
    model.source = TokenEmbedding(262, 8)
    with pytest.raises(UserError, match=r"TokenEmbedding, and target of Recurrent is not one"):
        task.loss(model, batch, {"tokens": 1.0})
    with pytest.raises(UserError, match=r"TokenEmbedding, and Linear has none"):
        task.loss(nn.Linear(1, 1), batch, {"tokens": 1.0})


def test_a_batch_without_seeds_is_refused(built: Built) -> None:
    task, model = built(*SIMCUT)
    (batch,) = batches(task, [2])
    del batch["seeds"]
    with pytest.raises(UserError, match=r"SimCut needs a seed for each sample: batch\['seeds'\]"):
        task.loss(model, batch, {"tokens": 1.0})


def test_a_config_of_an_earlier_version_has_no_simcut(built: Built) -> None:
    config = configure("train", ["model=seq2seq"])
    del config["task"]["loss"]["simcut"]
    assert migrate_config(config)["task"]["loss"] == {"smoothing": 0.1, "simcut": {"weight": 0.0, "cutoff": 0.05}}


@pytest.mark.parametrize("value", ["weight=-1", "cutoff=1.5"])
def test_values_out_of_range_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=rf"task\.loss\.simcut\.{value}"):
        configure("train", ["model=seq2seq", f"task.loss.simcut.{value}"])
