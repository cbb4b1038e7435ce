"""The first look, where hardly any draw of the prior can be used."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.core.types import LogDensity
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.ladder import climb
from visbi.fitting.looking import look
from visbi.fitting.pool import Pool
from visbi.fitting.target import Target
from visbi.priors import BoxUniform, coordinates


def cube(share: float, dim: int) -> Target:
    """Uniform on a cube that holds this share of the prior's box."""
    side = share ** (1 / dim)

    def log_p(theta: Tensor) -> Tensor:
        return torch.where(((theta > 0.3) & (theta < 0.3 + side)).all(-1), 0.0, -math.inf)

    return Target(log_p, coordinates(BoxUniform(torch.zeros(dim), torch.ones(dim))))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim", [2, 4])
def test_a_few_of_all_draws_that_are_searched_are_enough(dim: int, seed: int):
    """Seven of 32,768, of which the first 4096 often have none: the fit ended there, failed."""
    torch.manual_seed(seed)
    report = climb(cube(2e-4, dim)).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(math.log(2e-4), abs=0.05)


def test_in_more_dimensions_more_are_searched():
    """Seven parameters in order, 1/5040 of the box."""

    def ordered(theta: Tensor) -> Tensor:
        return torch.where((theta[:, 1:] > theta[:, :-1]).all(-1), 0.0, -math.inf)

    torch.manual_seed(2)
    target = Target(ordered, coordinates(BoxUniform(torch.zeros(7), torch.ones(7))))
    report = climb(target).report
    assert report.status in ("ok", "corrected")
    assert report.log_evidence == pytest.approx(-math.log(5040), abs=0.1)
    assert target.n_values > 30_000 and report.n_searched == 128  # led uphill


def test_where_none_can_be_used_that_is_said():
    with pytest.raises(ValueError, match="none at 32768"):
        climb(cube(0.0, 2))


class TestInwards:
    """What is measured in raw units has coefficients a millionth of their prior's sd."""

    def looked(self, log_p: LogDensity, dim: int) -> Group:
        prior = Independent(Normal(torch.zeros(dim).double(), 100.0), 1)
        target = Target(log_p, coordinates(prior))
        (now,) = look(Group(target, [Record()], ALONE, Pool(target)))
        return now

    @pytest.mark.parametrize(("dim", "n_prior", "inmost"), [(2, 28_672, 1e-6), (6, 4096, 0.1)])
    def test_some_draws_are_moved(self, dim: int, n_prior: int, inmost: float):
        torch.manual_seed(0)
        now = self.looked(lambda theta: -theta.square().sum(-1), dim)
        assert now.n_prior == now.n_searched == n_prior and now.searched.shape[1] > n_prior
        size = now.searched[0].norm(dim=-1)
        assert float(size[:n_prior].median()) > 0.9 and float(size[n_prior:].quantile(0.05)) < inmost
        assert now.starts.shape == (1, 512 + 128, dim) and bool(now.usable.all())
        nearest = now.starts[0, 512:].norm(dim=-1).max() / now.starts[0, :512].norm(dim=-1).max()
        assert float(nearest) < 0.1

    def test_slopes_that_only_these_have_are_found(self):
        """A clamp leaves none elsewhere."""
        now = self.looked(lambda theta: -(1e6 * theta[:, 0] - 1.0).square().clamp_max(1e4), 2)
        assert now.gradient

    @pytest.mark.parametrize("seed", range(3))
    def test_a_regression_with_a_guard_against_overflow(self, seed: int):
        """The clamp makes plateaus of all but 1e-6 of the prior: draws were those of one, and called good."""
        income = torch.linspace(1e4, 9e4, 40, dtype=torch.float64)
        count = (-2 + 4e-5 * income).exp().round()

        def log_p(theta: Tensor) -> Tensor:
            eta = (theta[:, :1] + theta[:, 1:] * income).clamp(-200.0, 80.0)
            return (count * eta - eta.exp()).sum(-1) - 0.5 * (theta / 100.0).square().sum(-1)

        side = torch.linspace(-8, 8, 801, dtype=torch.float64)
        scale = torch.tensor([0.5, 7e-6]).double()
        cells = torch.tensor([-2.0, 4e-5]).double() + scale * torch.cartesian_prod(side, side)
        exact = log_p(cells).logsumexp(0) + 2 * math.log(0.02) + scale.log().sum()
        torch.manual_seed(seed)
        prior = Independent(Normal(torch.zeros(2).double(), 100.0), 1)
        report = climb(Target(log_p, coordinates(prior))).report
        assert report.status in ("ok", "corrected")
        assert abs(report.log_evidence - float(exact)) < 4 * report.log_evidence_se
