"""An amortised fit: q(theta | x) with its weights, options, trace and report.

It trains on with a fresh optimiser, so there is none to store. A network of the user's own that embeds x is
asked for at loading; its weights are in the file.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from visbi.certificate.report import Report
from visbi.core.checks import violation
from visbi.core.encoding import Given, Kind, Otherwise, WrongGiven
from visbi.core.random import seeded
from visbi.families.conditional import ConditionalFamily
from visbi.families.conditional_config import ConditionalConfig
from visbi.fitting.amortized_config import AmortizedOptions
from visbi.fitting.state import AmortizedFit, AmortizedTrace
from visbi.priors.transforms import Coordinates
from visbi.saving.coordinates import CoordinatesOfPrior
from visbi.saving.modules import dataclass_kind, weights_of, with_weights

__all__ = ["AMORTIZED", "StoredAmortizedFit"]

_KEYWORD = "q_embedding_net"  # a learned ratio in the same file has an `embedding_net` of its own
_LOSSES = ("loss", "validation_loss")


@dataclass(frozen=True)
class StoredAmortizedFit:
    """An `AmortizedFit` as it is stored.

    Attributes:
        coords: those of q, ahead of it: where they cannot be stored, what to make them from.
        conditional, trace, options, x, report, method, share: as there.
    """

    coords: Any
    conditional: ConditionalFamily
    trace: AmortizedTrace
    options: AmortizedOptions
    x: Tensor | None
    report: Report | None
    method: str
    share: float = 1.0  # files of before have none

    @classmethod
    def of(cls, fit: AmortizedFit, prior: Distribution, transform: Given) -> "StoredAmortizedFit":
        """What is stored of `fit`.

        Args:
            fit: the fit.
            prior, transform: as for `CoordinatesOfPrior.of`.
        """
        q = fit.conditional
        stand_in = CoordinatesOfPrior.of(q.coords, prior, q.config.z_score_theta, transform)
        others = (fit.trace, fit.options, fit.x, fit.report, fit.method, fit.share)
        return cls(Otherwise(q.coords, stand_in), q, *others)

    def made(self) -> AmortizedFit:
        """The fit."""
        others = (self.trace, self.options, self.x, self.report, self.method, self.share)
        return AmortizedFit(self.conditional, *others)


def _conditional_fields(q: ConditionalFamily) -> dict[str, Any]:
    net = q.embedding
    plain = type(net) is nn.Flatten and (net.start_dim, net.end_dim) == (1, -1)
    return {
        "coords": q.coords,
        "x_shape": q.x_shape,
        "config": q.config,
        "embedding": None if plain else Otherwise(net, Given(_KEYWORD)),
        "weights": weights_of(q),
    }


def _conditional(
    coords: Coordinates,
    x_shape: torch.Size,
    config: ConditionalConfig,
    embedding: nn.Module | None,
    weights: dict[str, Any],
) -> ConditionalFamily:
    try:
        with seeded(0):
            made = ConditionalFamily(coords, x_shape, config, copy.deepcopy(embedding))
        return with_weights(made, weights).eval()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if embedding is None:
            raise
        expected = "the network that the posterior was trained with"
        raise WrongGiven(violation(_KEYWORD, expected, f"another one ({error})")) from error


def _trace_fields(trace: AmortizedTrace) -> dict[str, Any]:
    return {
        **vars(trace),
        **{name: torch.tensor(getattr(trace, name), dtype=torch.float64) for name in _LOSSES},
    }


def _trace(loss: Tensor, validation_loss: Tensor, **others: Any) -> AmortizedTrace:
    return AmortizedTrace(tuple(loss.tolist()), tuple(validation_loss.tolist()), **others)


def _stored_fit(**fields: Any) -> StoredAmortizedFit:
    fit = StoredAmortizedFit(**fields)
    if not (isinstance(fit.conditional, ConditionalFamily) and isinstance(fit.trace, AmortizedTrace)):
        raise TypeError("an amortised fit without q or trace")
    if not (isinstance(fit.options, AmortizedOptions) and isinstance(fit.report, Report | None)):
        raise TypeError("an amortised fit without options or report")
    if not (isinstance(fit.x, Tensor | None) and isinstance(fit.method, str)):
        raise TypeError("an amortised fit without x or method")
    if not (isinstance(fit.share, float) and 0 <= fit.share <= 1):
        raise TypeError("an amortised fit with an impossible share")
    return fit


AMORTIZED = (
    dataclass_kind(ConditionalConfig),
    dataclass_kind(AmortizedOptions),
    Kind("AmortizedTrace", AmortizedTrace, _trace_fields, _trace),
    Kind("ConditionalFamily", ConditionalFamily, _conditional_fields, _conditional),
    Kind("StoredAmortizedFit", StoredAmortizedFit, lambda fit: dict(vars(fit)), _stored_fit),
)
"""Kinds of what an amortised fit consists of."""
