"""Corrected draws of many fits: pools of each q's own draws, weighed in common calls of the potential."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.posterior import VIPosterior
from visbi.potentials.pairs import evaluate_each

__all__ = ["corrected"]

_FEWEST = 2048  # draws of q that corrected ones are taken from
_SLACK = 1.15  # what few kept draws say of how many are needed is a guess
_IN_A_GROUP = 65_536  # rows of theta


def corrected(posteriors: Sequence[VIPosterior], n: int, *, in_rows: bool) -> list[Tensor]:
    """n corrected draws (n, D) of each; those that weigh nothing at all are given as NaN.

    They come from the draws that a fit keeps and, where these are too few, new ones with them.

    Args:
        posteriors: of one potential, each fitted to one observation.
        n: how many.
        in_rows: whether the potential takes rows of theta and x.
    """
    kept = {i: getattr(posterior.fit, "draws", None) for i, posterior in enumerate(posteriors)}
    pools: dict[int, WeightedDraws] = {i: draws for i, draws in kept.items() if draws is not None}
    wanted = {i: _FEWEST if i not in pools else _wanted(pools[i], n) for i in range(len(posteriors))}
    while wanted := {i: m for i, m in wanted.items() if i not in pools or m > len(pools[i].theta)}:
        for group in _groups(wanted):
            _grow(posteriors, pools, {i: wanted[i] for i in group}, in_rows=in_rows)
        wanted = {i: pools[i].needed(n) for i in wanted}
    return [_resampled(pools[i], n) for i in range(len(posteriors))]


def _wanted(draws: WeightedDraws, n: int) -> int:
    return max(int(_SLACK * draws.needed(n)), _FEWEST)


def _groups(wanted: dict[int, int]) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    rows = 0
    for i, m in wanted.items():
        if groups[-1] and rows + m > _IN_A_GROUP:
            groups.append([])
            rows = 0
        groups[-1].append(i)
        rows += m
    return groups


@torch.no_grad()
def _grow(
    posteriors: Sequence[VIPosterior],
    pools: dict[int, WeightedDraws],
    wanted: dict[int, int],
    *,
    in_rows: bool,
) -> None:
    theta, log_q, x = [], [], []
    for i, m in wanted.items():
        fit, there = posteriors[i].fit, len(pools[i].theta) if i in pools else 0
        each, density = fit.family.sample_and_log_prob(m - there)  # type: ignore[union-attr]
        theta.append(each)
        log_q.append(density)
        x.append(fit.x)  # type: ignore[union-attr]
    log_p = evaluate_each(posteriors[0].potential_fn, theta, x, in_rows=in_rows)
    for i, *parts in zip(wanted, theta, log_p, log_q, strict=True):
        more = WeightedDraws(*parts)
        pools[i] = pools[i].with_(more) if i in pools else more


def _resampled(draws: WeightedDraws, n: int) -> Tensor:
    if not bool((draws.log_p - draws.log_q).isfinite().any()):
        return draws.theta.new_full((n, draws.theta.shape[1]), torch.nan)
    return draws.resampled(n)
