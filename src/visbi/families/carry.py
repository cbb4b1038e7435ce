r"""The score of q at its own draws, carried along while they are drawn.

Path gradients need v = d log q / dz at the draws. For one layer y = f(x) with Jacobian J,

    v_y = J^{-T} (v_x - grad_x log|det J|),   v_u = -u  at the base

(Vaitl, Nicoli, Nakajima, Kessel 2022), and J of an autoregressive layer is triangular:
J = diag(df/dx) + (df/dphi)(dphi/dx), with dphi/dx carried forward through the masked network as a product of
its weight matrices. No inversion of the layer, d passes of its network, is needed.

Layers may see a context beside x, the same for many draws; what it adds to the first hidden layer is then
computed once for each context and not once for each draw.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from visbi.core.zuko_import import zuko

__all__ = ["carry", "forward"]

_AFFINE_SLOPE = 1e-3  # zuko's smallest slope of an affine entry


def forward(layer: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y and log|det J| (N,) from x (N, d) for one of zuko's layers.

    Args:
        layer: masked autoregressive, or any other lazy transform.
        x: (N, d).
        context: (M, F) with N = n M; row i of x goes with row i mod M.
    """
    if _is_autoregressive(layer):
        phi = _masked_network(layer.hyper, x, context)[0].unflatten(-1, (x.shape[1], -1))
        y, ladj = layer.univariate(*zuko.utils.unpack(phi, layer.shapes)).call_and_ladj(x)
    else:
        y, ladj = layer(_tiled(context, len(x))).call_and_ladj(x)
    return y, ladj.sum(-1) if ladj.ndim > 1 else ladj


def carry(
    layer: Any, x: Tensor, score: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, log|det J| (N,) and v_y from x and v_x (N, d) for one layer; `context` as for `forward`.

    The layer acts entry by entry if it is not masked autoregressive.
    """
    if not _is_autoregressive(layer):
        return _carry_elementwise(layer(_tiled(context, len(x))), x, score)
    phi, pull = _masked_network(layer.hyper, x, context)
    phi = phi.unflatten(-1, (x.shape[1], -1))
    transform = layer.univariate(*zuko.utils.unpack(phi, layer.shapes))
    entry = x if _is_affine(transform) else _leaf(x)  # x as the entry, not by way of the network
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


def _is_autoregressive(layer: Any) -> bool:
    return hasattr(layer, "order")


def _is_affine(transform: Any) -> bool:
    return isinstance(transform, zuko.transforms.MonotonicAffineTransform)


def _leaf(x: Tensor) -> Tensor:
    """x as a tensor of its own, by which one can differentiate."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _tiled(context: Tensor | None, n_rows: int) -> Tensor | None:
    return None if context is None else context.repeat(n_rows // len(context), 1)


def _carry_elementwise(transform: Any, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    base = getattr(transform, "base", transform)
    entry = _leaf(x)
    y, ladj = base.call_and_ladj(entry)
    ladj_x = _gradients(ladj, (entry,))[0]
    score = (score if ladj_x is None else score - ladj_x) / ladj.detach().exp()
    return y, ladj.sum(-1), score


def _derivatives(
    transform: Any, x: Tensor, phi: Tensor, y: Tensor, ladj: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dy/dphi (N, d, P), dladj/dx (N, d) or None for zero, and dladj/dphi (N, d, P), entry by entry."""
    if _is_affine(transform):
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


def _masked_network(
    network: Any, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Output phi of a masked MLP (N, d P) with its graph, and the function that multiplies rows by dphi/dx.

    That function takes (N, d, P), one row for each entry, and (N, d, P), one row in all, to (N, d + 1, d):
    the products of the rows with the network's weights from the last to the first, each a single matrix
    product for all draws.
    """
    *hidden, last = network
    h, weights, slopes = x, [], []
    for module in hidden:
        if hasattr(module, "mask"):
            weight = module.mask * module.weight
            bias: Any = module.bias
            if context is not None and not weights:
                weight, from_context = weight.tensor_split([x.shape[1]], dim=1)
                bias = _tiled(functional.linear(context, from_context, bias), len(x))
            weights.append(weight)
            h = functional.linear(h, weight) + bias if bias.ndim > 1 else functional.linear(h, weight, bias)
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
