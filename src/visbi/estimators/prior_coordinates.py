"""theta in the coordinates of its prior, as the network's first layer.

A wide prior with positive rates and scales puts most of a standardised theta into a corner; in the
coordinates in which the prior is standard normal the network sees parameters on the scale on which they were
drawn.
"""

from torch import Tensor, nn

from visbi.priors.transforms import Coordinates

__all__ = ["PriorCoordinates"]


class PriorCoordinates(nn.Module):
    """theta (N, D) -> z (N, d), for `theta_embedding_net` with `z_score_theta="none"`; nothing in it trains.

    >>> import torch
    >>> from visbi.priors import BoxUniform, coordinates
    >>> net = PriorCoordinates(coordinates(BoxUniform(torch.zeros(2), torch.ones(2))))
    >>> net(torch.full((1, 2), 0.5)).tolist()
    [[0.0, 0.0]]
    """

    def __init__(self, coords: Coordinates) -> None:
        super().__init__()
        self.coords = coords

    def forward(self, theta: Tensor) -> Tensor:
        return self.coords.to_z(theta)[0].to(theta.dtype)
