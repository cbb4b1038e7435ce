r"""Points on the lines through what is known, one along each axis.

Where a model repeats itself, in a frequency by the spacing of the data, in a lag by a period, in a sign, a
mode has fellows of the same shape that differ in one entry of theta, each a millionth of the prior. Draws of
the prior meet few of them; hundreds of points on a line through a known mode meet those of a hundredth of it.
"""

import torch
from torch import Tensor

__all__ = ["along_axes"]


def along_axes(z: Tensor, n: int) -> Tensor:
    """n points on each line through z (F, K, d) along an axis, even by the prior N(0, I): (F, K d n, d).

    >>> along_axes(torch.zeros(1, 2, 3), 5).shape
    torch.Size([1, 30, 3])
    >>> (along_axes(torch.zeros(1, 1, 2), 4) != 0).sum(-1).unique()
    tensor([1])
    """
    fits, k, d = z.shape
    steps = torch.arange(n, dtype=z.dtype, device=z.device)
    places = torch.special.ndtri((steps + torch.rand(fits, k, d, n).to(z)) / n)
    axes = torch.eye(d, dtype=torch.bool, device=z.device)[:, None]
    return torch.where(axes, places[..., None], z[:, :, None, None]).flatten(1, 3)
