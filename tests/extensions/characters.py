"""A language model on the characters of a text file, as GPT-2 is (Radford et al. 2019): data, task and model."""

import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.decoding.contract import SpecialIds
from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.machine import distributed
from common.nn.blocks import BlockOptions, Stack
from common.nn.linear import Linear
from common.nn.positions import Learned1d
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import Fraction, Positive


class Text:
    """The lines of a file cut into blocks of `length` characters; every tenth block is val, the one after it test."""

    def __init__(self, *, file: str, length: Positive, batch_size: Positive):
        self.file, self.length, self.batch_size = file, length, batch_size

    @cached_property
    def text(self) -> str:
        try:
            return Path(self.file).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"data.file={self.file}: cannot be read ({error.strerror}); give a text file.") from error

    @cached_property
    def characters(self) -> str:
        return "".join(sorted({*self.text, "\n"}))

    def blocks(self, split: Split) -> list[int]:
        remainders = {"train": range(2, 10), "val": [0], "test": [1]}[split]
        return [n for n in range(len(self.text) // (self.length + 1)) if n % 10 in remainders]

    def count(self, split: Split) -> int:
        return len(self.blocks(split))

    def cost(self, split: Split) -> list[int]:
        return [1] * self.count(split)

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        block = self.blocks(split)[index]
        text = self.text[block * (self.length + 1) :][: self.length + 1]
        return {"id": block, "tokens": torch.tensor([self.characters.index(character) for character in text])}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        return {"ids": [s["id"] for s in samples], "tokens": torch.stack([s["tokens"] for s in samples])}

    def summary(self) -> list[str]:
        return [f"{len(self.text):,} characters, {len(self.characters)} different ones"]


class LanguageModelling:
    """The next character after all before it; the goal is bits per character."""

    handed_on: ClassVar[tuple[str, ...]] = ("characters",)

    def __init__(self, *, data: Any, predict: DecodingOptions):
        self.data, self.options = data, predict
        self.goal = Goal("bits", higher_is_better=False)
        self.characters = ""

    def model_arguments(self) -> dict[str, Any]:
        return {"characters": len(self.state()["characters"])}

    def state(self) -> dict[str, Any]:
        self.characters = self.characters or self.data.characters
        return {"characters": self.characters}

    def restore(self, state: dict[str, Any]) -> None:
        self.characters = state["characters"]

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        raise UserError("a language model on characters takes its own checkpoints alone.")

    def normalisers(self, batch: Batch) -> dict[str, float]:
        return {"characters": float(batch["tokens"][:, 1:].numel())}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        nats = self._nats(model, batch).sum() / normalisers["characters"]
        return nats, {}

    def _nats(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = batch["tokens"].to(next(model.parameters()).device)
        logits = model(tokens[:, :-1]).float()  # (B, T, V)
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # (B, T)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Answer]:
        if "prompts" not in batch:
            return [{"nats": nats} for nats in self._nats(model, batch).double().sum(1).tolist()]
        end = self.characters.index("\n")
        prompts = [[self.characters.index(character) for character in text] for text in batch["prompts"]]
        nothing = torch.zeros(len(prompts), 0, dtype=torch.int64, device=next(model.parameters()).device)
        lengths = torch.zeros(len(prompts), dtype=torch.int64)
        decoder: Any = model
        best = decode(decoder, nothing, lengths, self.options, SpecialIds(end, end, ()), batch["ids"], prompts)
        return [{"text": "".join(self.characters[i] for i in rows[0].tokens)} for rows in best]

    def read(self, input: str) -> Iterator[Batch]:
        lines = Path(input).read_text(encoding="utf-8").splitlines()
        yield {"ids": [*range(len(lines))], "prompts": lines}

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> list[str]:
        return [prompt + answer["text"] for prompt, answer in zip(batch["prompts"], answers, strict=True)]

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        return None

    def metric(self, split: Split) -> "Bits":
        return Bits(self.data.length, self.data.count(split))

    def advice(self, pretrained: bool) -> list[str]:
        return []

    def alarms(self, answers: list[Answer]) -> list[str]:
        return []


class Bits:
    """Bits per character over all blocks of a split."""

    def __init__(self, length: int, blocks: int):
        self.length, self.blocks = length, blocks
        self.rows: list[tuple[int, float]] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        self.rows += [(i, answer["nats"]) for i, answer in zip(batch["ids"], answers, strict=True)]

    def gather(self) -> None:
        self.rows = distributed.gather_samples(self.rows, None)

    def compute(self) -> dict[str, float]:
        nats = math.fsum(nats for _, nats in self.rows)
        return {"bits": nats / math.log(2) / (self.length * len(self.rows))}

    def details(self) -> list[tuple[Any, ...]]:
        return [("block", "nats"), *self.rows]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nats.json").write_text(json.dumps(self.rows))


class CharacterModel(nn.Module):
    """Embeddings with learned positions, causal blocks, and a map to the next character."""

    def __init__(
        self,
        *,
        characters: int,
        width: Positive,
        heads: Positive,
        layers: Positive,
        longest: Positive,
        dropout: Fraction,
    ):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = Learned1d(width, longest)
        options = BlockOptions(
            width=width,
            heads=heads,
            feedforward=4 * width,
            pre_norm=True,
            dropout=dropout,
            activation=nn.GELU,
            norm="rms",
        )
        self.stack = Stack(options, layers=layers, final_norm=True)
        self.head = Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> logits of each next character (B, T, V)."""
        logits: Tensor = self.head(self.stack(self._embed(tokens, 0), causal=True))
        return logits

    def encode(self, source: Tensor, lengths: Tensor) -> Any:
        """See common.decoding.contract.Decoder; there is no source."""
        return self.stack.caches()

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Tokens (R,), or a prompt (R, N) -> logits of the next character (R, V)."""
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        x = self._embed(tokens, state[0].own.length)
        logits: Tensor = self.head(self.stack(x, causal=True, caches=state)[:, -1])
        return logits

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """The caches of these rows."""
        for cache in state:
            cache.own.select(rows)
        return state

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        return self.embedding(tokens) + self.positions(tokens.shape[1], start)
