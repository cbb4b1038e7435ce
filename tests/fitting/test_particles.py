"""Particles as an answer: the kernels' moments, when they are given, and what is said of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal

from visbi.certificate.verdict import certify
from visbi.families.gaussians import Mixture
from visbi.fitting.climbing import ALONE, Answer, Group, Record
from visbi.fitting.explore import explore
from visbi.fitting.particles import kernels, settle
from visbi.fitting.pool import Pool
from visbi.fitting.target import Target
from visbi.priors import coordinates


def test_kernels_keep_mean_covariance_and_bends():
    x = torch.randn(1, 800, 1, dtype=torch.float64)
    z = torch.cat([x, x.square() + 0.1 * torch.randn_like(x), 1e-3 * torch.randn_like(x)], -1)
    draws = kernels(z).sample(20_000)[0]
    torch.testing.assert_close(draws.mean(0), z[0].mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(draws.mT), torch.cov(z[0].mT), atol=0.12, rtol=0.12)
    off = draws[:, 1] - draws[:, 0].square()
    assert float(off.abs().quantile(0.95)) < 0.5  # a Gaussian of the same moments: 3 and more
    wide = draws[:, 2].std() / z[0, :, 2].std()
    assert float(wide) == pytest.approx(1.0, abs=0.1)


def test_kernels_of_each_fit():
    z = torch.randn(2, 60, 2, dtype=torch.float64) + torch.tensor([0.0, 50.0]).double()[:, None, None]
    both = kernels(z)
    alone = kernels(z[1:])
    torch.testing.assert_close(both.loc[1], alone.loc[0])
    torch.testing.assert_close(both.cov[1], alone.cov[0])


def group(log_p) -> Group:
    prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    target = Target(log_p, coordinates(prior))
    return Group(target, [Record()], ALONE, Pool(target))


def ring(theta):
    return -0.5 * ((theta.norm(dim=-1) - 1.5) / 0.02).square()


def given(now: Group, status: str | None) -> None:
    record = now.records[0]
    record.carried = explore(now.target, 256)
    if status is not None:
        q = Mixture.of(torch.zeros(1, 1), torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None, None])
        unknown = torch.zeros(100, dtype=torch.float64)
        report = replace(certify(unknown, unknown), status=status)
        record.answer = "a mixture", Answer(q, q.sample(100)[0], unknown, unknown, report)


@pytest.mark.parametrize("status", [None, "failed"])
def test_where_nothing_passed(status):
    now = group(ring)
    given(now, status)
    settle(now)
    rung, answer = now.records[0].answer or ("", None)
    assert rung == "particles" and answer is not None
    assert answer.report.status == "suspect" and "Run MCMC" in answer.report.sentence
    assert answer.z.shape == (ALONE.trial, 2) and math.isfinite(answer.report.log_evidence)
    away = (answer.q.sample(4000)[0].norm(dim=-1) - 1.5).abs()
    assert float(away.median()) < 0.05


@pytest.mark.parametrize("status", ["suspect", "corrected"])
def test_an_answer_with_weights_is_left(status):
    now = group(ring)
    given(now, status)
    settle(now)
    assert (now.records[0].answer or ("",))[0] == "a mixture"


def test_without_particles_there_is_nothing():
    now = group(ring)
    settle(now)
    assert now.records[0].answer is None
