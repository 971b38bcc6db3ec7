"""word2vec: two tables of word vectors, CBOW and skip-gram, and the stochastic gradient descent that trains them.

Mikolov et al. 2013, "Efficient Estimation of Word Representations in Vector Space" (arXiv 1301.3781), and "Distributed
Representations of Words and Phrases and their Compositionality" (arXiv 1310.4546).

word2vec.c updates both tables after every pair of words. Here, up to `block` neighbouring words of a text are updated
at once, by a few matrix products, and blocks follow each other as pairs do in word2vec.c. The words of a block are
processed in groups of `GROUP`: the (GROUP + 2 * window) vectors around a group meet all output rows of the group in one
dense product, and pairs outside the windows get the weight 0. For a window of 5 and 5 negatives, the product computes
108 logits a word; reading each vector once for the group costs less than reading it again for each of its pairs.

Differs from word2vec.c:
- The pairs of a block use the tables from before the block, and their updates are summed.
- The T centres of a group share their T * K negatives (Ji et al. 2016, arXiv 1604.04661, share those of a batch): each
  pair meets all of them with the weight 1 / T, instead of K of its own. The expected update is the same, and its
  variance is smaller.
- The sigmoid is exact. word2vec.c reads it from a table of 1,000 values between -6 and 6. Beyond, negative sampling
  takes 0 or 1, and hierarchical softmax skips the update.
- There is no word for the end of a sentence. A sentence of more than 1,000 words is divided before frequent words are
  left out, and not afterwards.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.machine.device import full_precision
from common.types import Positive

GROUP = 8  # words whose windows share one matrix product


class Word2Vec(nn.Module):
    """A table of input vectors, which are the word vectors, and one of output vectors.

    Like word2vec.c, skip-gram predicts the centre of a window from each context word by itself, and CBOW predicts it
    from the mean of the context words.
    """

    decided_by_data = ("inputs", "outputs")
    unshardable = "word2vec updates rows of whole tables"

    def __init__(self, *, words: int, width: Positive, architecture: Literal["cbow", "skip_gram"]):
        """Make the tables.

        Args:
            words: number V of words.
            width: number of dimensions of a vector.
            architecture: cbow or skip_gram.
        """
        super().__init__()
        self.is_cbow = architecture == "cbow"
        self.inputs = nn.Parameter(torch.empty(words, width).uniform_(-0.5 / width, 0.5 / width))
        self.outputs = nn.Parameter(torch.zeros(words, width))

    def forward(
        self,
        words: Tensor,
        left: Tensor,
        right: Tensor,
        rows: Tensor,
        labels: Tensor,
        active: Tensor,
        *,
        block: int,
        shared: bool,
        rate: float | None = None,
        divisor: float = 1.0,
    ) -> Tensor:
        """Return the loss of a text in nats: the sum over its pairs, divided by `divisor`.

        Words (N,) are int64, and `left` and `right` (N,) are the sizes of the window around each word, within the text.
        `rows`, `labels` and `active` (N, R) are the decisions on each word (seq2seq/criterion/word_targets.py). A pair
        is a context word and a centre for skip-gram, and a centre with at least one context word for CBOW. With
        `shared`, column 0 is the word itself and the others are sampled negatives, which a group shares; `active` is
        not read.

        With a learning rate `rate`, blocks of `block` words (above `GROUP`, rounded down to a multiple of it) are
        updated one after the other in copies of the tables, and the gradient of the loss is defined as (table before -
        table after) / `rate`. An SGD step of this rate therefore sets the tables to those after the last block. If all
        words are in one block, it is the ordinary gradient of the sum for skip-gram. For CBOW, the input gradient is
        that of word2vec.c: each context word gets the whole error of the mean, not its share. `divisor` does not change
        the gradient.

        Without a rate, nothing is updated, and the loss has no gradient.
        """
        with torch.no_grad(), full_precision(words.device):
            tables = self.inputs.detach(), self.outputs.detach()
            if rate is not None:
                tables = tables[0].clone(), tables[1].clone()
            loss = self.inputs.new_zeros(())
            if len(words):
                text, targets = (words, left, right), (rows, labels, active)
                size, dtype = min(block, GROUP), self.inputs.dtype
                near = _near(text, size, dtype)
                groups = (_shared_groups if shared else _groups)(text, targets, near, self.is_cbow)
                errors, count = torch.empty_like(groups.weights), max(1, block // GROUP)
                for part, error in zip(_parts(groups, count), errors.split(count), strict=True):
                    self._descend(*tables, part, error, rate)
                loss = _cross_entropy(errors, groups.weights)
        loss /= divisor
        if rate is None:
            return loss
        gradients = [
            before.detach().sub(after).div_(rate) for before, after in zip(self._tables(), tables, strict=True)
        ]
        descended: Tensor = _Descended.apply(*self._tables(), *gradients, loss)
        return descended

    def vectors(self) -> Tensor:
        """Return the word vectors: (V, C)."""
        return self.inputs

    def _tables(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.inputs, self.outputs

    def _descend(self, inputs: Tensor, outputs: Tensor, groups: "_Groups", error: Tensor, rate: float | None) -> None:
        """Compute the errors of one block of G groups into `error` and, with a rate, update the tables (V, C) in place.

        An error (G, T or M, Q) is the label minus the predicted probability.
        """
        context, rows = groups.words.flatten(), groups.rows.flatten()
        x = inputs.index_select(0, context).view(*groups.words.shape, -1)  # (G, M, C)
        y = outputs.index_select(0, rows).view(*groups.rows.shape, -1)  # (G, Q, C)
        hidden = torch.bmm(groups.mean, x) if self.is_cbow else x  # (G, T or M, C)
        logits = torch.bmm(hidden, y.transpose(1, 2))  # (G, T or M, Q)
        torch.sub(groups.labels, logits.sigmoid_(), out=error)
        if rate is None:
            return
        update = torch.mul(error, groups.weights, out=logits).mul_(rate)
        step = torch.bmm(update, y)  # (G, T or M, C)
        if self.is_cbow:
            step = torch.bmm(groups.near.transpose(1, 2), step)  # (G, M, C)
        inputs.index_add_(0, context, step.view(len(context), -1))
        outputs.index_add_(0, rows, torch.bmm(update.transpose(1, 2), hidden).view(len(rows), -1))


def _cross_entropy(errors: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the decisions' losses in nats; an error is the label minus the predicted probability."""
    # Without the bound, an error that is rounded to 1 would give an infinite loss.
    probabilities = errors.abs_().neg_().add_(1).clamp_(min=torch.finfo(errors.dtype).eps)
    return -torch.dot(probabilities.log_().flatten(), weights.flatten())


class _Descended(torch.autograd.Function):
    """A loss whose gradients are given."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, outputs: Tensor, input_gradient: Tensor, output_gradient: Tensor, loss: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input_gradient, output_gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return *(gradients[0] * tensor for tensor in ctx.saved_tensors), None, None, None


class _Groups(NamedTuple):
    """G groups of T centres, the M = T + 2 * window words around each group, and its Q rows of the output table."""

    words: Tensor  # int64 (G, M)
    near: Tensor  # (G, T, M): 1 where a word is in the window of a centre, otherwise 0
    mean: Tensor  # (G, T, M): `near`, divided by the number of words in the window
    rows: Tensor  # int64 (G, Q)
    labels: Tensor  # (G, 1, Q)
    weights: Tensor  # (G, T, Q) for CBOW, (G, M, Q) for skip-gram: of each logit, 0 if it does not count


class _Near(NamedTuple):
    """The indices of centres and of the words around them."""

    positions: Tensor  # int64 (G, M)
    centres: Tensor  # int64 (G, T); those added at the end of the text repeat its last word
    exists: Tensor  # bool (G, T): False for the added ones
    near: Tensor  # (G, T, M); see _Groups


def _near(text: tuple[Tensor, Tensor, Tensor], size: int, dtype: torch.dtype) -> _Near:
    """Cut a text of at least one word into groups of `size` centres; added centres at its end have no window."""
    words, left, right = text
    count, device = len(words), words.device
    window = int(torch.maximum(left, right).max())
    starts = torch.arange(0, count, size, device=device)[:, None]  # (G, 1)
    positions = starts + torch.arange(-window, size + window, device=device)  # (G, M)
    centres = starts + torch.arange(size, device=device)  # (G, T)
    offsets = positions[0] - centres[0][:, None]  # (T, M)
    exists = centres < count
    centres = centres.clamp(max=count - 1)
    before, after = ((side[centres] * exists)[..., None] for side in (left, right))  # (G, T, 1)
    near = ((offsets != 0) & (offsets >= -before) & (offsets <= after)).to(dtype)  # (G, T, M)
    return _Near(positions.clamp_(0, count - 1), centres, exists, near)


def _groups(
    text: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor], cut: _Near, is_cbow: bool
) -> _Groups:
    """Make groups in which each centre has its own rows: Q = T * R."""
    rows, labels, active = (tensor[cut.centres] for tensor in targets)  # (G, T, R)
    weights = (_meets(cut, is_cbow)[..., None] * active.to(cut.near.dtype)[:, None]).flatten(2)
    return _joined(text, cut, rows.flatten(1), labels.to(weights.dtype).flatten(1)[:, None], weights)


def _shared_groups(
    text: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor], cut: _Near, is_cbow: bool
) -> _Groups:
    """Make groups whose centres share their sampled negatives: Q = T + T * (R - 1).

    A pair meets the row of its centre, and each of the group's negatives that is not this word, with the weight 1 / T.
    """
    meets, size = _meets(cut, is_cbow), cut.centres.shape[1]  # (G, T or M, T)
    rows = targets[0][cut.centres]  # (G, T, R)
    own, negatives = rows[..., 0], rows[..., 1:].flatten(1)  # (G, T), (G, T * (R - 1))
    exists = cut.exists.repeat_interleave(rows.shape[2] - 1, 1)[:, None]
    other = ((own[..., None] != negatives[:, None]) & exists).to(meets.dtype)  # (G, T, T * (R - 1))
    shares = meets / cut.exists.sum(1)[:, None, None]
    labels = meets.new_zeros(1, 1, rows[0].numel())
    labels[..., :size] = 1
    weights = torch.cat([meets, torch.bmm(shares, other)], 2)
    return _joined(text, cut, torch.cat([own, negatives], 1), labels.expand(len(rows), -1, -1), weights)


def _meets(cut: _Near, is_cbow: bool) -> Tensor:
    """Which hidden vectors predict which centres: (G, T, T) for CBOW, (G, M, T) for skip-gram; 1 or 0.

    Skip-gram: a word predicts the centres in whose window it is. CBOW: a centre with a window is predicted by its own.
    """
    if not is_cbow:
        return cut.near.transpose(1, 2)
    return cut.near.amax(2, keepdim=True) * torch.eye(cut.near.shape[1], dtype=cut.near.dtype, device=cut.near.device)


def _joined(text: tuple[Tensor, Tensor, Tensor], cut: _Near, rows: Tensor, labels: Tensor, weights: Tensor) -> _Groups:
    mean = cut.near / cut.near.sum(2, keepdim=True).clamp(min=1)
    return _Groups(text[0][cut.positions], cut.near, mean, rows, labels, weights)


def _parts(groups: _Groups, size: int) -> Iterator[_Groups]:
    """Cut groups into blocks of `size` groups."""
    return map(_Groups._make, zip(*(tensor.split(size) for tensor in groups), strict=True))
