"""Callables and other packages' stateful objects as potentials."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from visbi.potentials import AdaptedPotential, BasePotential, CustomPotential, as_potential

PRIOR = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
OTHER_PRIOR = Independent(Normal(torch.ones(2), torch.ones(2)), 1)
THETA = torch.tensor([[0.0, 1.0], [1.0, -1.0], [0.5, 0.5]])
X, OTHER_X = torch.ones(1, 2), torch.full((1, 2), 3.0)


def quadratic(theta, x_o):
    return -0.5 * (theta - x_o).square().sum(-1)


class Stateful:
    """In the shape of the sbi package's BasePotential."""

    def __init__(self, prior=PRIOR, x_o=None, device="cpu", fails=False):
        self.prior, self.device, self.fails = prior, device, fails
        self.set_x(x_o)

    def set_x(self, x_o, x_is_iid=True):
        if x_o is not None and x_o.shape[-1] != 2:
            raise ValueError("theirs: x of a wrong shape")
        self._x_o, self._x_is_iid = x_o, x_is_iid

    @property
    def x_o(self):
        if self._x_o is None:
            raise ValueError("theirs: no x")
        return self._x_o

    @property
    def x_is_iid(self):
        return self._x_is_iid

    def return_x_o(self):
        return self._x_o

    def to(self, device):
        self.device = device
        return self

    def __call__(self, theta, track_gradients=True):
        if self.fails:
            raise RuntimeError("theirs: failed")
        with torch.set_grad_enabled(track_gradients):
            if self.x_is_iid:
                return sum(quadratic(theta, x) for x in self.x_o)
            return quadratic(theta, self.x_o)


class TestCustom:
    def test_a_callable_gets_theta_and_x(self):
        potential = CustomPotential(quadratic)
        assert torch.equal(potential.evaluate(THETA, X), quadratic(THETA, X))
        theta = THETA.clone().requires_grad_()
        potential.evaluate(theta, X).sum().backward()
        torch.testing.assert_close(theta.grad, X - THETA)

    def test_without_x_it_gets_the_one_that_was_set_or_none(self):
        seen = []
        potential = CustomPotential(lambda theta, x_o: (seen.append(x_o), theta.sum(-1))[1])
        potential.evaluate(THETA, None)
        potential.set_x(X)
        potential.evaluate(THETA, None)
        assert seen == [None, X]

    def test_a_column_is_taken_as_values(self):
        values = CustomPotential(lambda theta, x_o: theta[:, :1]).evaluate(THETA, X)
        assert torch.equal(values, THETA[:, 0])
        one = CustomPotential(lambda theta, x_o: theta[:, :1]).evaluate(THETA[:1], X)
        assert torch.equal(one, THETA[:1, 0])

    @pytest.mark.parametrize(
        ("function", "got"),
        [
            (lambda theta, x_o: theta, r"\(3, 2\)"),
            (lambda theta, x_o: theta.sum(), r"\(\)"),
            (lambda theta, x_o: theta[:2, 0], r"\(2,\)"),
            (lambda theta, x_o: theta[None, :, 0], r"\(1, 3\)"),
        ],
    )
    def test_values_of_a_wrong_shape(self, function, got):
        message = rf"^`potential_fn`: expected to return shape \(3,\) for theta of shape \(3, D\); got {got}$"
        with pytest.raises(ValueError, match=message):
            CustomPotential(function).evaluate(THETA, X)

    def test_values_that_are_no_tensor(self):
        message = r"^`potential_fn`: expected to return a tensor of shape \(3,\); got list$"
        with pytest.raises(TypeError, match=message):
            CustomPotential(lambda theta, x_o: [0.0] * 3).evaluate(THETA, X)

    def test_something_that_cannot_be_called(self):
        with pytest.raises(
            TypeError, match=r"^`potential_fn`: expected a callable \(theta, x_o\) -> \(N,\); got float$"
        ):
            CustomPotential(3.0)

    def test_something_that_takes_no_observation(self):
        message = r"^`potential_fn`: expected a callable \(theta, x_o\) -> \(N,\); got <lambda>\(theta\)$"
        with pytest.raises(TypeError, match=message):
            CustomPotential(lambda theta: theta.sum(-1))
        CustomPotential(lambda *both: both[0].sum(-1))
        CustomPotential(lambda theta, x=None, scale=1.0: scale * theta.sum(-1))
        CustomPotential(torch.add)  # says nothing of what it takes

    def test_nan_in_the_observation(self):
        with pytest.raises(ValueError, match=r"^`x_o`: expected finite numbers; got 1 of 1 NaN or Inf$"):
            CustomPotential(quadratic, x_o=torch.tensor([math.nan]))

    def test_called_like_a_plain_callable(self):
        potential = CustomPotential(quadratic, PRIOR, OTHER_X)
        assert torch.equal(potential(THETA, X), quadratic(THETA, X))
        assert torch.equal(potential(THETA), quadratic(THETA, OTHER_X))

    def test_it_moves(self):
        potential = CustomPotential(quadratic, PRIOR, X).to("meta")
        assert potential.x_o.device.type == potential.prior.sample().device.type == "meta"


class TestAdapted:
    def test_values_are_those_of_the_wrapped_object(self):
        theirs = Stateful()
        ours = AdaptedPotential(theirs)
        trials = torch.cat([X, OTHER_X, -X])
        assert torch.equal(ours.evaluate(THETA, trials), sum(quadratic(THETA, x) for x in trials))
        assert torch.equal(ours.evaluate(THETA, trials, x_is_iid=False), quadratic(THETA, trials))

    @pytest.mark.parametrize("own", [None, X])
    @pytest.mark.parametrize("own_iid", [True, False])
    def test_the_wrapped_object_keeps_what_it_had(self, own, own_iid):
        theirs = Stateful()
        theirs.set_x(own, x_is_iid=own_iid)
        ours = AdaptedPotential(theirs)
        assert ours.return_x_o() is own
        assert ours.x_is_iid is own_iid
        ours.evaluate(THETA, OTHER_X)
        assert theirs.return_x_o() is own
        assert theirs.x_is_iid is own_iid

    @pytest.mark.parametrize("own", [None, X])
    def test_also_when_the_call_raises(self, own):
        theirs = Stateful(x_o=own, fails=True)
        ours = AdaptedPotential(theirs)
        with pytest.raises(RuntimeError, match="theirs: failed"):
            ours.evaluate(THETA, OTHER_X)
        assert theirs.return_x_o() is own
        theirs.fails = False
        with pytest.raises(ValueError, match="theirs: x of a wrong shape"):
            ours.evaluate(THETA, torch.ones(1, 3))
        assert theirs.return_x_o() is own

    def test_without_x_the_wrapped_object_uses_its_own(self):
        ours = AdaptedPotential(Stateful(x_o=X))
        assert torch.equal(ours.evaluate(THETA, None), quadratic(THETA, X))
        assert torch.equal(ours(THETA), quadratic(THETA, X))
        with pytest.raises(ValueError, match="theirs: no x"):
            AdaptedPotential(Stateful()).evaluate(THETA, None)

    def test_setting_x_on_ours_leaves_theirs(self):
        theirs = Stateful(x_o=X)
        ours = AdaptedPotential(theirs)
        ours.set_x(OTHER_X)
        assert torch.equal(ours(THETA), quadratic(THETA, OTHER_X))
        assert torch.equal(theirs(THETA), quadratic(THETA, X))

    def test_gradients_as_the_caller_has_them(self):
        ours = AdaptedPotential(Stateful())
        theta = THETA.clone().requires_grad_()
        assert ours.evaluate(theta, X).requires_grad
        with torch.no_grad():
            assert not ours.evaluate(theta, X).requires_grad

    def test_wrong_shapes_from_the_wrapped_object(self):
        class Flat(Stateful):
            def __call__(self, theta, track_gradients=True):
                return super().__call__(theta, track_gradients).sum()

        with pytest.raises(
            ValueError, match=r"^`potential_fn`: expected to return shape \(3,\) .* got \(\)$"
        ):
            AdaptedPotential(Flat()).evaluate(THETA, X)

    def test_its_prior_goes_first(self):
        assert AdaptedPotential(Stateful(), OTHER_PRIOR).prior is PRIOR
        assert AdaptedPotential(Stateful(prior=None), OTHER_PRIOR).prior is OTHER_PRIOR

    def test_a_missing_prior_is_lent(self):
        class WithPrior(Stateful):
            def __call__(self, theta, track_gradients=True):
                return super().__call__(theta, track_gradients) + self.prior.log_prob(theta)

        theirs = WithPrior(prior=None)
        ours = AdaptedPotential(theirs, OTHER_PRIOR)
        expected = quadratic(THETA, X) + OTHER_PRIOR.log_prob(THETA)
        torch.testing.assert_close(ours.evaluate(THETA, X), expected)
        assert theirs.prior is None
        theirs.fails = True
        with pytest.raises(RuntimeError, match="theirs: failed"):
            ours.evaluate(THETA, X)
        assert theirs.prior is None

    def test_a_row_of_values_of_the_wrapped_object(self):
        class Row(Stateful):
            def __call__(self, theta, track_gradients=True):
                return super().__call__(theta, track_gradients)[None]

        assert torch.equal(AdaptedPotential(Row()).evaluate(THETA, X), quadratic(THETA, X))

    def test_it_moves_with_ours(self):
        theirs = Stateful(x_o=X)
        ours = AdaptedPotential(theirs).to("meta")
        assert theirs.device == ours.device == "meta"
        assert ours.prior.sample().device.type == ours.x_o.device.type == "meta"


class TestDoor:
    def test_ours_pass(self):
        potential = CustomPotential(quadratic, PRIOR)
        assert as_potential(potential, OTHER_PRIOR) is potential

    def test_a_stateful_object_is_adapted(self):
        potential = as_potential(Stateful())
        assert isinstance(potential, AdaptedPotential)
        assert isinstance(potential, BasePotential)

    def test_a_callable_is_wrapped_with_the_prior(self):
        potential = as_potential(quadratic, PRIOR)
        assert isinstance(potential, CustomPotential)
        assert potential.prior is PRIOR

    def test_a_posterior_is_told_what_to_give(self):
        class Posterior:
            potential_fn = Stateful()

        with pytest.raises(TypeError, match=r"got Posterior \(give its `potential_fn`\)$"):
            as_potential(Posterior())

    @pytest.mark.parametrize("given", [None, 3.0, "rKL", PRIOR])
    def test_nothing_that_can_be_called(self, given):
        with pytest.raises(TypeError, match=r"^`potential_fn`: expected a BasePotential or a callable"):
            as_potential(given)
