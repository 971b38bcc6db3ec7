"""The options of decoding as config keys: method, length penalty, stopping rule, limits and sampling."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from common.errors import UserError
from common.types import Count, NonNegativeFloat, Positive, PositiveFloat, Range

Probability = Annotated[float, Range(above=0.0, high=1.0)]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How answers are decoded. Lengths count an answer's tokens including its end, without its prompt.

    method: "greedy", "beam", "sample" (tokens sampled by their probabilities), or "given" (scores given translations).
    beam: the beam size, hypotheses of a sentence that are continued in each step.
    penalty: the length penalty, by which the log probability of n tokens is divided: "gnmt" ((5 + n) / 6)^alpha,
        "average" n^alpha (that of fairseq, Marian and transformers), "none" 1.
    alpha: the penalty's exponent; 0 means no penalty.
    stop: when the search for a sentence with `beam` finished hypotheses ends: "first" at once (fairseq's rule,
        transformers' early_stopping=True); "bound" when the best unfinished hypothesis, scored at its present length,
        does not beat the worst finished one (early_stopping=False; a longer one may still be better); "never" when it
        could not beat it even at the limit and without losing probability (early_stopping="never"; the search misses
        nothing within the beam).
    candidates: the maximum number of answers to each sentence: the best of a beam, or samples in the order of sampling.
    longest_factor, longest_extra: an answer to S source tokens has at most longest_factor * S + longest_extra tokens.
    at_limit: the last token at the limit: "end", always EOS with its own probability, as in fairseq; or "cut", any
        token, so that an answer may lack its end, as in transformers.
    temperature: divides the logits before sampling.
    top_k: sample only from this many of the likeliest tokens; 0 means all.
    top_p: sample only from the likeliest tokens that together have this probability; 1 means all.
    seed: a sample is a function of the seed and the sentence's id, independent of the batch.
    attention: whether to also return the last layer's cross-attention of the best translation, for pictures.
    """

    method: Literal["greedy", "beam", "sample", "given"]
    beam: Positive
    penalty: Literal["gnmt", "average", "none"]
    alpha: NonNegativeFloat
    stop: Literal["first", "bound", "never"]
    candidates: Positive
    longest_factor: NonNegativeFloat
    longest_extra: Count
    at_limit: Literal["end", "cut"]
    temperature: PositiveFloat
    top_k: Count
    top_p: Probability
    seed: int
    attention: bool

    def __post_init__(self) -> None:
        """Raise UserError if `candidates` exceeds the number of answers that the method finds."""
        maximum = {"greedy": 1, "given": 1, "beam": self.beam, "sample": self.candidates}[self.method]
        if self.candidates > maximum:
            advice = "raise task.predict.beam" if self.method == "beam" else "use task.predict.method=beam or sample"
            raise UserError(
                f"task.predict.candidates={self.candidates}: expected at most {maximum} with method={self.method}"
                f"{f' and beam={maximum}' if self.method == 'beam' else ''}; {advice}."
            )

    def divisor(self, tokens: int) -> float:
        """The length penalty of a hypothesis with this many tokens."""
        base = {"gnmt": (5 + tokens) / 6, "average": float(tokens), "none": 1.0}[self.penalty]
        return float(base**self.alpha)

    def limits(self, lengths: Tensor) -> Tensor:
        """The maximum lengths of answers to sources of lengths (B,): (B,) int64 on the CPU, at least 1."""
        limits = [int(self.longest_factor * length) + self.longest_extra for length in lengths.tolist()]
        return torch.tensor(limits, dtype=torch.int64).clamp(min=1)
