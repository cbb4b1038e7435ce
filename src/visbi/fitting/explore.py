r"""Tempered sequential Monte Carlo: particles carried from a base distribution to the posterior.

Del Moral, Doucet, Jasra: Sequential Monte Carlo samplers. JRSS B 2006.

The path is p_beta(z) ~ base(z)^(1 - beta) exp(beta ell(z)), beta from 0 to 1. Each step is as long as
leaves an effective sample size of half the particles; then they are resampled (systematically) and moved,
by Hamiltonian Monte Carlo whose mass is the inverse covariance of the particles, with a jittered step size
that follows the acceptance rate, until they have forgotten where they were. Where the potential has no
useful gradient the moves are random walks (steps with the particles' covariance; Roberts, Gelman, Gilks
1997).

From the prior, N(0, I) in these coordinates, it finds where the mass is, all modes of it. From a fitted q
it is a bridge that carries q's draws the rest of the way. Every particle of every temperature is kept:
together they are a sample from a known mixture of tempered densities. A leading axis F holds independent
populations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from visbi.certificate.weights import resample
from visbi.core.logs import exp_, log_sum_exp
from visbi.core.rows import picked
from visbi.fitting.target import Target, log_standard_normal

__all__ = ["MOVES", "Base", "Exploration", "StandardNormal", "drift", "explore"]

_ESS = 0.5
_LEAPFROG = 5  # steps of a move, at most: fewer where steps are so long that
_QUARTER = 1.6  # this length, a quarter of a unit Gaussian's orbit, is passed before
_ACCEPTANCE = 0.8
_WALK_ACCEPTANCE = 0.234
_GAIN = 1.7  # one over the slope of acceptance by the logarithm of the step, there
_MAX_MOVES, _MAX_WALKS = 12, 40
MOVES = 2
"""Rounds at a temperature; with one, what is fitted to the particles has more to mend and takes longer."""
_FIRST = 0.01  # temperature below which far too wide priors spend most of their steps, and
_FIRST_MOVES = 1  # one is enough
_CORRELATION = 0.5  # moves go on until lag-one correlation falls below
_STALLED = 0.08  # or falls by less than this in a round
_MAX_TEMPERATURES = 200
_LEAST_STEP = 1e-12
_BISECTIONS = 18  # of its logarithm: to one in ten thousand
_RISE = 0.02  # nats of mean log-weight that no one would notice
_LARGEST_RISE = 10.0


class Base(Protocol):
    """Where particles start: a distribution that can be drawn from and has a score."""

    def sample(self, fits: int, n: int, like: Tensor) -> Tensor:
        """(fits, n, d) draws, of the dtype and on the device of `like`."""
        ...

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log base(z) (F, N) and its gradient (F, N, d)."""
        ...


@dataclass(frozen=True)
class StandardNormal:
    """N(0, I) in `dim` dimensions: the prior, in coordinates that make it so."""

    dim: int

    def sample(self, fits: int, n: int, like: Tensor) -> Tensor:
        """(fits, n, d)."""
        return torch.randn(fits, n, self.dim, dtype=like.dtype, device=like.device)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log N(z; 0, I) and -z."""
        return log_standard_normal(z), -z


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
    def of_draws(z: Tensor, ell: Tensor, n: int) -> "Exploration":
        """What draws of the prior themselves show, z (F, N, d) with ell (F, N), -inf where it is not finite.

        For posteriors so wide beside the prior that some n of them, resampled, stand for it.
        """
        relative = ell - log_standard_normal(z)
        index = torch.stack([resample(row, n) for row in relative])
        one = torch.ones_like(relative[:, 0])
        log_evidence = log_sum_exp(relative, 1) - math.log(z.shape[1])
        return Exploration(
            z=picked(z, index),
            ell=ell.gather(1, index),
            relative=relative.gather(1, index),
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
        return self.z.mean(1), _covariance(self.z)

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


@dataclass
class _Population:
    """Particles with all that a move needs."""

    z: Tensor
    ell: Tensor
    gradient: Tensor
    log_base: Tensor
    base_score: Tensor

    @property
    def relative(self) -> Tensor:
        return self.ell - self.log_base

    def log_tempered(self, beta: Tensor) -> Tensor:
        return beta[:, None] * self.ell + (1 - beta[:, None]) * self.log_base

    def slope(self, beta: Tensor) -> Tensor:
        return beta[:, None, None] * self.gradient + (1 - beta[:, None, None]) * self.base_score

    def taken(self, index: Tensor) -> "_Population":
        wide = index[..., None].expand(-1, -1, self.z.shape[-1])
        z, gradient, score = (t.gather(1, wide) for t in (self.z, self.gradient, self.base_score))
        return _Population(z, self.ell.gather(1, index), gradient, self.log_base.gather(1, index), score)

    def replaced(self, other: "_Population", where: Tensor) -> "_Population":
        wide = where[..., None]
        return _Population(
            torch.where(wide, other.z, self.z),
            torch.where(where, other.ell, self.ell),
            torch.where(wide, other.gradient, self.gradient),
            torch.where(where, other.log_base, self.log_base),
            torch.where(wide, other.base_score, self.base_score),
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
    kernel = _Moves(target, base, gradient, moves)
    z, log_z = (base.sample(fits, n, like), like.expand(fits)) if start is None else start
    now, beta = kernel.at(z), like.expand(fits)
    betas, log_zs, seen, values = [beta], [log_z], [now.z], [now.relative]
    while bool((beta < 1).any()):
        relative = now.relative
        new = _next_beta(relative, beta) if len(betas) < _MAX_TEMPERATURES else torch.ones_like(beta)
        increments = (new - beta)[:, None] * relative
        log_z = log_z + log_sum_exp(increments, 1) - math.log(n)
        now, beta = now.taken(_resample(increments)), new
        now = kernel.forget(now, beta)
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


class _Moves:
    """Markov kernels that leave the tempered density as it is, and what they learn about it."""

    def __init__(self, target: Target, base: Base, gradient: bool, least: int = MOVES) -> None:
        self.target, self.base, self.gradient, self.least = target, base, gradient, least
        start = 0.8 / target.dim**0.25 if gradient else 2.38 / math.sqrt(target.dim)
        self.step = torch.full((1,), start, dtype=torch.float64, device=target.device)
        self.acceptance = torch.ones(1, dtype=torch.float64, device=target.device)

    def at(self, z: Tensor) -> _Population:
        if self.gradient:
            ell, gradient = self.target.value_and_gradient(z)
        else:
            ell, gradient = self.target.value(z), torch.zeros_like(z)
        return _Population(z, ell, gradient, *self.base.log_prob_and_score(z))

    def forget(self, now: _Population, beta: Tensor) -> _Population:
        """Rounds at one temperature, until the particles have forgotten where they were."""
        scale, start = _root(_covariance(now.z)), now.z
        most = _MAX_MOVES if self.gradient else _MAX_WALKS
        least = _STALLED if self.gradient else _STALLED / _LEAPFROG
        enough = _FIRST_MOVES if float(beta.max()) < _FIRST else self.least
        before = 1.0
        for done in range(1, most + 1):
            now = self.round(now, beta, scale)
            self.adapt()
            correlation = float(_correlation(start, now.z).max())
            # between modes that are far apart particles do not move, and more rounds would not change that
            if done >= enough and (correlation < _CORRELATION or before - correlation < least):
                break
            before = correlation
        return now

    def adapt(self) -> None:
        """Step size after a round's acceptance."""
        aim = _ACCEPTANCE if self.gradient else _WALK_ACCEPTANCE
        self.step = (self.step * (_GAIN * (self.acceptance - aim)).exp()).clamp(1e-4, 2.5)

    def round(self, now: _Population, beta: Tensor, scale: Tensor) -> _Population:
        """One round for all particles, in coordinates y = scale^-1 z where they have unit covariance."""
        new, log_ratio = (self._hamiltonian if self.gradient else self._walk)(now, beta, scale)
        probability = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0)
        self.acceptance = probability.mean(1)
        return now.replaced(new, torch.rand_like(probability) < probability)

    @property
    def leapfrog(self) -> int:
        """Steps of a Hamiltonian move: particles are somewhere else after a quarter of an orbit."""
        return min(_LEAPFROG, math.ceil(_QUARTER / float(self.step.median())))

    def _hamiltonian(self, now: _Population, beta: Tensor, scale: Tensor) -> tuple[_Population, Tensor]:
        size = self.step[:, None, None] * torch.empty_like(now.z[..., :1]).uniform_(0.6, 1.4)
        momentum = torch.randn_like(now.z)
        before = now.log_tempered(beta) - 0.5 * momentum.square().sum(-1)
        new = now
        momentum = momentum + 0.5 * size * (now.slope(beta) @ scale)
        for left in reversed(range(self.leapfrog)):
            new = self.at(new.z + size * (momentum @ scale.mT))
            momentum = momentum + (size if left else 0.5 * size) * (new.slope(beta) @ scale)
        return new, new.log_tempered(beta) - 0.5 * momentum.square().sum(-1) - before

    def _walk(self, now: _Population, beta: Tensor, scale: Tensor) -> tuple[_Population, Tensor]:
        size = self.step[:, None, None] * torch.empty_like(now.z[..., :1]).uniform_(0.3, 1.7)
        new = self.at(now.z + size * (torch.randn_like(now.z) @ scale.mT))
        return new, new.log_tempered(beta) - now.log_tempered(beta)


def _resample(log_w: Tensor) -> Tensor:
    """As many indices as weights (F, N), drawn in proportion to them, systematically (one uniform a row)."""
    edges = torch.softmax(log_w, 1).cumsum(1)
    n = log_w.shape[1]
    steps = torch.arange(n, dtype=log_w.dtype, device=log_w.device)
    points = (torch.rand_like(log_w[:, :1]) + steps) / n
    return torch.searchsorted(edges, points * edges[:, -1:]).clamp_max(n - 1)


def _next_beta(relative: Tensor, beta: Tensor) -> Tensor:
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


def _covariance(z: Tensor) -> Tensor:
    """(F, d, d), shrunk towards its diagonal by what so few particles leave uncertain."""
    n, d = z.shape[1:]
    centred = z - z.mean(1, keepdim=True)
    cov = centred.mT @ centred / max(n - 1, 1)
    own = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300))
    share = d / (n + d)
    return (1 - share) * cov + share * own


def _root(cov: Tensor) -> Tensor:
    tril, info = torch.linalg.cholesky_ex(cov)
    plain = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).sqrt())
    return torch.where((info == 0)[:, None, None], tril, plain)


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """(F,) largest correlation, over coordinates, between particles before and after the moves."""
    a, b = before - before.mean(1, keepdim=True), after - after.mean(1, keepdim=True)
    norm = (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-300)
    return ((a * b).sum(1) / norm).amax(1)


def drift(
    target: Target,
    z: Tensor,
    log_q: Callable[[Tensor], Tensor],
    *,
    gradient: bool,
    rounds: int = 5,
    step: Tensor | None = None,
    cov: Tensor | None = None,
) -> Tensor:
    """How far the posterior's own moves carry draws towards where q is too low, in standard errors.

    Draws that are right stay right under moves that leave the posterior as it is, so their log-weights
    ell - log q keep their mean. Draws of a q that misses what lies next to it walk into it, and the mean
    rises.

    Args:
        target: of F potentials.
        z: (F, n, d) draws that are meant to be right, such as resampled ones.
        log_q: (F, N, d) -> (F, N).
        gradient: whether the moves use the potential's gradient.
        rounds: of moves.
        step: (F,) what an exploration of the same posterior had come to; None finds it on the way.
        cov: (F, d, d) covariance of what a draw can reach, such as that within modes; None is that of z.

    Returns:
        (F,) the mean rise of log-weights over its standard error where the rise is above `_RISE`; else 0.

    Raises:
        BudgetReached: the target's budget is used up.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(prior.log_prob, coordinates(prior))  # the posterior is the prior
    >>> drift(target, prior.sample((1, 256)), prior.log_prob, gradient=True)
    tensor([0.], dtype=torch.float64)
    """
    moves = _Moves(target, StandardNormal(target.dim), gradient)
    one = torch.ones(len(z), dtype=z.dtype, device=z.device)
    if step is not None:
        moves.step = step
    scale = _root(_covariance(z) if cov is None else cov)
    start = now = moves.at(z)
    for _ in range(rounds if gradient else rounds * _LEAPFROG):
        now = moves.round(now, one, scale)
        moves.adapt()
    rise = (now.ell - start.ell) - (log_q(now.z) - log_q(z))
    rise = rise.clamp(-_LARGEST_RISE, _LARGEST_RISE)
    error = rise.std(1) / rise.shape[1] ** 0.5
    return torch.where(rise.mean(1) > _RISE, rise.mean(1) / error.clamp_min(1e-300), 0.0)
