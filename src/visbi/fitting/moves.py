r"""Moves that leave a tempered density as it is: Hamiltonian ones, or random walks where no slope is of use.

The path from a base to the posterior is p_beta(z) ~ base(z)^(1 - beta) exp(beta ell(z)). Hamiltonian Monte
Carlo's mass is the inverse covariance of the particles, its step size is jittered and follows the acceptance
rate. Random walks take steps with the particles' covariance (Roberts, Gelman, Gilks 1997). A leading axis F
holds independent populations.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from visbi.fitting.target import Target, log_standard_normal

__all__ = [
    "FIRST",
    "LEAPFROG",
    "MOVES",
    "Base",
    "Moves",
    "Population",
    "StandardNormal",
    "covariance",
    "root",
]

LEAPFROG = 5
"""Steps of a Hamiltonian move, at most; as many walks cost as much."""
_QUARTER = 1.6  # the length of a quarter of a unit Gaussian's orbit: longer steps are fewer
_ACCEPTANCE = 0.8
_WALK_ACCEPTANCE = 0.234
_GAIN = 1.7  # one over the slope of acceptance by the logarithm of the step, there
_MAX_MOVES, _MAX_WALKS = 12, 40
MOVES = 2
"""Rounds at a temperature; with one, what is fitted to the particles has more to mend and takes longer."""
FIRST = 0.01
"""Temperature below which far too wide priors spend most of their steps, and"""
_FIRST_MOVES = 1  # one is enough
_CORRELATION = 0.5  # moves go on until lag-one correlation falls below
_STALLED = 0.08  # or falls by less than this in a round


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


@dataclass
class Population:
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

    def taken(self, index: Tensor) -> "Population":
        wide = index[..., None].expand(-1, -1, self.z.shape[-1])
        z, gradient, score = (t.gather(1, wide) for t in (self.z, self.gradient, self.base_score))
        return Population(z, self.ell.gather(1, index), gradient, self.log_base.gather(1, index), score)

    def first(self, n: int) -> "Population":
        parts = (self.z, self.ell, self.gradient, self.log_base, self.base_score)
        return Population(*(part[:, :n] for part in parts))

    def joined(self, other: "Population") -> "Population":
        pairs = (
            (self.z, other.z),
            (self.ell, other.ell),
            (self.gradient, other.gradient),
            (self.log_base, other.log_base),
            (self.base_score, other.base_score),
        )
        return Population(*(torch.cat(pair, 1) for pair in pairs))

    def replaced(self, other: "Population", where: Tensor) -> "Population":
        wide = where[..., None]
        return Population(
            torch.where(wide, other.z, self.z),
            torch.where(where, other.ell, self.ell),
            torch.where(wide, other.gradient, self.gradient),
            torch.where(where, other.log_base, self.log_base),
            torch.where(wide, other.base_score, self.base_score),
        )


class Moves:
    """Markov kernels that leave the tempered density as it is, and what they learn about it."""

    def __init__(self, target: Target, base: Base, gradient: bool, least: int = MOVES) -> None:
        self.target, self.base, self.gradient, self.least = target, base, gradient, least
        start = 0.8 / target.dim**0.25 if gradient else 2.38 / math.sqrt(target.dim)
        self.step = torch.full((1,), start, dtype=torch.float64, device=target.device)
        self.acceptance = torch.ones(1, dtype=torch.float64, device=target.device)

    def at(self, z: Tensor) -> Population:
        if self.gradient:
            ell, gradient = self.target.value_and_gradient(z)
        else:
            ell, gradient = self.target.value(z), torch.zeros_like(z)
        return Population(z, ell, gradient, *self.base.log_prob_and_score(z))

    def forget(self, now: Population, beta: Tensor) -> tuple[Population, Population]:
        """Rounds at one temperature, until the particles have forgotten where they were.

        Returns:
            The particles after the last round, and before it.
        """
        scale, start = root(covariance(now.z)), now.z
        most = _MAX_MOVES if self.gradient else _MAX_WALKS
        least = _STALLED if self.gradient else _STALLED / LEAPFROG
        enough = _FIRST_MOVES if float(beta.max()) < FIRST else self.least
        last, before = now, 1.0
        for done in range(1, most + 1):
            last, now = now, self.round(now, beta, scale)
            self.adapt()
            correlation = float(_correlation(start, now.z).max())
            # between modes that are far apart particles do not move, and more rounds would not change that
            if done >= enough and (correlation < _CORRELATION or before - correlation < least):
                break
            before = correlation
        return now, last

    def adapt(self) -> None:
        """Step size after a round's acceptance."""
        aim = _ACCEPTANCE if self.gradient else _WALK_ACCEPTANCE
        self.step = (self.step * (_GAIN * (self.acceptance - aim)).exp()).clamp(1e-4, 2.5)

    def round(self, now: Population, beta: Tensor, scale: Tensor) -> Population:
        """One round for all particles, in coordinates y = scale^-1 z where they have unit covariance."""
        return self.taken(now, *(self._hamiltonian if self.gradient else self._walk)(now, beta, scale))

    def taken(self, now: Population, new: Population, log_ratio: Tensor) -> Population:
        """The new places where they are accepted."""
        probability = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0)
        self.acceptance = probability.mean(1)
        return now.replaced(new, torch.rand_like(probability) < probability)

    @property
    def leapfrog(self) -> int:
        """Steps of a Hamiltonian move: particles are somewhere else after a quarter of an orbit."""
        return min(LEAPFROG, math.ceil(_QUARTER / float(self.step.median())))

    def _hamiltonian(self, now: Population, beta: Tensor, scale: Tensor) -> tuple[Population, Tensor]:
        size = self.step[:, None, None] * torch.empty_like(now.z[..., :1]).uniform_(0.6, 1.4)
        return self.trajectory(now, beta, scale, size, self.leapfrog)

    def trajectory(
        self, now: Population, beta: Tensor, scale: Tensor, size: Tensor, steps: int
    ) -> tuple[Population, Tensor]:
        """Where fresh momenta lead in steps of a size (F, N, 1), and the log-ratio that accepts it."""
        momentum = torch.randn_like(now.z)
        before = now.log_tempered(beta) - 0.5 * momentum.square().sum(-1)
        new = now
        momentum = momentum + 0.5 * size * (now.slope(beta) @ scale)
        for left in reversed(range(steps)):
            new = self.at(new.z + size * (momentum @ scale.mT))
            momentum = momentum + (size if left else 0.5 * size) * (new.slope(beta) @ scale)
        return new, new.log_tempered(beta) - 0.5 * momentum.square().sum(-1) - before

    def _walk(self, now: Population, beta: Tensor, scale: Tensor) -> tuple[Population, Tensor]:
        size = self.step[:, None, None] * torch.empty_like(now.z[..., :1]).uniform_(0.3, 1.7)
        new = self.at(now.z + size * (torch.randn_like(now.z) @ scale.mT))
        return new, new.log_tempered(beta) - now.log_tempered(beta)


def covariance(z: Tensor) -> Tensor:
    """(F, d, d), shrunk towards its diagonal by what so few particles leave uncertain."""
    n, d = z.shape[1:]
    centred = z - z.mean(1, keepdim=True)
    cov = centred.mT @ centred / max(n - 1, 1)
    own = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300))
    share = d / (n + d)
    return (1 - share) * cov + share * own


def root(cov: Tensor) -> Tensor:
    """(F, d, d) lower factors; of the diagonal alone where there is no other."""
    tril, info = torch.linalg.cholesky_ex(cov)
    plain = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1).sqrt())
    return torch.where((info == 0)[:, None, None], tril, plain)


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """(F,) largest correlation, over coordinates, between particles before and after the moves."""
    a, b = before - before.mean(1, keepdim=True), after - after.mean(1, keepdim=True)
    norm = (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-300)
    return ((a * b).sum(1) / norm).amax(1)
