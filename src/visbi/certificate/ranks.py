r"""Ranks of true values among draws, and what their shape says.

If theta*, x come from prior and simulator and theta_1 .. theta_L are independent draws of p(theta | x), then
theta* is one of L + 1 draws of the same distribution and the rank of f(theta*, x) among f(theta_l, x) is
uniform on 0 .. L for any f; ties are broken at random.

With u = (rank + 1/2) / (L + 1), two scores that are standard normal for uniform ranks say in which way ranks
are not uniform:

    shift   sum (u - 1/2), scaled: the truth lies above the draws (or below)
    spread  the variance of u beside that of a uniform one, scaled: the truth lies at the edges of the draws,
            which are too narrow (or in the middle: too wide)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visbi.core.checks import finite_tensor, violation

__all__ = [
    "ALPHA",
    "checked_densities",
    "checked_names",
    "checked_pairs",
    "clear",
    "density_verdict",
    "lie_aside",
    "p_text",
    "parameter_verdict",
    "ranks_among",
    "shift_score",
    "spread_score",
    "unit",
]

ALPHA = 0.05
"""Chance of a false alarm of a diagnostic, over all that it looks at."""
_SPEAKS = 0.01  # chance that one of several standard normal scores says something by accident
_FEWEST_OBSERVATIONS = 20
_FEWEST_DRAWS = 10
_SMALLEST = 1e-15  # p-values below are not told apart


def checked_pairs(
    theta: Any, draws: Any, name: str = "theta", draws_name: str = "draws"
) -> tuple[Tensor, Tensor]:
    """True values (n_obs, D) and draws (n_draws, n_obs, D), float64 on the CPU.

    Raises:
        ValueError: shapes that do not fit, less than 20 observations or 10 draws, or numbers not finite.
    """
    theta = finite_tensor(name, theta).detach().cpu().double()
    draws = finite_tensor(draws_name, draws).detach().cpu().double()
    if theta.ndim != 2 or len(theta) < _FEWEST_OBSERVATIONS or theta.shape[1] < 1:
        expected = f"shape (n_obs, D) with n_obs >= {_FEWEST_OBSERVATIONS}"
        raise ValueError(violation(name, expected, tuple(theta.shape)))
    if draws.ndim != 3 or draws.shape[1:] != theta.shape or len(draws) < _FEWEST_DRAWS:
        expected = f"shape (n_draws, {len(theta)}, {theta.shape[1]}) with n_draws >= {_FEWEST_DRAWS}"
        raise ValueError(violation(draws_name, expected, tuple(draws.shape)))
    return theta, draws


def checked_names(names: Sequence[str] | None, dim: int, stem: str = "theta") -> tuple[str, ...]:
    """One name for each of D parameters, "theta_1" and so on unless given."""
    if names is None:
        return tuple(f"{stem}_{i + 1}" for i in range(dim))
    if len(names) != dim:
        raise ValueError(violation("names", f"{dim} names", len(names)))
    return tuple(map(str, names))


def checked_densities(name: str, at_truth: Any, at_draws: Any, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Log-densities at the truth (n_obs,) and at draws (n_draws, n_obs, D) as (n_draws, n_obs), float64.

    Raises:
        ValueError: other shapes, or NaN.
    """
    pair = [torch.as_tensor(value).detach().cpu().double() for value in (at_truth, at_draws)]
    shapes = [tuple(draws.shape[1:2]), tuple(draws.shape[:2])]
    if [tuple(value.shape) for value in pair] != shapes:
        got = " and ".join(str(tuple(value.shape)) for value in pair)
        raise ValueError(violation(name, f"shapes {shapes[0]} and {shapes[1]}", got))
    if any(bool(value.isnan().any()) for value in pair):
        raise ValueError(violation(name, "log-densities", "NaN"))
    return pair[0], pair[1]


def ranks_among(truth: Tensor, draws: Tensor) -> Tensor:
    """Ranks (n_obs, ...) in 0 .. n_draws of truth (n_obs, ...) among draws (n_draws, n_obs, ...).

    >>> ranks_among(torch.tensor([0.5]), torch.tensor([[0.0], [1.0], [2.0]]))
    tensor([1])
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(truth.shape, dtype=torch.float64) * (equal + 1)).long().minimum(equal)


def unit(ranks: Tensor, n_draws: int) -> Tensor:
    """Ranks 0 .. n_draws as numbers u in (0, 1)."""
    return (ranks.double() + 0.5) / (n_draws + 1)


def shift_score(u: Tensor) -> Tensor:
    """Of u (n, ...): (...), standard normal if uniform, positive where the truth lies above."""
    return (u.mean(0) - 0.5) * (12.0 * len(u)) ** 0.5


def spread_score(u: Tensor, n_draws: int) -> Tensor:
    """Of u (n, ...): (...), standard normal if uniform, positive where the truth lies at the edges."""
    square = (unit(torch.arange(n_draws + 1), n_draws) - 0.5).square()
    variance = (u - 0.5).square().mean(0) - (u.mean(0) - 0.5).square()
    return (variance - square.mean()) / square.var(correction=0).sqrt() * len(u) ** 0.5


def lie_aside(ranks: Tensor, n_draws: int) -> bool:
    """Whether truths lie on one side of the draws more clearly than at their edges.

    Args:
        ranks: (n_obs, D) of the truths among the draws.
        n_draws: how many draws there are.

    >>> high, at_both_ends = torch.full((100, 1), 9), torch.tensor([0, 10]).repeat(50)[:, None]
    >>> lie_aside(high, 10), lie_aside(at_both_ends, 10)
    (True, False)
    """
    u = unit(ranks, n_draws)
    shift, spread = shift_score(u).abs(), spread_score(u, n_draws).abs()
    i = int(torch.maximum(shift, spread).argmax())
    return bool(shift[i] > clear(ranks.shape[1]) and shift[i] >= spread[i])


def clear(n: int = 1) -> float:
    """From here on the largest of n standard normal scores says something.

    >>> round(clear(), 2)
    2.58
    """
    return float(torch.special.ndtri(torch.tensor(1 - 0.5 * _SPEAKS / n, dtype=torch.float64)))


def p_text(p: float) -> str:
    """A p-value in a sentence.

    >>> p_text(0.0123), p_text(0.0)
    ('p = 0.012', 'p < 1e-15')
    """
    return f"p = {p:.2g}" if p >= _SMALLEST else f"p < {_SMALLEST:.0e}"


def parameter_verdict(shift: float, spread: float) -> str:
    """What the scores of a parameter's ranks say, once these are known not to be uniform."""
    if max(abs(shift), abs(spread)) < clear(2):
        return "miscalibrated"
    if abs(shift) >= abs(spread):
        return "biased"
    return "over-confident" if spread > 0 else "under-confident"


def density_verdict(shift: float) -> str:
    """What the ranks of a density say: truths less probable than draws lie outside of regions too narrow."""
    if abs(shift) < clear():
        return "miscalibrated"
    return "over-confident" if shift < 0 else "under-confident"
