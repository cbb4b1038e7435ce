"""Cheap fits to many observations, for the tests of them."""

from typing import Any

import torch
from torch import Tensor

from posterior_cases import log_p, real
from visbi import Posteriors, fit_many

X = torch.tensor([[-1.0, 0.5], [0.0, 0.0], [1.0, 2.0], [0.3, -0.7], [-2.0, 1.0]])
QUICK: dict[str, Any] = dict(max_num_iters=3, n_particles=16, warm_up_rounds=0)
GOOD: dict[str, Any] = dict(max_num_iters=200, learning_rate=0.05)


def many(x: Any = X, q: Any = "gaussian", potential: Any = log_p, prior: Any = None, **options: Any) -> Any:
    """Two observations to a chunk; three steps unless told otherwise, none for q="auto"."""
    short = {} if q == "auto" else QUICK
    given = {**short, "seed": 1, "chunk_size": 2, "quality_control": False, **options}
    return fit_many(potential, real() if prior is None else prior, x, q, show_progress_bar=False, **given)


def tensors(posteriors: Posteriors) -> list[Tensor]:
    """All numbers of all fits."""
    return [tensor for record in posteriors.records for _, tensor in sorted(record.tensors.items())]


def equal(a: Posteriors, b: Posteriors) -> bool:
    """Whether two runs gave the same, to the last bit."""
    if str(a.reports) != str(b.reports) and a.reports != b.reports:
        return False
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return len(pairs) > 0 and all(torch.equal(s, t) for s, t in pairs) and torch.equal(a.x, b.x)
