"""Posteriors with q="auto": cheap targets, and fits that end with each kind of q, for the tests of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from posterior_cases import SD, X, box, log_p
from visbi import VIPosterior
from visbi.certificate import certify
from visbi.core.random import seeded
from visbi.families.bent import Bend, features
from visbi.families.gaussians import Mixture
from visbi.fitting.bend import BentProposal
from visbi.fitting.flow import FlowProposal, flow_body, widened
from visbi.fitting.ladder import Answer
from visbi.fitting.pool import Proposal
from visbi.fitting.refine import Blend
from visbi.fitting.target import Target

QUIET: dict[str, Any] = dict(show_progress_bar=False, quality_control=False)
KINDS = ("mixture", "bent mixture", "flow", "patched flow")


def two_modes(theta: Tensor, x_o: Tensor) -> Tensor:
    """Half of the mass at x_o + 1.5, half at x_o - 1.5, each N(., .3^2)."""
    each = [-0.5 * ((theta - x_o - shift) / 0.3).square().sum(-1) for shift in (1.5, -1.5)]
    return torch.logaddexp(*each)


def auto(potential: Any = log_p, prior: Any = None, **options: Any) -> VIPosterior:
    return VIPosterior(potential, box() if prior is None else prior, **{"q": "auto", **options})


def trained(posterior: VIPosterior, x: Tensor | None = X, **options: Any) -> VIPosterior:
    return posterior.train(x, **{**QUIET, "seed": 1, **options})


def found(kind: str, posterior: VIPosterior | None = None, **options: Any) -> VIPosterior:
    """One whose fit to `log_p` ended with this kind of q."""
    with _ending_with(kind):
        return trained(auto() if posterior is None else posterior, **options)


@contextmanager
def _ending_with(kind: str) -> Iterator[None]:
    def climb(target: Target, **_: Any) -> Answer:
        q = _proposal(kind, target.dim)
        z = q.sample(500)
        ell, log_q = target.value(z)[0], q.log_prob(z)[0]
        report = replace(certify(ell, log_q, resampled=True), rung=f"a {kind}")
        return Answer(q, z[0], ell, log_q, report)

    with patch("visbi.fitting.auto.climb", climb):
        yield


def _proposal(kind: str, dim: int) -> Proposal:
    """Near `log_p`'s posterior, with weights unlike those it starts with."""
    loc, spread = torch.zeros(dim).double(), SD / 2
    mixture = Mixture.of(
        torch.tensor([[-1.0, 0.3]]).double(),
        torch.stack([loc, loc + 0.2])[None],
        (spread**2 * torch.eye(dim).double()).expand(1, 2, dim, dim),
    )
    if kind == "mixture":
        return mixture
    if kind == "bent mixture":
        noise = Mixture(mixture.log_weights, mixture.loc / spread, mixture.tril / spread)
        one = torch.ones(dim).double()
        i, _ = features(dim, crossed=True)
        coefficients = 0.05 * (i[:, None] <= torch.arange(dim)).double()
        order = torch.arange(dim).flip(0)
        each = (loc, spread * one, order, coefficients, coefficients, -one, one)
        return BentProposal(noise, Bend(*(part[None] for part in each), crossed=True))
    with seeded(3):
        body = flow_body(dim)
        body.placed(loc, spread * torch.eye(dim).double())
        for parameter in body.layers.parameters():
            parameter.data.add_(0.003 * torch.randn_like(parameter))
    flow = FlowProposal.of(widened(body))
    return flow if kind == "flow" else Blend(flow, mixture, torch.tensor([0.3]).double())
