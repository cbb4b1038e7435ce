r"""Flow bodies through zuko, built in the direction that samples fast.

The objectives of variational inference sample from q at every step and evaluate it at its own draws. An
autoregressive transform costs one pass of its network in one direction and d passes in the other; so here its
one-pass direction is the one that turns noise into z (an inverse autoregressive flow, Kingma et al. 2016).
log q at arbitrary points then costs d passes, which only a user who asks for it pays.

The vector v = d log q / dz at q's own draws, which path gradients need, is carried along while sampling
instead of being found by inversion (`families.carry`).

Flows of which one direction is a closed form and the other a root search but neither is autoregressive
(Gaussianization) and coupling flows, one pass both ways, keep zuko's own direction or need no choice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visbi.core.zuko_import import zuko
from visbi.families.base import Body, log_standard_normal, path_part
from visbi.families.carry import carry
from visbi.families.gaussianize import Gaussianize, gaussianization_flow

__all__ = ["AutoregressiveBody", "CouplingFlowBody", "GaussianizationBody", "shrink"]


class _FlowBody(Body):
    """A zuko flow whose forward direction carries noise u to z."""

    def __init__(self, dim: int, flow: Any) -> None:
        super().__init__(dim)
        self.layers = nn.ModuleList(flow.transform.transforms)
        # outputs near zero make every layer near the identity: q starts as the prior in its coordinates
        for layer in self.layers:
            shrink(layer)

    def _noise(self, n: int) -> Tensor:
        weight = next(self.parameters())
        return torch.randn(n, self.dim, dtype=weight.dtype, device=weight.device)

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        u = self._noise(n)
        z, log_q = u, log_standard_normal(u)
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
        return log_q + log_standard_normal(z)


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
        z, log_q, score = self.draw_and_score(n)
        return z, log_q, path_part(log_q, z, score)

    def draw_and_score(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """z (n, d), log q(z) (n,) and d log q / dz (n, d), the last without gradient."""
        u = self._noise(n)
        z, log_q, score = u, log_standard_normal(u), -u
        for layer in self.layers:
            z, ladj, score = carry(layer, z, score)
            log_q = log_q - ladj
        return z, log_q, score


# Shifts and log-scales of Gaussianization layers are trained in quarters of what they stand for, which moves
# them by .004 a step at the learning rate of .001. On a Gaussian posterior with half the prior's sds the
# reverse KL then stops after 500 steps instead of 1200, at a total variation of .006 instead of .016; under
# the importance-weighted bound, where q stopped far from the optimum, it is .009 instead of .218. A power of
# two, so that weights survive saving to the last bit.
_UNIT = 4.0


def _scaled(shift: Tensor, scale: Tensor) -> Gaussianize:
    return Gaussianize(_UNIT * shift, _UNIT * scale)


class GaussianizationBody(Body):
    """Gaussianization flow (Meng et al. 2020): data to noise in closed form, noise to data by a root search.

    Each layer is a mixture cdf per entry and a rotation, so q is mixture-like in every direction it turns to.
    Its `state_dict` has shifts and log-scales themselves, whatever unit they are trained in.
    """

    def __init__(self, dim: int, *, num_transforms: int) -> None:
        super().__init__(dim)
        self.flow: Any = gaussianization_flow(dim, transforms=num_transforms)
        with torch.no_grad():  # near the identity, components apart just enough to part ways
            for layer in self.flow.transform.transforms:
                for phi, spread in zip(getattr(layer, "phi", ()), (0.3, 0.0), strict=False):
                    phi.normal_(std=spread / _UNIT) if spread else phi.zero_()
                if hasattr(layer, "univariate"):
                    layer.univariate = _scaled

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in self._in_units(prefix):
            state[name] = state[name] * _UNIT
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # comes before the layers' own, which read the same dictionary, a copy of the caller's
        for name in self._in_units(prefix):
            if name in state_dict:
                state_dict[name] = state_dict[name] / _UNIT
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _in_units(self, prefix: str) -> list[str]:
        return [prefix + name for name, _ in self.named_parameters() if ".phi." in name]

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        u = torch.randn(n, self.dim, dtype=weight.dtype, device=weight.device)
        z, ladj = self.flow.transform(None).inv.call_and_ladj(u)
        return z, log_standard_normal(u) - _total(ladj, u[:, 0])

    def log_prob(self, z: Tensor) -> Tensor:
        u, ladj = self.flow.transform(None).call_and_ladj(z.double())
        return log_standard_normal(u) + _total(ladj, u[:, 0])


def _total(ladj: Tensor, like: Tensor) -> Tensor:
    """A log-Jacobian summed over entries where the transform left them apart."""
    return ladj.sum(-1) if ladj.ndim > like.ndim else ladj


def shrink(layer: nn.Module) -> None:
    """Bring one of zuko's layers near the identity, in place."""
    with torch.no_grad():
        # one network of a layer, not both: where the one that steers the other has small outputs, too, a
        # dependence between parameters starts at a saddle and may never be learnt
        network = getattr(getattr(layer, "univariate", None), "integrand", None) or getattr(
            layer, "hyper", None
        )
        if network is not None:
            last = [m for m in network.modules() if hasattr(m, "weight")][-1]
            last.weight.mul_(1e-2)
            if last.bias is not None:
                last.bias.zero_()
        for phi in getattr(layer, "phi", None) or ():
            phi.mul_(1e-2)
