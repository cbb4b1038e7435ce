"""Points on the lines through what is known."""

import torch

from visbi.fitting.lines import along_axes


def test_each_point_differs_in_one_entry_and_together_they_are_even_by_the_prior() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4).double()
    points = along_axes(z, 1000).reshape(2, 3, 4, 1000, 4)
    for k in range(4):
        others = [j for j in range(4) if j != k]
        assert bool((points[:, :, k, :, others] == z[:, :, None, others]).all())
        levels = torch.special.ndtr(points[:, :, k, :, k])
        gap = levels - torch.arange(1000) / 1000
        assert float(gap.min()) >= 0.0 and float(gap.max()) <= 1e-3 + 1e-12
