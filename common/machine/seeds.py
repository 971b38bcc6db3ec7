"""Compute seeds from numbers and names, such as (seed, "order", epoch).

Since a seed can be computed again, checkpoints need not store the state of random generators.
"""

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """Hash any number of integers and strings to one 63-bit seed.

    A sum such as `seed + epoch` would give seed 0 in epoch 1 the same random numbers as seed 1 in epoch 0.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `mix(*parts)`."""
    return torch.Generator().manual_seed(mix(*parts))
