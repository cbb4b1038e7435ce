r"""The rung for what no mixture of Gaussians fits: a coupling flow, by the reverse KL.

The flow starts as the Gaussian with the mean and covariance of what is known of the posterior and is
trained by

    -E_u[ell(f(u)) - log q(f(u))]  with q's own parameters held fixed in log q

(sticking the landing, Roeder, Wu, Duvenaud 2017), whose noise vanishes as q approaches the posterior. Where
the posterior has several modes, a share of forward KL on weighted points keeps all of them. A round is one
cycle of the learning rate (Smith, Topin 2019); after each one fresh draws say how good the flow is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.families.base import Body
from visbi.families.coupling import CouplingBody
from visbi.families.widened import WidenedBody
from visbi.fitting.mixture import defence
from visbi.fitting.target import Target

__all__ = ["FlowProposal", "flow_body", "train_flow", "widened"]

_PEAKS = (8e-3, 5e-3, 3e-3, 2e-3)
_CLIP = 10.0
_FEW_DIMENSIONS = 20


@dataclass(frozen=True)
class FlowProposal:
    """A body as a proposal."""

    body: Body

    def sample(self, n: int) -> Tensor:
        """(1, n, d)."""
        with torch.no_grad():
            return self.body.rsample_and_log_prob(n)[0].double()[None]

    def log_prob(self, z: Tensor) -> Tensor:
        """(1, N)."""
        with torch.no_grad():
            parts = [self.body.log_prob(piece.to(self.body.dtype)).double() for piece in z[0].split(16_384)]
        return torch.cat(parts)[None]

    def of_fits(self, which: Tensor) -> "FlowProposal":
        """This one: F = 1."""
        assert bool(which.all())
        return self


def train_flow(
    body: Body,
    target: Target,
    *,
    round_: int,
    steps: int,
    batch: int,
    points: tuple[Tensor, Tensor] | None = None,
    forward_share: float = 0.0,
) -> float:
    """One round of training, in place; the mean ELBO of its last fifth.

    Args:
        body: the flow.
        target: the target.
        round_: number of the round; later ones take smaller steps.
        steps: gradient steps.
        batch: draws in each.
        points: (N, d) and weights (N,) that stand for the posterior, for the forward KL.
        forward_share: of the loss that is forward KL.

    Raises:
        BudgetReached: the target's budget is used up; the flow is left as the last step made it.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(lambda theta: prior.log_prob(theta) + 3, coordinates(prior))
    >>> elbo = train_flow(flow_body(2), target, round_=0, steps=10, batch=16)
    >>> elbo < 3.001
    True
    """
    parameters = [p for p in body.parameters() if p.requires_grad]
    peak = _PEAKS[min(round_, len(_PEAKS) - 1)]
    optimizer = torch.optim.Adam(parameters, lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.2)
    elbos: list[float] = []
    for _ in range(steps):
        z, log_q, log_q_path = body.draw(batch, path=True)
        assert log_q_path is not None
        ell, gradient = target.value_and_gradient(z.detach().double())
        log_w = ell - log_q.detach().double()
        # a draw where the potential is hopeless says nothing that its neighbours do not, and would drown them
        usable = log_w > log_w.median() - 1e4
        through = (gradient.to(z.dtype) * z).sum(-1)
        loss = torch.where(usable, log_q_path - through, 0.0).mean()
        if points is not None and forward_share > 0:
            chosen = torch.multinomial(points[1], batch, replacement=True)
            loss = (1 - forward_share) * loss - forward_share * body.log_prob(
                points[0][chosen].to(body.dtype)
            ).mean()
        if not bool(torch.isfinite(loss)):
            schedule.step()
            continue
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        schedule.step()
        elbos.append(float(log_w.mean()))
    last = elbos[-max(1, len(elbos) // 5) :]
    return sum(last) / len(last) if last else -math.inf


def flow_body(dim: int) -> CouplingBody:
    """The flow that the ladder trains, for z in R^dim; networks are wider in many dimensions.

    >>> flow_body(3).rsample_and_log_prob(2)[0].shape
    torch.Size([2, 3])
    """
    return CouplingBody(dim, hidden_features=64 if dim <= _FEW_DIMENSIONS else 128)


def widened(body: CouplingBody) -> WidenedBody:
    """The trained flow with a tenth of its mass spread wider, as `mixture.defended` has it; shares weights.

    >>> widened(flow_body(2)).shares.tolist()
    [0.9, 0.08, 0.02]
    """
    scales, shares = zip(*defence(body.dim), strict=True)
    return WidenedBody(body, scales=(1.0, *scales), shares=(1.0 - sum(shares), *shares))
