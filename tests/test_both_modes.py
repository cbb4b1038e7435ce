"""What holds of a posterior however it was fitted: to one observation, or to all at once."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor

from posterior_cases import PUBLISHED_FAMILIES
from visbi import VIPosterior
from visbi.core.random import seeded
from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal

SMALL: dict[str, Any] = dict(num_transforms=1, hidden_features=8)
QUICK: dict[str, Any] = dict(max_num_iters=3, n_particles=8, show_progress_bar=False)


def log_p(theta: Tensor, x: Tensor) -> Tensor:
    return -2 * (theta - x).square().sum(-1)


def box(dim: int = 2) -> BoxUniform:
    return BoxUniform(torch.zeros(dim), torch.ones(dim))


def one(value: float) -> Tensor:
    return torch.tensor([value])


PRIORS: dict[str, Callable[[], td.Distribution]] = {
    "box": box,
    "half-line and box": lambda: MultipleIndependent([td.HalfCauchy(one(1.0)), box(1)]),
    "all kinds": lambda: MultipleIndependent(
        [
            box(1),
            td.Gamma(one(2.0), one(1.0)),
            td.Normal(one(0.0), one(2.0)),
            TruncatedNormal(one(0.0), one(1.0), low=one(-0.5)),
        ]
    ),
    "log-normal and correlated": lambda: MultipleIndependent(
        [td.LogNormal(one(0.0), one(0.5)), td.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5)]
    ),
}


def single(posterior: VIPosterior, x: Tensor | None = None, **options: Any) -> VIPosterior:
    x = torch.full((1, posterior.prior.event_shape[0]), 0.5) if x is None else x
    return posterior.train(x, **{**QUICK, "warm_up_rounds": 2, "quality_control": False, **options})


def amortised(posterior: VIPosterior, x: Tensor | None = None, **options: Any) -> VIPosterior:
    with seeded(4):
        theta = posterior.prior.sample(torch.Size([60]))
        data = theta + 0.5 * torch.randn_like(theta)
    posterior.train_amortized(theta, data, **{**QUICK, **options})
    x = torch.full((1, theta.shape[1]), 0.5) if x is None else x
    return posterior if posterior.default_x is not None else posterior.set_default_x(x)


MODES = {"single": single, "amortised": amortised}
BOTH = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def made(prior: td.Distribution | None = None, potential: Any = log_p, **options: Any) -> VIPosterior:
    return VIPosterior(potential, box() if prior is None else prior, **{"q": "gaussian", **SMALL, **options})


def weights(posterior: VIPosterior) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in posterior.q.parameters()])


# supports


@BOTH
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("q", PUBLISHED_FAMILIES)
def test_every_family_on_bounded_and_mixed_priors(q: str, prior: Any, mode: Any) -> None:
    """q lies within the support, and its integral over it, as a mean over draws of the prior, is one."""
    posterior = mode(made(prior(), q=q))
    with seeded(0):
        theta = posterior.sample((300,))
        of_prior = posterior.prior.sample(torch.Size([1000]))
    assert posterior.trace.skipped == posterior.trace.excluded == 0
    assert bool(posterior.prior.support.check(theta).all())
    assert bool(posterior.log_prob(theta).isfinite().all())
    ratio = (posterior.log_prob(of_prior) - posterior.prior.log_prob(of_prior)).double().exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.2 and abs(float(ratio.mean()) - 1) < 5 * error + 1e-3
    outside = of_prior[:3].clone()
    outside[:, 0] = -1.0  # each of the first entries is bounded below
    assert posterior.log_prob(outside).tolist() == [-torch.inf] * 3


def test_an_amortised_fit_on_a_mixed_prior_is_right() -> None:
    """Two independent parameters, one positive and one in (0, 1): moments against quadrature in each."""
    prior = MultipleIndependent([td.HalfCauchy(one(1.0)), box(1)])

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        return prior.log_prob(theta) - 0.5 * ((theta - x) / 0.3).square().sum(-1)

    def simulations(n: int) -> tuple[Tensor, Tensor]:
        theta = prior.sample(torch.Size([n]))
        theta = theta[theta[:, 0] < 5]  # where the tail is thin
        return theta, theta + 0.3 * torch.randn_like(theta)

    posterior = made(prior, potential).train_amortized(
        *simulations(2000),
        flow_type="nsf",
        n_particles=16,
        learning_rate=5e-3,
        gamma=0.99,
        max_num_iters=200,
        stop_after_iters=60,
        hidden_features=32,
        num_transforms=2,
        show_progress_bar=False,
        seed=0,
    )
    x = simulations(20)[1]
    theta = posterior.sample((4000,), x)
    grids = (torch.linspace(1e-4, 8, 8000), torch.linspace(1e-4, 1 - 1e-4, 2000))
    factors = (td.HalfCauchy(1.0), td.Uniform(0.0, 1.0))
    for i, (grid, factor) in enumerate(zip(grids, factors, strict=True)):
        log_w = factor.log_prob(grid)[:, None] - 0.5 * ((grid[:, None] - x[:, i]) / 0.3).square()
        w = torch.softmax(log_w.double(), 0)
        mean = (w * grid[:, None]).sum(0)
        sd = (w * (grid[:, None] - mean).square()).sum(0).sqrt()
        assert ((theta[..., i].mean(0) - mean) / sd).abs().mean() < 0.1
        assert (theta[..., i].std(0) / sd - 1).abs().mean() < 0.1


# the maximum


@BOTH
@pytest.mark.parametrize("peak", [[0.3, 0.5, 1.0], [5.0, -1.0, 2.0], [-3.0, 4.0, 0.0]])
def test_map_of_a_mixed_prior_and_on_its_bounds(peak: list[float], mode: Any) -> None:
    prior = MultipleIndependent([box(1), td.HalfCauchy(one(1.0)), td.Normal(one(0.0), one(1.0))])
    x = torch.tensor([peak])
    posterior = mode(made(prior), x)
    nearest = torch.tensor([[min(max(peak[0], 0.0), 1.0), max(peak[1], 0.0), peak[2]]])
    best = posterior.map()
    assert best.shape == (1, 3) and bool(prior.support.check(best[0]).all())
    assert (best - nearest).abs().max() < 5e-3
    assert posterior.potential(best) >= posterior.potential(posterior.sample((500,))).max()


@BOTH
def test_map_in_a_corner_of_a_box(mode: Any) -> None:
    for signs in itertools.product((-1.0, 1.0), repeat=2):
        slope = torch.tensor(signs)
        best = mode(made(potential=lambda theta, x, slope=slope: theta @ slope)).map()
        assert (best - (slope[None] > 0).float()).abs().max() < 1e-6


@BOTH
def test_ctrl_c_in_map_keeps_the_best_so_far(mode: Any) -> None:
    left = [10**6]

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return log_p(theta, x)

    posterior = mode(made(potential=potential))
    start = torch.full((1, 2), 0.9)
    left[0] = 30
    best = posterior.map(init_method=start, save_best_every=1)
    left[0] = 10**6
    found, at_start = posterior.potential(best), posterior.potential(start)
    assert found > at_start and posterior.map() is best


@BOTH
def test_ctrl_c_in_training_keeps_the_fit(mode: Any) -> None:
    left = [10**6]

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return log_p(theta, x)

    posterior = made(potential=potential)
    left[0] = 11
    mode(posterior, max_num_iters=500)
    left[0] = 10**6
    assert posterior.trace.stop_reason == "interrupted" and 0 < posterior.trace.num_iters < 12
    assert posterior.sample((3,)).shape == (3, 2) and posterior.map(num_iter=2).shape == (1, 2)


# devices


@BOTH
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_everything_moves(prior: Any, mode: Any) -> None:
    posterior = mode(made(prior(), q="maf"))
    posterior.map(num_iter=2, num_init_samples=10), posterior.report
    stays = copy.deepcopy(posterior)
    assert posterior.to("meta") is posterior
    dim = posterior.prior.event_shape[0]
    theta = torch.full((2, dim), 0.5)
    found = {
        "default x": posterior.default_x,
        "map": posterior.map(),
        "prior": posterior.prior.sample(),
        "potential's prior": posterior.potential_fn.prior.sample(),
        "draws": posterior.sample((2,)),
        "density": posterior.log_prob(theta),
        "density at x": posterior.log_prob(theta, torch.full((1, dim), 0.5)),
        "potential": posterior.potential(theta),
        "link": posterior.link_transform(torch.zeros(1, dim, device="meta")),
        **dict(posterior.q.named_parameters()),
        **dict(posterior.q.named_buffers()),
    }
    assert {name: value.device.type for name, value in found.items()} == dict.fromkeys(found, "meta")
    assert posterior._device == posterior.potential_fn.device == "meta"
    assert stays.sample((2,)).device.type == stays.default_x.device.type == "cpu"


@BOTH
def test_map_location_moves_everything(mode: Any) -> None:
    buffer = io.BytesIO()
    torch.save(mode(made()), buffer)
    posterior = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False, map_location="meta")
    assert posterior._device == "meta" and posterior.sample((2,)).device.type == "meta"
    assert posterior.default_x.device.type == "meta"


@BOTH
def test_an_index_of_a_device_is_kept(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = mode(made())
    asked: list[str] = []

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | torch.device):
            asked.append(str(device))
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    posterior.to("cuda:1")
    assert len(asked) > 10 and set(asked) == {"cuda:1"}
    assert posterior._device == posterior.potential_fn.device == "cuda:1"


@BOTH
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fitted_on_a_gpu_and_moved_back(mode: Any) -> None:
    posterior = mode(made(q="maf", device="cuda:0"))
    theta = posterior.sample((20,))
    assert theta.device == posterior.default_x.device == torch.device("cuda:0")
    log_q = posterior.log_prob(theta)
    posterior.to("cpu")
    torch.testing.assert_close(posterior.log_prob(theta.cpu()), log_q.cpu(), rtol=1e-4, atol=1e-4)
    assert mode(posterior).map(num_iter=2).device.type == "cpu"


# randomness and torch's settings


@BOTH
@pytest.mark.parametrize("q", PUBLISHED_FAMILIES)
def test_a_seed_repeats_a_fit_to_the_bit(q: str, mode: Any) -> None:
    def trained(seed: int | None) -> Tensor:
        return weights(mode(made(q=q), n_particles=64, retrain_from_scratch=True, seed=seed))

    before = torch.get_rng_state()
    with seeded(9):  # what is built when the posterior is made draws from it, and goes with the fresh weights
        first = trained(1)
    with seeded(10):
        second, other = trained(1), trained(2)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_a_seeded_fit_leaves_the_global_generator(mode: Any) -> None:
    posterior = made(q="nsf")
    before = torch.get_rng_state()
    mode(posterior, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    mode(posterior)
    assert not torch.equal(torch.get_rng_state(), before)


@BOTH
@pytest.mark.parametrize("setting", [True, False])
def test_torchs_settings_stay_as_they_are(setting: bool, mode: Any) -> None:
    default = td.Distribution._validate_args
    try:
        td.Distribution.set_default_validate_args(setting)
        posterior = mode(made(q="nsf"))
        posterior.sample((3,)), posterior.map(num_iter=2), posterior.report
        assert td.Distribution._validate_args is setting
        assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
    finally:
        td.Distribution.set_default_validate_args(default)


# precision


@BOTH
@pytest.mark.parametrize("of_prior", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_x", [torch.float32, torch.float64])
def test_every_precision(of_prior: torch.dtype, of_x: torch.dtype, mode: Any) -> None:
    prior = BoxUniform(torch.zeros(2, dtype=of_prior), torch.ones(2, dtype=of_prior))
    posterior = mode(made(prior, q="maf"), torch.full((1, 2), 0.5, dtype=of_x))
    theta = posterior.sample((4,), posterior.default_x)
    assert theta.dtype == posterior.map(num_iter=2).dtype == of_prior
    assert posterior.log_prob(theta).dtype == of_prior
    assert bool(posterior.log_prob(theta.double(), posterior.default_x).isfinite().all())
