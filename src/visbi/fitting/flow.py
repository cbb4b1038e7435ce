r"""The rung for what no mixture of Gaussians fits: coupling flows, by the reverse KL.

A flow starts as the Gaussian with the mean and covariance of what is known of the posterior and is trained by

    -E_u[ell(f(u)) - log q(f(u))]  with q's own parameters held fixed in log q

(sticking the landing, Roeder, Wu, Duvenaud 2017), whose noise vanishes as q approaches the posterior. Where
the posterior has several modes, a share of forward KL on weighted points keeps all of them. A round is one
cycle of the learning rate (Smith, Topin 2019); after each one fresh draws say how good the flow is.

F flows train at once, each with a loss, a clipped gradient and an optimiser's state of its own: a flow whose
step is not finite skips it, and the others go on.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visbi.families.coupling import CouplingBody
from visbi.families.coupling_stack import CouplingStack, Gradient
from visbi.families.widened import WidenedBody, log_wide_normal, wide_score
from visbi.fitting.mixture import defence
from visbi.fitting.target import Target

__all__ = ["FlowProposal", "flow_body", "show_points", "train_flow", "train_flows", "widened"]

_PEAKS = (8e-3, 5e-3, 3e-3, 2e-3)
_RISE = 0.2  # share of a round in which the learning rate rises
_FIRST, _LAST = 1 / 25, 1 / 25e4  # of the peak, at both ends
_MOMENTA = 0.95, 0.85  # at both ends, and at the peak
_SQUARES = 0.999
_CLIP = 10.0
_HOPELESS = 1e4
_FEW_DIMENSIONS = 20
_LAYERS, _SPLINES = 6, 4
_AT_ONCE = 2048  # points, of all flows, whose scores are taken in one pass


@dataclass(frozen=True)
class FlowProposal:
    """F flows whose noise is a mixture of centred normals (see `families.widened`), as proposals.

    Attributes:
        flows: which must not change afterwards.
        scales, shares: (B,), standard deviations of the noise and their shares.

    >>> q = FlowProposal.of(widened(flow_body(2)))
    >>> q.log_prob(q.sample(3)).shape
    torch.Size([1, 3])
    """

    flows: CouplingStack
    scales: Tensor
    shares: Tensor

    @staticmethod
    def of(body: CouplingBody | WidenedBody) -> "FlowProposal":
        """One body as a proposal, copied."""
        if isinstance(body, WidenedBody):
            return FlowProposal(CouplingStack([body.inner]), body.scales, body.shares)
        one = torch.ones(1, dtype=torch.float64, device=body.place.raw_loc.device)
        return FlowProposal(CouplingStack([body]), one, one)

    @staticmethod
    def widened(flows: CouplingStack) -> "FlowProposal":
        """Copies of flows with a tenth of their mass spread wider, as `mixture.defended` has it."""
        scales, shares = torch.tensor(_wider(flows.dim)).to(flows.place)
        return FlowProposal(flows.only(range(len(flows))), scales, shares)

    @property
    def body(self) -> WidenedBody:
        """The only one of these (F = 1), with weights of its own."""
        assert len(self.flows) == 1
        return WidenedBody(self.flows.one(0), scales=self.scales.tolist(), shares=self.shares.tolist())

    def sample(self, n: int) -> Tensor:
        """(F, n, d)."""
        return self.draw(n)[0]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(F, n, d) and log q there, (F, n), from the noise that they were made of.

        A draw that a funnel has thrown a million widths out does not lead back to its noise in float32: by
        `log_prob` its weight may be e^1000 times that of all others.
        """
        like = {"dtype": self.scales.dtype, "device": self.scales.device}
        which = torch.bucketize(torch.rand(len(self.flows), n, **like), self.shares.cumsum(0)[:-1])
        u = self.scales[which][..., None] * torch.randn(len(self.flows), n, self.flows.dim, **like)
        z, log_det = self.flows.push(u)
        return z, _clean(log_wide_normal(u, self.scales, self.shares) - log_det)

    def log_prob(self, z: Tensor) -> Tensor:
        """(F, N) for z (F, N, d)."""
        u, log_det = self.flows.pull(z)
        return _clean(log_wide_normal(u, self.scales, self.shares) - log_det)

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q (F, N) and its gradient (F, N, d); zero where log q is not finite."""
        parts = []
        for piece in z.split(max(1, _AT_ONCE // len(z)), 1):
            u, log_det, tape = self.flows.pull_and_tape(piece)
            log_q = _clean(log_wide_normal(u, self.scales, self.shares) - log_det)
            score = self.flows.carry(tape, wide_score(u, self.scales, self.shares))
            good = log_q.isfinite()[..., None] & score.isfinite()
            parts.append((log_q, torch.where(good, score, 0.0)))
        log_q, score = zip(*parts, strict=True)
        return torch.cat(log_q, 1), torch.cat(score, 1)

    def of_fits(self, which: Tensor) -> "FlowProposal":
        """Those `which`, (F,) bool."""
        return self if bool(which.all()) else FlowProposal(self.flows.only(which), self.scales, self.shares)


def _clean(log_q: Tensor) -> Tensor:
    return torch.where(log_q.isnan(), -torch.inf, log_q)


def train_flows(
    flows: CouplingStack,
    target: Target,
    *,
    round_: int,
    steps: int,
    batch: int,
    points: tuple[Tensor, Tensor] | None = None,
    forward_share: float | Tensor = 0.0,
) -> Tensor:
    """One round of training of F flows, in place; the mean ELBO of each one's last fifth, (F,).

    Args:
        flows: F of them.
        target: of z (F, N, d).
        round_: number of the round; later ones take smaller steps.
        steps: gradient steps.
        batch: draws of each flow in each.
        points: (F, M, d) and weights (F, M) that stand for the posteriors, for the forward KL.
        forward_share: of the loss that is forward KL, for all or for each (F,).

    Raises:
        BudgetReached: the target's budget is used up; the flows are left as the last step made them.

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(lambda theta: prior.log_prob(theta) + 3, coordinates(prior))
    >>> flows = CouplingStack([flow_body(2), flow_body(2)])
    >>> train_flows(flows, target, round_=0, steps=10, batch=16) < 3.001
    tensor([True, True])
    """
    share = torch.as_tensor(forward_share, dtype=torch.float64, device=flows.place.device).expand(len(flows))
    forward = points is not None and bool((share > 0).any())
    adam = _Adam.of(flows)
    elbos = flows.place.new_full((steps, len(flows)), math.nan)
    for step in range(steps):
        z, log_q, tape = flows.draw(batch)
        ell, by_z = target.value_and_gradient(z)
        log_w = ell - log_q
        # a draw where the potential is hopeless says nothing that its neighbours do not, and would drown them
        usable = log_w > log_w.median(1, keepdim=True).values - _HOPELESS
        gradient = flows.path_gradient(tape, by_z, usable)
        if forward and points is not None:
            chosen = torch.multinomial(points[1], batch, replacement=True)
            shown = points[0].gather(1, chosen[..., None].expand(-1, -1, flows.dim))
            gradient = gradient.mixed(flows.likelihood_gradient(shown)[1], share)
        done = adam.step(flows, gradient, *_cycle(step, steps, _PEAKS[min(round_, len(_PEAKS) - 1)]))
        elbos[step] = torch.where(done, log_w.mean(1), math.nan)
    return _last_fifth(elbos)


def show_points(flows: CouplingStack, points: tuple[Tensor, Tensor], *, steps: int, batch: int) -> None:
    """A round of F flows by the forward KL to weighted points alone, in place; it evaluates no potential.

    Args:
        flows: F of them.
        points: (F, M, d) and weights (F, M) that stand for the posteriors.
        steps: gradient steps.
        batch: points in each, drawn by their weights.

    >>> flows, z = CouplingStack([flow_body(2)]), 0.1 * torch.randn(1, 500, 2).double()
    >>> show_points(flows, (z, torch.full((1, 500), 1 / 500).double()), steps=50, batch=64)
    >>> bool((flows.log_prob(z).mean() > -1.0))
    True
    """
    adam = _Adam.of(flows)
    for step in range(steps):
        chosen = torch.multinomial(points[1], batch, replacement=True)
        shown = points[0].gather(1, chosen[..., None].expand(-1, -1, flows.dim))
        adam.step(flows, flows.likelihood_gradient(shown)[1], *_cycle(step, steps, _PEAKS[0]))


def train_flow(
    body: CouplingBody,
    target: Target,
    *,
    round_: int,
    steps: int,
    batch: int,
    points: tuple[Tensor, Tensor] | None = None,
    forward_share: float = 0.0,
) -> float:
    """`train_flows` for one flow, whose weights change in place; points are (N, d) and (N,).

    >>> from torch.distributions import Independent, Normal
    >>> from visbi.priors import coordinates
    >>> prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    >>> target = Target(lambda theta: prior.log_prob(theta) + 3, coordinates(prior))
    >>> train_flow(flow_body(2), target, round_=0, steps=10, batch=16) < 3.001
    True
    """
    flows = CouplingStack([body])
    many = None if points is None else (points[0][None], points[1][None])
    try:
        elbo = train_flows(
            flows,
            target,
            round_=round_,
            steps=steps,
            batch=batch,
            points=many,
            forward_share=forward_share,
        )
    finally:
        flows.write(0, body)
    return float(elbo[0])


@dataclass
class _Adam:
    """Adam (Kingma, Ba 2015) for each flow by itself, its gradient clipped to a norm of `_CLIP`."""

    layers: tuple[Tensor, Tensor]  # means of gradients and of their squares
    place: tuple[Tensor, Tensor]
    weights: Tensor  # (2, F), products of the momenta so far

    @staticmethod
    def of(flows: CouplingStack) -> "_Adam":
        layers, place = flows.layers, flows.place
        return _Adam(
            (torch.zeros_like(layers), torch.zeros_like(layers)),
            (torch.zeros_like(place), torch.zeros_like(place)),
            torch.ones(2, len(flows), dtype=place.dtype, device=place.device),
        )

    def step(self, flows: CouplingStack, gradient: Gradient, rate: float, momentum: float) -> Tensor:
        """Which flows took it, (F,): those with a finite gradient."""
        norm = gradient.norm()
        good = norm.isfinite()
        clip = torch.where(good, (_CLIP / (norm + 1e-6)).clamp_max(1.0), 0.0)[:, None]
        self.weights *= torch.where(good, self.weights.new_tensor([[momentum], [_SQUARES]]), 1.0)
        first, second = (1.0 - self.weights).clamp_min(1e-12)
        take = (torch.where(good, rate * second.sqrt(), 0.0) / first)[:, None]
        keep = None if bool(good.all()) else good[:, None]
        layers = flows.layers, gradient.layers, *self.layers
        place = flows.place, gradient.place, *self.place
        for at, by, mean, square in (layers, place):
            by.mul_(clip.to(by))
            new: float | Tensor = 1.0 - momentum
            old: float | Tensor = _SQUARES
            if keep is not None:
                by = torch.where(keep, by, 0.0)
                new, old = torch.where(keep, new, 0.0).to(by), torch.where(keep, old, 1.0).to(by)
            mean.lerp_(by, new)
            square.mul_(old).addcmul_(by, by, value=1.0 - _SQUARES)
            at.addcdiv_(mean, square.sqrt().add_(1e-8).div_(take.to(by)), value=-1.0)
        return good


def _cycle(step: int, steps: int, peak: float) -> tuple[float, float]:
    """Learning rate and momentum of a step: up and down along cosines.

    >>> _cycle(0, 100, 1.0), _cycle(19, 100, 1.0), _cycle(99, 100, 1.0)
    ((0.04, 0.95), (1.0, 0.85), (4e-06, 0.95))
    """
    top = max(_RISE * steps - 1, 0.5)
    rising = step < top
    along = step / top if rising else (step - top) / max(steps - 1 - top, 1e-12)
    high = 0.5 - 0.5 * math.cos(math.pi * along) if rising else 0.5 + 0.5 * math.cos(math.pi * along)
    low = _FIRST if rising else _LAST
    return peak * (low + (1 - low) * high), _MOMENTA[0] + (_MOMENTA[1] - _MOMENTA[0]) * high


def _last_fifth(elbos: Tensor) -> Tensor:
    """(F,) means over the last fifth of what is not NaN in (S, F); -inf where nothing is."""
    there = ~elbos.isnan()
    number = there.sum(0)
    last = there & (there.long().cumsum(0) > number - (number // 5).clamp_min(1))
    mean = torch.where(last, elbos, 0.0).sum(0) / last.sum(0)
    return torch.where(number > 0, mean, -torch.inf)


def flow_body(dim: int, *, spline: bool = False) -> CouplingBody:
    """A flow that the ladder trains, for z in R^dim; networks are wider in many dimensions.

    Args:
        dim: d.
        spline: whether the layers are splines, for several modes.

    >>> flow_body(3).rsample_and_log_prob(2)[0].shape
    torch.Size([2, 3])
    """
    width = 64 if dim <= _FEW_DIMENSIONS else 128
    return CouplingBody(dim, _SPLINES if spline else _LAYERS, width, spline)


def widened(body: CouplingBody) -> WidenedBody:
    """The trained flow with a tenth of its mass spread wider, as `mixture.defended` has it; shares weights.

    >>> widened(flow_body(2)).shares.tolist()
    [0.9, 0.08, 0.02]
    """
    scales, shares = _wider(body.dim)
    return WidenedBody(body, scales=scales, shares=shares)


def _wider(dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    scales, shares = zip(*defence(dim), strict=True)
    return (1.0, *scales), (1.0 - sum(shares), *shares)
