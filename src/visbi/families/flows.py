r"""Flow bodies through zuko, built in the direction that samples fast.

The objectives of variational inference sample from q at every step and evaluate it at its own draws. An
autoregressive transform costs one pass of its network in one direction and d passes in the other; so here its
one-pass direction is the one that turns noise into z (an inverse autoregressive flow, Kingma et al. 2016).
log q at arbitrary points then costs d passes, which only a user who asks for it pays.

The vector v = d log q / dz at q's own draws, which path gradients need, is carried along while sampling
instead of being found by inversion (Vaitl, Nicoli, Nakajima, Kessel 2022). For one layer y = f(x) with
Jacobian J,

    v_y = J^{-T} (v_x - grad_x log|det J|),   v_u = -u  at the base,

and J of an autoregressive layer is triangular: J = diag(df/dx) + (df/dphi)(dphi/dx), with dphi/dx carried
forward through the masked network as a product of its weight matrices.

Flows of which one direction is a closed form and the other a bisection but neither is autoregressive
(Gaussianization) and coupling flows, one pass both ways, keep zuko's own direction or need no choice.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from visbi.core.zuko_import import zuko
from visbi.families.base import Body, path_part
from visbi.families.spline import RationalQuadraticSpline, spline_shapes

__all__ = ["AutoregressiveBody", "CouplingFlowBody", "GaussianizationBody", "spline_flow"]

_LOG_2PI = math.log(2 * math.pi)
_AFFINE_SLOPE = 1e-3  # zuko's smallest slope of an affine entry


def _standard_normal(u: Tensor) -> Tensor:
    return -0.5 * u.square().sum(-1) - 0.5 * u.shape[-1] * _LOG_2PI


class _FlowBody(Body):
    """A zuko flow whose forward direction carries noise u to z."""

    def __init__(self, dim: int, flow: Any) -> None:
        super().__init__(dim)
        self.layers = nn.ModuleList(flow.transform.transforms)
        # outputs near zero make every layer near the identity: q starts as the prior in its coordinates
        for layer in self.layers:
            _shrink(layer)

    def _noise(self, n: int) -> Tensor:
        weight = next(self.parameters())
        return torch.randn(n, self.dim, dtype=weight.dtype, device=weight.device)

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        u = self._noise(n)
        z, log_q = u, _standard_normal(u)
        for layer in self.layers:
            z, ladj = layer(None).call_and_ladj(z)
            log_q = log_q - _total(ladj, log_q)
        return z, log_q

    def log_prob(self, z: Tensor) -> Tensor:
        log_q = z.new_zeros(z.shape[:-1])
        for layer in reversed(self.layers):
            transform = layer(None)
            x = transform.inv(z)
            _, ladj = transform.call_and_ladj(x)
            log_q, z = log_q - _total(ladj, log_q), x
        return log_q + _standard_normal(z)


class CouplingFlowBody(_FlowBody):
    """Affine coupling layers (NICE and RealNVP; Dinh et al. 2015, 2017): one pass in both directions."""

    def __init__(self, dim: int, *, num_transforms: int, hidden_features: int) -> None:
        super().__init__(
            dim, zuko.flows.NICE(dim, transforms=num_transforms, hidden_features=[hidden_features] * 2)
        )


class AutoregressiveBody(_FlowBody):
    """Masked autoregressive layers sampled in one pass.

    Args:
        dim: d.
        flow: one of zuko's autoregressive flows (MAF, NAF, UNAF, SOSPF), or `spline_flow`.
        num_transforms: number of layers.
        hidden_features: width of the two hidden layers of each masked network.

    >>> body = AutoregressiveBody(3, zuko.flows.MAF, num_transforms=2, hidden_features=16)
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> bool(torch.allclose(body.log_prob(z), log_q, atol=1e-4))
    True
    """

    def __init__(
        self, dim: int, flow: Callable[..., Any], *, num_transforms: int, hidden_features: int
    ) -> None:
        super().__init__(dim, flow(dim, transforms=num_transforms, hidden_features=[hidden_features] * 2))

    def draw(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        if not (path and torch.is_grad_enabled()):
            return *self.rsample_and_log_prob(n), None
        u = self._noise(n)
        z, log_q, score = u, _standard_normal(u), -u
        for layer in self.layers:
            z, ladj, score = _carry(layer, z, score)
            log_q = log_q - ladj
        return z, log_q, path_part(log_q, z, score)


def spline_flow(dim: int, *, bins: int = 8, **options: Any) -> Any:
    """zuko's masked autoregressive flow with our splines as its entries."""
    return zuko.flows.MAF(dim, univariate=RationalQuadraticSpline, shapes=spline_shapes(bins), **options)


class GaussianizationBody(Body):
    """Gaussianization flow (Meng et al. 2020): data to noise in closed form, noise to data by bisection.

    Each layer is a mixture cdf per entry and a rotation, so q is mixture-like in every direction it turns to.
    """

    def __init__(self, dim: int, *, num_transforms: int) -> None:
        super().__init__(dim)
        # float64: the inverse by bisection and the tails of erf lose too much in float32
        self.flow: Any = zuko.flows.GF(dim, transforms=num_transforms).double()
        with torch.no_grad():  # near the identity, components apart just enough to part ways
            for layer in self.flow.transform.transforms:
                for phi, spread in zip(getattr(layer, "phi", ()), (0.3, 0.0), strict=False):
                    phi.normal_(std=spread) if spread else phi.zero_()

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        u = torch.randn(n, self.dim, dtype=weight.dtype, device=weight.device)
        z, ladj = self.flow.transform(None).inv.call_and_ladj(u)
        return z, _standard_normal(u) - _total(ladj, u[:, 0])

    def log_prob(self, z: Tensor) -> Tensor:
        u, ladj = self.flow.transform(None).call_and_ladj(z.double())
        return _standard_normal(u) + _total(ladj, u[:, 0])


def _total(ladj: Tensor, like: Tensor) -> Tensor:
    """A log-Jacobian summed over entries where the transform left them apart."""
    return ladj.sum(-1) if ladj.ndim > like.ndim else ladj


def _shrink(layer: nn.Module) -> None:
    with torch.no_grad():
        for network in (
            getattr(layer, "hyper", None),
            getattr(getattr(layer, "univariate", None), "integrand", None),
        ):
            if network is not None:
                last = [m for m in network.modules() if hasattr(m, "weight")][-1]
                last.weight.mul_(1e-2)
                if last.bias is not None:
                    last.bias.zero_()
        for phi in getattr(layer, "phi", None) or ():
            phi.mul_(1e-2)


def _carry(layer: Any, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, log|det J| (N,) and v_y from x and v_x for one layer; see the module's text."""
    if not hasattr(layer, "hyper"):
        return _carry_elementwise(layer(None), x, score)
    phi, pull = _masked_network(layer.hyper, x)
    phi = phi.unflatten(-1, (x.shape[1], -1))
    entry = (
        x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    )  # x as the entry, not by way of the network
    transform = layer.univariate(*zuko.utils.unpack(phi, layer.shapes))
    y, ladj = transform.call_and_ladj(entry)
    y_phi, ladj_x, ladj_phi = _derivatives(transform, entry, phi, y, ladj)
    with torch.no_grad():
        # rows of dphi/dx that make up dy/dx and dladj/dx, all through the network at once: (N, d + 1, d)
        product = pull(y_phi, ladj_phi)
        rhs = score - product[:, -1] if ladj_x is None else score - ladj_x - product[:, -1]
        triangle = product[:, :-1] + torch.diag_embed(ladj.exp())
        # entries are taken in ascending or in descending order, so J is lower or upper triangular as it
        # stands
        ascending = bool(layer.order[0] <= layer.order[-1])
        score = torch.linalg.solve_triangular(triangle.mT, rhs[..., None], upper=ascending)[..., 0]
    return y, ladj.sum(-1), score


def _carry_elementwise(transform: Any, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    base = getattr(transform, "base", transform)
    entry = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    y, ladj = base.call_and_ladj(entry)
    ladj_x = _gradients(ladj, (entry,))[0]
    score = (score if ladj_x is None else score - ladj_x) / ladj.detach().exp()
    return y, ladj.sum(-1), score


def _derivatives(
    transform: Any, x: Tensor, phi: Tensor, y: Tensor, ladj: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dy/dphi (N, d, P), dladj/dx (N, d) or None for zero, and dladj/dphi (N, d, P), entry by entry."""
    if isinstance(transform, zuko.transforms.MonotonicAffineTransform):
        # y = exp(s) x + shift with s = a / (1 + |a| / c), so that ds/da = (1 - |s| / c)^2
        with torch.no_grad():
            slope = (1.0 + ladj.abs() / math.log(_AFFINE_SLOPE)).square()
            zero_one = torch.zeros_like(slope), torch.ones_like(slope)
            y_phi = torch.stack([zero_one[1], (y - phi[..., 0]) * slope], -1)
            return y_phi, None, torch.stack([zero_one[0], slope], -1)
    (y_phi,) = _gradients(y, (phi,))
    ladj_x, ladj_phi = _gradients(ladj, (x, phi))
    zero = torch.zeros_like(phi)
    return zero if y_phi is None else y_phi, ladj_x, zero if ladj_phi is None else ladj_phi


def _gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    if not output.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(output, inputs, torch.ones_like(output), retain_graph=True, allow_unused=True)


def _masked_network(network: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Output phi of a masked MLP (N, d P) with its graph, and the function that multiplies rows by dphi/dx.

    That function takes (N, d, P), one row for each entry, and (N, d, P), one row in all, to (N, d + 1, d):
    the products of the rows with the network's weights from the last to the first, each a single matrix
    product for all draws.
    """
    *hidden, last = network
    h, weights, slopes = x, [], []
    for module in hidden:
        if hasattr(module, "mask"):
            weights.append(module.mask * module.weight)
            h = functional.linear(h, weights[-1], module.bias)
        else:  # ReLU, as zuko builds them here
            h = module(h)
            slopes.append((h.detach() > 0).to(h.dtype)[:, None])
    top = last.mask * last.weight

    def pull(per_entry: Tensor, total: Tensor) -> Tensor:
        n, d, width = per_entry.shape
        first = torch.bmm(per_entry.transpose(0, 1), top.detach().view(d, width, -1)).transpose(0, 1)
        rows = torch.cat([first, (total.reshape(n, -1) @ top.detach())[:, None]], 1)
        for weight, slope in zip(reversed(weights), reversed(slopes), strict=True):
            rows = rows.mul_(slope) @ weight.detach()
        return rows

    return functional.linear(h, top, last.bias), pull
