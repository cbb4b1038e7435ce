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
    return with_hidden(target, q, z, target.value(z), by=math.log(20))


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


def test_where_q_does_not_fit_nothing_is_sought():
    def student(theta: Tensor) -> Tensor:
        return -0.5 * (5 + D) * torch.log1p(theta.square().sum(-1) / 0.05)

    prior = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
    target = Target(student, coordinates(prior))
    q, z = mixture([1.0], [0.0], [0.1]), torch.randn(1, 500, D).double()
    ell = target.value(z)
    assert torch.equal(with_hidden(target, q, z, ell, by=3.0).loc, q.loc)
    assert target.n_gradients == 0


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
