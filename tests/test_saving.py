"""Posteriors as files: what comes back is the same to the bit; what cannot be stored is asked for by name."""

import builtins
import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.distributions import constraints, transforms
from torch.optim import lr_scheduler

from visbi import VIPosterior
from visbi.core.archive import ArchiveError
from visbi.core.encoding import Decoder, Encoder, Vocabulary
from visbi.core.random import seeded
from visbi.estimators import LikelihoodEnsemble, NeuralLikelihood, NeuralRatio, RatioEnsemble
from visbi.estimators.likelihood import LikelihoodConfig
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.estimators.ratio import RatioConfig
from visbi.families import FAMILY_NAMES, LinkedFamily, named_body
from visbi.families.gaussian import GaussianBody
from visbi.potentials import BasePotential, CustomPotential, LikelihoodPotential, RatioPotential
from visbi.potentials.fence import Fence, FencedPotential
from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal, coordinates, mcmc_transform
from visbi.priors.inverse import Inverted
from visbi.priors.simplex import StickBreaking
from visbi.saving.distributions import CONSTRAINTS, DISTRIBUTIONS, TRANSFORMS

X = torch.tensor([[0.3, 0.5]])
SHORT: dict[str, Any] = dict(
    max_num_iters=5, warm_up_rounds=2, n_particles=16, show_progress_bar=False, quality_control=False
)


def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
    return -2 * (theta - x_o).square().sum(-1)


def box() -> BoxUniform:
    return BoxUniform(-2 * torch.ones(2), torch.tensor([2.0, 3.0]))


def likelihood(embedding: nn.Module | None = None, seed: int = 0) -> NeuralLikelihood:
    config = LikelihoodConfig(
        flow="maf", num_transforms=2, hidden_features=8, z_score_theta="independent", z_score_x="structured"
    )
    with seeded(seed):
        estimator = NeuralLikelihood(2, (2,), config, embedding)
        estimator.fit_standardisation(torch.randn(50, 2), 3 * torch.randn(50, 2) + 1)
        for parameter in estimator.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return estimator


def ratio(embedding: nn.Module | None = None, seed: int = 0) -> NeuralRatio:
    config = RatioConfig(num_blocks=1, hidden_features=8, z_score_theta="independent", z_score_x="none")
    with seeded(seed):
        return NeuralRatio(2, (2,), config, embedding)


def learned(**options: Any) -> VIPosterior:
    """A posterior of which everything can be stored."""
    options = {"q": "gaussian", "num_transforms": 1, "hidden_features": 4, **options}
    with seeded(4):
        return VIPosterior(LikelihoodPotential(likelihood(), box()), **options)


def trained(posterior: VIPosterior, x: Tensor | None = X, **options: Any) -> VIPosterior:
    with seeded(1):
        return posterior.train(x, **{**SHORT, **options})


def reload(posterior: VIPosterior, path: Path, **given: Any) -> VIPosterior:
    posterior.save(path / "p.visbi")
    return VIPosterior.load(path / "p.visbi", **given)


def assert_equal(a: VIPosterior, b: VIPosterior, *, go_on: bool = True) -> None:
    """Same draws and densities, and the same again after training on, to the last bit."""
    with seeded(2):
        theta = a.q.sample((50,))
    with seeded(2):
        assert torch.equal(theta, b.q.sample((50,)))
    assert torch.equal(a.q.log_prob(theta), b.q.log_prob(theta))
    assert torch.equal(a.prior.log_prob(theta), b.prior.log_prob(theta))
    assert torch.equal(a.potential(theta, X), b.potential(theta, X))
    assert torch.equal(a.theta_transform(theta), b.theta_transform(theta))
    if go_on:
        before = [t.clone() for t in a.q.trainable()]
        trained(a), trained(b)
        weights = list(zip(a.q.trainable(), b.q.trainable(), strict=True))
        assert all(torch.equal(mine, theirs) for mine, theirs in weights)
        assert any(not torch.equal(t, old) for t, old in zip(a.q.trainable(), before, strict=True))


# -- families and state --------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_named_families(name: str, tmp_path: Path) -> None:
    posterior = learned(q=name)
    assert_equal(posterior, reload(posterior, tmp_path), go_on=False)
    trained(posterior)
    assert_equal(posterior, reload(posterior, tmp_path))


@pytest.mark.parametrize(
    ("name", "options"),
    [("mixture", {"num_components": 3}), ("coupling", {"spline": True, "num_transforms": 2})],
)
def test_named_families_with_options_of_their_own(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    build = named_body(name, **options)
    with seeded(2):
        family = LinkedFamily(build(2), coordinates(box()), build)
    posterior = trained(learned(q=family))
    back = reload(posterior, tmp_path)
    assert_equal(posterior, back)
    assert [t.shape for t in back.q.fresh().trainable()] == [t.shape for t in family.trainable()]


@pytest.mark.parametrize("name", ["maf", "gf", "gaussian_diag"])
def test_placed_families(name: str, tmp_path: Path) -> None:
    posterior = trained(learned(q=name), init="match")
    assert_equal(posterior, reload(posterior, tmp_path))


def test_families_placed_twice(tmp_path: Path) -> None:
    posterior = learned(q="nice")
    posterior.set_q(posterior.q.placed(torch.ones(2), 0.5 * torch.eye(2)))
    trained(posterior, init=torch.randn(20, 2))
    assert_equal(posterior, reload(posterior, tmp_path))


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    posterior = learned(q="maf")
    posterior.q.body.double()
    assert_equal(posterior, reload(posterior, tmp_path))


def test_frozen_weights_stay_frozen(tmp_path: Path) -> None:
    posterior = learned(q="maf")
    next(posterior.q.body.parameters()).requires_grad_(False)
    trained(posterior)
    back = reload(posterior, tmp_path)
    assert len(back.q.trainable()) == len(posterior.q.trainable())
    assert_equal(posterior, back)


def test_all_state_comes_back(tmp_path: Path) -> None:
    posterior = trained(
        learned(vi_method="IW", num_transforms=3, z_score_theta="structured", z_score_x="none"), K=4
    )
    posterior.report, posterior.map(num_init_samples=20, num_iter=3)
    back = reload(posterior, tmp_path)
    assert (back.vi_method, back.num_transforms, back.hidden_features) == ("IW", 3, 4)
    assert (back.z_score_theta, back.z_score_x) == ("structured", "none")
    assert back.report == posterior.report
    assert back.trace == posterior.trace
    assert torch.equal(back.map(num_init_samples=1, num_iter=1), posterior.map())
    assert torch.equal(back.default_x, posterior.default_x)
    assert back._state.options == posterior._state.options
    assert repr(back) == repr(posterior)
    assert back.q is back._state.family
    assert back.potential_fn.prior is back.prior
    assert back.q.coords is back._coords


def test_every_attribute_is_saved() -> None:
    """One that is added without a thought for saving would be lost."""
    known = {"prior", "potential_fn", "num_transforms", "hidden_features", "z_score_theta", "z_score_x"}
    known |= {"_device", "_coords", "_state", "_x", "_map", "_method", "_family", "_warm", "_automatic"}
    assert vars(trained(learned())).keys() == known


def test_an_untrained_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\(\)"):
        reload(learned(), tmp_path).sample((1,))


def test_it_belongs_to_its_observation(tmp_path: Path) -> None:
    back = reload(trained(learned()), tmp_path)
    with pytest.raises(ValueError, match="observation"):
        back.sample((1,), x=X + 1)


def test_a_warm_start_stays_one(tmp_path: Path) -> None:
    first = trained(learned(q="maf"))
    second = learned(q=first)
    assert_equal(second, reload(second, tmp_path))


def test_saving_and_loading_change_nothing(tmp_path: Path) -> None:
    posterior, other = trained(learned(q="maf")), trained(learned(q="maf"))
    before = torch.get_rng_state()
    back = reload(posterior, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(posterior, other)
    trained(back)
    assert_equal(posterior, other, go_on=False)


def test_saved_again_it_is_the_same_file(tmp_path: Path) -> None:
    posterior = trained(learned(q="nsf"), init="match")
    posterior.report  # noqa: B018
    reload(posterior, tmp_path).save(tmp_path / "again.visbi")
    assert (tmp_path / "p.visbi").read_bytes() == (tmp_path / "again.visbi").read_bytes()


def test_elsewhere(tmp_path: Path) -> None:
    posterior = trained(learned())
    back = reload(posterior, tmp_path, device="meta")
    assert back.q.sample((3,)).device.type == "meta"
    assert back.default_x.device.type == "meta"


def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    trained(learned()).save(tmp_path / "p.visbi")
    moved = changed(tmp_path / "p.visbi", lambda c: c["options"]["items"].update(device="cuda:77"))
    with pytest.raises(ValueError, match=r"`device`: expected .*pass device='cpu'.*got 'cuda:77'"):
        VIPosterior.load(moved)
    assert VIPosterior.load(moved, device="cpu").sample((2,)).shape == (2, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_a_gpu_and_back(tmp_path: Path) -> None:
    posterior = trained(learned(q="maf", device="cuda:0"), x=X.to("cuda:0"))
    back = reload(posterior, tmp_path)
    theta = posterior.sample((20,))
    assert back.default_x.device == torch.device("cuda:0")
    assert torch.equal(back.log_prob(theta), posterior.log_prob(theta))
    here = VIPosterior.load(tmp_path / "p.visbi", device="cpu")
    torch.testing.assert_close(here.log_prob(theta.cpu()), posterior.log_prob(theta).cpu())
    trained(here)


# -- optimisers ----------------------------------------------------------------------------


class Descent(torch.optim.SGD):
    pass


class Forgetful(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "history": {1, 2}}


def halving(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": torch.optim.RMSprop},
        {"optimizer": partial(torch.optim.SGD, momentum=0.9), "learning_rate": 1e-4},
        {"optimizer": torch.optim.AdamW, "scheduler": partial(lr_scheduler.StepLR, step_size=2)},
        {"scheduler": lr_scheduler.LinearLR, "gamma": 1.0},
        {"seed": torch.tensor(5), "init": torch.randn(20, 2)},
    ],
    ids=lambda o: "-".join(o),
)
def test_training_goes_on_with(options: dict[str, Any], tmp_path: Path) -> None:
    posterior = trained(learned(), **options)
    back = reload(posterior, tmp_path)
    for one in (posterior, back):
        trained(one, **options)
    assert_equal(posterior, back)


USERS_OWN = {
    "optimizer": Descent,
    "scheduler": halving,
    "weight_transform": torch.sqrt,
}


@pytest.mark.parametrize("name", USERS_OWN)
def test_a_users_option_is_asked_for(name: str, tmp_path: Path) -> None:
    options = {name: USERS_OWN[name]}
    posterior = trained(learned(vi_method="fKL"), **options)
    with pytest.raises(
        ValueError, match=rf"`{name}`: expected what .* could not store .*load\(path, {name}="
    ):
        reload(posterior, tmp_path)
    back = reload(posterior, tmp_path, **options)
    for one in (posterior, back):
        trained(one, **options)
    assert_equal(posterior, back, go_on=False)


@pytest.mark.parametrize("name", USERS_OWN)
def test_a_users_option_may_be_done_without(name: str, tmp_path: Path) -> None:
    posterior = trained(learned(vi_method="fKL"), **{name: USERS_OWN[name]})
    back = reload(posterior, tmp_path, **{name: None})
    assert_equal(posterior, back, go_on=False)
    trained(back)


def test_another_optimizer_than_the_saved_one(tmp_path: Path) -> None:
    posterior = trained(learned(), optimizer=Descent)
    with pytest.raises(ValueError, match="`optimizer` and `scheduler`"):
        reload(posterior, tmp_path, optimizer=lambda parameters, lr: torch.optim.SGD(parameters[:1], lr=lr))


def test_an_optimizer_with_a_state_of_its_own_loses_it(tmp_path: Path) -> None:
    posterior = trained(learned(), optimizer=Forgetful)
    with pytest.warns(UserWarning, match="optimiser's state cannot be stored"):
        posterior.save(tmp_path / "p.visbi")
    back = VIPosterior.load(tmp_path / "p.visbi", optimizer=Forgetful)
    assert_equal(posterior, back, go_on=False)
    trained(back, optimizer=Forgetful)


# -- priors, transforms, constraints -------------------------------------------------------


def two(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def a_cholesky() -> Tensor:
    return torch.linalg.cholesky(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))


EXAMPLES: list[td.Distribution] = [
    td.Beta(two(1.5, 2), two(3, 0.7)),
    td.Cauchy(two(0, 1), two(1, 2)),
    td.Chi2(two(3, 4.7)),
    td.Exponential(two(1, 0.3)),
    td.FisherSnedecor(two(3, 4), two(5, 6)),
    td.Gamma(two(1, 2), two(0.3, 4)),
    td.GeneralizedPareto(torch.zeros(2), torch.ones(2), torch.tensor([0.1, 0.2])),
    td.Gumbel(two(0, 1), two(1, 2)),
    td.HalfCauchy(two(1, 2)),
    td.HalfNormal(two(1, 2)),
    td.InverseGamma(two(1, 2), two(0.3, 4)),
    td.Kumaraswamy(two(1, 2), two(0.3, 4)),
    td.Laplace(two(0, 1), two(1, 2)),
    td.LogNormal(two(0, 1), two(1, 2)),
    td.Normal(torch.zeros(2), 0.1),
    td.Pareto(two(1, 2), two(3, 4)),
    td.StudentT(two(3, 4), two(0, 1), two(1, 2)),
    td.Uniform(torch.zeros(2), two(1, 2), validate_args=False),
    td.VonMises(two(0, 1), two(1, 2)),
    td.Weibull(two(1, 2), two(0.3, 4)),
    TruncatedNormal(torch.zeros(2), torch.ones(2), low=torch.tensor([-1.0, 0.0])),
    td.Dirichlet(two(1, 2, 3)),
    td.LogisticNormal(two(0, 1), two(1, 2)),
    td.LowRankMultivariateNormal(two(0, 1), torch.ones(2, 1).double(), two(1, 2)),
    td.MultivariateNormal(torch.ones(2), scale_tril=a_cholesky()),
    td.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.3], [0.3, 1.0]])),
    td.MultivariateNormal(torch.ones(2), precision_matrix=torch.tensor([[2.0, 0.3], [0.3, 1.0]])),
    td.MixtureSameFamily(
        td.Categorical(torch.rand(3)), td.Independent(td.Normal(torch.randn(3, 2), torch.rand(3, 2)), 1)
    ),
    MultipleIndependent([td.Beta(torch.ones(2), 2.0), td.HalfCauchy(torch.ones(1)), box()]),
    td.Independent(td.Normal(torch.zeros(2), torch.ones(2)), 1, validate_args=True),
    td.TransformedDistribution(
        td.Uniform(torch.zeros(2), torch.ones(2)),
        [transforms.SigmoidTransform().inv, transforms.AffineTransform(1.0, two(2, 3))],
    ),
    td.TransformedDistribution(td.Normal(two(0, 0), two(1, 1)), transforms.ExpTransform(cache_size=1)),
    box(),
    td.Categorical(torch.rand(7)),
    td.Categorical(logits=torch.randn(7)),
]
STORED = Vocabulary((*DISTRIBUTIONS, *TRANSFORMS, *CONSTRAINTS))


def there_and_back(value: Any) -> Any:
    encoder = Encoder(STORED)
    text = json.dumps(encoder.encode(value, "value"), allow_nan=False)
    return Decoder(STORED, encoder.tensors, {}).decode(json.loads(text))


@pytest.mark.parametrize("dist", EXAMPLES, ids=lambda d: type(d).__name__)
def test_distributions_come_back_to_the_bit(dist: td.Distribution) -> None:
    back = there_and_back(dist)
    assert type(back) is type(dist)
    assert (back.batch_shape, back.event_shape) == (dist.batch_shape, dist.event_shape)
    assert back._validate_args == dist._validate_args
    with seeded(0):
        draws = dist.sample(torch.Size([100]))
    with seeded(0):
        assert torch.equal(draws, back.sample(torch.Size([100])))
    draws = draws.clone()  # a transform that caches knows its last value by identity
    assert torch.equal(dist.log_prob(draws), back.log_prob(draws))
    if not dist.support.is_discrete:
        assert torch.equal(there_and_back(dist.support).check(draws), dist.support.check(draws))


def test_every_kind_of_distribution_has_an_example() -> None:
    assert {type(dist) for dist in EXAMPLES} == {kind.type for kind in DISTRIBUTIONS}


TRANSFORM_EXAMPLES: list[transforms.Transform] = [
    transforms.ExpTransform(),
    transforms.ExpTransform(cache_size=1),
    transforms.LowerCholeskyTransform(),
    transforms.SigmoidTransform(),
    transforms.SoftmaxTransform(),
    transforms.SoftplusTransform(),
    transforms.StickBreakingTransform(),
    StickBreaking(),
    transforms.TanhTransform(),
    transforms.AffineTransform(two(1, 2), two(3, 4), event_dim=1),
    transforms.CatTransform([transforms.ExpTransform(), transforms.SigmoidTransform()], -1, [1, 1]),
    transforms.ComposeTransform([transforms.ExpTransform(), transforms.PowerTransform(2.0)]),
    transforms.identity_transform,
    transforms.IndependentTransform(transforms.ExpTransform(), 1),
    transforms.PowerTransform(torch.tensor(3.0)),
    transforms.ReshapeTransform(torch.Size([2]), torch.Size([2, 1])),
    transforms.StackTransform([transforms.ExpTransform(), transforms.SigmoidTransform()], -1),
    transforms.ExpTransform().inv,
    Inverted(transforms.ExpTransform()),
]


@pytest.mark.parametrize("transform", TRANSFORM_EXAMPLES, ids=repr)
def test_transforms_come_back(transform: transforms.Transform) -> None:
    back = there_and_back(transform)
    y = torch.tensor([[0.2, 0.3], [0.4, 0.9]])
    assert type(back) is type(transform)
    assert torch.equal(back(y), transform(y))
    assert (back.domain.event_dim, back.codomain.event_dim) == (
        transform.domain.event_dim,
        transform.codomain.event_dim,
    )
    if transform.bijective:
        theta = transform(y).clone()  # one that caches knows its last value by identity
        assert torch.equal(back.inv(theta), transform.inv(theta))
        assert torch.equal(back.log_abs_det_jacobian(y, theta), transform.log_abs_det_jacobian(y, theta))


def test_every_kind_of_transform_has_an_example() -> None:
    assert {type(t) for t in TRANSFORM_EXAMPLES} == {kind.type for kind in TRANSFORMS}


CONSTRAINT_EXAMPLES: list[constraints.Constraint] = [
    constraints.real,
    constraints.simplex,
    constraints.positive,
    constraints.nonnegative,
    constraints.less_than(two(1, 2)),
    constraints.interval(-1.0, two(1, 2)),
    constraints.half_open_interval(0.0, 1.0),
    constraints.independent(constraints.unit_interval, 1),
    constraints.cat([constraints.real, constraints.positive], -1, [1, 1]),
    constraints.stack([constraints.real, constraints.positive], -1),
    constraints.MixtureSameFamilyConstraint(constraints.positive),
]


@pytest.mark.parametrize("constraint", CONSTRAINT_EXAMPLES, ids=repr)
def test_constraints_come_back(constraint: constraints.Constraint) -> None:
    back = there_and_back(constraint)
    values = torch.tensor([[-3.0, 0.5], [0.25, 0.75], [0.0, 1.0], [1.5, 1.5]])
    assert type(back) is type(constraint)
    assert torch.equal(back.check(values), constraint.check(values))
    assert back.event_dim == constraint.event_dim


def test_every_kind_of_constraint_has_an_example() -> None:
    assert {type(c) for c in CONSTRAINT_EXAMPLES} == {kind.type for kind in CONSTRAINTS}


PRIORS: dict[str, Callable[[], td.Distribution]] = {
    "box": box,
    "float64 box": lambda: BoxUniform(two(-3, -3), two(3, 3)),
    "mixed": lambda: MultipleIndependent([td.HalfCauchy(torch.ones(1)), td.Beta(torch.ones(1), 2.0)]),
    "truncated": lambda: td.Independent(TruncatedNormal(torch.zeros(2), 1.0), 1),
    "correlated": lambda: td.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5),
    "log-normal": lambda: td.Independent(td.LogNormal(torch.zeros(2), torch.ones(2)), 1),
    "gamma": lambda: td.Independent(td.Gamma(torch.ones(2), 2.0), 1),
    "simplex": lambda: td.Dirichlet(torch.ones(2)),
    "mixture": lambda: EXAMPLES[27],
    "logistic": lambda: td.Independent(EXAMPLES[30], 1),
}


@pytest.mark.parametrize("z_score", ["none", "independent", "structured"])
@pytest.mark.parametrize("name", PRIORS)
def test_posteriors_on_priors(name: str, z_score: Any, tmp_path: Path) -> None:
    posterior = VIPosterior(log_p, PRIORS[name](), q="gaussian", z_score_theta=z_score)
    assert_equal(trained(posterior), reload(posterior, tmp_path, potential_fn=log_p))


@pytest.mark.parametrize(
    "transform",
    [
        mcmc_transform(box()),
        transforms.identity_transform,
        transforms.ComposeTransform(
            [transforms.AffineTransform(0.5, torch.tensor([0.25, 0.2])), transforms.SigmoidTransform().inv]
        ),
    ],
    ids=["ours", "identity", "composed"],
)
def test_a_storable_theta_transform(transform: transforms.Transform, tmp_path: Path) -> None:
    prior = BoxUniform(-2 * torch.ones(2), torch.tensor([2.0, 2.5]))
    posterior = VIPosterior(log_p, prior, q="gaussian", theta_transform=transform)
    assert_equal(trained(posterior), reload(posterior, tmp_path, potential_fn=log_p))


class Doubled(transforms.Transform):
    """A user's own map, from R^2 to R^2."""

    domain, codomain, bijective = constraints.real_vector, constraints.real_vector, True

    def _call(self, x: Tensor) -> Tensor:
        return 2 * x

    def _inverse(self, y: Tensor) -> Tensor:
        return y / 2

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.full(x.shape[:-1], 2 * torch.log(torch.tensor(2.0)))


class Shifted(Doubled):
    def _call(self, x: Tensor) -> Tensor:
        return 2 * x + 1

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - 1) / 2


def test_a_users_theta_transform_is_asked_for(tmp_path: Path) -> None:
    prior = td.MultivariateNormal(torch.zeros(2), torch.eye(2))
    posterior = trained(VIPosterior(log_p, prior, q="gaussian", theta_transform=Doubled()))
    with pytest.raises(ValueError, match=r"theta_transform was an object of class Doubled"):
        reload(posterior, tmp_path, potential_fn=log_p)
    assert_equal(posterior, reload(posterior, tmp_path, potential_fn=log_p, theta_transform=Doubled()))
    posterior = VIPosterior(log_p, prior, q="gaussian", theta_transform=Doubled(), z_score_theta="none")
    with pytest.raises(ValueError, match="`prior` and `theta_transform`"):
        reload(posterior, tmp_path, potential_fn=log_p, theta_transform=Shifted())


class Ring(td.Distribution):
    """A user's own prior, with a support of torch or of its own, or none."""

    arg_constraints = {}

    def __init__(self, support: Any, scale: float = 1.0) -> None:
        self._support, self.scale = support, scale
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.scale * torch.randn(*sample_shape, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        return -(value.norm(dim=-1) / self.scale - 1).square()


class Plane(type(constraints.real)):
    """A user's own constraint, with torch's bijection of the one it extends."""


@pytest.mark.parametrize("support", [constraints.real_vector, constraints.independent(Plane(), 1)], ids=repr)
def test_a_users_prior_is_asked_for(support: Any, tmp_path: Path) -> None:
    if td.biject_to._registry.get(Plane) is None:
        td.biject_to.register(Plane, lambda _: transforms.identity_transform)
    posterior = trained(VIPosterior(log_p, Ring(support), q="gaussian"))
    with pytest.raises(
        ValueError, match=r"prior was an object of class Ring.*load\(path, prior=\.\.\., potential"
    ):
        reload(posterior, tmp_path, potential_fn=log_p)
    assert_equal(posterior, reload(posterior, tmp_path, potential_fn=log_p, prior=Ring(support)))
    three = td.MultivariateNormal(torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="`prior"):
        reload(posterior, tmp_path, potential_fn=log_p, prior=three)


def test_a_prior_that_leads_to_other_coordinates(tmp_path: Path) -> None:
    support = constraints.independent(Plane(), 1)
    posterior = VIPosterior(log_p, Ring(support), q="gaussian", theta_transform=Doubled())
    with pytest.raises(ValueError, match="`prior` and `theta_transform`: expected those"):
        reload(posterior, tmp_path, potential_fn=log_p, prior=box())
    back = reload(posterior, tmp_path, potential_fn=log_p, prior=Ring(support), theta_transform=Doubled())
    assert_equal(posterior, back)


# -- potentials ----------------------------------------------------------------------------


def embedding(width: int = 3) -> nn.Module:
    with seeded(3):
        return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Tanh())


def a_fence() -> Fence:
    with seeded(0):
        return Fence(coordinates(box()), 0.3 * torch.randn(100, 2), share=0.5)


STORABLE: dict[str, Callable[[], BasePotential]] = {
    "likelihood": lambda: LikelihoodPotential(likelihood(), box()),
    "ratio": lambda: RatioPotential(ratio(), box()),
    "likelihoods": lambda: LikelihoodPotential(LikelihoodEnsemble([likelihood(), likelihood(seed=1)]), box()),
    "ratios": lambda: RatioPotential(RatioEnsemble([ratio(), ratio(seed=1)]), box()),
    "in prior coordinates": lambda: LikelihoodPotential(
        likelihood(PriorCoordinates(coordinates(box()))), box()
    ),
    "fenced": lambda: FencedPotential(LikelihoodPotential(likelihood(), box()), a_fence()),
    "float64": lambda: LikelihoodPotential(likelihood().double(), BoxUniform(two(-2, -2), two(2, 2))),
}


@pytest.mark.parametrize("name", STORABLE)
def test_learned_potentials(name: str, tmp_path: Path) -> None:
    posterior = VIPosterior(STORABLE[name](), q="gaussian")
    assert_equal(trained(posterior, X.to(posterior.prior.sample().dtype)), reload(posterior, tmp_path))


def test_the_potentials_own_observation_comes_back(tmp_path: Path) -> None:
    potential = LikelihoodPotential(likelihood(), box(), x_o=X)
    potential.set_x(X, x_is_iid=False)
    back = reload(VIPosterior(potential, q="gaussian"), tmp_path)
    assert torch.equal(back.default_x, X)
    assert torch.equal(back.potential_fn.x_o, X)
    assert back.potential_fn.x_is_iid is False


def test_a_potential_with_a_prior_of_its_own(tmp_path: Path) -> None:
    wide = BoxUniform(-9 * torch.ones(2), 9 * torch.ones(2))
    posterior = VIPosterior(LikelihoodPotential(likelihood(), wide), box(), q="gaussian")
    back = reload(trained(posterior), tmp_path)
    assert_equal(posterior, back)
    assert back.potential_fn.prior.support.base_constraint.upper_bound.tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("keyword", "make"),
    [
        ("theta_embedding_net", lambda net: LikelihoodPotential(likelihood(net), box())),
        ("embedding_net", lambda net: RatioPotential(RatioEnsemble([ratio(net), ratio(net, 1)]), box())),
    ],
)
def test_a_users_network_is_asked_for(
    keyword: str, make: Callable[[nn.Module], BasePotential], tmp_path: Path
) -> None:
    net = embedding()
    posterior = trained(VIPosterior(make(net), q="gaussian"))
    with pytest.raises(ValueError, match=f"{keyword} was an object of class Sequential"):
        reload(posterior, tmp_path)
    other = embedding()
    for parameter in other.parameters():
        parameter.data.zero_()
    back = reload(posterior, tmp_path, **{keyword: other})
    assert_equal(posterior, back)
    assert all(not bool(p.any()) for p in other.parameters())  # copied, not changed
    with pytest.raises(ValueError, match=f"`{keyword}`: expected the network"):
        reload(posterior, tmp_path, **{keyword: embedding(4)})
    with pytest.raises(ValueError, match=f"`{keyword}`: expected what"):
        reload(posterior, tmp_path, **{keyword: None})


class Quadratic(BasePotential):
    def evaluate(self, theta: Tensor, x: Tensor | None, x_is_iid: bool = True) -> Tensor:
        return log_p(theta, self.x_o if x is None else x)


class Foreign:
    """A stateful potential of another package."""

    device, prior = "cpu", None

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def set_x(self, x: Tensor | None, x_is_iid: bool = True) -> None:
        self.x = x

    def return_x_o(self) -> Tensor | None:
        return self.x

    def to(self, device: str) -> "Foreign":
        return self

    def __call__(self, theta: Tensor, track_gradients: bool = True) -> Tensor:
        assert self.x is not None
        return log_p(theta, self.x)


@pytest.mark.parametrize(
    ("make", "was"),
    [
        (lambda: log_p, "function 'log_p'"),
        (lambda: lambda theta, x_o: log_p(theta, x_o), "<lambda>"),
        (Quadratic, "class Quadratic"),
        (Foreign, "class Foreign"),
        (lambda: LikelihoodPotential(_Likelihood(), box()), "class _Likelihood"),
    ],
    ids=["function", "lambda", "subclass", "foreign", "estimator"],
)
def test_a_users_potential_is_asked_for(make: Callable[[], Any], was: str, tmp_path: Path) -> None:
    posterior = trained(VIPosterior(make(), box(), q="gaussian"))
    with pytest.raises(ValueError, match=rf"`potential_fn`: expected what .*potential_fn was .*{was}"):
        reload(posterior, tmp_path)
    back = reload(posterior, tmp_path, potential_fn=make())
    assert_equal(posterior, back)
    assert back.potential_fn.prior is not None


class _Likelihood(nn.Module):
    def log_prob_iid(self, x: Tensor, theta: Tensor) -> Tensor:
        return log_p(theta, x)


def test_the_observation_of_a_callable_comes_back(tmp_path: Path) -> None:
    posterior = VIPosterior(CustomPotential(log_p, box(), x_o=X), q="gaussian")
    back = reload(posterior, tmp_path, potential_fn=log_p)
    assert torch.equal(back.potential_fn.x_o, X)
    assert torch.equal(back.default_x, X)


# -- q that is a user's own ----------------------------------------------------------------


def leaf(*shape: int) -> Tensor:
    return torch.zeros(*shape, requires_grad=True)


def normal(loc: Tensor, scale: Any = 1.0) -> td.Distribution:
    return td.Independent(td.Normal(loc, scale), 1)


def build(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
    return normal(leaf(*event_shape), torch.ones(event_shape, requires_grad=True))


class Module(nn.Module):
    event_shape, batch_shape, has_rsample = torch.Size([2]), torch.Size(), True

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.register_buffer("shift", torch.zeros(2))

    def _normal(self) -> td.Distribution:
        return normal(self.loc + self.shift, self.log_scale.exp())

    def rsample(self, shape: Any = ()) -> Tensor:
        return self._normal().rsample(shape)

    sample = rsample

    def log_prob(self, theta: Tensor) -> Tensor:
        return self._normal().log_prob(theta)


def shifted() -> Module:
    module = Module()
    module.shift.fill_(0.1)
    return module


def with_parameters() -> dict[str, Any]:
    loc = leaf(2)
    return {"q": normal(loc, torch.ones(2)), "parameters": [loc]}


def with_modules() -> dict[str, Any]:
    module = Module()
    return {"q": module, "modules": [module]}


Q_KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "distribution": lambda: {"q": normal(leaf(2), torch.ones(2, requires_grad=True))},
    "views": lambda: {"q": normal(leaf(2), torch.ones((), requires_grad=True))},
    "parameters": with_parameters,
    "module": lambda: {"q": Module()},
    "modules": with_modules,
    "callable": lambda: {"q": build},
}


@pytest.mark.parametrize("name", Q_KINDS)
def test_a_users_q_is_asked_for(name: str, tmp_path: Path) -> None:
    posterior = trained(VIPosterior(LikelihoodPotential(likelihood(), box()), **Q_KINDS[name]()))
    with pytest.raises(ValueError, match=r"`q`: expected what .*load\(path, q=\.\.\.\)"):
        reload(posterior, tmp_path)
    back = reload(posterior, tmp_path, **Q_KINDS[name]())
    assert_equal(posterior, back)
    for one in (posterior, back):
        trained(one, retrain_from_scratch=True)
    assert_equal(posterior, back)


def test_buffers_of_a_users_module_come_back(tmp_path: Path) -> None:
    posterior = trained(VIPosterior(LikelihoodPotential(likelihood(), box()), q=shifted()))
    assert_equal(posterior, reload(posterior, tmp_path, q=Module()))


@pytest.mark.parametrize(
    ("q", "said"),
    [
        (normal(leaf(2), 1.0), "shapes"),
        (normal(leaf(3), leaf(3).exp()), "event_shape"),
        ("maf", "`q`"),
        (None, "`q`"),
        (torch.zeros(2), "`q`"),
    ],
    ids=["fewer tensors", "other shape", "name", "none", "tensor"],
)
def test_another_q_than_the_saved_one(q: Any, said: str, tmp_path: Path) -> None:
    posterior = VIPosterior(LikelihoodPotential(likelihood(), box()), q=Q_KINDS["distribution"]()["q"])
    with pytest.raises((ValueError, TypeError), match=said):
        reload(posterior, tmp_path, q=q)


class Wide(LinkedFamily):
    """A family of a user's own."""

    def fresh(self) -> "Wide":
        return Wide(super().fresh().body, self.coords, self.build)


def wide() -> Wide:
    family = VIPosterior(log_p, box(), q="gaussian").q
    return Wide(family.body, family.coords, family.build)


def test_a_users_own_family(tmp_path: Path) -> None:
    posterior = trained(VIPosterior(LikelihoodPotential(likelihood(), box()), q=wide()))
    with pytest.raises(ValueError, match="q was an object of class Wide"):
        reload(posterior, tmp_path)
    assert_equal(posterior, reload(posterior, tmp_path, q=wide()))


def test_a_family_that_a_user_builds(tmp_path: Path) -> None:
    def family() -> LinkedFamily:
        coords = coordinates(box())
        return LinkedFamily(GaussianBody(2), coords, lambda dim: GaussianBody(dim))

    posterior = trained(VIPosterior(LikelihoodPotential(likelihood(), box()), q=family()))
    with pytest.raises(ValueError, match="q was an object of class LinkedFamily"):
        reload(posterior, tmp_path)
    assert_equal(posterior, reload(posterior, tmp_path, q=family()))


def test_a_named_family_with_a_body_of_ones_own(tmp_path: Path) -> None:
    posterior = learned(q="maf")
    posterior.q.body.layers = posterior.q.body.layers[:0]
    with pytest.raises(ValueError, match="q was an object of class LinkedFamily"):
        reload(posterior, tmp_path)


# -- the door ------------------------------------------------------------------------------


def test_all_that_is_missing_is_listed_at_once(tmp_path: Path) -> None:
    posterior = trained(VIPosterior(log_p, Ring(constraints.real_vector), q=build), optimizer=Descent)
    with pytest.raises(
        ValueError, match=r"load\(path, prior=\.\.\., potential_fn=\.\.\., q=\.\.\., optimizer="
    ):
        reload(posterior, tmp_path, prior=Ring(constraints.real_vector))


def test_what_the_file_holds_is_not_taken(tmp_path: Path) -> None:
    posterior = learned()
    with pytest.raises(
        TypeError, match=r"`prior`: expected nothing, since the file holds it; got BoxUniform"
    ):
        reload(posterior, tmp_path, prior=box())


def test_an_unknown_keyword_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`potential`: expected a keyword of load\(\).*`potential_fn`"):
        reload(learned(), tmp_path, potential=log_p)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    posterior = learned()
    posterior.save(tmp_path / "p.visbi")
    before = (tmp_path / "p.visbi").read_bytes()
    posterior.to("meta")
    with pytest.raises(TypeError, match="meta"):
        posterior.save(tmp_path / "p.visbi")
    assert (tmp_path / "p.visbi").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.visbi"]


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a saved posterior with another manifest."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(members["manifest.json"])
    change(manifest["content"])
    members["manifest.json"] = json.dumps(manifest).encode()
    out = path.with_name("changed.visbi")
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out


BOUND = {
    "is": "object",
    "kind": "partial",
    "id": 99,
    "fields": {
        "function": "os.system",
        "arguments": {"is": "tuple", "items": ["true"]},
        "keywords": {"is": "dict", "items": {}},
    },
}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.pop("x"),
        lambda c: c.update(prior=None),
        lambda c: c.update(family=c["coords"]),
        lambda c: c.update(options=[]),
        lambda c: c.update(fit=c["prior"]),
        lambda c: c.update(missing=5),
        lambda c: c["prior"].update(kind="os.system"),
        lambda c: c["prior"]["fields"].pop("low"),
        lambda c: c["prior"]["fields"].update(extra=1),
        lambda c: c["family"]["fields"].update(name="builtins.eval"),
        lambda c: c["family"]["fields"].update(dim=3),
        lambda c: c["fit"]["fields"].update(trace={"is": "tensor", "name": "x"}),
        lambda c: c["fit"]["fields"].update(method=None),
        lambda c: c["fit"]["fields"]["options"]["items"].update(optimizer=BOUND),
        lambda c: c["potential"]["fields"]["estimator"]["fields"]["weights"]["items"]["tensors"].update(
            items={}
        ),
        lambda c: c["x"].update({"is": "pickle"}),
    ],
)
def test_a_forged_manifest_is_a_clear_error(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    trained(learned()).save(tmp_path / "p.visbi")
    with pytest.raises(
        ArchiveError, match=r"`path`: expected a posterior saved by visbi; got '.*changed.visbi'"
    ):
        VIPosterior.load(changed(tmp_path / "p.visbi", change))


def test_no_file_and_a_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        VIPosterior.load(tmp_path / "p.visbi")
    (tmp_path / "p.visbi").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"p\.visbi': a damaged or foreign file"):
        VIPosterior.load(tmp_path / "p.visbi")


def test_loading_neither_unpickles_nor_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = trained(learned(q="nsf"))
    reload(posterior, tmp_path)  # what the loader itself needs is imported now

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loading a file must not run this")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr("importlib.import_module", forbidden)
    assert_equal(posterior, VIPosterior.load(tmp_path / "p.visbi"), go_on=False)


def test_a_fresh_process_loads_it_and_keeps_torchs_settings(tmp_path: Path) -> None:
    posterior = trained(learned(q="maf"))
    posterior.save(tmp_path / "p.visbi")
    code = """
import sys, torch
from visbi import VIPosterior
before = torch.distributions.Distribution._validate_args
posterior = VIPosterior.load(sys.argv[1])
torch.manual_seed(0)
print(torch.distributions.Distribution._validate_args == before, posterior.sample((1,))[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p.visbi")], capture_output=True, text=True, check=True
    )
    with seeded(0):
        assert done.stdout.strip() == f"True {posterior.sample((1,))[0].tolist()}"


def test_no_warnings_on_the_way(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reload(trained(learned(q="maf")), tmp_path)


# -- files of older versions ---------------------------------------------------------------

OLD = Path(__file__).parent / "data" / "format_1"
FACTS: dict[str, dict[str, Any]] = json.loads((OLD / "facts.json").read_text())


def old_potential(theta: Tensor, x_o: Tensor) -> Tensor:
    return -2 * (theta[:, :2] - x_o).square().sum(-1)


def from_old(name: str) -> VIPosterior:
    given: dict[str, Any] = {}
    if name not in ("maf", "sospf", "gaussian_diag"):
        given["potential_fn"] = old_potential
    if name == "users_q":
        given["q"] = build
    return VIPosterior.load(OLD / f"{name}.visbi", **given)


@pytest.mark.parametrize("name", FACTS)
def test_files_of_format_1_say_what_they_said(name: str) -> None:
    posterior, facts = from_old(name), FACTS[name]
    theta = torch.tensor(facts["theta"], dtype=posterior.prior.sample().dtype)
    said = {
        "log_prior": posterior.prior.log_prob(theta),
        "log_q": posterior.q.log_prob(theta),
        "potential": posterior.potential(theta, X),
        "theta_of_z": posterior.link_transform(torch.tensor(facts["z"])),
    }
    for key, value in said.items():
        torch.testing.assert_close(value.double(), torch.tensor(facts[key]).double(), rtol=1e-4, atol=1e-4)
    assert (repr(posterior), posterior.vi_method) == (facts["described"], facts["method"])


@pytest.mark.parametrize("name", FACTS)
def test_files_of_format_1_train_on(name: str) -> None:
    posterior = from_old(name)
    before = [t.detach().clone() for t in posterior.q.trainable()]
    trained(posterior)
    assert any(not torch.equal(a, b) for a, b in zip(before, posterior.q.trainable(), strict=True))


def test_a_file_of_format_1_holds_all_state() -> None:
    posterior = from_old("maf")
    assert posterior.trace.num_iters == 3
    assert posterior.report.n_draws == 50_000
    assert posterior._map is not None
    assert posterior._state.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.999**3)
    with zipfile.ZipFile(OLD / "maf.visbi") as file:
        assert json.loads(file.read("manifest.json"))["format_version"] == 1
