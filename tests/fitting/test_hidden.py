"""What a closely fitted q leaves unexplained, and the narrow modes to which that leads."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from mixture_cases import of_mixture
from visbi.families.gaussians import Mixture
from visbi.fitting.hidden import with_hidden
from visbi.fitting.ladder import climb
from visbi.fitting.target import Target
from visbi.priors import coordinates

D = 6


def mixture(weights: list[float], sides: list[float], sds: list[float], dim: int = D) -> Mixture:
    """Round Gaussians at multiples of (1, ..., 1)."""
    loc = torch.tensor(sides, dtype=torch.float64)[None, :, None] * torch.ones(dim).double()
    cov = torch.tensor(sds, dtype=torch.float64).square()[None, :, None, None] * torch.eye(dim).double()
    return Mixture.of(torch.tensor(weights, dtype=torch.float64)[None].log(), loc, cov)


def found_from(true: Mixture, q: Mixture, z: Tensor, log_z: float = 0.0) -> Mixture:
    target = of_mixture(true, log_z)
    found = with_hidden(target, q, z, target.value(z), by=math.log(20))
    assert found is not None
    return found


def test_a_trace_of_one_in_a_million_leads_to_the_mode():
    """No point is so near the narrow mode that ell itself says so: there it is e^-10 of the wide one."""
    true, wide = mixture([0.4, 0.6], [-0.3, 0.3], [0.3, 0.1]), mixture([1.0], [-0.3], [0.3])
    torch.manual_seed(0)
    z = torch.randn(1, 20_000, D).double()
    r = of_mixture(true).value(z) - wide.log_prob(z) - math.log(0.4)
    z = z[(r < -math.log1p(-1e-5)) & (r > 1e-6)][None]  # the trace is between 1e-6 and 1e-5
    assert z.shape[1] > 5
    both = found_from(true, wide, z, log_z=7.0)
    assert both.loc[0, :, 0].tolist() == pytest.approx([-0.3, 0.3], abs=1e-3)
    assert both.log_weights.exp()[0].tolist() == pytest.approx([0.4, 0.6], abs=1e-3)
    assert both.cov[0, 1].diagonal().tolist() == pytest.approx([0.01] * D, rel=1e-2)


def test_what_was_found_uncovers_the_next():
    true = mixture([0.5, 0.3, 0.2], [-0.4, 0.2, 0.8], [0.3, 0.2, 0.15])
    torch.manual_seed(0)
    both = found_from(true, mixture([1.0], [-0.4], [0.3]), torch.randn(1, 4096, D).double())
    order = both.loc[0, :, 0].argsort()
    assert both.loc[0, order, 0].tolist() == pytest.approx([-0.4, 0.2, 0.8], abs=1e-3)
    assert both.log_weights[0, order].exp().tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)


def test_nothing_is_added_to_what_is_right():
    q = mixture([0.3, 0.7], [-0.5, 0.5], [0.3, 0.2])
    torch.manual_seed(0)
    found = found_from(q, mixture([0.5, 0.5], [-0.5, 0.5], [0.3, 0.2]), torch.randn(1, 4096, D).double())
    assert torch.equal(found.loc, q.loc)
    assert found.log_weights.exp()[0].tolist() == pytest.approx([0.3, 0.7], abs=1e-6)


def test_a_component_that_fits_nothing_hides_nothing():
    """Matching from particles leaves some between modes; with one of them in q nothing more was sought."""
    true = mixture([0.5, 0.5], [-0.4, 0.4], [0.3, 0.15])
    astray = mixture([0.9, 0.1], [-0.4, 0.0], [0.3, 0.6])
    torch.manual_seed(0)
    found = found_from(true, astray, torch.randn(1, 4096, D).double())
    assert torch.equal(found.loc[:, :2], astray.loc)
    assert found.loc[0, 2:, 0].tolist() == pytest.approx([0.4], abs=1e-3)
    weights = found.log_weights.exp()[0]
    assert float(weights[2] / weights[0]) == pytest.approx(1.0, abs=1e-2)


def test_draws_around_q_lead_where_the_priors_do_not():
    """A prior a hundred times too wide: no draw of it has a trace of the narrower mode."""
    true = mixture([0.5, 0.5], [-0.03, 0.03], [0.01, 0.004], 4)
    torch.manual_seed(0)
    prior = torch.randn(1, 4096, 4).double()
    both = found_from(true, mixture([1.0], [-0.03], [0.01], 4), prior)
    assert both.loc[0, :, 0].tolist() == pytest.approx([-0.03, 0.03], abs=1e-3)


def test_what_rounding_makes_of_the_potential_hides_nothing():
    """In single precision ell is off by more, far out, than the trace of the other mode is anywhere."""
    true = mixture([0.4, 0.6], [-0.3, 0.3], [0.3, 0.1])
    prior = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
    rounded = Target(lambda theta: true.log_prob(theta[None])[0].float().double(), coordinates(prior))
    torch.manual_seed(0)
    z = torch.randn(1, 4096, D).double()
    far, near = 30 * z, z[:, (z[0] - 0.3).norm(dim=-1) > 1.0][:, :300]
    z = torch.cat([far, near], 1)
    found = with_hidden(rounded, mixture([1.0], [-0.3], [0.3]), z, rounded.value(z), by=math.log(20))
    assert found is not None and found.loc[0, :, 0].tolist() == pytest.approx([-0.3, 0.3], abs=1e-2)


def test_what_is_no_gaussian_is_left_alone():
    """A Gaussian beside a heavy tail: what is matched to that fits no better than what stands for it."""

    def both(theta: Tensor) -> Tensor:
        bell = -0.5 * ((theta + 0.5) / 0.2).square().sum(-1)
        return torch.logaddexp(bell, -0.5 * (3 + D) * torch.log1p((theta - 0.7).square().sum(-1) / 0.03))

    prior = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
    target = Target(both, coordinates(prior))
    torch.manual_seed(0)
    z = torch.randn(1, 4096, D).double()
    bell = mixture([1.0], [-0.5], [0.2])
    found = with_hidden(target, bell, z, target.value(z), by=3.0)
    assert found is not None and torch.equal(found.loc, bell.loc)
    assert target.n_gradients < 20_000


def test_where_q_does_not_fit_nothing_is_sought():
    def student(theta: Tensor) -> Tensor:
        return -0.5 * (5 + D) * torch.log1p(theta.square().sum(-1) / 0.05)

    prior = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
    target = Target(student, coordinates(prior))
    q, z = mixture([1.0], [0.0], [0.1]), torch.randn(1, 500, D).double()
    ell = target.value(z)
    assert with_hidden(target, q, z, ell, by=3.0) is None
    assert target.n_gradients == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_ladder_finds_modes_of_unlike_shapes_in_many_dimensions(seed: int):
    """About as wide, each turned its own way: of 35 % of the mass nothing was seen, and it was ok."""
    torch.manual_seed(8)
    dim, weights = 60, torch.tensor([0.25, 0.35, 0.4]).double()
    axes = torch.linalg.qr(torch.randn(3, dim, dim).double())[0]
    spread = (torch.tensor([0.17, 0.14, 0.15]).double() ** 2)[:, None] * (0.6 + 0.8 * torch.rand(3, dim))
    loc = 0.23 * torch.randn(1, 3, dim).double()
    true = Mixture.of(weights.log()[None], loc, (axes * spread[:, None] @ axes.mT)[None])
    torch.manual_seed(seed)
    report = climb(of_mixture(true)).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("dim", "sds"),
    [(50, (0.2, 0.14)), (8, (0.125, 0.04))],
    ids=["d50", "d8"],
)
def test_the_ladder_finds_a_narrower_mode_in_many_dimensions(dim: int, sds: tuple[float, float], seed: int):
    """From draws of the prior all slopes lead to the wide one: as a Gaussian alone it was called ok."""
    torch.manual_seed(seed)
    true = mixture([0.3, 0.7], [0.2, -0.2], list(sds), dim)
    report = climb(of_mixture(true)).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_the_ladder_finds_a_wide_and_a_narrow_mode_where_the_prior_is_far_too_wide(seed: int):
    """Draws with a trace of the other are far out in its tails, from where matching ran away."""
    torch.manual_seed(50)
    apart, middle = (
        torch.nn.functional.normalize(torch.randn(5), dim=0).double(),
        30 * torch.randn(5).double(),
    )
    covs = []
    for turn, sd in ((1, 0.5), (2, 1.5)):
        torch.manual_seed(turn)
        axes = torch.linalg.qr(torch.randn(5, 5).double())[0]
        covs.append(sd**2 * (axes * torch.logspace(-1, 1, 5).double()) @ axes.T)
    loc = middle + 4 * torch.stack([apart, -apart])
    true = Mixture.of(torch.tensor([[0.5, 0.5]]).double().log(), loc[None], torch.stack(covs)[None])
    prior = Independent(Normal(torch.zeros(5), 1000.0), 1)
    torch.manual_seed(seed)
    report = climb(Target(lambda theta: true.log_prob(theta.double()[None])[0], coordinates(prior))).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(0.0, abs=0.02)
