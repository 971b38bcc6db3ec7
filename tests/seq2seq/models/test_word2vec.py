"""word2vec against plain loops in fp64, written from the papers and the order of updates in word2vec.c."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from seq2seq.criterion.word_targets import HierarchicalSoftmax, NegativeSampling, Targets
from seq2seq.models.word2vec import GROUP, Word2Vec

COUNTS = np.array([900, 400, 200, 150, 90, 40, 17, 11, 5, 3, 2])
RATE = 0.1  # large, so that an update with old instead of new vectors shows
WIDTH = 6
# Sums in another order differ by the rounding of fp64, about 1e-15 here.
EXACT = 1e-10
outputs = pytest.mark.parametrize("output", ["negative_sampling", "hierarchical_softmax"])
architectures = pytest.mark.parametrize("architecture", ["skip_gram", "cbow"])


class Text(NamedTuple):
    words: Tensor
    left: Tensor
    right: Tensor


def model(architecture: Any, seed: int = 0) -> Word2Vec:
    """A model in fp64 whose two tables are random; the output table would begin with zeros."""
    network = Word2Vec(words=len(COUNTS), width=WIDTH, architecture=architecture).double()
    with torch.no_grad():
        for table in (network.inputs, network.outputs):
            name = "inputs" if table is network.inputs else "outputs"
            table.copy_(0.5 * torch.randn(table.shape, generator=generator(name, seed), dtype=torch.float64))
    return network


def text(count: int, window: int = 3, seed: int = 0) -> Text:
    """Random words in one sentence, with windows that are cut at its ends."""
    random = generator("text", seed)
    words = torch.multinomial(torch.from_numpy(COUNTS / COUNTS.sum()), count, replacement=True, generator=random)
    reach = torch.randint(1, window + 1, (count,), generator=random)
    position = torch.arange(count)
    return Text(words, torch.minimum(reach, position), torch.minimum(reach, count - 1 - position))


def targets_of(words: Tensor, output: str, seed: int = 0) -> Targets:
    sampled = NegativeSampling(COUNTS, 4, 0.75) if output == "negative_sampling" else HierarchicalSoftmax(COUNTS)
    return sampled(words, generator("targets", seed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain_descent(
    network: Word2Vec, text: Text, targets: Targets, block: int, shared: bool
) -> tuple[Tensor, Tensor, float]:
    """Loop over blocks, centres, context words and decisions; returns both tables and the loss.

    Each block reads the tables from before the block and adds its updates at its end, as word2vec.c does for one pair.
    The centres of a group share their negatives, except for their own words, with weights of 1 / (number of centres).
    """
    size = min(block, GROUP)
    inputs, outputs = network.inputs.detach().clone(), network.outputs.detach().clone()
    loss = 0.0
    for start in range(0, len(text.words), block):
        new_inputs, new_outputs = inputs.clone(), outputs.clone()
        for centre in range(start, min(start + block, len(text.words))):
            around = range(centre - int(text.left[centre]), centre + int(text.right[centre]) + 1)
            context = [int(text.words[i]) for i in around if i != centre]
            if not context:
                continue
            hidden = [inputs[word] for word in context]
            receivers = [[word] for word in context]
            if network.is_cbow:
                hidden, receivers = [torch.stack(hidden).mean(0)], [context]
            for vector, words in zip(hidden, receivers, strict=True):
                whole_error = torch.zeros(WIDTH, dtype=torch.float64)
                for row, label, weight in decisions(text, targets, centre, size if shared else None):
                    probability = sigmoid(float(vector @ outputs[row]))
                    step = RATE * weight * (label - probability)
                    whole_error += step * outputs[row]
                    new_outputs[row] += step * vector
                    loss -= weight * math.log(probability if label else 1 - probability)
                for word in words:
                    new_inputs[word] += whole_error
        inputs, outputs = new_inputs, new_outputs
    return inputs, outputs, loss


def decisions(text: Text, targets: Targets, centre: int, size: int | None) -> list[tuple[int, float, float]]:
    """(row, label, weight) of each decision on a centre; groups of `size` words share negatives, None = nothing is."""
    rows, labels, active = (part.tolist() for part in targets)
    if size is None:
        decided = zip(rows[centre], labels[centre], active[centre], strict=True)
        return [(row, label, 1.0) for row, label, active in decided if active]
    first = centre // size * size
    group = range(first, min(first + size, len(rows)))
    negatives = [row for other in group for row in rows[other][1:] if row != int(text.words[centre])]
    return [(rows[centre][0], 1.0, 1.0), *((row, 0.0, 1 / len(group)) for row in negatives)]


def descended(
    network: Word2Vec, text: Text, targets: Targets, block: int, shared: bool
) -> tuple[Tensor, Tensor, float]:
    """The tables after an SGD step on the model's loss, and the loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    loss = network(*text, *targets, block=block, shared=shared, rate=RATE)
    loss.backward()
    optimizer.step()
    return network.inputs.detach(), network.outputs.detach(), loss.item()


def assert_equal_descent(architecture: str, sample: Text, output: str, block: int) -> None:
    targets, shared = targets_of(sample.words, output), output == "negative_sampling"
    expected = plain_descent(model(architecture), sample, targets, block, shared)
    actual = descended(model(architecture), sample, targets, block, shared)
    assert (model(architecture).inputs - expected[0]).abs().max() > 0.01, "the step changes something"
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        assert (ours - theirs).abs().max() < EXACT
    assert actual[2] == pytest.approx(expected[2], abs=1e-9)


@architectures
@outputs
def test_a_block_of_one_pair_equals_a_plain_loop(architecture: str, output: str) -> None:
    """Word 4 is in the window of word 2; word 4 itself has no window."""
    pair = Text(torch.tensor([4, 2]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert_equal_descent(architecture, pair, output, block=1)


@architectures
@outputs
@pytest.mark.parametrize("block", [1, 5, GROUP, 2 * GROUP, 10 * GROUP])
@pytest.mark.parametrize("count", [1, 2, GROUP - 1, 3 * GROUP + 5])
def test_blocks_of_many_pairs_equal_a_plain_loop(architecture: str, output: str, block: int, count: int) -> None:
    sample = text(count)
    if count == 1:
        targets = targets_of(sample.words, output)
        tables = descended(model(architecture), sample, targets, block, output == "negative_sampling")
        assert torch.equal(tables[0], model(architecture).inputs) and tables[2] == 0.0, "no window, no pair"
        return
    assert_equal_descent(architecture, sample, output, block)


def test_a_block_size_is_rounded_down_to_whole_groups() -> None:
    sample = text(5 * GROUP)
    targets = targets_of(sample.words, "negative_sampling")
    results = [
        descended(model("skip_gram"), sample, targets, block, True)[0]
        for block in (2 * GROUP, 3 * GROUP - 1, 3 * GROUP)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@outputs
def test_the_gradient_of_skip_gram_in_one_block_is_that_of_the_loss(output: str) -> None:
    """The loss as one expression, differentiated by autograd."""
    sample, network, reference = text(12), model("skip_gram"), model("skip_gram")
    targets = targets_of(sample.words, output)
    network(*sample, *targets, block=2 * GROUP, shared=False, rate=0.7).backward()
    pairs = [(c, i) for c in range(12) for i in range(c - int(sample.left[c]), c + int(sample.right[c]) + 1) if i != c]
    centres, context = torch.tensor(pairs).T
    x, y = reference.inputs[sample.words[context]], reference.outputs[targets.rows[centres]]
    logits = torch.einsum("pc,prc->pr", x, y)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets.labels[centres].double(), reduction="none"
    )
    (losses * targets.active[centres]).sum().backward()
    for name in ("inputs", "outputs"):
        difference = getattr(network, name).grad - getattr(reference, name).grad
        assert difference.abs().max() < EXACT


@architectures
def test_words_beyond_a_window_change_nothing(architecture: str) -> None:
    """A sentence alone, and between others in a longer text."""
    parts = [text(n, seed=n) for n in (7, 20, 9)]
    joined = Text(*(torch.cat([part[i] for part in parts]) for i in range(3)))
    targets = [targets_of(part.words, "negative_sampling", seed) for seed, part in enumerate(parts)]
    together = Targets(*(torch.cat([part[i] for part in targets]) for i in range(3)))
    network = model(architecture)
    losses = [network(*part, *own, block=GROUP, shared=False) for part, own in zip(parts, targets, strict=True)]
    assert float(network(*joined, *together, block=GROUP, shared=False)) == pytest.approx(float(sum(losses)), abs=1e-9)


@architectures
def test_without_a_rate_nothing_is_updated_and_the_loss_is_that_of_the_tables(architecture: str) -> None:
    sample, network = text(40), model(architecture)
    targets = targets_of(sample.words, "negative_sampling")
    loss = network(*sample, *targets, block=GROUP, shared=True)
    assert not loss.requires_grad
    one_block = network(*sample, *targets, block=1000, shared=True, rate=RATE)
    assert float(loss) == pytest.approx(float(one_block.detach()), abs=1e-9)


def test_the_divisor_divides_the_loss_and_not_the_gradient() -> None:
    sample = text(40)
    targets = targets_of(sample.words, "negative_sampling")
    networks = [model("skip_gram") for _ in range(2)]
    losses = [
        net(*sample, *targets, block=8, shared=True, rate=RATE, divisor=d)
        for net, d in zip(networks, (1.0, 7.0), strict=True)
    ]
    sum(losses).backward()
    assert float(losses[0].detach()) == pytest.approx(7 * float(losses[1].detach()))
    assert torch.equal(networks[0].inputs.grad, networks[1].inputs.grad)


def test_a_text_without_words_has_no_loss_and_a_gradient_of_zero() -> None:
    network, none = model("cbow"), torch.empty(0, dtype=torch.int64)
    targets = targets_of(none, "negative_sampling")
    loss = network(none, none, none, *targets, block=8, shared=True, rate=RATE)
    loss.backward()
    assert loss.item() == 0.0 and network.inputs.grad is not None and not network.inputs.grad.any()


def test_a_saturated_error_gives_a_finite_loss() -> None:
    network = model("skip_gram").float()
    with torch.no_grad():
        network.inputs.fill_(30.0)
        network.outputs.fill_(-30.0)
    sample = text(10)
    loss = network(*sample, *targets_of(sample.words, "negative_sampling"), block=8, shared=True, rate=1e-3)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(network.inputs.grad).all()


def test_vectors_begin_as_in_word2vec() -> None:
    """Uniform from -0.5 / width to 0.5 / width; output vectors are zero."""
    torch.manual_seed(0)
    network = Word2Vec(words=3000, width=20, architecture="cbow")
    assert not network.outputs.any() and 0.0249 < float(network.inputs.detach().abs().max()) <= 0.025
    # five standard deviations of the mean of 60,000 uniform numbers are 0.0003
    assert abs(float(network.inputs.detach().mean())) < 0.0003
