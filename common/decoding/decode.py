"""Decode answers from a model's next-token probabilities by greedy search, beam search or sampling."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.decoding.beam import beam_search
from common.decoding.contract import Decoder, Hypothesis, SpecialIds, group_by_length
from common.decoding.options import DecodingOptions
from common.decoding.sampling import greedy_or_sample


@torch.no_grad()
def decode(
    model: Decoder,
    source: Tensor,
    lengths: Tensor,
    options: DecodingOptions,
    special: SpecialIds,
    ids: Sequence[int | str] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
) -> list[list[Hypothesis]]:
    """Decode one to `options.candidates` answers to each source (B, S) int64, best first.

    With method "sample", the answers are in the order of sampling instead, and may be equal. Raises UserError if the
    model's probabilities are NaN.

    Args:
        model: the model to decode.
        source: right-padded; (B, 0) for a model without a source.
        lengths: lengths of the sources (B,), which determine the maximum lengths of answers (`options.limits`).
        options: the method and its settings. The method "given" is not supported; see `common.decoding.given.score`.
        special: the vocabulary's special ids.
        ids: ids of the sentences, by default 0 to B - 1. Sampling is seeded by `options.seed` and these ids.
        prompts: the first tokens of each sentence's answer, at least one; by default, `special.begin`. Answers,
            limits, penalties and scores do not include these tokens. Prompts of different lengths are decoded in
            separate groups, because models do not support padded prompts.
        on_tokens: is called after each step, see `greedy_or_sample`; not with method "beam", whose hypotheses change.
            All prompts must have the same length.
    """
    assert options.method != "given", "given answers are scored, not decoded"
    assert on_tokens is None or options.method != "beam", "hypotheses of a beam change after they were reported"
    sentence_ids = range(len(source)) if ids is None else ids
    answers: dict[int, list[Hypothesis]] = {}
    for rows, group in group_by_length(prompts or [[special.begin]] * len(source), source.device):
        if options.method == "beam":
            hypotheses = beam_search(model, source[rows], lengths[rows], group, options, special)
        else:
            group_ids = [sentence_ids[row] for row in rows]
            hypotheses = greedy_or_sample(
                model, source[rows], lengths[rows], group, options, special, group_ids, on_tokens
            )
        answers |= zip(rows, hypotheses, strict=True)
    return [answers[row] for row in range(len(source))]
