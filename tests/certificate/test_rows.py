"""Many certificates at once are those of each alone."""

import dataclasses
import math

import pytest
import torch

from visbi.certificate import certify, certify_many, rows

N = 2000


def mixed() -> torch.Tensor:
    """log w of fits of all kinds, (12, N): good, narrow, wide, constant, with zero weights, broken."""
    z = torch.randn(N, dtype=torch.float64)
    scales = torch.tensor([1.0, 0.95, 0.8, 0.5, 0.1, 1.5, 3.0], dtype=torch.float64)[:, None]
    kinds = [0.5 * z.square() * (1.0 - scales.square()), torch.full((1, N), 7.0), 300 * z[None]]
    cut, none, few = z.square()[None] / 9, torch.full((1, N), -math.inf), torch.full((1, N), -math.inf)
    cut = torch.where(z > -1.0, cut, -math.inf)
    few = few.clone()
    few[0, :10] = z[:10]
    return torch.cat([*(kind.double() for kind in kinds), cut, none, few])


@pytest.mark.parametrize("resampled", [False, True])
def test_each_row_is_certified_as_if_it_were_alone(resampled):
    log_w = mixed()
    log_p = torch.cat([log_w, log_w[:2].index_fill(1, torch.arange(200), math.nan)])
    log_q = torch.randn(1, N, dtype=torch.float64).expand(len(log_p), N)
    doubts = [["one."] if i % 3 == 0 else [] for i in range(len(log_p))]
    found = certify_many(log_p + log_q, log_q, resampled=resampled, doubts=doubts, stop_reason="at last")
    assert len(found) == 14 and len({report.status for report in found}) >= 3
    for report, p, q, doubt in zip(found, log_p + log_q, log_q, doubts, strict=True):
        alone = certify(p, q, resampled=resampled, doubts=doubt, stop_reason="at last")
        assert (report.status, report.sentence) == (alone.status, alone.sentence)
        for field in dataclasses.fields(report):
            one, other = getattr(report, field.name), getattr(alone, field.name)
            if isinstance(one, float):
                assert one == pytest.approx(other, rel=1e-9, abs=1e-12, nan_ok=True), field.name
            else:
                assert one == other


def test_in_parts(monkeypatch):
    """The Pareto fits of many rows are taken a few at a time; the numbers do not depend on how many."""
    log_w = rows.cleaned(mixed())
    smooth, khat = rows.pareto_smooth(log_w)
    monkeypatch.setattr(rows, "_AT_ONCE", 1)
    again, same = rows.pareto_smooth(log_w)
    torch.testing.assert_close(again, smooth)
    torch.testing.assert_close(same, khat)


def test_no_fits():
    assert certify_many(torch.zeros(0, 100), torch.zeros(0, 100)) == []
    size, excess = rows.tail_mass(torch.zeros(0, 100).double())
    assert size.shape == excess.shape == (0,)


def test_a_row_without_spread_beside_one_with():
    log_w = 1e-5 * torch.randn(2, N, dtype=torch.float64)
    log_w[0, :3] = 0.01  # the tail's spread is above the threshold, that of all is not
    log_w[1] *= 1e5
    khat = rows.pareto_smooth(log_w)[1]
    assert khat[0] == -math.inf and torch.isfinite(khat[1])


def test_a_fit_that_breaks_beside_one_that_does_not(monkeypatch):
    log_w = rows.cleaned(mixed()[2:4])
    sound = rows.pareto_smooth(log_w)[0]
    fit = rows._pareto_fit

    def broken(excess):
        shape, scale = fit(excess)
        return shape.index_fill(0, torch.tensor([0]), math.nan), scale

    monkeypatch.setattr(rows, "_pareto_fit", broken)
    smooth, khat = rows.pareto_smooth(log_w)
    assert khat[0] == math.inf and torch.isfinite(khat[1])
    raw = log_w.log_softmax(1)
    torch.testing.assert_close(smooth[0], raw[0])
    torch.testing.assert_close(smooth[1], sound[1])
    assert (smooth[1] - raw[1]).abs().max() > 1e-3


def test_heights_of_other_rows_do_not_matter():
    log_w = torch.randn(1, N, dtype=torch.float64)
    high = torch.full((1, N), 1e18, dtype=torch.float64)  # next to it the other row is lost
    alone, beside = rows.effective_sample_size(log_w), rows.effective_sample_size(torch.cat([log_w, high]))
    torch.testing.assert_close(beside, torch.cat([alone, torch.tensor([float(N)]).double()]))


def test_khat_is_raised_only_where_asked():
    tail, khat = (torch.tensor([100.0]), torch.tensor([0.5])), torch.tensor([0.4])
    assert torch.equal(rows.unseen_mass(tail, khat), rows.unseen_mass(tail, khat, sigmas=0.0))
    assert (rows.unseen_mass(tail, khat, sigmas=1.0) > rows.unseen_mass(tail, khat)).all()


def test_shapes():
    with pytest.raises(ValueError, match=r"^`log_p` and `log_q`: expected one shape \(F, N\); got \(100,\)"):
        certify_many(torch.zeros(100), torch.zeros(100))
    with pytest.raises(ValueError, match=r"^`doubts`: expected one entry for each of 2 fits; got 1"):
        certify_many(torch.zeros(2, 100), torch.zeros(2, 100), doubts=[[]])
    with pytest.raises(ValueError, match="at least 25"):
        certify_many(torch.zeros(2, 10), torch.zeros(2, 10))
