r"""Bodies of conditional families: y = flow(u; h), u ~ N(0, I), by zuko's flows and ours with a context.

The counterparts of `families.flows`, with the same directions: autoregressive layers carry noise to y in one
pass, coupling layers either way, Gaussianization noise to y by a root search and back in closed form. Path
gradients need v = d log q / dy at the draws: autoregressive layers carry it along (`families.carry`), and so
do ours ("coupling", `families.coupling_layers`, here with splines); for the other two log q at a point is one
cheap pass, whose gradient it is.
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visbi.core.spline import spline_flow
from visbi.core.zuko_import import zuko
from visbi.families.base import log_standard_normal
from visbi.families.carry import carry, forward
from visbi.families.coupling_layers import CouplingLayers
from visbi.families.flows import shrink
from visbi.families.gated import GATED_SHAPES, Gate
from visbi.families.gaussianize import gaussianization_flow

__all__ = ["ConditionalBody", "conditional_body"]

_AUTOREGRESSIVE = {
    "maf": zuko.flows.MAF,
    "iaf": partial(zuko.flows.MAF, univariate=Gate, shapes=GATED_SHAPES),
    "nsf": spline_flow,
    "sospf": zuko.flows.SOSPF,
    # the one-dimensional networks inside: as wide as the signal that steers them
    "naf": partial(zuko.flows.NAF, network={"hidden_features": [16, 16]}),
    "unaf": partial(zuko.flows.UNAF, network={"hidden_features": [16, 16]}),
}


class ConditionalBody(nn.Module, ABC):
    """A distribution over y in R^d given a context; this one is N(0, I) whatever the context."""

    @property
    def dtype(self) -> torch.dtype:
        """What it works in."""
        return next((p.dtype for p in self.parameters()), torch.float64)

    @abstractmethod
    def draw(self, u: Tensor, context: Tensor, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, log q(y) and, if `path`, d log q / dy without gradient.

        Args:
            u: noise (N, d).
            context: (M, F) with N = n M; row i of u goes with row i mod M.
        """

    @abstractmethod
    def log_prob(self, y: Tensor, context: Tensor) -> Tensor:
        """log q(y_n | context_n), (N,), for y (N, d) and context (N, F)."""


class _NoiseBody(ConditionalBody):
    """N(0, I), whatever the context."""

    def draw(self, u: Tensor, context: Tensor, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        return u, log_standard_normal(u), -u if path else None

    def log_prob(self, y: Tensor, context: Tensor) -> Tensor:
        return log_standard_normal(y)


class _LayersBody(ConditionalBody):
    """zuko's layers, each carrying noise one step to y."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(flow.transform.transforms)
        for layer in self.layers:
            shrink(layer)

    def draw(self, u: Tensor, context: Tensor, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        y, log_q = u, log_standard_normal(u)
        for layer in self.layers:
            y, ladj = forward(layer, y, context)
            log_q = log_q - ladj
        return y, log_q, _score(self, y, context) if path else None

    def log_prob(self, y: Tensor, context: Tensor) -> Tensor:
        log_q = y.new_zeros(y.shape[:-1])
        for layer in reversed(self.layers):
            transform = layer(context)
            x = transform.inv(y)
            ladj = transform.call_and_ladj(x)[1]
            log_q, y = log_q - (ladj.sum(-1) if ladj.ndim > 1 else ladj), x
        return log_q + log_standard_normal(y)


class _AutoregressiveBody(_LayersBody):
    """Masked autoregressive layers, the score carried along."""

    def draw(self, u: Tensor, context: Tensor, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        if not path:
            return super().draw(u, context, path=False)
        y, log_q, score = u, log_standard_normal(u), -u
        for layer in self.layers:
            y, ladj, score = carry(layer, y, score, context)
            log_q = log_q - ladj
        return y, log_q, score


class _CouplingBody(ConditionalBody):
    """Spline coupling layers, the score carried along."""

    def __init__(self, dim: int, context: int, *, num_transforms: int, hidden_features: int) -> None:
        super().__init__()
        self.layers = CouplingLayers(
            dim,
            num_transforms=num_transforms,
            hidden_features=hidden_features,
            spline=True,
            context=context,
        )

    def draw(self, u: Tensor, context: Tensor, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        y, ladj, score = self.layers(u, -u if path else None, context)
        return y, log_standard_normal(u) - ladj, score

    def log_prob(self, y: Tensor, context: Tensor) -> Tensor:
        u, ladj = self.layers.inverse(y, context)
        return log_standard_normal(u) - ladj


class _GaussianizationBody(ConditionalBody):
    """Gaussianization flow."""

    def __init__(self, dim: int, context: int, *, num_transforms: int, hidden_features: int) -> None:
        super().__init__()
        width = [hidden_features] * 2
        self.flow = gaussianization_flow(dim, context, transforms=num_transforms, hidden_features=width)
        for layer in self.flow.transform.transforms:
            shrink(layer)
            if hasattr(layer, "hyper"):  # components apart just enough to part ways
                bias = layer.hyper[-1].bias.data.view(dim, 2, -1)
                bias[:, 0].normal_(std=0.3)

    def draw(self, u: Tensor, context: Tensor, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        transform = self.flow.transform(context.repeat(len(u) // len(context), 1))
        y, ladj = transform.inv.call_and_ladj(u)
        log_q = log_standard_normal(u) - (ladj.sum(-1) if ladj.ndim > 1 else ladj)
        return y, log_q, _score(self, y, context) if path else None

    def log_prob(self, y: Tensor, context: Tensor) -> Tensor:
        u, ladj = self.flow.transform(context).call_and_ladj(y)
        return log_standard_normal(u) + (ladj.sum(-1) if ladj.ndim > 1 else ladj)


def _score(body: ConditionalBody, y: Tensor, context: Tensor) -> Tensor:
    """d log q / dy at y (N, d), for a body whose log q is cheap."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        tiled = context.detach().repeat(len(y) // len(context), 1)
        return torch.autograd.grad(body.log_prob(leaf, tiled).sum(), leaf)[0]


def conditional_body(
    name: str, dim: int, context: int, *, num_transforms: int, hidden_features: int
) -> ConditionalBody:
    """The body of a conditional family's name, one of `CONDITIONAL_NAMES`.

    Args:
        name: the family's.
        dim: d.
        context: number of features of the context.
        num_transforms: layers.
        hidden_features: width of the two hidden layers of each network.
    """
    if name == "gf":
        return _GaussianizationBody(
            dim, context, num_transforms=num_transforms, hidden_features=hidden_features
        )
    if name == "coupling":
        return _CouplingBody(dim, context, num_transforms=num_transforms, hidden_features=hidden_features)
    options: dict[str, Any] = {"transforms": num_transforms, "hidden_features": [hidden_features] * 2}
    if name == "nice":
        return _LayersBody(zuko.flows.NICE(dim, context, **options))
    if name in _AUTOREGRESSIVE:
        return _AutoregressiveBody(_AUTOREGRESSIVE[name](dim, context, **options))
    return _NoiseBody()
