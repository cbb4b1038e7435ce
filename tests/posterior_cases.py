"""A posterior that is known, and short fits to it, for the tests of `VIPosterior`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor

from visbi import VIPosterior
from visbi.core.random import seeded
from visbi.priors import BoxUniform

PUBLISHED_FAMILIES = ("maf", "nsf", "naf", "unaf", "nice", "sospf", "gf", "gaussian", "gaussian_diag")
X = torch.tensor([[0.3, -0.5]])
OTHER = torch.tensor([[-0.6, 0.8]])
SD = 0.5
SHORT: dict[str, Any] = dict(
    max_num_iters=3, warm_up_rounds=0, n_particles=32, show_progress_bar=False, quality_control=False
)
GOOD: dict[str, Any] = dict(SHORT, max_num_iters=300, learning_rate=0.02)


@pytest.fixture(autouse=True)
def alone_and_seeded() -> Iterator[None]:
    """One thread and one seed; both as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with seeded(0):
        yield
    torch.set_num_threads(before)


def box(dim: int = 2, half_width: float = 3.0) -> BoxUniform:
    return BoxUniform(-half_width * torch.ones(dim), half_width * torch.ones(dim))


def real(dim: int = 2) -> td.Distribution:
    """With it and `log_p` a Gaussian q can be exact."""
    return td.Independent(td.Normal(torch.zeros(dim), 2 * torch.ones(dim)), 1)


def log_p(theta: Tensor, x_o: Tensor) -> Tensor:
    """The posterior N(x_o, SD^2); the box hardly cuts it."""
    return -0.5 * ((theta - x_o) / SD).square().sum(-1)


def made(potential: Any = log_p, prior: Any = None, **options: Any) -> VIPosterior:
    return VIPosterior(potential, box() if prior is None else prior, **{"q": "gaussian", **options})


def fitted(posterior: VIPosterior | None = None, x: Tensor | None = X, **options: Any) -> VIPosterior:
    return (made() if posterior is None else posterior).train(x, **{**SHORT, **options})


def weights(posterior: VIPosterior) -> Tensor:
    return torch.cat([t.detach().flatten().clone() for t in posterior.q.trainable()])
