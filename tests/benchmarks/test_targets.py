"""Every target's draws, density and evidence agree."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta, Independent, MultivariateNormal, Normal, Uniform

from targets import NAMES, names_of, target
from targets_tuning import slcp_proposals
from visbi.core.random import seeded

LOG_2_PI = math.log(2 * math.pi)
JUMPING = {"steps_d3", "two_moons", "ball_d4"}  # the moons end at angles of +-90 degrees


def normal(loc: Tensor, scale: Tensor | float) -> Independent:
    return Independent(Normal(loc, torch.as_tensor(scale, dtype=torch.float64)), 1)


def score(name: str, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(target(name).potential(theta).sum(), theta)[0]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_support_and_seed(name: str) -> None:
    goal = target(name)
    theta = goal.sample(300, 3)
    assert goal.name == name and name in names_of(goal.group)
    assert theta.shape == (300, goal.dim) and theta.dtype == torch.float64
    assert goal.prior.event_shape == (goal.dim,)
    assert bool(goal.prior.support.check(theta.float()).all())  # type: ignore[union-attr]
    assert torch.equal(theta, goal.sample(300, 3)) and not torch.equal(theta, goal.sample(300, 4))
    for dtype in (torch.float32, torch.float64):
        value = goal.potential(theta.to(dtype), torch.zeros(1, 1))
        assert value.shape == (300,) and value.dtype == dtype and bool(value.isfinite().all())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in JUMPING])
def test_stein_identity(name: str) -> None:
    """E[d_i f + f d_i log p] = 0 for f that vanishes at infinity and at the edges of the support."""
    goal = target(name)
    theta = goal.sample(20_000, 5)
    gradient = score(name, theta)
    loc, scale = theta.median(0).values, theta.quantile(0.84, 0) - theta.quantile(0.16, 0)
    centre, width = loc.double(), scale.double()
    support = goal.prior.support
    low = getattr(getattr(support, "base_constraint", support), "lower_bound", None)
    high = getattr(getattr(support, "base_constraint", support), "upper_bound", None)
    point = theta.clone().requires_grad_()
    z = (point - centre) / width
    bump = torch.exp(-0.5 * z.square().mean(-1))
    if low is not None and high is not None:
        # 1 - exp(-distance to the edge): zero there, one within
        bump = bump * (1 - torch.exp(-(point - low) / width)).prod(-1)
        bump = bump * (1 - torch.exp(-(high - point) / width)).prod(-1)
    for wave in (torch.ones_like(bump), (z.sum(-1) / math.sqrt(goal.dim)).sin(), z[:, 0].tanh()):
        f = bump * wave
        slope = torch.autograd.grad(f.sum(), point, retain_graph=True)[0]
        terms = (slope + f[:, None].detach() * gradient) * width
        mean, error = terms.mean(0), terms.std(0) / math.sqrt(len(terms))
        assert bool((mean.abs() < 5 * error + 1e-9).all()), (mean / error).tolist()


def banana_part(theta: Tensor) -> Tensor:
    """A normalised density within the banana: narrower in a and b, the others written out."""
    a, b = theta[:, 0], theta[:, 1]
    ridge = Normal(-0.1 * (a.square() - 9), 0.25)
    return Normal(0.0, 2.5).log_prob(a) + ridge.log_prob(b) + Normal(0.0, 1.0).log_prob(theta[:, 2:]).sum(-1)


def funnel_part(theta: Tensor) -> Tensor:
    v = theta[:, :1]
    return Normal(0.0, 2.5).log_prob(v[:, 0]) + Normal(0.0, (v / 2).exp()).log_prob(theta[:, 1:]).sum(-1)


def middle_of_a_mode(name: str) -> Callable[[Tensor], Tensor]:
    """Uniform where four fifths of the first mode's draws are, entry by entry."""
    goal = target(name)
    assert goal.modes is not None
    theta = goal.sample(20_000, 9)
    theta = theta[goal.modes.assign(theta) == 0]
    return box_part(theta.quantile(0.1, 0), theta.quantile(0.9, 0))


def box_part(low: Tensor, high: Tensor) -> Callable[[Tensor], Tensor]:
    """Uniform on a box within the support."""
    volume = float((high - low).log().sum())
    return lambda theta: torch.where(((theta >= low) & (theta <= high)).all(-1), -volume, -math.inf)


def fitted(name: str, shrink: float) -> Callable[[Tensor], Tensor]:
    """A Gaussian from other draws, with its covariance shrunk."""
    theta = target(name).sample(20_000, 9)
    return MultivariateNormal(theta.mean(0), shrink * theta.T.cov()).log_prob


def lognormal_part(theta: Tensor) -> Tensor:
    log_theta = theta.log()
    scales = torch.logspace(-2, 2, 5, dtype=torch.float64).log()
    covariance = 0.36 * (0.5 + 0.5 * torch.eye(5, dtype=torch.float64))
    return MultivariateNormal(scales, covariance).log_prob(log_theta) - log_theta.sum(-1)


def beta_part(name: str) -> Callable[[Tensor], Tensor]:
    theta = target(name).sample(20_000, 9)
    mean, variance = theta.mean(0), theta.var(0)
    total = 1.2 * (mean * (1 - mean) / variance - 1)
    return Independent(Beta((mean * total).clamp_min(1.0), (1 - mean) * total), 1).log_prob


def schools_part(centred: bool) -> Callable[[Tensor], Tensor]:
    """Effects given (mu, log tau) by their own normals, (mu, log tau) within a small box."""
    from targets_heldout import SCHOOLS_SD, SCHOOLS_Y

    def log_q(theta: Tensor) -> Tensor:
        mu, log_tau, rest = theta[:, :1], theta[:, 1:2], theta[:, 2:]
        tau = log_tau.exp()
        precision = 1 / tau.square() + 1 / SCHOOLS_SD.square()
        mean = (mu / tau.square() + SCHOOLS_Y / SCHOOLS_SD.square()) / precision
        effects = Normal(mean, precision.rsqrt())
        value = effects.log_prob(rest if centred else mu + tau * rest).sum(-1)
        value = value if centred else value + 8 * log_tau[:, 0]
        return value + box_part(torch.tensor([0.0, 0.5]), torch.tensor([8.0, 2.5]))(theta[:, :2])

    return log_q


def thin_bananas_part(theta: Tensor) -> Tensor:
    """The same ridges, narrower."""
    a, b = theta[:, 0::2], theta[:, 1::2]
    return (Normal(1.0, 0.9).log_prob(a) + Normal(a.square(), 0.09).log_prob(b)).sum(-1)


def thin_chain_part(theta: Tensor) -> Tensor:
    """The same chain, narrower."""
    first = Normal(0.0, 0.9).log_prob(theta[:, 0])
    return first + Normal(theta[:, :-1].square(), 0.27).log_prob(theta[:, 1:]).sum(-1)


def thin_funnel_part(theta: Tensor) -> Tensor:
    """The mouth of a funnel, narrower."""
    s = theta[:, :1]
    return Normal(0.0, 0.8).log_prob(s[:, 0]) + Normal(0.0, 0.9 * s.exp()).log_prob(theta[:, 1:]).sum(-1)


def moon_part(theta: Tensor) -> Tensor:
    """Radius and angle of the crescent written out, on one side."""
    side = theta.sum(-1) > 0
    first, second = theta.sum(-1) / math.sqrt(2) - 0.25, (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
    radius = torch.hypot(first, second)
    density = Normal(0.1, 0.01).log_prob(radius) - radius.log() - math.log(math.pi)
    return torch.where(side & (first > 0), density, -math.inf)


def shell_part(theta: Tensor) -> Tensor:
    """Directions uniform, the radius normal."""
    dim = theta.shape[1]
    radius = theta.norm(dim=-1)
    surface = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)
    return Normal(2.0, 0.1).log_prob(radius) - surface - (dim - 1) * radius.log()


def mixture_part(name: str, shrink: float = 0.6) -> Callable[[Tensor], Tensor]:
    """A Gaussian in the place of the first mode, with its covariance shrunk."""
    goal = target(name)
    theta = goal.sample(40_000, 9)
    assert goal.modes is not None
    own = theta[goal.modes.assign(theta) == 0]
    return MultivariateNormal(own.mean(0), shrink * own.T.cov()).log_prob


def slcp_part() -> Callable[[Tensor], Tensor]:
    """A Gaussian at half of one mode's size, of the logs of the scales."""
    theta = target("slcp").sample(20_000, 9)
    own = theta[(theta[:, 2:4] > 0).all(-1) & (theta[:, 2:4] > 0.7).all(-1)]
    mean, covariance = own.mean(0), 0.15 * own.T.cov()
    return MultivariateNormal(mean, covariance).log_prob


PARTS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "two_moons": lambda: moon_part,
    "mixture4_d2": lambda: mixture_part("mixture4_d2"),
    "mixture4_d8": lambda: mixture_part("mixture4_d8"),
    "mixture40": lambda: mixture_part("mixture40"),
    "slcp": slcp_part,
    "banana_d10": lambda: banana_part,
    "funnel_d10": lambda: funnel_part,
    "gaussian_d50": lambda: fitted("gaussian_d50", 0.9),
    "student_pair_d5": lambda: mixture_part("student_pair_d5"),
    "edge_d10": lambda: beta_part("edge_d10"),
    "gaussian_d100": lambda: fitted("gaussian_d100", 0.95),
    "banana_d50": lambda: banana_part,
    "funnel_d30": lambda: funnel_part,
    "student_d10": lambda: normal(torch.ones(10, dtype=torch.float64), 0.9).log_prob,
    "needle_d2": lambda: mixture_part("needle_d2"),
    "needle_d5": lambda: mixture_part("needle_d5"),
    "shell_d2": lambda: shell_part,
    "shell_d8": lambda: shell_part,
    "rough_d4": lambda: fitted("rough_d4", 0.9),
    "steps_d3": lambda: box_part(torch.tensor([-0.5, -1.5, 0.0]), torch.tensor([1.5, 0.5, 1.5])),
    "corner_d6": lambda: beta_part("corner_d6"),
    "wide_gaussian_d5": lambda: fitted("wide_gaussian_d5", 0.9),
    "wide_lognormal_d5": lambda: lognormal_part,
    "schools_centred": lambda: schools_part(True),
    "schools_noncentred": lambda: schools_part(False),
    "growth_d4": lambda: fitted("growth_d4", 0.7),
    "stopping_d5": lambda: fitted("stopping_d5", 0.7),
    "narrow_d50": lambda: mixture_part("narrow_d50", 0.8),
    "narrow_d8": lambda: mixture_part("narrow_d8"),
    "three_d20": lambda: mixture_part("three_d20", 0.8),
    "turned_d60": lambda: mixture_part("turned_d60", 0.8),
    "eight_d20": lambda: mixture_part("eight_d20", 0.8),
    "wide_pair_d5": lambda: mixture_part("wide_pair_d5", 0.8),
    "box_pair_d8": lambda: middle_of_a_mode("box_pair_d8"),
    "cut_d10": lambda: middle_of_a_mode("cut_d10"),
    "four_d30": lambda: mixture_part("four_d30", 0.8),
    "spike_d3": lambda: mixture_part("spike_d3"),
    "ripples_d8": lambda: fitted("ripples_d8", 0.9),
    "ball_d4": lambda: box_part(torch.full((4,), 1.51), torch.full((4,), 2.49)),
    "bananas_d6": lambda: thin_bananas_part,
    "chain_d4": lambda: thin_chain_part,
    "neck_d6": lambda: thin_funnel_part,
    "guarded_d2": lambda: fitted("guarded_d2", 0.7),
    "cross_d4": lambda: normal(torch.zeros(4, dtype=torch.float64), 0.9).log_prob,
    "laplace_d10": lambda: normal(torch.zeros(10).double(), torch.logspace(-2, 1, 10).double()).log_prob,
    "shell_d20": lambda: shell_part,
    "corner_d20": lambda: beta_part("corner_d20"),
}


@pytest.mark.parametrize("name", NAMES)
def test_evidence(name: str) -> None:
    """E_p[q / exp(potential)] = 1 / Z for every normalised q within the support."""
    goal = target(name)
    assert goal.log_evidence is not None
    log_q = PARTS[name]()
    theta = goal.sample(40_000, 5)
    ratio = (log_q(theta) - goal.potential(theta) + goal.log_evidence).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.1, "the check is too weak to mean anything"
    assert abs(float(ratio.mean()) - 1) < 4 * error + 1e-6, (float(ratio.mean()), error)


@pytest.mark.parametrize("name", [name for name in NAMES if target(name).modes is not None])
def test_mode_masses(name: str) -> None:
    goal = target(name)
    assert goal.modes is not None
    weights = goal.modes.weights.double()
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    found = torch.bincount(goal.modes.assign(goal.sample(20_000, 6)), minlength=len(weights)) / 20_000
    assert bool(((found - weights).abs() < 5 * (weights * (1 - weights) / 20_000).sqrt() + 1e-3).all())


def test_slcp_evidence_by_the_share_of_proposals_accepted() -> None:
    with seeded(8):
        _, accepted = slcp_proposals(1_000_000)
    mode_of_s = torch.tensor([[0.8576, 0.3855], [0.3855, 0.2237]], dtype=torch.float64)
    # Z = 6^-5 (2 pi)^-3 / 4 times the integral of |S|^(-3/2) exp(-tr(S^-1 A) / 2) over the shape's box
    ceiling = -1.5 * float(torch.logdet(mode_of_s)) - 3
    share = float(accepted.double().mean())
    estimate = ceiling + math.log(share * 6**3) - 3 * LOG_2_PI - math.log(4) - 5 * math.log(6)
    assert estimate == pytest.approx(
        target("slcp").log_evidence, abs=4 / math.sqrt(int(accepted.sum())) + 1e-3
    )


def test_two_moons_by_quadrature() -> None:
    goal = target("two_moons")
    line = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    value = goal.potential(torch.cartesian_prod(line, line)).exp().view(2001, 2001)
    total = torch.trapezoid(torch.trapezoid(value, line), line)
    assert float(total.log()) == pytest.approx(goal.log_evidence, abs=1e-3)


def test_steps_have_no_gradient() -> None:
    theta = target("steps_d3").sample(100, 1)
    assert float(score("steps_d3", theta).abs().max()) == 0.0


def test_outside_the_support() -> None:
    for name in NAMES:
        goal = target(name)
        support = goal.prior.support
        if isinstance(getattr(support, "base_constraint", None), type(Uniform(0.0, 1.0).support)):
            assert float(goal.potential(goal.sample(1, 0) + 1e6)) == -math.inf
