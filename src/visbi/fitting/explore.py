r"""Tempered sequential Monte Carlo: particles carried from a base distribution to the posterior.

Del Moral, Doucet, Jasra: Sequential Monte Carlo samplers. JRSS B 2006.

The path is p_beta(z) ~ base(z)^(1 - beta) exp(beta ell(z)), beta from 0 to 1. Each step is as long as
leaves an effective sample size of half the particles; then they are resampled (systematically) and moved
(`fitting.moves`) until they have forgotten where they were.

Of many particles in few dimensions only half are resampled and moved, and where they were before their last
round stands for the other half: both are draws of the same density, so a gradient that was paid for is used
twice (Dau, Chopin: Waste-free sequential Monte Carlo. JRSS B 2022, whose chains keep all of their states).

From the prior, N(0, I) in these coordinates, it finds where the mass is, all modes of it. From a fitted q
it is a bridge that carries q's draws the rest of the way. Every particle of every temperature is kept:
together they are a sample from a known mixture of tempered densities. A leading axis F holds independent
populations.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.certificate.weights import resample
from visbi.core.logs import exp_, log_sum_exp
from visbi.core.rows import picked
from visbi.fitting.moves import MOVES, Base, Moves, StandardNormal, covariance
from visbi.fitting.target import Target, log_standard_normal

__all__ = ["Exploration", "explore", "next_beta"]

_ESS = 0.5
_MAX_TEMPERATURES = 200
_LEAST_STEP = 1e-12
_BISECTIONS = 18  # of its logarithm: to one in ten thousand
_MANY = 1024  # particles, half of which still carry a small mode from one temperature to the next
_FEW_DIMENSIONS = 10  # in which half do: of six bananas in fifty, one lost a tenth of its mass with half


@dataclass(frozen=True)
class Exploration:
    """What the explorer saw, F populations of N particles at T temperatures.

    Attributes:
        z: (F, N, d) particles at beta = 1, equally weighted.
        ell: (F, N) at them.
        relative: (F, N) ell - log base at them.
        history_z, history_relative: (T, F, N, d) and (T, F, N), particles of every temperature.
        betas: (T, F) the temperatures, from 0; a population that is there stays at 1.
        log_evidence: (F,) the usual estimate of log Z; finds modes, is not to be trusted in high dimension.
        log_evidences: (T, F) the same on the way, from 0.
        acceptance: (F,) mean acceptance of the last moves.
        step: (F,) size of steps, in units of the particles' covariance, that the moves had come to; None
            where nothing was moved.
    """

    z: Tensor
    ell: Tensor
    relative: Tensor
    history_z: Tensor
    history_relative: Tensor
    betas: Tensor
    log_evidence: Tensor
    log_evidences: Tensor
    acceptance: Tensor
    step: Tensor | None

    @staticmethod
    def of_draws(z: Tensor, relative: Tensor, n: int) -> "Exploration":
        """What draws of the prior themselves show, z (F, N, d) with ell - log N(z; 0, I), (F, N).

        For posteriors so wide beside the prior that some n of them, resampled, stand for it.
        """
        index = torch.stack([resample(row, n) for row in relative])
        one = torch.ones_like(relative[:, 0])
        log_evidence = log_sum_exp(relative, 1) - math.log(z.shape[1])
        chosen, of_them = picked(z, index), relative.gather(1, index)
        return Exploration(
            z=chosen,
            ell=of_them + log_standard_normal(chosen),
            relative=of_them,
            history_z=z[None],
            history_relative=relative[None],
            betas=torch.zeros_like(one)[None],
            log_evidence=log_evidence,
            log_evidences=torch.zeros_like(one)[None],
            acceptance=one,
            step=None,
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (F, d) and covariance (F, d, d) of the final particles."""
        return self.z.mean(1), covariance(self.z)

    def weighted(self) -> tuple[Tensor, Tensor]:
        """All particles (F, T N, d) and log-weights (F, T N) that make them a sample of the posterior.

        Particles of temperature s are draws of p_s = base exp(beta_s relative) / Z_s, all of them together of
        the mean of the p_s; so the weight of each is exp(relative) over the mean of
        exp(beta_s relative) / Z_s.
        """
        relative = self.history_relative.movedim(0, 1)  # (F, T, N)
        flat = relative.flatten(1)
        betas, log_z = self.betas.mT[:, :, None], self.log_evidences.mT[:, :, None]
        mean = log_sum_exp(betas * flat[:, None] - log_z, 1) - math.log(len(self.betas))
        return self.history_z.movedim(0, 1).flatten(1, 2), flat - mean

    def of_fits(self, which: Tensor) -> "Exploration":
        """Of the populations `which`, (F,) bool."""
        return Exploration(
            z=self.z[which],
            ell=self.ell[which],
            relative=self.relative[which],
            history_z=self.history_z[:, which],
            history_relative=self.history_relative[:, which],
            betas=self.betas[:, which],
            log_evidence=self.log_evidence[which],
            log_evidences=self.log_evidences[:, which],
            acceptance=self.acceptance[which],
            step=None if self.step is None else self.step[which],
        )


def explore(
    target: Target,
    n: int = 1024,
    *,
    fits: int = 1,
    base: Base | None = None,
    gradient: bool = True,
    moves: int = MOVES,
    start: tuple[Tensor, Tensor] | None = None,
) -> Exploration:
    """Carry `n` particles from the base to the posterior.

    Args:
        target: ell in coordinates where the prior is near N(0, I).
        n: number of particles.
        fits: independent populations.
        base: where they start; None is N(0, I).
        gradient: whether the moves use the potential's gradient.
        moves: rounds at each temperature, at least.
        start: draws of the base (fits, n, d) at which the potential is finite, and the logarithm (fits,) of
            their share, where so few are that hardly any of n fresh draws would be; some may come twice.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    >>> target = Target(prior.log_prob, coordinates(prior))  # the posterior is the prior
    >>> found = explore(target, 64)
    >>> found.betas[:, 0].tolist(), round(float(found.log_evidence), 4) + 0.0
    ([0.0, 1.0], 0.0)
    """
    base = StandardNormal(target.dim) if base is None else base
    like = torch.zeros((), dtype=torch.float64, device=target.device)
    kernel = Moves(target, base, gradient, moves)
    z, log_z = (base.sample(fits, n, like), like.expand(fits)) if start is None else start
    now, beta = kernel.at(z), like.expand(fits)
    # a walk's step is short: where it was before the last one is where it is
    halved = gradient and n >= _MANY and target.dim <= _FEW_DIMENSIONS
    ancestors = (n + 1) // 2 if halved else n
    betas, log_zs, seen, values = [beta], [log_z], [now.z], [now.relative]
    while bool((beta < 1).any()):
        relative = now.relative
        new = next_beta(relative, beta) if len(betas) < _MAX_TEMPERATURES else torch.ones_like(beta)
        increments = (new - beta)[:, None] * relative
        log_z = log_z + log_sum_exp(increments, 1) - math.log(n)
        now, beta = now.taken(_resample(increments, ancestors)), new
        now, before = kernel.forget(now, beta)
        now = now.joined(before.first(n - ancestors)) if ancestors < n else now
        betas.append(beta)
        log_zs.append(log_z)
        seen.append(now.z)
        values.append(now.relative)
    return Exploration(
        z=now.z,
        ell=now.ell,
        relative=values[-1],
        history_z=torch.stack(seen),
        history_relative=torch.stack(values),
        betas=torch.stack(betas),
        log_evidence=log_z,
        log_evidences=torch.stack(log_zs),
        acceptance=kernel.acceptance,
        step=kernel.step,
    )


def _resample(log_w: Tensor, n: int) -> Tensor:
    """(F, n) indices of weights (F, N), drawn in proportion to them, systematically (one uniform a row)."""
    edges = torch.softmax(log_w, 1).cumsum(1)
    steps = torch.arange(n, dtype=log_w.dtype, device=log_w.device)
    points = (torch.rand_like(log_w[:, :1]) + steps) / n
    return torch.searchsorted(edges, points * edges[:, -1:]).clamp_max(log_w.shape[1] - 1)


def next_beta(relative: Tensor, beta: Tensor) -> Tensor:
    """(F,) temperatures at which the weights are worth `_ESS` of the particles; at most 1.

    By bisection of the step's logarithm.
    """
    relative = relative - relative.amax(1, keepdim=True)  # all of them may be huge and equal

    def enough(step: Tensor) -> Tensor:
        w = exp_(step[:, None] * relative)
        return w.sum(1).square() >= _ESS * relative.shape[1] * w.square().sum(1)

    rest = 1 - beta
    low, high = torch.full_like(beta, math.log(_LEAST_STEP)), rest.clamp_min(_LEAST_STEP).log()
    whole = enough(rest)
    if not bool(whole.all()):
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            good = enough(middle.exp())
            low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    step = torch.maximum(low.exp(), beta * 1e-9)
    return torch.where(whole, 1.0, (beta + step).clamp_max(1.0))
