"""Runs that go on where they ended, and stores of something else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from many_cases import QUICK, X, equal, many
from posterior_cases import alone_and_seeded, box, log_p, made
from visbi import Posteriors
from visbi.many import work

__all__ = ["alone_and_seeded"]


def chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("chunk-*.visbi"))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The observations of each chunk that was begun from now on."""
    seen: list[Tensor] = []
    original = work.fit_chunk

    def spy(job: Any, x: Tensor, seed: int) -> Any:
        seen.append(x)
        return original(job, x, seed)

    monkeypatch.setattr(work, "fit_chunk", spy)
    return seen


@pytest.mark.parametrize("q", ["gaussian", "auto"])
def test_only_what_is_missing_is_fitted(tmp_path: Path, begun: list[Tensor], q: str) -> None:
    first = many(q=q, store=tmp_path)
    assert [len(x) for x in begun] == [2, 2, 1] and len(chunks(tmp_path)) == 3
    begun.clear()
    assert equal(first, many(q=q, store=tmp_path)) and not begun
    chunks(tmp_path)[1].unlink()
    assert equal(first, many(q=q, store=tmp_path))
    assert len(begun) == 1 and torch.equal(begun[0], X[2:4])


def test_workers_may_change_on_the_way(tmp_path: Path) -> None:
    first = many(store=tmp_path)
    for path in chunks(tmp_path)[::2]:
        path.unlink()
    assert equal(first, many(store=tmp_path, workers=2)) and equal(first, many())


def test_seed_comes_from_the_store(tmp_path: Path) -> None:
    first = many(store=tmp_path, seed=None)
    chunks(tmp_path)[0].unlink()
    assert equal(first, many(store=tmp_path, seed=None))


def test_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    class Interrupted:
        on = True

        def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
            if self.on and len(chunks(tmp_path)) == 1:
                raise KeyboardInterrupt
            return log_p(theta, x)

    potential = Interrupted()
    with pytest.warns(UserWarning, match="Interrupted: 3 of 5"):
        part = many(potential=potential, store=tmp_path)
    assert [record.has_fit for record in part.records] == [True, True, False, False, False]
    assert "not fitted yet" in part.reports[4].sentence and part.failed.tolist() == [2, 3, 4]
    assert len(chunks(tmp_path)) == 1
    assert str(Posteriors.load(tmp_path, potential_fn=potential).reports) == str(part.reports)
    potential.on = False
    assert equal(many(potential=potential, store=tmp_path), many())


def wider(theta: Tensor, x: Tensor) -> Tensor:
    return 0.9 * log_p(theta, x)


CHANGES: list[tuple[dict[str, Any], str]] = [
    (dict(seed=2), "seed 2"),
    (dict(x=X[:4]), "n_obs 4"),
    (dict(x=torch.cat([X[:4], X[4:] + 1e-6])), "x "),
    (dict(chunk_size=3), "chunk_size 3"),
    (dict(q="gaussian_diag"), "q 'gaussian_diag'"),
    (dict(q=made(vi_method="fKL")), "q"),
    (dict(n_particles=17), "options"),
    (dict(potential=wider), "this potential and prior"),
    (dict(prior=box()), "this potential and prior"),
]


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_store_of_other_fits_is_an_error(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    many(store=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"`store`: expected a store made with {what}"):
        many(**change, store=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_how_it_is_shown_may_change(tmp_path: Path) -> None:
    first = many(store=tmp_path)
    with pytest.warns(UserWarning, match="suspect"):
        assert equal(first, many(store=tmp_path, quality_control=True))


def test_foreign_folder_and_simulations_are_errors(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="`store`: expected an empty folder or a store of fits"):
        many(store=tmp_path)
    folder = tmp_path / "fits"
    many(store=folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": "visbi simulations"}))
    with pytest.raises(ValueError, match="`store`: expected format 'visbi fits'; got 'visbi simulations'"):
        many(store=folder)


def test_damaged_chunk_is_named(tmp_path: Path) -> None:
    many(store=tmp_path)
    path = chunks(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=path.name):
        many(store=tmp_path)


def test_what_a_kill_leaves_is_cleared(tmp_path: Path) -> None:
    first = many(store=tmp_path)
    chunks(tmp_path)[1].unlink()
    (tmp_path / ".chunk-000001.visbi.0123.part").write_bytes(b"half")
    (tmp_path / "job.visbi").unlink()
    assert equal(first, many(store=tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    ours = {"manifest.json", "posterior.visbi", "job.visbi"}
    assert names == ours | {path.name for path in chunks(tmp_path)} and len(names) == 6


def test_options_are_those_of_quick() -> None:
    assert many(X[:2]).job.options.max_num_iters == QUICK["max_num_iters"]
