"""Targets made to break the automatic fit: narrow modes beside wide ones, tails, ripples, tiny supports.

The last two are of real data under far too wide priors: one leads to its posterior along a narrow bend, one
is a regression on powers of a raw predictor.

They were looked at afterwards, and what could be mended was; where a fit still fails, the table shows it.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.distributions import HalfCauchy, Laplace, Normal, StudentT, Uniform

from target_parts import (
    Gaussian,
    Modes,
    Target,
    box,
    constants_of,
    inside,
    mixture_draws,
    mixture_log_prob,
    rotated_covariance,
    wide_normal,
)
from visbi.core.random import seeded
from visbi.priors import MultipleIndependent

__all__ = [
    "ball",
    "bananas",
    "box_pair",
    "chain",
    "corner",
    "cross",
    "cut",
    "eight",
    "four",
    "growth",
    "guarded",
    "laplace",
    "narrow",
    "neck",
    "ripples",
    "spike",
    "stopping",
    "three",
    "turned",
    "wide_pair",
]


def _mixture(name: str, parts: list[Gaussian], weights: list[float], prior_sd: float) -> Target:
    """A mixture whose parts hardly overlap."""
    shares = torch.tensor(weights, dtype=torch.float64)
    dim = len(parts[0].mean)

    def assign(theta: Tensor) -> Tensor:
        return torch.stack([part.log_prob(theta) for part in parts], -1).argmax(-1)

    return Target(
        name=name,
        dim=dim,
        prior=wide_normal(prior_sd, dim),
        potential=lambda theta, x=None: mixture_log_prob(theta, parts, shares),
        draw=partial(mixture_draws, parts=parts, weights=shares),
        log_evidence=0.0,
        group="hard",
        modes=Modes(assign, shares),
        constants=constants_of(parts, shares),
    )


def _round(centre: Tensor, sd: float) -> Gaussian:
    return Gaussian(centre, sd**2 * torch.eye(len(centre), dtype=torch.float64))


def narrow(dim: int, wide: float, small: float) -> Target:
    """Two round modes at (1, ..., 1) and (-1, ..., -1); far off all slopes lead to the wider one."""
    one = torch.ones(dim, dtype=torch.float64)
    parts = [_round(one, wide), _round(-one, small)]
    return _mixture(f"narrow_d{dim}", parts, [0.3, 0.7], prior_sd=5.0)


def turned() -> Target:
    """Three modes in sixty dimensions, about as wide as each other, each longer in directions of its own."""
    parts = []
    for k, sd in enumerate((0.5, 0.42, 0.46)):
        with seeded(20 + k):
            centre = 0.7 * torch.randn(60, dtype=torch.float64)
            spread = 0.6 + 0.8 * torch.rand(60, dtype=torch.float64)
        parts.append(Gaussian(centre, sd**2 * rotated_covariance(spread, k)))
    return _mixture("turned_d60", parts, [0.25, 0.35, 0.4], prior_sd=3.0)


def eight() -> Target:
    """Eight modes in twenty dimensions, of 4 to 20 % of the mass, about as wide as each other."""
    with seeded(30):
        centres = 6 * torch.rand(8, 20, dtype=torch.float64) - 3
        spread = 0.5 + torch.rand(8, 20, dtype=torch.float64)
        sds = 0.4 + 0.05 * torch.rand(8, dtype=torch.float64)
    parts = [
        Gaussian(centres[k], sds[k] ** 2 * rotated_covariance(spread[k], k)) for k in range(len(centres))
    ]
    return _mixture("eight_d20", parts, [0.2, 0.18, 0.16, 0.14, 0.12, 0.09, 0.07, 0.04], prior_sd=3.0)


def wide_pair() -> Target:
    """Two modes, one three times as wide as the other, under a prior a thousand times too wide."""
    with seeded(50):
        apart = torch.nn.functional.normalize(torch.randn(5, dtype=torch.float64), dim=0)
        middle = 30 * torch.randn(5, dtype=torch.float64)
    spread = torch.logspace(-1, 1, 5, dtype=torch.float64)
    parts = [
        Gaussian(middle + side * 4 * apart, sd**2 * rotated_covariance(spread, k))
        for k, (side, sd) in enumerate(((1, 0.5), (-1, 1.5)))
    ]
    return _mixture("wide_pair_d5", parts, [0.5, 0.5], prior_sd=1000.0)


def three() -> Target:
    """Three modes in twenty dimensions, each stretched in directions of its own, a hundred to one."""
    with seeded(5):
        centres = 9 / math.sqrt(20) * torch.randn(3, 20, dtype=torch.float64)
    variances = torch.logspace(-2, 0, 20, dtype=torch.float64)
    parts = [Gaussian(centre, rotated_covariance(variances, k)) for k, centre in enumerate(centres)]
    return _mixture("three_d20", parts, [0.2, 0.3, 0.5], prior_sd=5.0)


def four() -> Target:
    """Four round modes in thirty dimensions; the narrowest has (.3 / .8)^30 of the widest one's volume."""
    with seeded(12):
        centres = 2 * torch.randn(4, 30, dtype=torch.float64)
    parts = [_round(centre, sd) for centre, sd in zip(centres, (0.5, 0.5, 0.8, 0.3), strict=True)]
    return _mixture("four_d30", parts, [0.1, 0.3, 0.4, 0.2], prior_sd=10.0)


def spike() -> Target:
    """A spike of half of the mass inside a slab a hundred times as wide."""
    zero = torch.zeros(3, dtype=torch.float64)
    return _mixture("spike_d3", [_round(zero, 5.0), _round(zero + 1, 0.05)], [0.5, 0.5], prior_sd=10.0)


def ripples() -> Target:
    """A standard normal in eight dimensions with ripples of two nats: five in each, 5^8 in all."""
    line = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    each = (torch.cos(6 * line) - 0.5 * line.square()).exp()

    def draw(n: int) -> Tensor:
        which = torch.multinomial(each, 8 * n, replacement=True)
        return (line[which] + 1e-3 * (torch.rand(8 * n, dtype=torch.float64) - 0.5)).reshape(n, 8)

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        return (torch.cos(6 * theta) - 0.5 * theta.square()).sum(-1)

    evidence = 8 * math.log(float(torch.trapezoid(each, line)))
    return Target("ripples_d8", 8, wide_normal(3.0, 8), log_prob, draw, evidence, "hard")


def _in_a_box(name: str, centres: Tensor, sds: Tensor, weights: list[float]) -> Target:
    """Round Gaussians, cut off by the sides of a unit box; each has so much of the mass."""
    dim, sd, shares = centres.shape[1], sds[:, None], torch.tensor(weights, dtype=torch.float64)
    below = torch.special.ndtr(-centres / sd)
    within = torch.special.ndtr((1 - centres) / sd) - below
    level = shares.log() - (sd * within).log().sum(1) - 0.5 * dim * math.log(2 * math.pi)
    low, high = torch.zeros(dim), torch.ones(dim)

    def each(theta: Tensor) -> Tensor:
        away = (theta[:, None] - centres.to(theta)) / sd.to(theta)
        return level.to(theta) - 0.5 * away.square().sum(-1)

    def draw(n: int) -> Tensor:
        part = torch.multinomial(shares, n, replacement=True)
        u = torch.rand(n, dim, dtype=torch.float64)
        return centres[part] + sd[part] * torch.special.ndtri(below[part] + u * within[part])

    return Target(
        name=name,
        dim=dim,
        prior=box(low, high),
        potential=inside(lambda theta: torch.logsumexp(each(theta), 1), low, high),
        draw=draw,
        log_evidence=0.0,
        group="hard",
        modes=Modes(lambda theta: each(theta).argmax(1), shares),
    )


def box_pair() -> Target:
    """Two modes in a box in eight dimensions, one a quarter as wide as the other."""
    with seeded(60):
        centres = 0.25 + 0.5 * torch.rand(2, 8, dtype=torch.float64)
    return _in_a_box("box_pair_d8", centres, torch.tensor([0.08, 0.02], dtype=torch.float64), [0.5, 0.5])


def cut() -> Target:
    """Ten narrow modes in a box in ten dimensions, each cut by a side."""
    with seeded(61):
        centres = 0.2 + 0.6 * torch.rand(10, 10, dtype=torch.float64)
        cuts = torch.rand(10, 10).argsort(1)[:, :1]
        sides = torch.randint(2, (10, 1)) + 0.06 * torch.rand(10, 1, dtype=torch.float64) - 0.03
        sds = 0.03 + 0.02 * torch.rand(10, dtype=torch.float64)
    weights = [0.18, 0.16, 0.14, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04]
    return _in_a_box("cut_d10", centres.scatter(1, cuts, sides), sds, weights)


def ball() -> Target:
    """A likelihood that is one in a ball and zero elsewhere: 5e-4 of a box in four dimensions."""
    low, high = torch.full((4,), -5.0), torch.full((4,), 5.0)

    def log_prob(theta: Tensor) -> Tensor:
        return torch.where((theta - 2).norm(dim=-1) < 1, 0.0, -math.inf).to(theta)

    def draw(n: int) -> Tensor:
        u = torch.randn(n, 4, dtype=torch.float64)
        return (
            2 + (1 - 1e-6) * u / u.norm(dim=-1, keepdim=True) * torch.rand(n, 1, dtype=torch.float64) ** 0.25
        )

    evidence = math.log(math.pi**2 / 2)
    return Target("ball_d4", 4, box(low, high), inside(log_prob, low, high), draw, evidence, "hard")


def bananas() -> Target:
    """Three thin bananas, b ~ N(a^2, .1^2) with a ~ N(1, 1): as Rosenbrock's."""
    width = 0.1

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        a, b = theta[:, 0::2], theta[:, 1::2]
        across = (b - a.square()) / width
        return (-0.5 * ((a - 1).square() + across.square()) - math.log(2 * math.pi * width)).sum(-1)

    def draw(n: int) -> Tensor:
        a = 1 + torch.randn(n, 3, dtype=torch.float64)
        return torch.stack([a, a.square() + width * torch.randn_like(a)], -1).reshape(n, 6)

    return Target("bananas_d6", 6, wide_normal(10.0, 6), log_prob, draw, 0.0, "hard")


def chain() -> Target:
    """Four entries, each N(the square of the one before, .3^2): a thin tail a thousand widths long."""
    width = 0.3

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        exact = theta.double()  # the last entry in the thousands, its width .3
        first = Normal(torch.tensor(0.0).to(exact), 1.0).log_prob(exact[:, 0])
        return (first + Normal(exact[:, :-1].square(), width).log_prob(exact[:, 1:]).sum(-1)).to(theta)

    def draw(n: int) -> Tensor:
        entries = [torch.randn(n, dtype=torch.float64)]
        for _ in range(3):
            entries.append(entries[-1].square() + width * torch.randn(n, dtype=torch.float64))
        return torch.stack(entries, -1)

    prior = wide_normal(torch.tensor([3.0, 5.0, 30.0, 1000.0]), 4)
    return Target("chain_d4", 4, prior, log_prob, draw, 0.0, "hard")


def neck() -> Target:
    """A funnel with a second mode in its neck: a tenth of the mass, e^-5 as wide as the mouth."""
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64)
    first = Normal(torch.tensor([0.0, -5.0]).double(), torch.tensor([1.0, 0.5]).double())

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        each = first.log_prob(theta[:, :1].double()) + shares.log()
        others = -0.5 * (theta[:, 1:] * (-theta[:, :1]).exp()).square() - theta[:, :1]
        return each.logsumexp(-1).to(theta) + (others - 0.5 * math.log(2 * math.pi)).sum(-1)

    def draw(n: int) -> Tensor:
        which = torch.multinomial(shares, n, replacement=True)
        s = first.sample((n,)).gather(1, which[:, None])
        return torch.cat([s, s.exp() * torch.randn(n, 5, dtype=torch.float64)], 1)

    modes = Modes(lambda theta: (theta[:, 0] < -3.5).long(), _shares_below(first, shares, -3.5))
    return Target("neck_d6", 6, wide_normal(6.0, 6), log_prob, draw, 0.0, "hard", modes=modes)


def _shares_below(parts: Normal, shares: Tensor, at: float) -> Tensor:
    """Mass of a mixture of normals above and below a point."""
    below = (shares * parts.cdf(torch.tensor(at).double())).sum()
    return torch.stack([1 - below, below])


def cross() -> Target:
    """Independent t with two degrees of freedom: tails along the axes, and none between."""
    body = StudentT(torch.tensor(2.0, dtype=torch.float64))

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        return StudentT(torch.tensor(2.0).to(theta)).log_prob(theta).sum(-1)

    return Target("cross_d4", 4, wide_normal(10.0, 4), log_prob, lambda n: body.sample((n, 4)), 0.0, "hard")


def laplace() -> Target:
    """Independent double exponentials, scales from .01 to 10."""
    scales = torch.logspace(-2, 1, 10, dtype=torch.float64)
    body = Laplace(torch.zeros_like(scales), scales)

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        return -(theta.abs() / scales.to(theta) + (2 * scales.to(theta)).log()).sum(-1)

    return Target(
        "laplace_d10", 10, wide_normal(50.0, 10), log_prob, lambda n: body.sample((n,)), 0.0, "hard"
    )


def corner() -> Target:
    """Exponentials in the corner of a box in twenty dimensions, rates from 3 to 300."""
    rates = torch.logspace(0.5, 2.5, 20, dtype=torch.float64)
    low, high = torch.zeros(20), torch.ones(20)
    mass = -torch.expm1(-rates)

    def draw(n: int) -> Tensor:
        return -torch.log1p(-mass * torch.rand(n, 20, dtype=torch.float64)) / rates

    def log_prob(theta: Tensor) -> Tensor:
        return -(theta * rates.to(theta)).sum(-1)

    evidence = float((mass / rates).log().sum())
    return Target("corner_d20", 20, box(low, high), inside(log_prob, low, high), draw, evidence, "hard")


# age in years and length in metres
DUGONGS = """
    1.0 1.80   1.5 1.85   1.5 1.87   1.5 1.77   2.5 2.02   4.0 2.27   5.0 2.15   5.0 2.26   7.0 2.47
    8.0 2.19   8.5 2.26   9.0 2.40   9.5 2.39   9.5 2.41  10.0 2.50  12.0 2.32  12.0 2.32  13.0 2.43
   13.0 2.47  14.5 2.56  15.5 2.65  15.5 2.47  16.5 2.64  17.0 2.56  22.5 2.70  29.0 2.72  31.5 2.57
"""


def growth() -> Target:
    """Growth of 27 dugongs (Ratkowsky 1983), y ~ N(a - b c^x, s^2), priors up to 1e4 times too wide.

    a, b ~ N(0, 1000^2), c ~ U(1/2, 1), s ~ half-Cauchy(10). Near c = 1 the curve is a straight line for any
    large a and b of the right difference. Given c and s the data are Gaussian and so are a and b; c and log s
    are drawn from a grid.
    """
    age, length = (
        torch.tensor([float(word) for word in DUGONGS.split()], dtype=torch.float64).reshape(-1, 2).T
    )
    wide = 1000.0
    prior = MultipleIndependent(
        [
            Normal(torch.zeros(1), torch.full((1,), wide)),
            Normal(torch.zeros(1), torch.full((1,), wide)),
            Uniform(torch.full((1,), 0.5), torch.ones(1)),
            HalfCauchy(torch.full((1,), 10.0)),
        ]
    )

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        a, b, c, s = (column[:, None] for column in theta.unbind(-1))
        away = (length.to(theta) - a + b * c ** age.to(theta)) / s
        likelihood = -0.5 * away.square() - s.log() - 0.5 * math.log(2 * math.pi)
        return prior.log_prob(theta).to(theta) + likelihood.sum(-1)

    def design(c: Tensor) -> Tensor:
        powers = -(c[:, None] ** age)
        return torch.stack([torch.ones_like(powers), powers], -1)

    cs, log_ss = torch.linspace(0.6, 1.0, 1002)[:-1].double(), torch.linspace(-3.5, -1.0, 801).double()
    values, vectors = torch.linalg.eigh(design(cs).mT @ design(cs))
    values = values.clamp_min(0.0)
    along = (vectors.mT @ (design(cs).mT @ length)[..., None])[..., 0]
    variance = (2 * log_ss).exp()[:, None]  # (S, 1), against (C, 1, 2)
    square = length.square().sum() - (along[:, None].square() / (values[:, None] + variance / wide**2)).sum(
        -1
    )
    log_det = len(age) * 2 * log_ss + torch.log1p(wide**2 * values[:, None] / variance).sum(-1)
    log_p = -0.5 * (len(age) * math.log(2 * math.pi) + log_det + square / variance[:, 0])
    log_p = log_p + math.log(2.0) + HalfCauchy(10.0).log_prob(log_ss.exp()) + log_ss
    cell = (cs[1] - cs[0], log_ss[1] - log_ss[0])
    edges = torch.softmax(log_p.flatten(), 0).cumsum(0)

    def draw(n: int) -> Tensor:
        index = torch.searchsorted(edges, edges[-1] * torch.rand(n, dtype=torch.float64)).clamp_max(
            len(edges) - 1
        )
        jitter = torch.rand(2, n, dtype=torch.float64) - 0.5
        c = cs[index // len(log_ss)] + cell[0] * jitter[0]
        s = (log_ss[index % len(log_ss)] + cell[1] * jitter[1]).exp()
        h = design(c)
        precision = h.mT @ h + (s / wide).square()[:, None, None] * torch.eye(2)
        mean = torch.linalg.solve(precision, h.mT @ length)
        noise = torch.linalg.solve(
            torch.linalg.cholesky(precision).mT, torch.randn(n, 2, 1, dtype=torch.float64)
        )
        return torch.cat([mean + s[:, None] * noise[..., 0], c[:, None], s[:, None]], -1)

    evidence = float(torch.logsumexp(log_p.flatten(), 0) + cell[0].log() + cell[1].log())
    return Target("growth_d4", 4, prior, log_prob, draw, evidence, "hard")


# speed in miles an hour and distance in feet
CARS = """
     4 2    4 10   7 4    7 22   8 16   9 10  10 18  10 26  10 34  11 17  11 28  12 14  12 20  12 24  12 28
    13 26  13 34  13 34  13 46  14 26  14 36  14 60  14 80  15 20  15 26  15 54  16 32  16 40  17 32  17 40
    17 50  18 42  18 56  18 76  18 84  19 36  19 46  19 68  20 32  20 48  20 52  20 56  20 64  22 66  23 54
    24 70  24 92  24 93  24 120  25 85
"""


def guarded() -> Target:
    """Poisson counts at raw incomes, 1e4 to 9e4, priors N(0, 100^2), the log-rate clamped to [-200, 80].

    The clamp, against overflow, makes plateaus of all but 1e-6 of the prior; on half of it the potential is
    finite, flat, and 13,600 nats below what is to be found.
    """
    income = torch.linspace(1e4, 9e4, 40, dtype=torch.float64)
    with seeded(76):
        count = torch.poisson((-2 + 4e-5 * income).exp())
    prior = wide_normal(100.0, 2)
    constant = float(torch.lgamma(count + 1).sum())

    def log_prob(theta: Tensor, x: Tensor | None = None) -> Tensor:
        eta = (theta[:, :1].double() + theta[:, 1:].double() * income).clamp(-200.0, 80.0)
        return ((count * eta - eta.exp()).sum(-1) - constant + prior.log_prob(theta.double())).to(theta)

    centre, sd = torch.tensor([-2.0, 4e-5]).double(), torch.tensor([0.5, 7e-6]).double()
    side = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    width = float(side[1] - side[0])
    cells = centre + sd * torch.cartesian_prod(side, side)
    log_mass = log_prob(cells)

    def draw(n: int) -> Tensor:
        chosen = cells[torch.multinomial(torch.softmax(log_mass, 0), n, replacement=True)]
        return chosen + sd * width * (torch.rand(n, 2, dtype=torch.float64) - 0.5)

    evidence = float(log_mass.logsumexp(0)) + 2 * math.log(width) + float(sd.log().sum())
    return Target("guarded_d2", 2, prior, log_prob, draw, evidence, "hard")


def stopping() -> Target:
    """Stopping distances of 50 cars (Ezekiel 1930), a cubic in raw speed; U(-1e4, 1e4)^4 and U(0, 1e3) for s.

    With flat priors s^2 is an inverse gamma and coefficients given s are Gaussian, of scales from 30 to .01
    and correlations of up to -.99.
    """
    speed, distance = (
        torch.tensor([float(word) for word in CARS.split()], dtype=torch.float64).reshape(-1, 2).T
    )
    design = speed[:, None] ** torch.arange(4)
    gram = design.T @ design
    centre = torch.linalg.lstsq(design, distance[:, None], driver="gelsd").solution[:, 0]
    rest = (distance - design @ centre).square().sum()
    low, high = torch.tensor([-1e4] * 4 + [0.0]), torch.tensor([1e4] * 4 + [1e3])
    freedom = len(speed) - 4

    def log_prob(theta: Tensor) -> Tensor:
        mean, s = theta[:, :4].double() @ design.T, theta[:, 4:].double()
        each = -0.5 * ((distance - mean) / s).square() - s.log() - 0.5 * math.log(2 * math.pi)
        return (each.sum(-1) - (high - low).double().log().sum()).to(theta)

    def draw(n: int) -> Tensor:
        shape = torch.full((n, 1), 0.5 * (freedom - 1), dtype=torch.float64)
        s = (torch.distributions.Gamma(shape, 0.5 * rest).sample()).rsqrt()
        off = torch.linalg.solve_triangular(
            torch.linalg.cholesky(gram).T, torch.randn(4, n, dtype=torch.float64), upper=True
        )
        return torch.cat([centre + s * off.T, s], 1)

    evidence = (
        -0.5 * freedom * math.log(2 * math.pi)
        - 0.5 * float(torch.logdet(gram))
        + math.log(0.5)
        - 0.5 * (freedom - 1) * math.log(0.5 * float(rest))
        + math.lgamma(0.5 * (freedom - 1))
        - float((high - low).double().log().sum())
    )
    return Target("stopping_d5", 5, box(low, high), inside(log_prob, low, high), draw, evidence, "hard")
