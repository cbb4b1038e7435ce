"""What `fit_many` returns: a sequence, a table, a text, files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from many_cases import GOOD, X, equal, many
from posterior_cases import SD, alone_and_seeded, log_p, real
from visbi import Posteriors, VIPosterior
from visbi.core.random import seeded

__all__ = ["alone_and_seeded"]


@pytest.fixture(scope="module")
def found() -> Posteriors:
    return many(X[:3], "auto")


def test_it_is_a_sequence(found: Posteriors) -> None:
    assert isinstance(found, Sequence) and len(found) == 3
    assert all(isinstance(each, VIPosterior) for each in found)
    assert [each.default_x.tolist() for each in found] == [[row] for row in X[:3].tolist()]  # type: ignore[union-attr]
    assert found[-1] is found[2] and torch.equal(found[1:].x, X[1:3]) and len(found[:2]) == 2
    with pytest.raises(IndexError):
        found[3]


INDICES = [[2, 0], (2, 0), np.array([2, 0]), torch.tensor([-1, -3]), slice(None, None, -2)]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: type(index).__name__)
def test_some_in_another_order(found: Posteriors, index: Any) -> None:
    some = found[index]
    assert isinstance(some, Posteriors) and torch.equal(some.x, X[[2, 0]])
    assert some.reports == (found.reports[2], found.reports[0])


def test_some_by_bools_or_none(found: Posteriors) -> None:
    right = found.x[:, 0] > found.x[0, 0]
    assert torch.equal(found[right].x, found.x[right]) and len(found[right.tolist()]) == int(right.sum())
    assert len(found[[]]) == len(found[found.failed]) == len(found[3:]) == 0


@pytest.mark.parametrize("index", ["a", 1.0, None, [0.5], ["a"], [True, False], torch.zeros(1, 1).long()])
def test_what_is_no_index(found: Posteriors, index: Any) -> None:
    with pytest.raises(TypeError, match="`index`: expected"):
        found[index]


def test_places_that_are_not_there(found: Posteriors) -> None:
    for index in ([0, 3], torch.tensor([-4])):
        with pytest.raises(IndexError, match="`index`: expected whole numbers from -3 to 2"):
            found[index]


def test_a_loop_ends_where_there_is_no_fit() -> None:
    x = X[:3].clone()
    x[1] = torch.nan
    some = many(x, "gaussian")
    with pytest.raises(ValueError, match="no fit to this observation"):
        list(some)
    assert len(list(some[[i for i, record in enumerate(some.records) if record.has_fit]])) == 2


@pytest.mark.parametrize(("shape", "error"), [((-1,), ValueError), (5, TypeError), (("a",), TypeError)])
def test_what_is_no_shape(found: Posteriors, shape: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`sample_shape`: expected"):
        found.sample(shape)


def test_densities_of_numbers_of_any_make(found: Posteriors) -> None:
    expected = found.log_prob(torch.ones(3, 2))
    for theta in ([[1, 1]] * 3, np.ones((3, 2), dtype=np.float32), torch.ones(3, 2).long()):
        torch.testing.assert_close(found.log_prob(theta), expected)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`theta`: expected a tensor; got str"):
        found.log_prob("theta")  # type: ignore[arg-type]


def test_an_entry_is_a_posterior_like_any_other(found: Posteriors) -> None:
    one = found[1]
    assert one.report.status == "ok" and one.report == found.reports[1]
    assert (one.sample((2000,)).mean(0) - X[1]).abs().max() < 0.1
    assert (one.weighted_sample(2000)[0].shape) == (2000, 2)
    assert one.map().sub(X[1]).abs().max() < 0.05
    one.train(X[4:], seed=1, show_progress_bar=False)
    assert (one.sample((2000,)).mean(0) - X[4]).abs().max() < 0.1
    found._made.clear()


def test_draws_and_densities(found: Posteriors) -> None:
    theta = found.sample((2, 3))
    assert theta.shape == (2, 3, 3, 2)
    assert found.sample().shape == (3, 2) and found.sample((0,)).shape == (0, 3, 2)
    each = torch.stack([found[i].log_prob(theta[0, :, i]) for i in range(3)], -1)
    torch.testing.assert_close(found.log_prob(theta)[0], each)
    everywhere = found.log_prob(theta[..., :1, :])
    assert everywhere.shape == (2, 3, 3)
    torch.testing.assert_close(everywhere[..., 0], found.log_prob(theta)[..., 0])
    exact = torch.distributions.Independent(torch.distributions.Normal(X[:3], SD), 1).log_prob(theta)
    torch.testing.assert_close(found.log_prob(theta, normalized="potential"), exact, atol=0.05, rtol=0)
    with pytest.raises(ValueError, match=r"`theta`: expected shape \(\.\.\., 3, 2\)"):
        found.log_prob(theta[..., :2, :])


def test_draws_are_corrected_unless_told(found: Posteriors) -> None:
    """With q known to be too wide, corrected draws have the posterior's spread and raw ones have q's."""
    prior = real()
    wide = many(X[:2], "gaussian", prior=prior, max_num_iters=1, learning_rate=1e-9)
    assert (wide.sample((4000,)).std(0) / 2 - 1).abs().max() < 0.1  # as after the start at the prior
    assert (wide.sample((4000,), correct=True).std(0) / SD - 1).abs().max() < 0.15
    with seeded(3):
        raw = found.sample((50,), correct=False)
    with seeded(3):
        assert torch.equal(raw, torch.stack([each.sample((50,), correct=False) for each in found], 1))


def test_table_and_text(found: Posteriors) -> None:
    table = found.table()
    assert [row["index"] for row in table] == [0, 1, 2]
    assert [row["khat"] for row in table] == [report.khat for report in found.reports]
    json.dumps(table)
    assert str(found).startswith("3 posteriors over 2 parameters: 3 ok")
    assert repr(found) == "Posteriors(n_obs=3, D=2)"


def test_text_is_short_whatever_failed() -> None:
    x = torch.cat([X] * 6)
    x[::2] = torch.nan
    said = str(many(x, max_num_iters=1))
    assert len(said.splitlines()) <= 10 and "and 7 more" in said


@pytest.mark.parametrize("q", ["auto", "gaussian", "maf"])
def test_saved_and_loaded(tmp_path: Path, q: str) -> None:
    posteriors = many(X[:3], q)
    posteriors.save(tmp_path / "fits")
    again = Posteriors.load(tmp_path / "fits", potential_fn=log_p)
    assert equal(posteriors, again) and again.job.options == posteriors.job.options
    draws = []
    for one in (posteriors, again):
        with seeded(5):
            draws.append(one.sample((20,)))
    assert torch.equal(*draws) and torch.equal(posteriors.log_prob(draws[0]), again.log_prob(draws[0]))
    with pytest.raises(ValueError, match="potential_fn"):
        Posteriors.load(tmp_path / "fits")
    with pytest.raises(ValueError, match="`path`: expected an empty folder"):
        posteriors.save(tmp_path / "fits")


def test_a_part_is_saved_as_well(tmp_path: Path) -> None:
    some = many(X, q="gaussian")[1:4]
    some.save(tmp_path)
    assert equal(some, Posteriors.load(tmp_path, potential_fn=log_p))


def test_a_loaded_one_trains_on(tmp_path: Path) -> None:
    many(X[:2], **GOOD).save(tmp_path)
    one = Posteriors.load(tmp_path, potential_fn=log_p)[0]
    before = one.q.trainable()[0].clone()
    one.train(X[3:4], **GOOD, seed=1, show_progress_bar=False, quality_control=False)
    assert not torch.equal(before, one.q.trainable()[0])


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`path`: expected a folder of fits"):
        Posteriors.load(tmp_path)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"`path`: expected a folder; got the file .*thesis.tex"):
        Posteriors.load(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="`store`: expected an empty folder or a store of fits"):
        Posteriors.load(tmp_path)


def test_no_pickle_in_the_folder(tmp_path: Path) -> None:
    many(X[:2], "auto").save(tmp_path)
    for path in tmp_path.iterdir():
        assert b"pickle" not in path.read_bytes() and path.suffix in (".json", ".visbi")
