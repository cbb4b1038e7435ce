"""Which map is chosen: a user's own, a fallback, or an error that says what to do."""

import warnings

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Categorical,
    ComposeTransform,
    Dirichlet,
    Distribution,
    ExpTransform,
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Poisson,
    Transform,
    TransformedDistribution,
    Uniform,
    biject_to,
    constraints,
)

from visbi.core.devices import move
from visbi.priors import BoxUniform, MultipleIndependent, coordinates, mcmc_transform
from visbi.priors.inverse import Inverted

BOX = BoxUniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0]))
POSITIVE = Independent(LogNormal(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0])), 1)


class NoSupport:
    """A prior of one's own that says nothing about its support."""

    event_shape, batch_shape = torch.Size([2]), torch.Size()

    def sample(self, shape=()):
        return POSITIVE.sample(shape)

    def log_prob(self, theta):
        return POSITIVE.log_prob(theta)


class TorchNoSupport(Distribution):
    """The same as a torch Distribution, whose `support` raises NotImplementedError."""

    arg_constraints = {}

    def __init__(self):
        super().__init__(event_shape=torch.Size([2]))

    sample, log_prob = NoSupport.sample, NoSupport.log_prob


class Lossy(Transform):
    """A map that forgets."""

    domain = codomain = constraints.independent(constraints.real, 1)
    bijective = True

    def _call(self, x):
        return x.round()

    def _inverse(self, y):
        return y

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


OWN = {
    "forward": (POSITIVE, ComposeTransform([ExpTransform().inv, AffineTransform(1.0, 3.0)])),
    "an .inv": (POSITIVE, biject_to(POSITIVE.support).inv),
    "an .inv of a box": (BOX, biject_to(BOX.support).inv),
    "our own": (BOX, mcmc_transform(BOX)),
    "our own inverse of an inverse": (BOX, Inverted(Inverted(mcmc_transform(BOX)))),
    "of a simplex": (Dirichlet(torch.ones(3)), biject_to(constraints.simplex).inv),
    "an identity": (Independent(Normal(torch.zeros(2), torch.ones(2)), 1), AffineTransform(0.0, 1.0)),
}


@pytest.mark.parametrize(("prior", "transform"), OWN.values(), ids=OWN)
@pytest.mark.parametrize("z_score", ["none", "independent", "structured"])
def test_a_map_of_ones_own_is_used(prior, transform, z_score):
    coords = coordinates(prior, z_score=z_score, theta_transform=transform)
    theta = prior.sample((2000,))
    z, ladj = coords.to_z(theta)
    torch.testing.assert_close(coords.to_theta(z)[0], theta, rtol=1e-4, atol=1e-5)
    y = transform(theta.double())
    block = coords.blocks[0]
    torch.testing.assert_close(block.loc + z @ block.scale_tril.mT, y, rtol=1e-5, atol=1e-5)
    own = transform.log_abs_det_jacobian(theta.double(), y)
    own = own.sum(-1) if own.ndim > 1 else own
    expected = block.scale_tril.diagonal().log().sum() - own
    torch.testing.assert_close(ladj, expected, rtol=1e-3, atol=1e-3)
    if z_score == "none":
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    else:
        assert (z.median(0).values.abs() < 0.15).all()


@pytest.mark.parametrize("prior", [NoSupport(), TorchNoSupport()], ids=["plain", "torch"])
def test_a_prior_without_support_needs_a_map(prior):
    message = (
        r"^`prior`: expected a Distribution with `support` \(or pass `theta_transform`\); got .*NoSupport"
    )
    with pytest.raises(ValueError, match=message):
        coordinates(prior)
    coords = coordinates(prior, theta_transform=ExpTransform().inv)
    theta = prior.sample((100,))
    torch.testing.assert_close(coords.to_theta(coords.to_z(theta)[0])[0], theta)
    assert coords.support is None
    assert coords.contains(torch.tensor([[-1.0, 1.0], [float("nan"), 1.0]])).tolist() == [True, False]


def test_a_map_that_does_not_come_back_is_not_used():
    with pytest.warns(
        UserWarning, match="does not return prior draws to where they were.*theta_transform"
    ) as caught:
        coords = coordinates(BOX, theta_transform=Lossy())
    assert len(caught) == 1
    theta = BOX.sample((10,))
    z, ladj = coords.to_z(theta)
    assert torch.equal(z.float(), theta)
    assert torch.equal(ladj, torch.zeros(10))
    assert torch.equal(coords.to_theta(z)[0], theta)


def test_a_support_whose_own_map_does_not_come_back():
    class Wrong(Uniform):
        """Says that it is positive, and draws negative numbers."""

        support = constraints.positive

    with pytest.warns(UserWarning, match="theta is used as it is"):
        coordinates(
            Independent(Wrong(-torch.ones(2), torch.zeros(2), validate_args=False), 1), z_score="none"
        )


@pytest.mark.parametrize(
    "prior",
    [
        Independent(Poisson(torch.ones(2)), 1),
        Independent(Bernoulli(0.5 * torch.ones(2)), 1),
        Independent(Categorical(torch.ones(2, 3)), 1),
        MultipleIndependent([Normal(torch.zeros(1), 1.0), Poisson(torch.ones(1))]),
    ],
    ids=["Poisson", "Bernoulli", "Categorical", "mixed"],
)
def test_a_discrete_prior_is_refused(prior):
    with pytest.raises(ValueError, match=r"^`prior`: expected a continuous distribution"):
        coordinates(prior)


def test_a_support_without_a_bijection_is_refused():
    class Ball(constraints.Constraint):
        event_dim = 1

        def check(self, value):
            return value.norm(dim=-1) < 1

    class OnBall(NoSupport):
        support = Ball()

    with pytest.raises(ValueError, match=r"^`prior`: expected a support that torch has a bijection for"):
        coordinates(OnBall())


def test_a_mixture_of_unlike_boxes_is_refused_unless_a_map_is_given():
    corners = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    prior = MixtureSameFamily(
        Categorical(torch.ones(2)), Independent(Uniform(corners, corners + 3.0), 1), validate_args=False
    )
    with pytest.raises(ValueError, match=r"^`prior`: expected a support that torch has a bijection for"):
        coordinates(prior)
    whole = BoxUniform(torch.zeros(2), 5 * torch.ones(2))
    coords = coordinates(prior, theta_transform=biject_to(whole.support).inv)
    theta = prior.sample((100,))
    torch.testing.assert_close(coords.to_theta(coords.to_z(theta)[0])[0], theta, rtol=1e-4, atol=1e-4)


def test_a_prior_without_numbers_is_refused():
    with pytest.raises(
        ValueError, match=r"^`prior`: expected tensors that hold numbers; got tensors on device meta"
    ):
        coordinates(move(Independent(Normal(torch.zeros(2), torch.ones(2)), 1), "meta"), z_score="none")


def test_samples_of_a_wrong_shape_are_refused():
    class Column(NoSupport):
        support = constraints.independent(constraints.positive, 1)

        def sample(self, shape=()):
            return super().sample(shape)[..., :1]

    with pytest.raises(
        ValueError, match=r"^`prior`: expected samples of shape \(n, 2\) in floating point; got"
    ):
        coordinates(Column())


def test_an_unknown_scale_is_refused():
    with pytest.raises(
        ValueError, match=r"^`z_score_theta`: expected one of 'none', 'independent', 'structured'"
    ):
        coordinates(BOX, z_score="whitened")


def test_a_scalar_prior_has_one_coordinate():
    coords = coordinates(Normal(2.0, 3.0))
    assert (coords.dim_theta, coords.dim_z) == (1, 1)
    assert coords.to_theta(torch.ones(1, 1))[0].tolist() == [[5.0]]


def test_a_product_of_another_package_is_seen_as_one():
    class MultipleIndependent(Distribution):
        """Of the same name and make as that of sbi."""

        arg_constraints = {}

        def __init__(self, dists):
            self.dists = dists
            super().__init__(event_shape=torch.Size([sum(d.sample().numel() for d in dists)]))

        support = constraints.cat([constraints.positive, BOX.support.base_constraint], -1, [1, 2])

        def sample(self, shape=()):
            return torch.cat([d.sample(torch.Size(shape)) for d in self.dists], -1)

        def log_prob(self, theta):
            raise AssertionError("not needed")

    prior = MultipleIndependent([LogNormal(torch.zeros(1), 2 * torch.ones(1)), BOX])
    coords = coordinates(prior)
    assert [type(b).__name__ for b in coords.blocks] == ["AffineBlock", "UniformBlock"]


def test_a_mixture_that_keeps_its_parts_in_dists_is_not_taken_for_a_product():
    class Average(NoSupport):
        support = constraints.independent(constraints.positive, 1)
        dists = (LogNormal(torch.zeros(1), torch.ones(1)), LogNormal(torch.zeros(1), torch.ones(1)))

    assert [type(b).__name__ for b in coordinates(Average()).blocks] == ["BijectionBlock"]


class TestMcmcTransform:
    """The torch Transform around the coordinates."""

    def test_it_is_a_transform_from_the_support(self):
        transform = mcmc_transform(BOX)
        theta = BOX.sample((5,))
        assert transform.domain.check(theta).all()
        assert not transform.domain.check(theta + 10).any()
        assert transform.codomain.event_dim == transform.domain.event_dim == 1
        z = transform(theta)
        assert z.dtype is theta.dtype
        torch.testing.assert_close(transform.inv(z), theta)
        assert transform.inv.inv is transform
        torch.testing.assert_close(
            transform.log_abs_det_jacobian(theta, z), -transform.inv.log_abs_det_jacobian(z, theta)
        )

    def test_the_prior_is_a_normal_seen_through_it(self):
        standard = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        pushed = TransformedDistribution(standard, [mcmc_transform(BOX).inv])
        theta = BOX.sample((20,))
        torch.testing.assert_close(pushed.log_prob(theta), BOX.log_prob(theta), rtol=1e-4, atol=1e-4)
        assert BOX.support.check(pushed.sample((50,))).all()

    def test_shapes_on_a_simplex(self):
        transform = mcmc_transform(Dirichlet(torch.ones(4)))
        assert transform.forward_shape(torch.Size([7, 4])) == (7, 3)
        assert transform.inv.forward_shape(torch.Size([7, 3])) == (7, 4)

    def test_unscaled_and_disabled(self):
        theta = BOX.sample((5,))
        plain = mcmc_transform(BOX, num_prior_samples_for_zscoring=None)(theta)
        torch.testing.assert_close(plain, biject_to(BOX.support).inv(theta), rtol=1e-4, atol=1e-4)
        assert torch.equal(mcmc_transform(BOX, enable_transform=False)(theta), theta)

    def test_device(self):
        assert mcmc_transform(BOX, device="meta")(torch.zeros(3, 2, device="meta")).device.type == "meta"

    def test_no_warning_for_ordinary_priors(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mcmc_transform(POSITIVE)
