"""The truncated normal against SciPy's, however far out the interval lies."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Independent, biject_to, constraints

from visbi.priors import TruncatedNormal

INF = math.inf
# loc, scale, low, high
INTERVALS = [
    (1.0, 0.5, 0.0, INF),
    (0.05, 0.05, 0.0, INF),
    (0.0, 1.0, -INF, INF),
    (0.0, 2.0, -INF, 1.0),
    (3.0, 2.0, -1.0, 4.0),
    (0.0, 1.0, -0.01, 0.02),
    (-3.0, 1.0, 2.0, INF),
    (0.0, 1.0, 6.0, 6.5),
    (0.0, 1.0, -6.5, -6.0),
    (0.0, 1.0, 30.0, INF),
    (0.0, 1.0, 45.0, INF),
    (0.0, 1.0, -INF, -45.0),
    (0.0, 1.0, 45.0, 45.01),
    (0.0, 1.0, 300.0, INF),
]
EVERY_INTERVAL = pytest.mark.parametrize("interval", INTERVALS, ids=str)
# beyond this SciPy's own numbers are checked against the exponential tail, not the other way round
UNITS = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)


def ours(interval, dtype=torch.float64) -> TruncatedNormal:
    return TruncatedNormal(*(torch.tensor(v, dtype=dtype) for v in interval))


def theirs(interval):
    loc, scale, low, high = interval
    return stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)


@EVERY_INTERVAL
def test_quantiles_and_cdf(interval):
    x = ours(interval).icdf(UNITS)
    torch.testing.assert_close(x, torch.as_tensor(theirs(interval).ppf(UNITS.numpy())), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours(interval).cdf(x), UNITS, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        ours(interval).cdf(x), torch.as_tensor(theirs(interval).cdf(x.numpy())), rtol=1e-6, atol=1e-7
    )


@EVERY_INTERVAL
def test_log_density(interval):
    x = ours(interval).icdf(UNITS)
    expected = torch.as_tensor(theirs(interval).logpdf(x.numpy()))
    torch.testing.assert_close(ours(interval).log_prob(x), expected, rtol=1e-6, atol=1e-7)


@EVERY_INTERVAL
def test_mean(interval):
    expected = torch.tensor(theirs(interval).mean(), dtype=torch.float64)
    torch.testing.assert_close(ours(interval).mean, expected, rtol=1e-6, atol=1e-9)


@EVERY_INTERVAL
def test_draws(interval):
    prior = ours(interval)
    x = prior.sample((4000,))
    assert ((x >= prior.low) & (x <= prior.high)).all()
    assert stats.kstest(x.numpy(), theirs(interval).cdf).pvalue > 1e-4


@EVERY_INTERVAL
def test_the_ends(interval):
    prior = ours(interval)
    ends = prior.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([prior.low.item(), prior.high.item()])
    if prior.low.isfinite():
        assert prior.cdf(prior.low) == 0
        assert prior.log_prob(prior.low - 1e-3) == -INF
        assert prior.log_prob(prior.low).isfinite()
    if prior.high.isfinite():
        assert prior.cdf(prior.high) == 1
        assert prior.log_prob(prior.high + 1e-3) == -INF


@EVERY_INTERVAL
def test_draws_are_differentiable_in_loc_and_scale(interval):
    loc, scale, low, high = (torch.tensor(v, dtype=torch.float64) for v in interval)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def quantiles(loc, scale):
        return TruncatedNormal(loc, scale, low, high).icdf(u)

    analytic = torch.autograd.functional.jacobian(quantiles, (loc, scale))
    for i, step in enumerate((torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))):
        h = 1e-5 * step.double()
        numeric = (quantiles(loc + h[0], scale + h[1]) - quantiles(loc - h[0], scale - h[1])) / 2e-5
        torch.testing.assert_close(analytic[i], numeric, rtol=1e-3, atol=1e-5)


def test_float32_keeps_its_dtype_and_its_interval():
    prior = ours((1.0, 0.5, 0.1, INF), torch.float32)
    x = prior.sample((1000,))
    assert x.dtype is prior.log_prob(x).dtype is prior.mean.dtype is torch.float32
    assert (x >= prior.low).all()
    expected = torch.as_tensor(theirs((1.0, 0.5, 0.1, INF)).logpdf(x.double().numpy())).float()
    torch.testing.assert_close(prior.log_prob(x), expected, rtol=1e-4, atol=1e-5)


def test_parameters_broadcast():
    prior = TruncatedNormal(torch.zeros(3, 1), torch.ones(2), low=torch.tensor([0.0, -INF]))
    assert prior.batch_shape == (3, 2)
    assert prior.sample((5,)).shape == (5, 3, 2)
    assert prior.expand((4, 3, 2)).sample().shape == (4, 3, 2)
    assert TruncatedNormal(0, 1).sample().shape == ()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-INF, INF, constraints.real),
        (0.0, INF, constraints.greater_than(0.0)),
        (-INF, 0.0, constraints.less_than(0.0)),
        (0.0, 1.0, constraints.interval(0.0, 1.0)),
    ],
)
def test_support(low, high, expected):
    support = TruncatedNormal(torch.zeros(2), 1.0, low, high).support
    assert type(support) is type(expected)
    x = torch.linspace(-2, 2, 21)[:, None].expand(21, 2)
    assert torch.equal(support.check(x), expected.check(x) & torch.ones_like(x, dtype=torch.bool))


def test_support_of_unlike_entries_has_a_bijection():
    prior = TruncatedNormal(
        torch.zeros(3), 1.0, torch.tensor([0.0, -INF, 1.0]), torch.tensor([INF, INF, 2.0])
    )
    joint = Independent(prior, 1)
    x = torch.tensor([[1.0, -5.0, 1.5], [-1.0, 0.0, 1.5], [1.0, 0.0, 2.5]])
    assert joint.support.check(x).tolist() == [True, False, False]
    link = biject_to(joint.support)
    y = torch.randn(50, 3)
    assert joint.support.check(link(y)).all()
    torch.testing.assert_close(link.inv(link(y)), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.0), "^`scale`: expected finite numbers > 0; got 0.0$"),
        ((0.0, INF), "^`scale`: expected finite numbers > 0"),
        ((math.nan, 1.0), "^`loc`: expected finite numbers; got nan$"),
        ((0.0, 1.0, 1.0, 1.0), "^`low`, `high`: expected low < high in every entry; got 1.0, 1.0$"),
        ((0.0, 1.0, torch.tensor([0.0, math.nan])), "^`low`, `high`: expected low < high"),
    ],
)
def test_arguments_that_make_no_interval(arguments, message):
    with pytest.raises(ValueError, match=message):
        TruncatedNormal(*arguments)
