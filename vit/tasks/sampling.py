"""Sample images pixel by pixel, whole or from a given upper part, with the key-value cache of common/decoding/."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.decoding.contract import Decoder, Hypothesis, SpecialIds
from common.decoding.decode import decode
from common.decoding.options import DecodingOptions, Hypotheses, Probability
from common.task import Answer
from common.types import Count, Fraction, PositiveFloat
from vit.evaluation import completions
from vit.tokenizers.palette import Palette

SAMPLES = "samples"  # the value of `input` with which predict.py samples whole images


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of prediction. Images are sampled from their first pixel to their last, row by row.

    given: share of an image's rows, from the top, that a completion keeps; the other rows are sampled. 0 = none.
    candidates: number of completions of each image, and of whole images with input=samples.
    temperature, top_k, top_p, seed: see common.decoding.options.DecodingOptions.
    """

    given: Fraction
    candidates: Hypotheses
    temperature: PositiveFloat
    top_k: Count
    top_p: Probability
    seed: int

    def decoding(self, count: int) -> DecodingOptions:
        """Return the options of sampling exactly `count` pixels, without an end token."""
        return DecodingOptions(
            method="sample",
            beam=1,
            penalty="none",
            alpha=0.0,
            stop="first",
            candidates=self.candidates,
            longest_factor=0.0,
            longest_extra=count,
            at_limit="cut",
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            attention=False,
        )


def complete(
    model: nn.Module,
    palette: Palette,
    options: SampleOptions,
    tokens: Tensor,
    size: tuple[int, int],
    ids: Sequence[Any],
) -> list[Answer]:
    """Complete images of colours (B, H W) from their upper rows; returns additions to their answers.

    They are given (the number of rows that are kept), image uint8 (channels, H, W), in the palette's colours, and
    completions uint8 (n, channels, H, W), where n is `options.candidates`, or 1 if all rows are given. Samples depend
    on the seed and on the image's id, but not on the other images.
    """
    rows = round(options.given * size[0])
    prompts = tokens[:, : rows * size[1]].tolist()
    whole = [[Hypothesis([], 0.0, 0.0, False)] for _ in prompts]  # nothing to sample
    samples = _sample(model, palette, options, prompts, math.prod(size), ids) if rows < size[0] else whole
    answers: list[Answer] = []
    for row, prompt, hypotheses in zip(tokens, prompts, samples, strict=True):
        drawn = torch.tensor([[*prompt, *hypothesis.tokens] for hypothesis in hypotheses])  # (n, H W)
        images = {"image": palette.decode(row, size), "completions": palette.decode(drawn, size)}
        answers.append({"given": rows, **images})
    return answers


def sample_images(model: nn.Module, palette: Palette, options: SampleOptions, size: tuple[int, int]) -> list[Answer]:
    """Sample `options.candidates` whole images: answers with image uint8 (channels, H, W) and bits_per_pixel.

    The bits are those of the model's probabilities, before temperature, top-k and top-p.
    """
    (hypotheses,) = _sample(model, palette, options, [[]], math.prod(size), [SAMPLES])
    scale = -math.log(2) * math.prod(size)
    return [
        {"image": palette.decode(torch.tensor(h.tokens), size), "bits_per_pixel": h.log_probability / scale}
        for h in hypotheses
    ]


def _sample(
    model: nn.Module,
    palette: Palette,
    options: SampleOptions,
    prompts: list[list[int]],
    pixels: int,
    ids: Sequence[Any],
) -> list[list[Hypothesis]]:
    """Sample the pixels that follow the prompts, which have the same length, in images of `pixels` pixels."""
    device, start = next(model.parameters()).device, len(palette)
    source = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    special = SpecialIds(begin=start, end=-1, never=())  # an image ends by its length, and not by a token
    begun = [[start, *prompt] for prompt in prompts]
    decoding = options.decoding(pixels - len(prompts[0]))
    return decode(cast(Decoder, model), source, lengths, decoding, special, [*map(str, ids)], begun)


def record(answer: Answer) -> dict[str, Any]:
    """Return {"bits_per_pixel"} of an image and, with a classifier, name and share of its most probable class."""
    bits = answer["nats"] / math.log(2) / max(1, answer["pixels"])
    values: dict[str, Any] = {"bits_per_pixel": round(bits, 4)}
    if "name" in answer:
        values |= {"name": answer["name"], "share": round(answer["probability"], 4)}
    return values


def draw(answer: Answer) -> Tensor:
    """Draw an image, its given rows and its completions: uint8 (3, H', W')."""
    return completions.draw_completions(answer["image"], answer["completions"], answer["given"])


def draw_sheet(answers: Sequence[Answer]) -> Tensor:
    """Draw sampled images with their bits per pixel: uint8 (3, H', W')."""
    images = torch.stack([answer["image"] for answer in answers])
    return completions.draw_samples(images, [answer["bits_per_pixel"] for answer in answers])
