r"""The target in coordinates: ell(z) = U(theta(z)) + log|dtheta/dz|, its gradient, and a count of both.

Relative to the prior, L(z) = ell(z) - log N(z; 0, I) is the log-likelihood up to a constant wherever the
coordinates make the prior standard normal; tempering runs along it.

A potential that is not finite, or raises, becomes a large negative number with no gradient, and is counted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.core.types import LogDensity
from visbi.families.base import log_standard_normal
from visbi.fitting.budget import Budget, BudgetReached
from visbi.priors.blocks import CdfBlock, UniformBlock, ndtr
from visbi.priors.transforms import Coordinates

__all__ = ["FlatTarget", "ManyTargets", "Target", "is_usable", "log_standard_normal"]

_FLOOR = -1e30
_BATCH = 16_384
_RAISING = 32  # points of a batch at which a potential may raise
_PROBES = (-1.5, 0.3, 1.1)  # prior sds at which priors are compared


def is_usable(ell: Tensor) -> Tensor:
    """Where the potential was finite, for values of `Target`; bool, of ell's shape.

    >>> is_usable(torch.tensor([-3.0, -1e30]))
    tensor([ True, False])
    """
    return ell > 0.1 * _FLOOR


@dataclass(frozen=True)
class Tally:
    """Evaluations of each of F potentials, (F,) counts.

    Attributes:
        values, gradients: without and with gradient.
        nonfinite: how many of them were not finite, and
        broken: how many of those were NaN or +inf, which no density is.
    """

    values: Tensor
    gradients: Tensor
    nonfinite: Tensor
    broken: Tensor

    @staticmethod
    def of(fits: int) -> "Tally":
        """Zeros."""
        return Tally(*(torch.zeros(fits, dtype=torch.int64) for _ in range(4)))


class Target:
    """ell and its gradient, in float64, for z of any leading shape.

    Args:
        log_p: the potential, (N, D) -> (N,).
        coords: the coordinates.
        budget: what evaluations are taken from; None is one without limits.

    Attributes:
        dim: d.
        fits: how many potentials stand side by side: one. See `ManyTargets`.
        tally: evaluations so far.
    """

    def __init__(self, log_p: LogDensity, coords: Coordinates, budget: Budget | None = None) -> None:
        self._log_p = log_p
        self._begin(coords, budget, 1)

    def _begin(self, coords: Coordinates, budget: Budget | None, fits: int) -> None:
        self._coords = coords
        self._may_overflow = not all(isinstance(block, UniformBlock) for block in coords.blocks)
        self.budget = Budget() if budget is None else budget
        self.dim, self.fits = coords.dim_z, fits
        self.tally = Tally.of(fits)
        self._which = torch.arange(fits)

    @property
    def device(self) -> torch.device:
        """Where z is expected."""
        return self._coords.low.device  # type: ignore[return-value]

    @property
    def n_values(self) -> int:
        """Evaluations without gradient, of all potentials."""
        return int(self.tally.values.sum())

    @property
    def n_gradients(self) -> int:
        """Evaluations with gradient."""
        return int(self.tally.gradients.sum())

    @property
    def n_nonfinite(self) -> int:
        """How many were not finite."""
        return int(self.tally.nonfinite.sum())

    @property
    def n_broken(self) -> int:
        """How many were NaN or +inf."""
        return int(self.tally.broken.sum())

    @property
    def broken(self) -> Tensor:
        """(F,) the same for each potential."""
        return self.tally.broken[self._which]

    def only(self, which: Tensor) -> "Target":
        """The potentials `which`, (F,) bool; budget and tally are shared."""
        assert bool(which.all())
        return self

    def value(self, z: Tensor) -> Tensor:
        """ell(z), shape of z without its last axis."""
        with torch.no_grad():
            parts = [self._despite_errors(piece) for piece in self._paid(self._rows(z), self.tally.values)]
        value = torch.cat(parts, 1)
        return self._clean(value, whole=_all_finite(value)).reshape(z.shape[:-1])

    def value_as_far(self, z: Tensor, least: int) -> tuple[Tensor, BudgetReached | KeyboardInterrupt | None]:
        """ell at as many of the first points of z (F, M, d) as the budget allows, (F, m), and what ended it.

        Raises:
            BudgetReached: it is not enough for `least` points.
        """
        self.budget.ask(least)
        parts, end = [], None
        try:
            with torch.no_grad():
                for piece in self._paid(z[:, : int(min(z.shape[1], self.budget.left))], self.tally.values):
                    parts.append(self._despite_errors(piece))
            self.budget.ask(z.shape[1] - sum(part.shape[1] for part in parts))
        except (BudgetReached, KeyboardInterrupt) as reached:
            end = reached
        value = torch.cat(parts, 1) if parts else z[:, :0, 0]
        if end is not None and value.shape[1] < least:
            raise end
        return self._clean(value, whole=_all_finite(value)), end

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """ell(z) and its gradient, of z's shape."""
        values, gradients = [], []
        for piece in self._paid(self._rows(z), self.tally.gradients):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                ell = self._despite_errors(leaf)
                (gradient,) = torch.autograd.grad(ell.sum(), leaf)
            values.append(ell.detach())
            gradients.append(gradient)
        value, gradient = torch.cat(values, 1), torch.cat(gradients, 1)
        whole = _all_finite(value)
        if not (whole and _all_finite(gradient)):
            usable = torch.isfinite(value)[..., None] & torch.isfinite(gradient).all(-1, keepdim=True)
            gradient = torch.where(usable, gradient, torch.zeros_like(gradient))
        return self._clean(value, whole=whole).reshape(z.shape[:-1]), gradient.reshape(z.shape)

    def alike(self) -> list[tuple[int, int]]:
        """Pairs of entries of z that stand for entries of theta with the same prior."""
        coords = self._coords
        if coords.dim_theta != coords.dim_z:
            return []
        z = torch.tensor(_PROBES, dtype=torch.float64, device=self.device)[:, None].expand(-1, self.dim)
        theta = coords.to_theta(z)[0]
        same = (theta[:, :, None] == theta[:, None]).all(0)
        return [(i, j) for i, j in same.nonzero().tolist() if i < j]

    def scales(self) -> list[bool]:
        """Which entries of z stand for a theta that is positive and whose prior does not say on what scale.

        That is, a uniform one that begins at zero, or one with a density at zero: half-normal, half-Cauchy.
        """
        coords = self._coords
        if coords.dim_theta != coords.dim_z:
            return [False] * self.dim
        low, up_to = coords.low.double(), torch.finfo(coords.dtype).tiny
        kinds = [isinstance(b, UniformBlock | CdfBlock) for b in coords.blocks for _ in range(b.dim_z)]  # type: ignore[arg-type]
        return [kind and 0 < each < up_to for kind, each in zip(kinds, low.tolist(), strict=True)]

    def inwards(self, loc: Tensor, cov: Tensor) -> Tensor:
        """Points loc (..., d), or near them, around which draws with these covariances can be used."""
        return loc

    def _rows(self, z: Tensor) -> Tensor:
        """z as (F, M, d): whatever stands first in z, the potentials are outermost."""
        return z.reshape(self.fits, -1, self.dim)

    def _paid(self, rows: Tensor, counts: Tensor) -> Iterator[Tensor]:
        """Pieces of rows (F, M, d), as many at once as memory and the clock allow, taken from the budget."""
        self.budget.ask(rows.shape[1])
        done = 0
        while done < rows.shape[1] or not done:
            piece = rows[:, done : done + min(max(1, _BATCH // self.fits), self.budget.at_once)]
            done += max(piece.shape[1], 1)
            self.budget.spend(piece.shape[1])
            yield piece
            counts.index_add_(0, self._which, torch.full_like(self._which, piece.shape[1]))

    def _despite_errors(self, z: Tensor) -> Tensor:
        """ell (F, M) at z (F, M, d); NaN at the few points, found by halving, where one potential raises.

        So do torch's distributions where, far out, exp(theta) has underflowed to a scale of zero.

        Raises:
            ValueError: what the potential raised, if it did so at more than a few points, or at all of them.
        """
        try:
            return self._evaluate(z)
        except ValueError as error:
            if self.fits > 1 or z.shape[1] == 1:
                raise
            first = error
        pieces, parts, bad = _halves(z), [], 0
        while pieces:
            piece = pieces.pop()
            try:
                parts.append(self._evaluate(piece))
            except ValueError:
                if piece.shape[1] > 1:
                    pieces += _halves(piece)
                    continue
                parts.append(torch.full_like(piece[..., 0], torch.nan))
                bad += 1
                if bad > _RAISING or bad == z.shape[1]:
                    theta = self._coords.to_theta(piece[0].detach())[0]
                    first.add_note(
                        f"`potential_fn` raised this at many points, as at theta = {theta[0].tolist()}."
                    )
                    raise first from None
        return torch.cat(parts, 1)

    def _evaluate(self, z: Tensor) -> Tensor:
        """ell (F, M) at z (F, M, d)."""
        z, lost = _numbers(z)
        theta, ladj = self._coords.to_theta(z[0])
        return self._over_z(self._log_p(theta), theta, ladj, lost)[None]

    def _over_z(self, log_p: Tensor, theta: Tensor, ladj: Tensor, lost: Tensor | None) -> Tensor:
        """ell (...), nothing where z was `lost`, and where theta (..., D) is larger than numbers are."""
        ell = log_p.double() + ladj
        ell = ell if lost is None else torch.where(lost.reshape(ell.shape), _FLOOR, ell)
        return torch.where(self._coords.overflows(theta), _FLOOR, ell) if self._may_overflow else ell

    def _clean(self, value: Tensor, *, whole: bool) -> Tensor:
        """`value` (F, M) above the floor, and a count of what is not finite; `whole` says that all is."""
        if whole:
            return value.clamp_min(_FLOOR)
        finite = torch.isfinite(value)
        self.tally.nonfinite[self._which] += (~finite).sum(1).cpu()
        self.tally.broken[self._which] += (~finite & (value != -torch.inf)).sum(1).cpu()
        return torch.where(finite, value.clamp_min(_FLOOR), _FLOOR)


def _numbers(z: Tensor) -> tuple[Tensor, Tensor | None]:
    """z (F, M, d) with the prior's middle where it is no number, and where that was, (F, M); None: nowhere.

    Moves along a slope of 1e30 end there. A potential is asked at points of the prior alone: one that checks
    its arguments would raise.
    """
    if _all_finite(z.detach()):
        return z, None
    lost = ~torch.isfinite(z).all(-1)
    return torch.where(lost[..., None], 0.0, z), lost


def _halves(z: Tensor) -> list[Tensor]:
    """The second and the first half of z (F, M, d), M > 1: a stack gives the first one back first."""
    return [*reversed(z.split(-(-z.shape[1] // 2), 1))]


def _all_finite(values: Tensor) -> bool:
    """Whether every entry is finite, at the price of a sum; False, too, where that overflows."""
    return math.isfinite(float(values.sum()))


_SD = 12**-0.5  # of a uniform prior of width 1
_EDGE = 0.5 / _SD
_LEAST = 1e-15  # of the box's width that y keeps from its sides
_LOG_SLOPE = 0.5 * math.log(2 * math.pi) + math.log(_SD)


class FlatTarget(Target):
    """A target over y = (theta - middle) / sd of the prior where that is a box, and y = z elsewhere.

    Outside the box it is nothing; evaluations and budget are those of the target that it is made of.

    >>> from visbi.priors import BoxUniform, coordinates
    >>> target = Target(lambda theta: theta.sum(-1), coordinates(BoxUniform(torch.zeros(2), torch.ones(2))))
    >>> flat = FlatTarget.of(target)
    >>> assert flat is not None
    >>> flat.value(torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]]]).double()).diff()
    tensor([[ 0.29, -1.0e30]], dtype=torch.float64)
    """

    def __init__(self, target: Target, boxed: Tensor) -> None:
        self._target, self._boxed = target, boxed
        self._begin(target._coords, target.budget, target.fits)
        self.tally, self._which = target.tally, target._which

    @staticmethod
    def of(target: Target) -> "FlatTarget | None":
        """None where no entry of the prior is uniform."""
        coords = target._coords
        pairs = zip(coords.blocks, coords.dims_z, strict=True)
        boxed = torch.cat([torch.full((n,), isinstance(block, UniformBlock)) for block, n in pairs])
        boxed = boxed.to(target.device)
        return FlatTarget(target, boxed) if bool(boxed.any()) else None

    def from_z(self, z: Tensor) -> Tensor:
        """y."""
        return torch.where(self._boxed, (ndtr(z) - 0.5) / _SD, z)

    def to_z(self, y: Tensor) -> Tensor:
        """z of y, or of the nearest y inside."""
        return torch.where(self._boxed, torch.special.ndtri((_SD * y + 0.5).clamp(_LEAST, 1 - _LEAST)), y)

    def cov_from_z(self, z: Tensor, cov: Tensor) -> Tensor:
        """Covariances at z (..., d), stretched as the map is there."""
        slope = self._log_slope(z).exp()
        return slope[..., None] * cov * slope[..., None, :]

    def cov_to_z(self, y: Tensor, cov: Tensor) -> Tensor:
        """Covariances at y, likewise."""
        slope = (-self._log_slope(self.to_z(y))).exp()
        return slope[..., None] * cov * slope[..., None, :]

    def value_from_z(self, z: Tensor, ell: Tensor) -> Tensor:
        """ell as a density over y, from that over z."""
        return ell - self._log_slope(z).sum(-1)

    def inwards(self, loc: Tensor, cov: Tensor) -> Tensor:
        most = (_EDGE - cov.diagonal(dim1=-2, dim2=-1).sqrt()).clamp_min(0.0)
        return torch.where(self._boxed, torch.minimum(torch.maximum(loc, -most), most), loc)

    def _log_slope(self, z: Tensor) -> Tensor:
        """log dy/dz (..., d)."""
        return torch.where(self._boxed, -0.5 * z.square() - _LOG_SLOPE, 0.0)

    def _evaluate(self, z: Tensor) -> Tensor:
        inside = ((z.abs() < _EDGE) | ~self._boxed).all(-1)
        stretched = self.to_z(z)
        ell = self.value_from_z(stretched, self._target._evaluate(stretched))
        return torch.where(inside, ell, _FLOOR)


class ManyTargets(Target):
    """Potentials of F observations, evaluated together.

    z has F, or a multiple of it, as its first axis: all that belongs to one potential stands together.

    Args:
        log_p: (theta (F', M, D), which (F',)) -> (F', M), the potentials `which` of all there are.
        coords: the coordinates.
        fits: F.
        budget: of each potential: evaluations of all of them at once count once.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> def log_p(theta, which):
    ...     return -0.5 * x[which, None] * theta.square().sum(-1)
    >>> targets = ManyTargets(log_p, coordinates(prior), 3)
    >>> targets.value(torch.ones(3, 1, 2)).tolist()
    [[-1.0], [-2.0], [-3.0]]
    >>> targets.only(torch.tensor([False, True, True])).value(torch.ones(2, 1, 2)).tolist()
    [[-2.0], [-3.0]]
    >>> targets.tally.values.tolist()
    [1, 2, 2]
    """

    def __init__(
        self,
        log_p: Callable[[Tensor, Tensor], Tensor],
        coords: Coordinates,
        fits: int,
        budget: Budget | None = None,
    ) -> None:
        self._joint = log_p
        self._begin(coords, budget, fits)

    def only(self, which: Tensor) -> "ManyTargets":
        """The potentials `which`, (F,) bool; budget and tally are shared."""
        fewer = ManyTargets(self._joint, self._coords, int(which.sum()), self.budget)
        fewer.tally, fewer._which = self.tally, self._which[which.cpu()]
        return fewer

    def _evaluate(self, z: Tensor) -> Tensor:
        z, lost = _numbers(z)
        theta, ladj = self._coords.to_theta(z.flatten(0, 1))
        theta = theta.reshape(*z.shape[:2], -1)
        log_p = self._joint(theta, self._which.to(theta.device))
        return self._over_z(log_p, theta, ladj.reshape(z.shape[:2]), lost)
