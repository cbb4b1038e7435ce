r"""Losses that make a classifier f(theta, x) a log-ratio, log p(x | theta) / p(x).

Each row of logits holds f(theta_k, x) for one x: k = 0 is the theta that x was simulated from, the others are
thetas of other simulations, so draws of the marginal p(theta). `num_atoms` counts the thetas that compete.

`binary` (NRE-A; Hermans, Begy, Louppe 2020). Is theta the one that made x? With equal odds the Bayes
classifier is sigma(f) with e^f = p(theta, x) / (p(theta) p(x)) = r(theta, x), so the cross-entropy

    L = -log sigma(f_0) - log sigma(-f_1)

has its minimum at f = log r.

`contrastive` (NRE-B; Durkan, Murray, Papamakarios 2020). Which of K thetas made x? Given x and the thetas,
the index is k with probability r(theta_k, x) / sum_j r(theta_j, x), so

    L = -f_0 + log sum_{k<K} e^{f_k}

has its minimum where f = log r + c(x), any c: right for a posterior at given x, unknown as a ratio.

`contrastive_normalised` (NRE-C; Miller, Weniger, Forre 2022). Which of K thetas made x, or none? With odds
gamma for one of them, p(k) = gamma r_k / (K + gamma sum_j r_j), p(none) = K / (K + gamma sum_j r_j), and

    L = -gamma/(1 + gamma) log p(0 | theta_0..theta_{K-1}) - 1/(1 + gamma) log p(none | theta_1..theta_K)

has its minimum at f = log r, with no free c(x). K = 1 with gamma = 1 is half of `binary`; gamma to infinity
is `contrastive`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from visbi.core.checks import one_of, positive_int, violation

__all__ = ["RATIO_LOSSES", "binary", "contrastive", "contrastive_normalised", "contrasts", "ratio_loss"]

RATIO_LOSSES = ("binary", "contrastive", "contrastive_normalised")
"""Names of losses for ratios."""

_LOG_GAMMA = 0.0  # equal odds of one of the thetas and none


def binary(logits: Tensor) -> Tensor:
    """The cross-entropy of logits (B, 2), (B,)."""
    return -logsigmoid(logits[:, 0]) - logsigmoid(-logits[:, 1])


def contrastive(logits: Tensor) -> Tensor:
    """The cross-entropy of the index for logits (B, K), (B,)."""
    return logits.logsumexp(1) - logits[:, 0]


def contrastive_normalised(logits: Tensor) -> Tensor:
    """The cross-entropy of the index or none for logits (B, K + 1), (B,)."""
    offset = _LOG_GAMMA - math.log(logits.shape[1] - 1)
    joint, marginal = logits[:, :-1].logsumexp(1) + offset, logits[:, 1:].logsumexp(1) + offset
    log_p_index = logits[:, 0] + offset - softplus(joint)
    log_p_none = -softplus(marginal)
    weight = 1 / (1 + math.exp(-_LOG_GAMMA))
    return -weight * log_p_index - (1 - weight) * log_p_none


def ratio_loss(name: str, num_atoms: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """The loss called `name` and how many logits a row needs.

    Raises:
        ValueError: an unknown name, or too few atoms.

    >>> loss, n_logits = ratio_loss("contrastive", 5)
    >>> loss(torch.zeros(1, n_logits))  # log 5: no better than guessing
    tensor([1.6094])
    """
    one_of("loss", name, RATIO_LOSSES)
    if name == "binary":
        return binary, 2
    if positive_int("num_atoms", num_atoms) < 2:
        raise ValueError(violation("num_atoms", "at least 2 thetas to tell apart", num_atoms))
    return (contrastive, num_atoms) if name == "contrastive" else (contrastive_normalised, num_atoms + 1)


def contrasts(theta: Tensor, n: int) -> Tensor:
    """For each of B rows itself and the n - 1 rows after it, cyclically: (B, n, D).

    The rows of a batch are in random order, so the rows that follow are a draw without replacement from the
    others, and every row serves equally often.

    >>> contrasts(torch.tensor([[0.0], [1.0], [2.0]]), 2).squeeze(-1)
    tensor([[0., 1.],
            [1., 2.],
            [2., 0.]])
    """
    first = torch.arange(theta.shape[0], device=theta.device)
    return theta[(first[:, None] + torch.arange(n, device=theta.device)) % theta.shape[0]]
