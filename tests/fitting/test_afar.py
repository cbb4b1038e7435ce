"""Gaussians at summits: which ascents are made, and made once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from visbi.fitting.afar import _all_met, at_summits
from visbi.fitting.budget import Budget
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.explore import Exploration
from visbi.fitting.pool import Pool
from visbi.fitting.summits import Summits, summits
from visbi.fitting.target import Target, log_standard_normal
from visbi.priors import coordinates

CENTRE = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)


def two(z: Tensor) -> Tensor:
    """Modes of sd 1/100 on both sides."""
    return torch.logaddexp(*(-5e3 * (z - side * CENTRE).square().sum(-1) for side in (1, -1)))


def group() -> Group:
    """Draws of the prior that lie on one side."""
    target = Target(two, coordinates(Independent(Normal(torch.zeros(3).double(), 1.0), 1)))
    z = CENTRE + 0.3 * torch.randn(1, 64, 3).double()
    return Group(target, [Record()], ALONE, Pool(target), starts=z, usable=torch.ones(1, 64).bool())


def with_particles(now: Group, z: Tensor) -> None:
    now.seen = Exploration.of_draws(z, two(z) - log_standard_normal(z), z.shape[1])


def test_ascents_from_the_prior_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(target: Target, z: Tensor, steps: int) -> object:
        asked.append(z)
        return summits(target, z, steps)

    monkeypatch.setattr("visbi.fitting.summits.summits", counted)
    torch.manual_seed(0)
    now = group()
    first = at_summits(now)
    assert first.loc.shape[1] == 1 and len(asked) == 1
    torch.testing.assert_close(first.loc[0, 0], CENTRE, atol=1e-3, rtol=0)
    with_particles(now, -CENTRE + 0.05 * torch.randn(1, 200, 3).double())
    both = at_summits(now)
    assert len(asked) == 2 and bool((asked[1][0] @ CENTRE < 0).all())  # from particles alone
    assert both.loc.shape[1] == 2
    assert (both.loc[0] @ CENTRE).sort().values.tolist() == pytest.approx([-2.25, 2.25], abs=1e-3)
    assert both.log_weights.exp().tolist()[0] == pytest.approx([0.5, 0.5], abs=0.02)
    assert both.cov[0].diagonal(dim1=-2, dim2=-1).flatten().tolist() == pytest.approx([1e-4] * 6, rel=0.05)


def test_what_is_kept_goes_with_the_fit() -> None:
    torch.manual_seed(0)
    now = group()
    at_summits(now)
    assert now.ends is not None and now.ends.z.shape == (1, 8, 3) and now.ends.cov.shape == (1, 8, 3, 3)
    both = now.ends.with_(now.ends)
    assert both.ell.shape == (1, 16) and both.of_fits(torch.tensor([False])).z.shape == (0, 16, 3)
    assert float(now.ends.ell.max()) == pytest.approx(0.0, abs=1e-3)


def test_as_many_ascents_as_it_takes_to_meet_all_of_several_summits() -> None:
    """Of six, such as three labels that can be exchanged have, eight ascents leave out one or more."""
    corners = torch.eye(3).double()
    tops = torch.cat([corners, -corners])

    def six(z: Tensor) -> Tensor:
        return torch.stack([-5e3 * (z - top).square().sum(-1) for top in tops]).logsumexp(0)

    torch.manual_seed(0)
    target = Target(six, coordinates(Independent(Normal(torch.zeros(3).double(), 1.0), 1)))
    z = torch.randn(1, 512, 3).double()
    now = Group(target, [Record()], ALONE, Pool(target), starts=z, usable=torch.ones(1, 512).bool())
    assert at_summits(now).loc.shape[1] == 6
    assert now.ends is not None and now.ends.z.shape[1] == 32
    few = Target(six, target._coords, Budget(2000))
    at_summits(
        replace(now, target=few, pool=Pool(few), ends=None)
    )  # not where that would be the whole budget


def test_how_many_are_enough() -> None:
    """One summit by eight of them, two by fifteen: (k + 1) (k / (k + 1))^n < .01."""

    def ends(*at: tuple[float, float, int]) -> Summits:
        z, ell = (torch.tensor([row[i] for row in at for _ in range(row[2])]).double() for i in (0, 1))
        cov = torch.full((1, len(z), 1, 1), 1e-4).double()
        return Summits(z[None, :, None], ell[None], cov, torch.ones(1, len(z), dtype=torch.bool))

    assert not _all_met(ends((0.0, 0.0, 7))) and _all_met(ends((0.0, 0.0, 8)))
    assert not _all_met(ends((0.0, 0.0, 7), (1.0, -20.0, 1)))  # one that ended far below
    assert not _all_met(ends((0.0, 0.0, 13), (1.0, 0.0, 1)))
    assert _all_met(ends((0.0, 0.0, 14), (1.0, 0.0, 1)))
    rising = ends((0.0, 0.0, 1), (1.0, 0.0, 1))
    assert not _all_met(rising) and _all_met(replace(rising, rests=torch.zeros(1, 2, dtype=torch.bool)))


def test_where_few_starts_are_of_use() -> None:
    torch.manual_seed(0)
    now = group()
    assert now.ends is None
    now.usable = torch.arange(64)[None] < 3
    now.starts[:, 3:] = torch.nan
    assert at_summits(now).loc.shape[1] == 1
