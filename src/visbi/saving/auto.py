"""A fit with q="auto": the bodies that it may end with, its weighted draws, options, trace and report.

Nothing of it trains on, so there is no optimiser to store. The draws are, because corrected ones are taken
from them: equal seeds give equal draws after loading.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from visbi.certificate.correction import WeightedDraws
from visbi.certificate.modes import Mode
from visbi.certificate.report import Report
from visbi.core.encoding import Kind, described
from visbi.core.random import seeded
from visbi.families import Family
from visbi.families.base import Body
from visbi.families.bent import Bend, BentBody, features
from visbi.families.blend import BlendBody
from visbi.families.coupling import CouplingBody
from visbi.families.mixture import MixtureBody
from visbi.families.widened import WidenedBody
from visbi.fitting.auto import CONCERNS_AUTO
from visbi.fitting.config import TrainOptions
from visbi.fitting.gradient import Trace
from visbi.fitting.state import AutoFit
from visbi.saving.modules import dataclass_kind, weights_of, with_weights

__all__ = ["AUTOMATIC", "StoredAutoFit"]


@dataclass(frozen=True)
class StoredAutoFit:
    """An `AutoFit` apart from its family.

    Attributes:
        x, trace, options, report, draws: as there.
    """

    x: Tensor | None
    trace: Trace
    options: TrainOptions
    report: Report
    draws: WeightedDraws

    @classmethod
    def of(cls, fit: AutoFit) -> "StoredAutoFit":
        """What is stored of `fit`."""
        return cls(fit.x, fit.trace, fit.options, fit.report, fit.draws)

    def made(self, family: Family) -> AutoFit:
        """The fit of `family`."""
        return AutoFit(family, self.x, self.trace, self.options, self.report, self.draws)


def _fit_fields(fit: StoredAutoFit) -> dict[str, Any]:
    # the other options had no effect, and may hold a user's own code
    return {**vars(fit), "options": {name: getattr(fit.options, name) for name in CONCERNS_AUTO}}


def _fit(options: dict[str, Any], **others: Any) -> StoredAutoFit:
    fit = StoredAutoFit(options=TrainOptions(**options), **others)
    if not (isinstance(fit.trace, Trace) and isinstance(fit.report, Report)):
        raise TypeError("a fit without trace or report")
    if not (isinstance(fit.draws, WeightedDraws) and isinstance(fit.x, Tensor | None)):
        raise TypeError("a fit without draws or x")
    return fit


def _draws(theta: Tensor, log_p: Tensor, log_q: Tensor) -> WeightedDraws:
    if theta.ndim != 2 or log_p.shape != theta.shape[:1] or log_q.shape != theta.shape[:1]:
        shapes = ", ".join(str(tuple(each.shape)) for each in (theta, log_p, log_q))
        raise ValueError(f"weighted draws of shapes {shapes}")
    return WeightedDraws(theta, log_p, log_q)


def _mixture_fields(body: MixtureBody) -> dict[str, Any]:
    return {"dim": body.dim, "n_components": body.n_components, "weights": weights_of(body)}


def _mixture(dim: int, n_components: int, weights: dict[str, Any]) -> MixtureBody:
    with seeded(0):
        made = MixtureBody(dim, n_components)
    return with_weights(made, weights)


def _coupling_fields(body: CouplingBody) -> dict[str, Any]:
    layers = body.layers
    return {
        "dim": body.dim,
        "num_transforms": len(layers.moved),
        # with one entry there is no network, and any width will do
        "hidden_features": 1 if layers.first is None else layers.first.shape[1],
        "spline": layers.spline,
        "weights": weights_of(body),
    }


def _coupling(
    dim: int, num_transforms: int, hidden_features: int, spline: bool, weights: dict[str, Any]
) -> CouplingBody:
    with seeded(0):
        made = CouplingBody(dim, num_transforms, hidden_features, spline)
    return with_weights(made, weights)


def _widened_fields(body: WidenedBody) -> dict[str, Any]:
    return {"inner": body.inner, "scales": body.scales, "shares": body.shares}


def _widened(inner: CouplingBody, scales: Tensor, shares: Tensor) -> WidenedBody:
    if not isinstance(inner, CouplingBody):
        raise TypeError(f"a flow that is {described(inner)}")
    made = WidenedBody(inner, scales=scales.tolist(), shares=shares.tolist())
    made.scales, made.shares = scales, shares  # to the last bit
    return made


def _blend_fields(body: BlendBody) -> dict[str, Any]:
    return {"bodies": list(body.bodies), "shares": body.shares}


def _blend(bodies: list[Body], shares: Tensor) -> BlendBody:
    if not all(isinstance(body, Body) for body in bodies) or len({body.dim for body in bodies}) != 1:
        raise TypeError("a blend of something else than bodies of one dimension")
    made = BlendBody(bodies, torch.ones(len(bodies)))
    if shares.shape != made.shares.shape:
        raise ValueError(f"{len(bodies)} bodies with shares of shape {tuple(shares.shape)}")
    made.shares = shares
    return made


def _bend_fields(bend: Bend) -> dict[str, Any]:
    return {field.name: getattr(bend, field.name) for field in fields(Bend)}


def _bend(crossed: bool, **tensors: Tensor) -> Bend:
    d = len(tensors["centre"])
    n = len(features(d, crossed=crossed)[0])
    shapes = {"mean": (n, d), "log_scale": (n, d)}
    for name, value in tensors.items():
        if value.shape != shapes.get(name, (d,)):
            raise ValueError(f"a bend of {d} entries with {name} of shape {tuple(value.shape)}")
    if not torch.equal(tensors["order"].sort().values, torch.arange(d)):
        raise ValueError("a bend whose order is no permutation")
    return Bend(crossed=crossed, **tensors)


def _bent(inner: Body, bend: Bend) -> BentBody:
    if not (isinstance(inner, MixtureBody) and isinstance(bend, Bend)):
        raise TypeError(f"a bent body of {described(inner)} and {described(bend)}")
    return BentBody(inner, bend)


AUTOMATIC = (
    Kind("MixtureBody", MixtureBody, _mixture_fields, _mixture),
    Kind("CouplingBody", CouplingBody, _coupling_fields, _coupling),
    Kind("WidenedBody", WidenedBody, _widened_fields, _widened),
    Kind("BlendBody", BlendBody, _blend_fields, _blend),
    Kind("Bend", Bend, _bend_fields, _bend),
    Kind("BentBody", BentBody, lambda body: {"inner": body.inner, "bend": body.bend}, _bent),
    dataclass_kind(Mode),
    Kind(
        "WeightedDraws",
        WeightedDraws,
        lambda draws: {"theta": draws.theta, "log_p": draws.log_p, "log_q": draws.log_q},
        _draws,
    ),
    Kind("StoredAutoFit", StoredAutoFit, _fit_fields, _fit),
)
"""Kinds of what an automatic fit consists of."""
