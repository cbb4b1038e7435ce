"""Potentials at many observations at once: row n of theta meets row n of x.

A potential of ours or of a package takes such rows; a callable of a user's own may or may not. It is tried:
the values of a few rows, evaluated together, are compared with those evaluated one by one. Where they
differ, each observation is evaluated by itself, which is right and slower.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import violation
from visbi.core.random import seeded
from visbi.potentials.base import BasePotential

__all__ = ["Probe", "probe", "takes_rows"]

_ROWS = 32
_SEED = 20_031  # of the thetas that are tried
_TOLERANCE = 1e-3  # relative; float32 sums in another order


class Probe:
    """A potential's values at a few draws of the prior and some of the observations.

    Args:
        potential: log p(theta | x) + const.
        prior: over theta.
        x: observations (F, ...), finite.
        x_is_iid: whether each is rows of independent trials.

    Attributes:
        theta: (32, D) draws of the prior, always the same ones.
        x: (32, ...), observations spread over all that there are; each comes again if there are fewer.
        one_by_one: (32,) the potential at each pair, float64; NaN where it raised.
        answered: (32,) where it did not.

    Raises:
        Exception: what the potential raised, if it did so at every pair.
    """

    def __init__(
        self, potential: BasePotential, prior: Distribution, x: Tensor, *, x_is_iid: bool = False
    ) -> None:
        self.potential, self._x_is_iid = potential, x_is_iid
        chosen = (torch.arange(_ROWS) * len(x)) // _ROWS if len(x) > _ROWS else torch.arange(_ROWS) % len(x)
        with seeded(_SEED):
            self.theta, self.x = prior.sample(torch.Size([_ROWS])), x[chosen.to(x.device)]
        outcomes = [self._tried(i, x_o) for i, x_o in enumerate(self.x)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if len(errors) == _ROWS:
            if x.ndim > 2 and not x_is_iid:
                errors[0].add_note("If the rows within an observation are independent trials: x_is_iid=True.")
            raise errors[0]
        unknown = self.theta.new_full((), torch.nan, dtype=torch.float64)
        self.one_by_one = torch.stack([unknown if isinstance(v, Exception) else v for v in outcomes])
        self.answered = torch.tensor([not isinstance(v, Exception) for v in outcomes], device=x.device)

    def _tried(self, i: int, x_o: Tensor) -> Tensor | Exception:
        try:
            return self._alone(i, x_o)
        except Exception as error:  # noqa: BLE001 - an observation that breaks the potential fails by itself, later
            return error

    def _alone(self, i: int, x_o: Tensor) -> Tensor:
        with seeded(_SEED), torch.no_grad():
            x_o = x_o if self._x_is_iid else x_o[None]
            return self.potential.evaluate(self.theta[i : i + 1], x_o)[0].double()

    def together(self) -> Tensor | None:
        """The values where there was an answer from one call; None if the potential does not take rows."""
        theta, x = self.theta[self.answered], self.x[self.answered]
        try:
            with seeded(_SEED), torch.no_grad():
                return self.potential.evaluate(theta, x, x_is_iid=False).double()
        except Exception:  # noqa: BLE001 - a callable made for one observation may raise anything
            return None

    def depends_on_x(self) -> bool:
        """Whether values change with x; True if that cannot be seen."""
        other = self.x.roll(1, 0)
        unlike = (other != self.x).flatten(1).any(1) & self.one_by_one.isfinite()
        pairs = [
            (self.one_by_one[i], self._tried(i, other[i])) for i in torch.nonzero(unlike).flatten().tolist()
        ]
        return not pairs or any(isinstance(b, Exception) or bool(a != b) for a, b in pairs)


def probe(potential: BasePotential, prior: Distribution, x: Tensor, *, x_is_iid: bool = False) -> Probe:
    """A potential's values at a few pairs, or an error that says what is wrong.

    Raises:
        ValueError: the potential does not depend on x.
    """
    found = Probe(potential, prior, x, x_is_iid=x_is_iid)
    if not found.depends_on_x():
        expected = "a function of theta and x (this one gives the same whatever x is)"
        raise ValueError(violation("potential", expected, "one of theta alone"))
    return found


def takes_rows(found: Probe) -> bool:
    """Whether the potential gives for rows of theta and x what it gives for each pair alone.

    >>> from visbi.potentials import as_potential
    >>> from visbi.priors import BoxUniform
    >>> prior, x = BoxUniform(-torch.ones(2), torch.ones(2)), torch.randn(5, 2)
    >>> takes_rows(Probe(as_potential(lambda theta, x: -(theta - x).square().sum(-1)), prior, x))
    True
    >>> takes_rows(Probe(as_potential(lambda theta, x: -(theta - x[0]).square().sum(-1)), prior, x))
    False
    """
    values, alone = found.together(), found.one_by_one[found.answered]
    if values is None or int(alone.isfinite().sum()) < 2:  # nothing to compare: the safe way
        return False
    finite = alone.isfinite()
    if not bool((values.isfinite() == finite).all()):
        return False
    scale = 1.0 + alone[finite].abs()
    return bool(((values[finite] - alone[finite]).abs() <= _TOLERANCE * scale).all())
