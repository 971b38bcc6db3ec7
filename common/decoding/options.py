"""The options of decoding, as config keys of a task: method, length penalty, stopping rule, limits, sampling."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from common.errors import UserError
from common.types import Count, NonNegativeFloat, Positive, PositiveFloat, Range

Probability = Annotated[float, Range(above=0.0, high=1.0)]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How answers are searched for. Lengths count an answer's tokens with its end, without its prompt.

    method: "greedy", "beam", "sample" (a token at random by its probability), or "given" (scores given translations).
    beam: how many hypotheses of a sentence are followed at once.
    penalty: what a hypothesis's log probability is divided by, for n tokens: "gnmt" ((5 + n) / 6)^alpha, "average"
        n^alpha (fairseq's, Marian's and transformers' length penalty), "none" 1.
    alpha: the penalty's exponent; 0 is none.
    stop: what ends a sentence that has `beam` finished hypotheses: "first" just that (fairseq's rule, transformers'
        early_stopping=True); "bound" that the best unfinished one would not beat the worst of these if it ended where
        it is (early_stopping=False; longer ones may yet be better); "never" that it would not even if it continued to
        the limit and lost no more probability (early_stopping="never"; nothing in reach of the beam is missed).
    candidates: how many answers are returned for each sentence, at most: of a beam the best, of samples as drawn.
    longest_factor, longest_extra: an answer to S source tokens has at most longest_factor * S + longest_extra.
    at_limit: what the last token in the limit is: "end", always EOS at its own probability, as in fairseq; or "cut",
        any, which leaves an answer without its end, as in transformers.
    temperature: logits are divided by it before a token is drawn.
    top_k: only this many of the likeliest tokens are drawn from; 0 = all.
    top_p: only from the likeliest tokens that have this probability together; 1 = all.
    seed: what is drawn is a function of it and of a sentence's id, whatever else is in the batch.
    attention: also give the last layer's cross-attention of the best translation, for pictures.
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
        """Refuse to return more candidates than a method looks for."""
        most = {"greedy": 1, "given": 1, "beam": self.beam, "sample": self.candidates}[self.method]
        if self.candidates > most:
            advice = "raise task.predict.beam" if self.method == "beam" else "use task.predict.method=beam or sample"
            raise UserError(
                f"task.predict.candidates={self.candidates}: expected at most {most} with method={self.method}"
                f"{f' and beam={most}' if self.method == 'beam' else ''}; {advice}."
            )

    def divisor(self, tokens: int) -> float:
        """The divisor of the log probability of a hypothesis with this many tokens."""
        form = {"gnmt": (5 + tokens) / 6, "average": float(tokens), "none": 1.0}[self.penalty]
        return float(form**self.alpha)

    def limits(self, lengths: Tensor) -> Tensor:
        """The most tokens that an answer may have, for source lengths (B,): (B,) int64 on the CPU, at least 1."""
        most = [int(self.longest_factor * length) + self.longest_extra for length in lengths.tolist()]
        return torch.tensor(most, dtype=torch.int64).clamp(min=1)
