r"""Inverse autoregressive flow with gates, inside a Gaussian (Kingma et al. 2016).

"maf" is sampled in one pass here, so it is an inverse autoregressive flow already, with y = exp(s) x + m as
its update. This one is that paper's in the two things that differ: a Gaussian that is learnt along, here a
full one and outside, and the gated update of `families.gated`, which Kingma et al. prefer as the more stable.
"""

from functools import partial

from torch import Tensor, nn

from visbi.core.zuko_import import zuko
from visbi.families.flows import AutoregressiveBody
from visbi.families.gated import GATED_SHAPES, Gate
from visbi.families.outside import OutsideBody

__all__ = ["InverseAutoregressiveBody"]


class InverseAutoregressiveBody(OutsideBody):
    """Masked autoregressive layers with gates inside a Gaussian, sampled in one pass.

    Args:
        dim: d. With one entry this is a Gaussian.
        num_transforms: number of layers, their entries in ascending and descending order by turns.
        hidden_features: width of the two hidden layers of each masked network.

    >>> body = InverseAutoregressiveBody(3, num_transforms=2, hidden_features=16)
    >>> z, log_q = body.rsample_and_log_prob(4)
    >>> import torch
    >>> bool(torch.allclose(body.log_prob(z), log_q, atol=1e-4))
    True
    """

    def __init__(self, dim: int, *, num_transforms: int, hidden_features: int) -> None:
        super().__init__(dim)
        flow = partial(zuko.flows.MAF, univariate=Gate, shapes=GATED_SHAPES)
        self.inside = AutoregressiveBody(
            dim, flow, num_transforms=num_transforms, hidden_features=hidden_features
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The masked autoregressive layers."""
        return self.inside.layers

    def draw_inside(self, n: int, *, path: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        if path:
            return self.inside.draw_and_score(n)
        return *self.inside.rsample_and_log_prob(n), None

    def log_prob_inside(self, y: Tensor) -> Tensor:
        return self.inside.log_prob(y.to(self.inside.dtype))
