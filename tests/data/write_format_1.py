"""How the files in `format_1` were written: `python tests/data/write_format_1.py`, with the visbi they name.

They stand for files that users have. Once a visbi of a higher format is out they are never written again: the
tests read them with every later one.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.optim import lr_scheduler

from visbi import VIPosterior
from visbi.estimators import LikelihoodEnsemble, NeuralLikelihood, NeuralRatio
from visbi.estimators.likelihood import LikelihoodConfig
from visbi.estimators.prior_coordinates import PriorCoordinates
from visbi.estimators.ratio import RatioConfig
from visbi.potentials import LikelihoodPotential, RatioPotential
from visbi.potentials.fence import Fence, FencedPotential
from visbi.priors import BoxUniform, MultipleIndependent, TruncatedNormal, coordinates

FOLDER = Path(__file__).parent / "format_1"
X = torch.tensor([[0.3, 0.5]])
FIT: dict[str, Any] = dict(
    n_particles=16,
    learning_rate=0.01,
    max_num_iters=3,
    warm_up_rounds=2,
    show_progress_bar=False,
    quality_control=False,
    seed=0,
)


def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
    """A user's potential."""
    return -2 * (theta[:, :2] - x_o).square().sum(-1)


def build(event_shape: torch.Size, link_transform: Any, device: str) -> td.Distribution:
    """A user's q."""
    loc = torch.zeros(event_shape, requires_grad=True)
    scale = torch.ones(event_shape, requires_grad=True)
    return td.Independent(td.Normal(loc, scale), 1)


def box() -> BoxUniform:
    """-2 to 2 and 3."""
    return BoxUniform(-2 * torch.ones(2), torch.tensor([2.0, 3.0]))


def likelihood(**options: Any) -> NeuralLikelihood:
    """A likelihood with weights nowhere near their start."""
    config = LikelihoodConfig(
        flow="nsf", num_transforms=1, hidden_features=3, z_score_theta="none", z_score_x="structured"
    )
    estimator = NeuralLikelihood(2, (2,), config, **options)
    for parameter in estimator.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return estimator.fit_standardisation(torch.randn(50, 2), torch.randn(50, 2) + 1)


def ratio() -> NeuralRatio:
    """A learned ratio, untrained."""
    config = RatioConfig(num_blocks=1, hidden_features=3, z_score_theta="independent", z_score_x="none")
    return NeuralRatio(2, (2,), config)


def posteriors() -> dict[str, VIPosterior]:
    """One of each family, on priors, with potentials and options that together use most of the format."""
    small: dict[str, Any] = dict(num_transforms=1, hidden_features=3)
    mixed = MultipleIndependent([td.HalfCauchy(torch.ones(1)), td.Beta(torch.ones(1), 2.0)])
    normal = td.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5)
    positive = td.Independent(TruncatedNormal(torch.zeros(2), 1.0), 1)
    weights = td.Categorical(torch.tensor([0.3, 0.7]))
    bumps = td.Independent(td.Normal(torch.tensor([[-1.0, 0.0], [1.0, 1.0]]), torch.ones(2, 2)), 1)
    logistic = td.TransformedDistribution(
        td.Uniform(torch.zeros(2), torch.ones(2)), [td.SigmoidTransform().inv, td.AffineTransform(0.0, 2.0)]
    )
    momentum = partial(torch.optim.SGD, momentum=0.9)
    steps = partial(lr_scheduler.StepLR, step_size=2)
    coords = coordinates(box())
    fenced = FencedPotential(RatioPotential(ratio(), box()), Fence(coords, 0.3 * torch.randn(50, 2)))
    embedded = LikelihoodPotential(
        LikelihoodEnsemble([likelihood(theta_embedding=PriorCoordinates(coords)) for _ in range(2)]), box()
    )
    untrained = VIPosterior(LikelihoodPotential(likelihood(), box(), x_o=X), q="gaussian_diag")
    made = {
        "maf": VIPosterior(embedded, q="maf", **small).train(X, **FIT),
        "nsf": VIPosterior(log_p, mixed, q="nsf", **small).train(X, **FIT),
        "naf": VIPosterior(log_p, normal, q="naf", z_score_theta="structured", **small).train(X, **FIT),
        "unaf": VIPosterior(log_p, positive, q="unaf", **small).train(X, **FIT),
        "nice": VIPosterior(log_p, td.Dirichlet(torch.ones(3)), q="nice", **small).train(X, **FIT),
        "sospf": VIPosterior(fenced, q="sospf", vi_method="IW", **small).train(X, init="match", K=4, **FIT),
        "gf": VIPosterior(log_p, td.MixtureSameFamily(weights, bumps), q="gf", **small).train(X, **FIT),
        "gaussian": VIPosterior(log_p, td.Independent(logistic, 1), q="gaussian", vi_method="alpha").train(
            X, optimizer=momentum, scheduler=steps, **FIT
        ),
        "gaussian_diag": untrained,
        "users_q": VIPosterior(log_p, box(), q=build).train(X, **FIT),
    }
    made["maf"].map(num_init_samples=20, num_iter=3)
    made["maf"].report  # noqa: B018
    return made


def facts(posterior: VIPosterior) -> dict[str, Any]:
    """What must hold of the posterior after loading."""
    theta = posterior.prior.sample(torch.Size([5]))
    z = torch.randn(5, posterior._coords.dim_z)
    return {
        "theta": theta.tolist(),
        "log_prior": posterior.prior.log_prob(theta).tolist(),
        "log_q": posterior.q.log_prob(theta).tolist(),
        "potential": posterior.potential(theta, X).tolist(),
        "z": z.tolist(),
        "theta_of_z": posterior.link_transform(z).tolist(),
        "described": repr(posterior),
        "method": posterior.vi_method,
    }


def main() -> None:
    """Write the files, and beside them what they must say."""
    torch.manual_seed(0)
    written = {}
    for name, posterior in posteriors().items():
        written[name] = facts(posterior)
        posterior.save(FOLDER / f"{name}.visbi")
    (FOLDER / "facts.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
