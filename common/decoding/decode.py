"""From a model's next-token probabilities to answers, by the method that the options name."""

from collections.abc import Sequence

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
) -> list[list[Hypothesis]]:
    """Answers to sources (B, S) int64 with `lengths` (B,), one to `options.candidates` for each, best first.

    Samples come in the order of drawing and may repeat. Raises UserError when the model's probabilities are not
    numbers.

    Args:
        model: what is decoded.
        source: right-padded; (B, 0) for a model without a source.
        lengths: of the sources; with `options`, they limit an answer's length.
        options: the method and its settings; "given" is `common.decoding.given.score`.
        special: the vocabulary's special ids.
        ids: names of the sentences for the seed, by default 0 to B - 1.
        prompts: the first tokens of each sentence's answer, at least one, by default `special.begin` alone. They are
            not in the answers, nor in limits, penalties and scores. A state has no padding, so sentences whose prompts
            differ in length are decoded one group after another.
    """
    assert options.method != "given", "a given answer is scored, not decoded"
    names = range(len(source)) if ids is None else ids
    answers: dict[int, list[Hypothesis]] = {}
    for rows, first in group_by_length(prompts or [[special.begin]] * len(source), source.device):
        if options.method == "beam":
            hypotheses = beam_search(model, source[rows], lengths[rows], first, options, special)
        else:
            of_rows = [names[row] for row in rows]
            hypotheses = greedy_or_sample(model, source[rows], lengths[rows], first, options, special, of_rows)
        answers |= zip(rows, hypotheses, strict=True)
    return [answers[row] for row in range(len(source))]
