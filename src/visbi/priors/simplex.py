r"""Stick breaking: R^K to the simplex of K + 1 entries, exact in its corners.

    v_k = sigmoid(y_k - log(K - k)),  theta_k = v_k prod_{j<k} (1 - v_j),  k = 0, ..., K - 1,

the last entry is what remains (Betancourt 2012; y = 0 is the centre). The way back is v_k / (1 - v_k) =
theta_k / (the sum of the entries after k), and the Jacobian of the first K entries has log-determinant
sum_k log theta_k over all K + 1.

torch's own transform takes the remainder as one minus a sum, which leaves no digit of an entry of 1e-8 in
float32; here sums run from the far end and products are sums of logarithms.
"""

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid, pad

__all__ = ["StickBreaking"]


class StickBreaking(Transform):
    """y (..., K) -> theta (..., K + 1).

    >>> StickBreaking()(torch.zeros(3)).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return _log_theta(x).exp()

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp_min(torch.finfo(y.dtype).tiny)
        after = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return y[..., :-1].log() - after.log() + _log_pieces_left(y[..., 1:])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return _log_theta(x).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])


def _log_theta(y: Tensor) -> Tensor:
    logit = y - _log_pieces_left(y)
    remaining = pad(logsigmoid(-logit).cumsum(-1), (1, 0))
    return pad(logsigmoid(logit), (0, 1)) + remaining


def _log_pieces_left(y: Tensor) -> Tensor:
    return torch.arange(y.shape[-1], 0, -1, dtype=y.dtype, device=y.device).log()
