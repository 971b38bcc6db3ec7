"""The options of decoding as config keys: method, length penalty, stopping rule, limits and sampling."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from common.errors import UserError
from common.types import Count, Range

Probability = Annotated[float, Range(above=0.0, high=1.0)]
Hypotheses = Annotated[int, Range(low=1, high=10_000)]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How answers are decoded. Lengths count the end token, but not the tokens that are given at the start.

    method: "greedy", "beam", "sample" (samples each token by its probability), or "given" (scores the user's
        translations and decodes nothing).
    beam: the beam size, which is the number of hypotheses of a sentence that are continued in each step.
    penalty: the length penalty, by which the log probability of an answer of n tokens is divided. "gnmt" is
        ((5 + n) / 6)^alpha; "average" is n^alpha (used by fairseq, Marian and transformers); "none" is 1.
    alpha: the penalty's exponent; 0 means no penalty.
    stop: when beam search ends for a sentence that has `beam` finished hypotheses.
        "first": at once (fairseq's rule; early_stopping=True in transformers).
        "bound": when the score of the best unfinished hypothesis at its current length is at most that of the worst
        finished one (early_stopping=False in transformers). A better hypothesis may be missed, because the score of an
        unfinished hypothesis can still rise with its length.
        "never": when even the highest score that the best unfinished hypothesis can reach is at most that of the worst
        finished one (early_stopping="never" in transformers). This highest score is the one at the maximum length if
        all further tokens have probability 1. No better hypothesis is missed.
    candidates: the maximum number of answers to each sentence: the best ones of beam search, or this many samples.
    longest_factor, longest_extra: an answer to S source tokens has at most floor(longest_factor * S) + longest_extra
        tokens, but this limit is at least 1.
    at_limit: the last token of an answer that reaches the maximum length. "end": always EOS, with the probability that
        the model gives it, as in fairseq. "cut": any token, so that the answer may lack its end, as in transformers.
    temperature: the logits are divided by this number before sampling.
    top_k: sample only from the `top_k` likeliest tokens; 0 means from all.
    top_p: sample only from the smallest set of likeliest tokens whose total probability is at least `top_p`; 1 means
        from all.
    seed: the seed of sampling. The random numbers of a sample depend only on the seed, the sentence's id and the
        sample's number, and not on the other sentences in the batch.
    attention: whether an answer contains the last layer's cross-attention of the best translation, for pictures.
    """

    method: Literal["greedy", "beam", "sample", "given"]
    beam: Hypotheses
    penalty: Literal["gnmt", "average", "none"]
    alpha: Annotated[float, Range(low=0.0, high=10.0)]
    stop: Literal["first", "bound", "never"]
    candidates: Hypotheses
    longest_factor: Annotated[float, Range(low=0.0, high=100.0)]
    longest_extra: Annotated[int, Range(low=0, high=100_000)]
    at_limit: Literal["end", "cut"]
    temperature: Annotated[float, Range(low=1e-6, high=1e6)]
    top_k: Count
    top_p: Probability
    seed: int
    attention: bool

    def __post_init__(self) -> None:
        """Raise UserError if `candidates` is higher than the number of answers that the method can find."""
        maximum = {"greedy": 1, "given": 1, "beam": self.beam, "sample": self.candidates}[self.method]
        if self.candidates > maximum:
            advice = "raise task.predict.beam" if self.method == "beam" else "use task.predict.method=beam or sample"
            raise UserError(
                f"task.predict.candidates={self.candidates}: expected at most {maximum} with method={self.method}"
                f"{f' and beam={maximum}' if self.method == 'beam' else ''}; {advice}."
            )

    def divisor(self, tokens: int) -> float:
        """The length penalty of an answer of `tokens` tokens, including its end."""
        base = {"gnmt": (5 + tokens) / 6, "average": float(tokens), "none": 1.0}[self.penalty]
        return float(base**self.alpha)

    def limits(self, lengths: Tensor) -> Tensor:
        """The maximum length of the answer to each source: (B,) int64 on the CPU, at least 1.

        `lengths` (B,) are the lengths of the sources.
        """
        limits = [int(self.longest_factor * length) + self.longest_extra for length in lengths.tolist()]
        return torch.tensor(limits, dtype=torch.int64).clamp(min=1)
