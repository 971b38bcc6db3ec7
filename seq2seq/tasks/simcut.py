"""Call a translator with and without cut tokens, for SimCut (Gao et al. 2022, arXiv 2206.02368)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.embedding import TokenEmbedding, cutting
from common.task import Batch
from seq2seq.tokenizers.bpe import BOS, EOS, PAD


def original_and_cut(
    model: nn.Module, batch: Batch, cutoff: float, vocabularies: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The logits of a batch, and those with a share `cutoff` of the tokens of source and target cut: (B, T, V) each.

    The embedding of a cut token is zero; its position stays. Which tokens are cut depends on the seed of each sample
    (`batch["seeds"]`) and not on the rest of the batch. Padding, BOS and EOS are never cut. The model is called once
    with 2 B rows, so that dropout is independent in both halves. Raises UserError for a batch without seeds, and for a
    model that embeds a vocabulary of one of the sizes `vocabularies` otherwise than by TokenEmbedding.
    """
    if "seeds" not in batch:
        raise UserError("SimCut needs a seed for each sample: batch['seeds'], which the loader adds.")
    _check_embeddings(model, vocabularies)
    pairs = [
        torch.cat((batch[name], cut_at_random(batch[name], cutoff, batch["seeds"], name)))
        for name in ("source", "target_in")
    ]
    with cutting(model):
        logits: Tensor = model(pairs[0], batch["source_lengths"].repeat(2), pairs[1])  # (2 B, T, V)
    original, cut = logits.chunk(2)
    return original, cut


def cut_at_random(tokens: Tensor, cutoff: float, seeds: Sequence[int], name: str) -> Tensor:
    """Replace each token i by ~i with probability `cutoff`, except PAD, BOS and EOS: (B, N) int64 -> (B, N).

    The choice is a function of the sample's seed, of `name` (the side of the pair) and of the token's position.
    """
    width = tokens.shape[1]  # the first numbers of a row do not depend on its width, so padding changes nothing
    rows = [torch.rand(width, generator=generator(seed, "simcut", name)) for seed in seeds]
    chosen = (torch.stack(rows) < cutoff).to(tokens.device, non_blocking=True)
    fixed = (tokens == PAD) | (tokens == BOS) | (tokens == EOS)
    return torch.where(chosen & ~fixed, ~tokens, tokens)


def _check_embeddings(model: nn.Module, vocabularies: Sequence[int]) -> None:
    """Raise UserError unless all embeddings of the vocabularies are of the class TokenEmbedding."""
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tokens = {name for name, module in embeddings.items() if isinstance(module, TokenEmbedding)}
    others = [name for name in embeddings.keys() - tokens if embeddings[name].num_embeddings in vocabularies]
    if not tokens or others:
        what = f"{min(others)} of {type(model).__name__} is not one" if others else f"{type(model).__name__} has none"
        raise UserError(
            f"task.loss.simcut cuts tokens in modules of the class common.nn.embedding.TokenEmbedding, and {what}; use "
            "it in place of nn.Embedding, or give task.loss.simcut.weight=0."
        )
