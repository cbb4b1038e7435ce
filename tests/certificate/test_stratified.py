"""Corrected draws: every part of the posterior gets its share of them."""

import torch

from visbi.certificate.correction import WeightedDraws


def pool(n: int = 16_384) -> WeightedDraws:
    """Four modes of weights .4, .3, .2, .1 in five dimensions, uneven weights, in random order."""
    torch.manual_seed(0)
    mode = torch.multinomial(torch.full((4,), 0.25), n, replacement=True)
    theta = torch.stack([3.0 * torch.cos(mode * 1.7 + k) for k in range(5)], -1) + 0.2 * torch.randn(n, 5)
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[mode] + 0.3 * torch.randn(n)
    return WeightedDraws(torch.cat([theta, mode[:, None]], 1), log_p.double(), torch.zeros(n).double())


def test_modes_get_their_shares_within_a_fifth_of_what_chance_leaves() -> None:
    """Of 2000 draws of 16,384 in random order a mode of .4 had .40 +- .010; once .36."""
    draws = pool()
    weights = draws.log_weights.exp()
    exact = torch.stack([weights[draws.theta[:, -1] == k].sum() for k in range(4)])
    off = []
    for seed in range(50):
        torch.manual_seed(seed)
        mode = draws.resampled(2000)[:, -1]
        off.append(torch.stack([(mode == k).double().mean() for k in range(4)]) - exact)
    assert float(torch.stack(off).square().mean().sqrt()) < 0.002
    assert float(torch.stack(off).abs().max()) < 0.008


def test_means_stay_right_and_draws_come_in_random_order() -> None:
    draws = pool()
    weights = draws.log_weights.exp()
    torch.manual_seed(1)
    theta = torch.stack([draws.resampled(1000) for _ in range(100)]).double()
    mean = (weights[:, None] * draws.theta.double()).sum(0)
    torch.testing.assert_close(theta.mean((0, 1)), mean, rtol=0, atol=0.01)
    mode = theta[0, :, -1]
    assert abs(float(torch.corrcoef(torch.stack([mode[1:], mode[:-1]]))[0, 1])) < 0.15


def test_draws_that_are_all_alike_or_few() -> None:
    theta = torch.ones(40, 2)
    same = WeightedDraws(theta, torch.zeros(40).double(), torch.zeros(40).double())
    assert same.resampled(10).shape == (10, 2) and sorted(same._alike.tolist()) == list(range(40))
    far = WeightedDraws(torch.full((40, 1), 3e38), torch.zeros(40).double(), torch.zeros(40).double())
    assert sorted(far._alike.tolist()) == list(range(40))
