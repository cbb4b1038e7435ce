"""Which of two answers stays, and how many more draws a certificate takes."""

from dataclasses import replace

import pytest
import torch

from mixture_cases import known
from visbi.certificate.report import Report
from visbi.fitting import verdicts
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.mixture import defended
from visbi.fitting.pool import Pool
from visbi.fitting.target import Target
from visbi.fitting.verdicts import _more_mass, _rank
from visbi.priors import BoxUniform, coordinates

GOOD = Report("corrected", 0.5, 8000.0, 0.5, 1.0, 0.01, 0.3, 16_384, 0, "")


@pytest.mark.parametrize(("gap", "counts"), [(0.2, True), (-0.2, True), (0.03, False), (-0.03, False)])
def test_a_difference_of_evidence_counts_beyond_three_errors(gap: float, counts: bool) -> None:
    other = replace(GOOD, log_evidence=1.0 - gap)
    assert _more_mass(GOOD, other) == (pytest.approx(gap) if counts else 0.0)
    assert _more_mass(GOOD, replace(other, log_evidence_se=float("inf"))) == 0.0


def test_where_tails_are_heavy_the_distance_says_which_is_better() -> None:
    heavy = replace(GOOD, khat=0.75)
    near, far = replace(heavy, ess_fraction=0.1, total_variation=0.1), replace(heavy, total_variation=0.7)
    assert _rank(near, doubted=False) > _rank(far, doubted=False)
    assert _rank(GOOD, doubted=False) > _rank(near, doubted=False)
    assert (
        _rank(near, doubted=False)
        > _rank(GOOD, doubted=True)
        > _rank(replace(GOOD, status="suspect"), doubted=False)
    )


def test_of_two_that_pass_the_one_with_more_mass_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has the more even weights, because it lacks what they are uneven at."""
    two = known([0.7, 0.3], [[-1.5, 0.0], [1.5, 0.0]], 0.1)
    target = Target(
        lambda theta: two.log_prob(torch.special.ndtri((theta / 40 + 0.5).double())[None])[0],
        coordinates(BoxUniform(-20 * torch.ones(2), 20 * torch.ones(2))),
    )
    now = Group(target, [Record()], ALONE, Pool(target))
    monkeypatch.setattr(verdicts, "doubts", lambda *_: [[]])
    for q, there in (
        (known([1.0], [[-1.5, 0.0]], 0.1), 1),
        (known([0.5, 0.5], [[-1.5, 0.0], [1.5, 0.0]], 0.13), 2),
    ):
        verdicts.certified(now, str(there), defended(q), spare=1.1)
        (record,) = now.records
        assert record.answer is not None and record.answer[0] == str(there)
    verdicts.certified(now, "1", defended(known([1.0], [[-1.5, 0.0]], 0.1)), spare=1.1)
    assert now.records[0].answer is not None and now.records[0].answer[0] == "2"
