"""EM against known mixtures."""

import math

import pytest
import torch

from mixture_cases import even, known, some
from visbi.families import gaussians as module
from visbi.families.gaussians import Mixture
from visbi.fitting.em import expectation_maximisation, maximise

SMALL = pytest.mark.parametrize("at_once", [2**23, 7], ids=["at once", "in pieces"])


class TestEM:
    def test_a_known_mixture_is_recovered(self):
        exact = known([0.2, 0.5, 0.3], [[-3.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
        z = exact.sample(20_000)
        rough = Mixture.of(torch.zeros(1, 3).double(), exact.loc + 0.8, 4 * exact.cov)
        found = expectation_maximisation(rough, z, even(z), max_iters=100, tol=1e-7)
        torch.testing.assert_close(found.log_weights.exp(), exact.log_weights.exp(), atol=0.01, rtol=0)
        torch.testing.assert_close(found.loc, exact.loc, atol=0.03, rtol=0)
        torch.testing.assert_close(found.cov, exact.cov, atol=0.015, rtol=0)

    def test_weights_of_points_count(self):
        """Points of a proposal, weighted, stand for the target."""
        exact, proposal = known([0.8, 0.2], [[-1.5, 0.0], [1.5, 0.0]]), known([1.0], [[0.0, 0.0]], 2.0)
        z = proposal.sample(40_000)
        weights = (exact.log_prob(z) - proposal.log_prob(z)).softmax(1)
        rough = Mixture.of(torch.zeros(1, 2).double(), exact.loc, 4 * exact.cov)
        found = expectation_maximisation(rough, z, weights, max_iters=100, tol=1e-7)
        torch.testing.assert_close(found.log_weights.exp(), exact.log_weights.exp(), atol=0.02, rtol=0)
        torch.testing.assert_close(found.loc, exact.loc, atol=0.05, rtol=0)
        torch.testing.assert_close(found.cov, exact.cov, atol=0.03, rtol=0)

    @pytest.mark.parametrize("seed", range(5))
    def test_likelihood_hardly_ever_falls(self, seed):
        """EM's own steps never lower it; shrinkage may, by no more than what n points leave uncertain."""
        torch.manual_seed(seed)
        z = some(1, 4, 3, spread=1.5).sample(2000)
        q, scores = some(1, 5, 3), []
        for _ in range(15):
            scores.append(float(q.log_prob(z).mean()))
            joint = q.by_component(z)
            q = maximise(q, z, (joint - torch.logsumexp(joint, 1, keepdim=True)).exp() / 2000)
        steps = torch.tensor(scores).diff()
        assert float(steps[0]) > 0.05 and float(steps.min()) > -0.01
        assert float(steps[-5:].abs().max()) < 0.02

    def test_one_m_step_of_all_points_is_their_moments(self):
        """n = N points: the covariance is shrunk and widened as the module's formula says."""
        z = torch.randn(1, 50, 3, dtype=torch.float64) @ torch.randn(3, 3).double()
        found = maximise(some(1, 1, 3), z, even(z)[:, None])
        sample = torch.cov(z[0].mT, correction=0)
        shrunk = (1 + 4 / 50) * (50 * sample + 5 * sample.diagonal().diag()) / 55
        torch.testing.assert_close(found.loc[0, 0], z[0].mean(0))
        torch.testing.assert_close(found.cov[0, 0], shrunk)
        assert found.log_weights.tolist() == [[0.0]]

    def test_components_without_points_lose_their_weight(self):
        q = known([0.5, 0.25, 0.25], [[0.0, 0.0], [40.0, 0.0], [20.0, 0.0]])
        z = 0.5 * torch.randn(1, 500, 2, dtype=torch.float64)
        z[0, :2] += torch.tensor([20.0, 0.0])
        found = expectation_maximisation(q, z, even(z))
        assert found.log_weights[0, 1] == -math.inf  # none
        assert found.log_weights[0, 2] == -math.inf  # two points have no covariance
        assert float(found.log_weights[0, 0]) == pytest.approx(0.0)
        assert bool(found.tril.isfinite().all() and found.log_prob(z).isfinite().all())

    def test_copies_of_one_point_are_no_component(self):
        q = known([0.7, 0.3], [[0.0, 0.0], [9.0, 0.0]])
        z = 0.5 * torch.randn(1, 500, 2, dtype=torch.float64)
        z[0, :20] = torch.tensor([9.0, 1.0])
        found = expectation_maximisation(q, z, even(z))
        assert found.log_weights[0].tolist() == [pytest.approx(0.0), -math.inf]

    def test_a_narrow_component_stays(self):
        q = known([0.7, 0.3], [[0.0, 0.0], [9.0, 0.0]])
        z = 0.5 * torch.randn(1, 500, 2, dtype=torch.float64)
        z[0, :100] = torch.tensor([9.0, 1.0]) + 1e-7 * torch.randn(100, 2).double()
        found = expectation_maximisation(q, z, even(z))
        assert found.log_weights.exp()[0].tolist() == pytest.approx([0.8, 0.2], abs=1e-3)
        assert found.cov[0, 1].diagonal().sqrt().tolist() == pytest.approx([1e-7, 1e-7], rel=0.3)

    def test_nothing_to_go_on_leaves_it_as_it_was(self):
        q = some(1, 2)
        z = torch.randn(1, 2, 2, dtype=torch.float64)
        found = expectation_maximisation(q, z, even(z))
        torch.testing.assert_close(found.log_weights, q.log_weights)
        torch.testing.assert_close(found.loc, q.loc)
        torch.testing.assert_close(found.tril, q.tril)

    @SMALL
    def test_fits_do_not_mix(self, at_once, monkeypatch):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        z, start = some(3, 3, 2).sample(200), some(3, 3, 2)
        weights = torch.rand(3, 200, dtype=torch.float64).softmax(1)
        together = expectation_maximisation(start, z, weights, max_iters=5, tol=0.0)
        for f in range(3):
            one = Mixture(start.log_weights[f : f + 1], start.loc[f : f + 1], start.tril[f : f + 1])
            alone = expectation_maximisation(one, z[f : f + 1], weights[f : f + 1], max_iters=5, tol=0.0)
            torch.testing.assert_close(together.log_weights[f], alone.log_weights[0])
            torch.testing.assert_close(together.loc[f], alone.loc[0])
            torch.testing.assert_close(together.tril[f], alone.tril[0])
