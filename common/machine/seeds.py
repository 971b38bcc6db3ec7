"""Seeds as a pure function of their purpose, so that resuming has no generator state to restore."""

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """One 63-bit seed from any number of integers and strings.

    A hash, because `seed + epoch` would make seed 0, epoch 1 equal to seed 1, epoch 0.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `mix(*parts)`."""
    return torch.Generator().manual_seed(mix(*parts))
