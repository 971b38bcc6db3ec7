"""Low rank: replace linear maps by products of two that change their outputs on val as little as possible.

For inputs X with the mean product C = X^T X / n = L L^T, the rank-r matrix that is closest to W on these inputs is the
truncated SVD of W L, times the inverse of L (Wang et al. 2024, "SVD-LLM", arXiv 2403.07378, section 3.1).
"""

from functools import partial

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.compressed import factorise, linear_maps, saves
from scripts.compressing.measuring import Measure

DAMPING = 1e-6  # added to the diagonal of C, relative to its mean, because C may be singular


def reduce_rank(model: nn.Module, measure: Measure, rank: int | float) -> dict[str, int]:
    """Factorise the linear maps of attentions and feed-forwards, in place; returns the ranks by the maps' names.

    An integer is the rank of all maps. A fraction is the part of the squared singular values of W L that each map
    keeps, so that maps have different ranks. A map stays whole if its factors would not be smaller. Raises UserError if
    all maps stay whole.
    """
    moments = input_moments(model, measure)
    ranks = {}
    for name, linear in linear_maps(model).items():
        if name not in moments:  # the map was not called
            continue
        down, up, energies = factors(linear.weight.detach(), moments[name])
        kept = rank if isinstance(rank, int) else _rank_of_energy(energies, rank)
        if saves(linear, kept) and kept <= len(energies):
            factorise(model, name, down[:kept], up[:, :kept])
            ranks[name] = kept
    if not moments:
        raise UserError(
            f"rank={rank:g}: {type(model).__name__} has no linear maps in blocks that are not factored already."
        )
    if not ranks:
        raise UserError(
            f"rank={rank:g} saves nothing: for all {len(moments)} linear maps in blocks of {type(model).__name__}, two "
            "factors of this rank would be at least as large as the map; give a lower one, or leave it out."
        )
    return ranks


def factors(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise a weight (out, in) for inputs with the mean product `moment` (in, in).

    Returns the factors `down` (k, in) and `up` (out, k) for k = min(out, in), and the squared singular values (k,) in
    descending order. The first r rows of `down` and columns of `up` are the factors of rank r.
    """
    size = moment.diagonal().mean().clamp(min=1e-12)
    root = torch.linalg.cholesky(moment + DAMPING * size * torch.eye(len(moment), dtype=moment.dtype))
    u, s, vh = torch.linalg.svd(weight.cpu().double() @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, vh, upper=False, left=False)
    return s.sqrt()[:, None] * down, u * s.sqrt(), s.square()


def input_moments(model: nn.Module, measure: Measure) -> dict[str, Tensor]:
    """Compute the mean product X^T X / n (in, in) of each linear map's inputs on val: name of the map -> float64."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).double().cpu()
        sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    handles = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linear_maps(model).items()]
    try:
        measure(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _rank_of_energy(energies: Tensor, fraction: float) -> int:
    """The smallest rank that keeps this fraction of the sum of squared singular values."""
    shares = energies.cumsum(0) / energies.sum().clamp(min=1e-300)
    return min(len(energies), int((shares < fraction).sum()) + 1)
