r"""What a variational family is: a distribution q over theta whose parameters can be learnt.

A family has a *body*, a distribution over z in R^d, and the coordinates that carry z to the prior's
support: theta = link(z), log q(theta) = log q(z) - log|dtheta/dz|. Families whose user defines them on the
support directly have no link (`families.custom`).

Gradients. For draws theta = f_phi(u) the derivative of log q_phi(theta) has two parts,

    d/dphi log q_phi(f_phi(u)) = [d/dtheta log q] df/dphi          (through the path)
                               + d/dphi log q_phi(theta)|_theta    (the score).

Every objective wants one of: both, the path alone (sticking the landing, Roeder et al. 2017; DReG, Tucker et
al. 2019), or the score alone (forward KL on draws of q). `Draws` carries the total and the path part; the
score part is their difference. The path part needs only the vector v = d/dtheta log q(theta) at the draws,
because <v, theta> - <v, theta>.detach() has just that gradient: no second copy of q with frozen parameters.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visbi.core.checks import violation
from visbi.core.types import Shape
from visbi.priors.transforms import Coordinates

__all__ = ["Body", "Draws", "Family", "LinkedFamily", "kept_inside", "log_standard_normal", "path_part"]


@dataclass(frozen=True)
class Draws:
    """N draws of q and their log-densities.

    Attributes:
        theta: (N, D), differentiable through the path if q can be reparameterised.
        log_q: (N,) float64, its gradient the total derivative.
        log_q_path: (N,) float64, the same values, its gradient through theta alone; None if not asked for or
            if q cannot be reparameterised.
        log_q_choice: (N,) float64 up to a constant, its gradient at fixed theta by those parameters alone
            along which theta has no gradient, such as the weights of a mixture; None if there are none, or
            without the path part.
    """

    theta: Tensor
    log_q: Tensor
    log_q_path: Tensor | None = None
    log_q_choice: Tensor | None = None

    @property
    def log_q_score(self) -> Tensor:
        """(N,), the same values, its gradient with theta held fixed."""
        if self.log_q_path is None:
            if self.theta.requires_grad:
                raise ValueError("the score of reparameterised draws needs draws with path=True")
            return self.log_q  # theta carries no gradient, so the total derivative is the score
        return self.log_q - self.log_q_path + self.log_q_path.detach()


def path_part(log_q: Tensor, z: Tensor, score: Tensor) -> Tensor:
    """log_q's values with the gradient <score, dz>: log q with its parameters held fixed.

    Args:
        log_q: (N,). z: (N, d), with its graph. score: (N, d), d log q / dz.
    """
    return log_q.detach() + (score.detach() * (z - z.detach())).sum(-1)


def log_standard_normal(u: Tensor) -> Tensor:
    """log N(u; 0, I), (...), for u (..., d)."""
    return -0.5 * u.square().sum(-1) - 0.5 * u.shape[-1] * math.log(2 * math.pi)


def kept_inside(coords: Coordinates, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of theta (..., D) lie in the support, and theta with the others replaced by one that does.

    They are replaced before any arithmetic, so that none gives birth to a NaN, be it in a gradient.
    """
    contained = coords.contains(theta) & torch.isfinite(theta).all(-1)
    origin = torch.zeros(coords.dim_z, dtype=torch.float64, device=theta.device)
    anchor = coords.to_theta(origin)[0].to(theta.dtype)
    return contained, torch.where(contained[..., None], theta, anchor)


class Family(nn.Module, ABC):
    """A trainable distribution over theta on the prior's support.

    Attributes:
        reparameterised: whether draws are differentiable in the parameters.
        event_shape: (D,).
    """

    reparameterised: bool = True
    has_rsample: bool = True
    event_shape: torch.Size
    batch_shape = torch.Size()

    @abstractmethod
    def draw(self, n: int, *, path: bool = True) -> Draws:
        """`n` draws; `path=False` skips the path part where it is not needed."""

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """log q(theta) for theta (..., D), (...) float64; -inf outside the support, never NaN."""

    def sample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` draws (n, D) and their log-densities (n,), both differentiable."""
        draws = self.draw(n, path=False)
        return draws.theta, draws.log_q

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of shape (*sample_shape, D), differentiable."""
        shape = torch.Size(sample_shape)
        # no family need know how to draw nothing
        theta = self.sample_and_log_prob(max(shape.numel(), 1))[0][: shape.numel()]
        return theta.reshape(*shape, *self.event_shape)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of shape (*sample_shape, D), no gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def trainable(self) -> list[Tensor]:
        """The tensors an optimiser steps."""
        return [p for p in self.parameters() if p.requires_grad]

    @abstractmethod
    def fresh(self) -> "Family":
        """A family of the same make, its weights as at the beginning; ValueError if it cannot be rebuilt."""


class Body(nn.Module, ABC):
    """A trainable distribution over R^d."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(violation("prior", "at least one free dimension", dim))
        self.dim = dim

    @abstractmethod
    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        """z (n, d) and log q(z) (n,), differentiable."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z) (N,) for z (N, d) of `dtype`."""

    @property
    def dtype(self) -> torch.dtype:
        """What `log_prob` expects z in."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def placed(self, loc: Tensor, scale_tril: Tensor) -> "Body":
        """This body moved by z = loc + L y; a Gaussian takes the place itself."""
        from visbi.families.affine import AffineBody

        return AffineBody(self, loc, scale_tril)

    def score_at_draws(self, z: Tensor) -> Tensor:
        """d log q / dz at z (N, d), without gradient."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(leaf).sum(), leaf)[0]

    def log_prob_by_choice(self, z: Tensor) -> Tensor | None:
        """log q(z) (N,) by those parameters alone along which `draw` with a path leaves z without a gradient.

        None here: z follows all of them.
        """
        return None

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """z, log q and its path part."""
        z, log_q = self.rsample_and_log_prob(n)
        if not (path and torch.is_grad_enabled()):
            return z, log_q, None
        return z, log_q, path_part(log_q, z, self.score_at_draws(z))


class LinkedFamily(Family):
    """A body on R^d carried to the prior's support.

    Args:
        body: the distribution over z.
        coords: the map between theta and z.
        build: makes a body like it with fresh weights.
    """

    def __init__(self, body: Body, coords: Coordinates, build: Any) -> None:
        super().__init__()
        self.body, self.coords, self.build = body, coords, build
        self.event_shape = torch.Size([coords.dim_theta])

    @property
    def support(self) -> Any:
        """The prior's support."""
        return self.coords.support

    def draw(self, n: int, *, path: bool = True) -> Draws:
        z, log_q, log_q_path = self.body.draw(n, path=path)
        theta, ladj = self.coords.to_theta(z)
        if log_q_path is None:
            return Draws(theta, log_q.double() - ladj)
        choice = self.body.log_prob_by_choice(z.detach())
        return Draws(theta, log_q.double() - ladj, log_q_path.double() - ladj, choice)

    def log_prob(self, theta: Tensor) -> Tensor:
        contained, safe = kept_inside(self.coords, theta)
        z, ladj = self.coords.to_z(safe)
        flat = z.reshape(-1, z.shape[-1])
        log_q = self.body.log_prob(flat.to(self.body.dtype)).double().reshape(z.shape[:-1]) - ladj
        return torch.where(contained, log_q, -torch.inf)

    def placed(self, loc: Tensor, scale_tril: Tensor) -> "LinkedFamily":
        """A family with the same weights, its body moved by z = loc + L y."""
        return LinkedFamily(self.body.placed(loc, scale_tril), self.coords, self.build)

    def fresh(self) -> "LinkedFamily":
        body = self.build(self.body.dim).to(self.coords.low.device)
        return LinkedFamily(body, self.coords, self.build)
