"""`VIPosterior` in amortised mode: training, use, and the way from one mode to the other."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, MultivariateNormal

import visbi
from visbi import BoxUniform, VIPosterior, VIPosteriorParameters, ZukoFlowType
from visbi.families.conditional import ConditionalFamily
from visbi.fitting.state import AmortizedFit

SIGMA = 0.3
MIX = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
REAL = MultivariateNormal(torch.zeros(2), torch.eye(2))
BOX = BoxUniform(-2 * torch.ones(2), 2 * torch.ones(2))
QUICK = dict(
    flow_type="gaussian",
    max_num_iters=3,
    n_particles=4,
    num_transforms=1,
    hidden_features=8,
    show_progress_bar=False,
    seed=0,
)


class LinearGaussian:
    """log N(x; MIX theta, SIGMA^2) + log p(theta), as something that can be pickled."""

    def __init__(self, prior):
        self.prior = prior

    def __call__(self, theta, x):
        return self.prior.log_prob(theta) - 0.5 * ((x - theta @ MIX.T) / SIGMA).square().sum(-1)


@pytest.fixture(autouse=True)
def alone_and_seeded():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(before)


def simulations(prior=REAL, n=100):
    theta = prior.sample((n,))
    return theta, theta @ MIX.T + SIGMA * torch.randn(n, 2)


def posterior(prior=REAL, **options) -> VIPosterior:
    return VIPosterior(LinearGaussian(prior), prior, **options)


def quick(prior=REAL, **changes) -> VIPosterior:
    return posterior(prior).train_amortized(*simulations(prior), **QUICK | changes)


def single(**changes) -> VIPosterior:
    options = dict(max_num_iters=5, quality_control=False, show_progress_bar=False)
    return posterior(q="gaussian").train(torch.ones(1, 2), **options | changes)


# -- accuracy


def exact_moments(prior, x):
    """Mean and sd of the exact posterior at each x (M, 2): on a grid, the same way for both priors."""
    end = 4.0 if prior is REAL else 2.0 - 0.0025  # midpoints of 800 cells of the box
    axis = torch.linspace(-end, end, 800)
    grid = torch.cartesian_prod(axis, axis)
    means, sds = [], []
    for row in x:
        w = torch.softmax(LinearGaussian(prior)(grid, row).double(), 0)[:, None]
        mean = (w * grid).sum(0)
        means.append(mean)
        sds.append((w * (grid - mean).square()).sum(0).sqrt())
    return torch.stack(means), torch.stack(sds)


@pytest.mark.parametrize(("prior", "flow_type"), [(REAL, "gaussian"), (REAL, "maf"), (BOX, "nsf")])
def test_close_to_the_exact_posterior_at_held_out_x(prior, flow_type):
    fitted = posterior(prior).train_amortized(
        *simulations(prior, 2000),
        flow_type=flow_type,
        n_particles=32,
        learning_rate=5e-3,
        gamma=0.99,
        max_num_iters=200,
        stop_after_iters=60,
        num_transforms=3,
        show_progress_bar=False,
        seed=1,
    )
    x = simulations(prior, 12)[1]
    theta = fitted.sample((4000,), x)
    mean, sd = exact_moments(prior, x)
    assert ((theta.mean(0) - mean) / sd).abs().mean() < 0.08
    assert (theta.std(0) / sd - 1).abs().mean() < 0.06
    fitted.set_default_x(x[0])
    assert fitted.evaluate(N=4000).status == "ok"


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", visbi.families.CONDITIONAL_NAMES)
def test_every_family_trains(name, dim):
    prior = BoxUniform(torch.zeros(dim), torch.ones(dim))
    fitted = VIPosterior(lambda theta, x: -8 * (theta - x).square().sum(-1), prior)
    theta = prior.sample((40,))
    fitted.train_amortized(theta, theta, **QUICK | {"flow_type": name})
    trace = fitted.trace
    assert trace.num_iters == 3 and trace.skipped == 0
    draws = fitted.sample((5,), theta[:3])
    assert draws.shape == (5, 3, dim)
    assert ((draws > 0) & (draws < 1)).all()
    assert fitted.log_prob(theta[:3], theta[:3]).isfinite().all()


# -- the keywords


def test_signature_is_the_published_one():
    parameters = inspect.signature(VIPosterior.train_amortized).parameters
    expected = dict(
        n_particles=128,
        learning_rate=1e-3,
        gamma=0.999,
        max_num_iters=500,
        clip_value=5.0,
        batch_size=64,
        validation_fraction=0.1,
        validation_batch_size=None,
        validation_n_particles=None,
        stop_after_iters=20,
        show_progress_bar=True,
        retrain_from_scratch=False,
        flow_type=None,
        num_transforms=None,
        hidden_features=None,
        z_score_theta=None,
        z_score_x=None,
        params=None,
    )
    published = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][3:]
    assert [(p.name, p.default) for p in published] == list(expected.items())


@pytest.mark.parametrize(
    "change",
    [
        {"n_particles": 5},
        {"learning_rate": 0.1},
        {"gamma": 0.5},
        {"max_num_iters": 2},
        {"clip_value": 1e-9},
        {"batch_size": 7},
        {"validation_fraction": 0.5},
        {"validation_batch_size": 2},
        {"validation_n_particles": 3},
        {"flow_type": "nice"},
        {"flow_type": ZukoFlowType.MAF},
        {"hidden_features": 9},
        {"z_score_theta": "none"},
        {"z_score_x": "none"},
        {"z_score_x": "structured"},
        {"params": VIPosteriorParameters(z_score_x="none"), "hidden_features": 8},
        {"seed": 1},
        {"embedding_net": nn.Linear(2, 3)},
    ],
)
def test_keyword_has_an_effect(change):
    def trace(**options):
        torch.manual_seed(3)
        return quick(BOX, **options).trace

    assert trace() == trace()
    assert trace(**change) != trace()


def drops_rows(x):
    return x.sum()


class Own(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (3, TypeError, "an nn.Module or None; got int"),
        (drops_rows, TypeError, "an nn.Module or None; got function"),
        (nn.Linear(3, 2), ValueError, r"one that takes \(M, 2\); got RuntimeError: mat1"),
        (
            Own(drops_rows),
            ValueError,
            r"one that makes \(M, features\) of \(M, 2\); got shape \(\) for M = 2",
        ),
        (Own(lambda x: x[:1]), ValueError, r"one that makes .*; got shape \(1, 2\) for M = 2"),
        (Own(lambda x: [x]), ValueError, "one that makes .*; got list"),
    ],
)
def test_a_net_that_embeds_nothing(net, error, message):
    with pytest.raises(error, match=f"`embedding_net`: expected {message}"):
        quick(BOX, embedding_net=net)


@pytest.mark.parametrize("seed", [-1, torch.tensor(-1)])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="`seed`: expected a whole number >= 0"):
        quick(BOX, seed=seed)


def test_structured_theta_has_an_effect():
    prior = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    losses = [quick(prior, z_score_theta=z).trace.loss for z in ("independent", "structured")]
    assert losses[0] != losses[1]


def test_another_z_score_keeps_a_map_of_ones_own():
    own = AffineTransform(torch.zeros(2), 3 * torch.ones(2))
    for transform, expected in ((own, [3.0, 3.0]), (None, [1.0, 1.0])):
        fitted = posterior(theta_transform=transform, z_score_theta="independent")
        fitted.train_amortized(*simulations(), **QUICK | {"z_score_theta": "none"})
        z, _ = fitted.q.coords.to_z(torch.ones(1, 2))
        torch.testing.assert_close(z[0], torch.tensor(expected).double())


def test_num_transforms_and_stop_after_iters():
    layers = [len(quick(flow_type="maf", num_transforms=n).q.body.layers) for n in (2, 4)]
    assert layers[0] < layers[1]
    options = dict(learning_rate=3.0, clip_value=1e6, max_num_iters=100, stop_after_iters=2)
    trace = quick(**options).trace
    assert trace.num_iters == trace.best_iter + 2


def test_progress_bar(capsys):
    quick()
    assert capsys.readouterr().err == ""
    quick(show_progress_bar=True)
    assert "Fitting" in capsys.readouterr().err


def test_seed_repeats_and_leaves_the_global_generator_alone():
    data = simulations()
    before = torch.get_rng_state()
    fits = [posterior(q="gaussian").train_amortized(*data, **QUICK) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(fits[0].q.parameters(), fits[1].q.parameters(), strict=True):
        assert torch.equal(a, b)


def test_explicit_beats_params_beats_instance():
    instance = posterior(q="nice", num_transforms=2, hidden_features=6)
    data, run = simulations(), dict(max_num_iters=1, n_particles=2, show_progress_bar=False)
    params = VIPosteriorParameters(q="gf", num_transforms=3, hidden_features=7)
    config = instance.train_amortized(*data, **run).q.config
    assert (config.flow_type, config.num_transforms, config.hidden_features) == ("nice", 2, 6)
    config = instance.train_amortized(*data, **run, params=params, retrain_from_scratch=True).q.config
    assert (config.flow_type, config.num_transforms, config.hidden_features) == ("gf", 3, 7)
    instance.train_amortized(*data, **run, params=params, flow_type="maf", retrain_from_scratch=True)
    assert (instance.q.config.flow_type, instance.q.config.num_transforms) == ("maf", 3)


# -- errors


@pytest.mark.parametrize(
    ("theta", "x", "match"),
    [
        (torch.zeros(5, 2), torch.zeros(4, 2), "equally many rows"),
        (torch.zeros(0, 2), torch.zeros(0, 2), "at least two"),
        (torch.full((5, 2), torch.nan), torch.zeros(5, 2), "`theta`"),
        (torch.zeros(5, 2), torch.full((5, 2), torch.inf), "`x`"),
        (torch.zeros(5, 3), torch.zeros(5, 2), "`theta`"),
        (torch.zeros(5), torch.zeros(5, 2), "`theta`"),
    ],
)
def test_bad_simulations(theta, x, match):
    fresh = posterior()
    with pytest.raises(ValueError, match=match):
        fresh.train_amortized(theta, x, **QUICK)
    with pytest.raises(ValueError, match="not been fitted"):
        fresh.sample((2,), torch.zeros(2))


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 1.0},
        {"validation_fraction": 0.0},
        {"batch_size": 0},
        {"n_particles": -1},
        {"stop_after_iters": 0},
        {"flow_type": "mdn"},
        {"num_transforms": 0},
        {"z_score_x": "yes"},
        {"z_score_theta": "yes"},
    ],
)
def test_bad_keywords(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        quick(**change)


def test_own_q_has_no_conditional_form():
    own = posterior(q=MultivariateNormal(torch.zeros(2, requires_grad=True), torch.eye(2)))
    with pytest.raises(ValueError, match="flow_type"):
        own.train_amortized(*simulations(), **QUICK | {"flow_type": None})


def test_potential_of_a_wrong_shape():
    wrong = VIPosterior(lambda theta, x: theta, REAL)
    with pytest.raises(ValueError, match="potential_fn"):
        wrong.train_amortized(*simulations(), **QUICK)


# -- use


def test_shapes_of_samples():
    fitted, x = quick(BOX), torch.randn(5, 2)
    assert fitted.sample((3, 4), x[0]).shape == (3, 4, 2)
    assert fitted.sample((), x[:1]).shape == (2,)
    assert fitted.sample((3, 4), x).shape == (3, 4, 5, 2)
    assert fitted.sample((0,), x).shape == (0, 5, 2)
    assert fitted.sample_batched((7,), x).shape == (7, 5, 2)
    assert fitted.sample_batched((7,), x[:1]).shape == (7, 1, 2)
    with pytest.raises(ValueError, match="`x`"):
        fitted.sample((3,))
    with pytest.raises(ValueError, match="`x`: expected shape"):
        fitted.sample((3,), torch.zeros(5, 3))
    assert fitted.set_default_x(x[0]).sample((3,)).shape == (3, 2)


def test_batches_of_samples_are_no_larger_than_asked(monkeypatch):
    fitted, sizes, draw = quick(), [], ConditionalFamily.draw

    def counted(self, x, n, **options):
        sizes.append(n * len(x))
        return draw(self, x, n, **options)

    monkeypatch.setattr(ConditionalFamily, "draw", counted)
    x = torch.randn(5, 2)
    samples = fitted.sample_batched((7,), x, max_sampling_batch_size=3)
    assert samples.shape == (7, 5, 2) and max(sizes) <= 3 and sum(sizes) == 35
    with pytest.raises(ValueError, match="max_sampling_batch_size"):
        fitted.sample_batched((7,), x, max_sampling_batch_size=0)


def test_log_prob_broadcasts():
    fitted, theta, x = quick(BOX), BOX.sample((5,)), torch.randn(5, 2)
    paired = fitted.log_prob(theta, x)
    assert paired.shape == (5,)
    torch.testing.assert_close(fitted.log_prob(theta[2:3], x)[2], paired[2])
    torch.testing.assert_close(fitted.log_prob(theta, x[2])[2], paired[2])
    assert fitted.log_prob(theta + 10, x).tolist() == [-torch.inf] * 5
    assert not paired.requires_grad and fitted.log_prob(theta, x, track_gradients=True).requires_grad
    with pytest.raises(ValueError, match="equally many rows"):
        fitted.log_prob(theta[:2], x)


def test_map_evaluate_potential_and_report_at_the_default_x(capsys):
    fitted = quick(max_num_iters=100, learning_rate=0.02, n_particles=16)
    for x in (torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.0])):
        fitted.set_default_x(x)
        exact = torch.linalg.solve(MIX.T @ MIX / SIGMA**2 + torch.eye(2), MIX.T @ x / SIGMA**2)
        torch.testing.assert_close(fitted.map(num_iter=300)[0], exact, atol=0.02, rtol=0)
        torch.testing.assert_close(fitted.potential(exact[None]), LinearGaussian(REAL)(exact[None], x))
        report = fitted.report
        assert report.status == "ok" and fitted.report is report
    assert fitted.set_default_x(torch.ones(2)).report is not report
    assert fitted.evaluate("prop", N=2000).status == "ok"
    assert "r^2" in capsys.readouterr().out
    other = fitted.map(torch.tensor([-1.0, 0.0]), num_iter=300)[0]
    torch.testing.assert_close(other, exact, atol=0.02, rtol=0)
    fitted.set_default_x(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="single observation"):
        fitted.evaluate(N=100)


def test_images_and_embedding():
    prior = BoxUniform(torch.zeros(2), torch.ones(2))
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    weights = copy.deepcopy(net.state_dict())
    images = VIPosterior(lambda theta, x: -x[:, 0, :2].sub(theta).square().sum(-1), prior)
    theta = prior.sample((30,))
    images.train_amortized(theta, torch.randn(30, 3, 3), embedding_net=net, **QUICK)
    assert images.sample((4,), torch.randn(3, 3)).shape == (4, 2)
    assert images.sample((4,), torch.randn(5, 3, 3)).shape == (4, 5, 2)
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    assert not torch.equal(images.q.embedding[1].weight, net[1].weight)


def test_one_image_is_one_observation_everywhere():
    prior, image = BoxUniform(torch.zeros(2), torch.ones(2)), torch.randn(3, 3)

    def log_p(theta, x):
        assert x.shape[1:] == (3, 3)  # never one image taken for three observations
        return -x[:, 0, :2].sub(theta).square().sum(-1)

    images = VIPosterior(log_p, prior)
    images.train_amortized(prior.sample((30,)), torch.randn(30, 3, 3), **QUICK)
    images.set_default_x(image)
    theta, few = prior.sample((4,)), dict(num_iter=2, num_init_samples=10)
    expected = -image[0, :2].sub(theta).square().sum(-1)
    for x in (None, image, image[None]):
        torch.testing.assert_close(images.potential(theta, x), expected)
    best = images.map(**few)
    assert images.map(image) is images.map(image[None]) is best  # kept, however x is written
    assert images.report.n_draws == 16_384 and images.evaluate(N=100).n_draws == 100
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        images.train(image, max_num_iters=2, quality_control=False, show_progress_bar=False)
    assert images.default_x.shape == (1, 3, 3)


# -- training on, and from one mode to the other


def test_trains_on_or_from_scratch():
    fitted, data = quick(), simulations()
    q, before = fitted.q, copy.deepcopy(fitted.q.state_dict())
    fitted.train_amortized(*data, **QUICK)
    assert fitted.q is q
    fitted.train_amortized(*data, max_num_iters=1, show_progress_bar=False, n_particles=2)
    assert fitted.q is q and q.config.flow_type == "gaussian"
    fitted.train_amortized(*data, **QUICK | {"retrain_from_scratch": True})
    assert fitted.q is not q
    assert not torch.equal(fitted.q.encoder.entry.weight, before["encoder.entry.weight"])
    with pytest.warns(UserWarning, match="anew, because of another flow_type"):
        fitted.train_amortized(*data, **QUICK | {"flow_type": "maf"})
    with pytest.raises(ValueError, match="retrain_from_scratch"):
        fitted.train_amortized(data[0], torch.zeros(100, 5), **QUICK | {"flow_type": "maf"})


def test_from_one_observation_to_amortised():
    fitted = single()
    start = posterior(q="gaussian").q.state_dict()
    with pytest.warns(UserWarning, match="replaces the fit to a single observation"):
        fitted.train_amortized(*simulations(), **QUICK)
    assert isinstance(fitted._state, AmortizedFit) and fitted._map is None
    assert torch.equal(fitted._family.state_dict()["body.raw_loc"], start["body.raw_loc"])
    assert fitted.sample((3,), torch.zeros(4, 2)).shape == (3, 4, 2)
    assert fitted.sample((3,)).shape == (3, 2)  # the default x has stayed
    assert fitted.map(num_iter=2, num_init_samples=10, num_to_optimize=2).shape == (1, 2)


def test_from_amortised_to_one_observation():
    fitted, x = quick(), torch.ones(1, 2)
    options = dict(max_num_iters=5, quality_control=False, show_progress_bar=False)
    with pytest.warns(UserWarning, match="replaces the amortised fit"):
        fitted.train(x, **options)
    assert fitted.sample((3,)).shape == (3, 2)
    assert fitted.log_prob(torch.zeros(4, 2)).shape == (4,)
    assert fitted.map(num_iter=2, num_init_samples=10, num_to_optimize=2).shape == (1, 2)
    with pytest.raises(NotImplementedError, match="train_amortized"):
        fitted.sample_batched((3,), x)
    with pytest.raises(ValueError, match="fitted to"):
        fitted.sample((3,), 2 * x)


def test_another_q_forgets_the_fit():
    fitted = quick()
    fitted.set_q("gaussian")
    with pytest.raises(ValueError, match="not been fitted"):
        fitted.sample((2,), torch.zeros(2))


# -- state


def copies(fitted):
    yield copy.deepcopy(fitted)
    buffer = io.BytesIO()
    torch.save(fitted, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ["gaussian", "maf", "gf"])
def test_copies_draw_the_same_and_train_on_alone(name):
    fitted, x = quick(BOX, flow_type=name), torch.randn(3, 2)
    weights = copy.deepcopy(fitted.q.state_dict())
    for twin in copies(fitted):
        draws = []
        for one in (fitted, twin):
            torch.manual_seed(5)
            draws.append(one.sample((4,), x))
        assert torch.equal(*draws)
        twin.train_amortized(*simulations(BOX), **QUICK | {"flow_type": name, "learning_rate": 0.1})
        assert any(not torch.equal(value, weights[key]) for key, value in twin.q.state_dict().items())
    assert all(torch.equal(value, weights[key]) for key, value in fitted.q.state_dict().items())


def test_moves_as_a_whole():
    fitted = quick(BOX).set_default_x(torch.zeros(2))
    fitted.to("meta")
    assert {t.device.type for t in (*fitted.q.parameters(), *fitted.q.buffers())} == {"meta"}


def test_says_what_it_is():
    assert repr(quick()) == "VIPosterior(D=2, fitted by amortised rKL in 3 steps)"
