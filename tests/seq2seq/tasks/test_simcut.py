"""SimCut in the translator's loss: parity with a plain loop, the same step for any cut, any model, and old configs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.config.compose import configure
from common.config.migrations import migrate_config
from common.errors import UserError
from common.machine.seeds import generator
from common.nn.embedding import TokenEmbedding
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.criterion.cross_entropy import LossOptions, cross_entropy
from seq2seq.tasks.simcut import cut_at_random
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, PAD
from tests.cutting import CUTOFF, SIMCUT, SMOOTHING, batches, check_loss, kept, make

TRANSFORMER = ["model=seq2seq", "model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=2"]
TRANSFORMER += ["model.decoder_layers=2"]
SEPARATE = ["data.tokenizer.joint=false", "data.tokenizer.vocabulary=261", "model.tied=none"]
Built = Callable[..., tuple[Translation, nn.Module]]


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Returns a function that makes the task and a small Transformer of a command line."""
    return lambda *keys: make(tmp_path, *TRANSFORMER, *keys)


@pytest.mark.parametrize("keys", [[], SEPARATE, ["model.blocks.pre_norm=false"]], ids=["joint", "separate", "post"])
def test_it_is_the_loss_of_a_plain_loop_with_its_gradients(built: Built, keys: list[str]) -> None:
    task, model = built(*SIMCUT, *keys)
    (batch,) = batches(task, [8])
    source, target = kept(batch, "source"), kept(batch, "target_in")
    separate = {"source_embedding": [source], "embedding": [target]}
    check_loss(task, model.double(), batch, separate if keys == SEPARATE else {"embedding": [source, target]})


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


def test_a_recurrent_model_that_embeds_token_by_token_has_the_same_loss(built: Built) -> None:
    task, _ = built(*SIMCUT)
    torch.manual_seed(0)
    model = Recurrent(262, TokenEmbedding).double()
    (batch,) = batches(task, [8])
    check_loss(task, model, batch, {"source": [kept(batch, "source")], "target": [*kept(batch, "target_in").unbind(1)]})


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
