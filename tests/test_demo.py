"""The demonstration, with next to no effort: every file is written and holds what it should."""

import json
from pathlib import Path

import pytest
import torch

from visbi.demo import FULL, QUICK, Effort, exact_posterior, run_demo
from visbi.estimators import TrainingOptions
from visbi.posterior import VIPosterior
from visbi.simulators.zoo import lynx_hare

TINY = Effort(
    simulations=(400, 200),
    options=TrainingOptions(max_epochs=2),
    q="gaussian",
    train={"max_num_iters": 5, "init": "prior"},
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a demonstration and what it said."""
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = torch.random.get_rng_state()
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert run_demo(folder, effort=TINY, seed=1, workers=1, say=said.append) == folder
    assert torch.equal(before, torch.random.get_rng_state())
    torch.set_num_threads(threads)
    return folder, said


def test_files(demo: tuple[Path, list[str]]) -> None:
    names = {"posterior.visbi", "pairs.png", "prediction.png", "trace.png", "table.md", "certificate.json"}
    assert {path.name for path in demo[0].iterdir()} == names


@pytest.mark.parametrize("name", ["pairs.png", "prediction.png", "trace.png"])
def test_pictures(demo: tuple[Path, list[str]], name: str) -> None:
    content = (demo[0] / name).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_posterior_comes_back_with_the_same_draws(demo: tuple[Path, list[str]]) -> None:
    draws = []
    for _ in range(2):
        posterior = VIPosterior.load(demo[0] / "posterior.visbi")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            draws.append(posterior.sample((20,)))
    assert draws[0].shape == (20, 8) and torch.equal(draws[0], draws[1])
    report = json.loads((demo[0] / "certificate.json").read_text())["simulations"]
    assert report["khat"] == posterior.report.khat and report["sentence"] == posterior.report.sentence


def test_table(demo: tuple[Path, list[str]]) -> None:
    head, rule, *rows = (demo[0] / "table.md").read_text().splitlines()
    assert "from 600 simulations" in head
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(lynx_hare.THETA_NAMES)
    assert {row.count("|") for row in (head, rule, *rows)} == {6}


def test_certificates(demo: tuple[Path, list[str]]) -> None:
    reports = json.loads((demo[0] / "certificate.json").read_text())
    assert set(reports) == {"simulations", "exact likelihood"}
    for report in reports.values():
        assert report["status"] in {"ok", "corrected", "suspect", "failed"} and report["n_draws"] > 1000


def test_says_what_it_does(demo: tuple[Path, list[str]]) -> None:
    folder, said = demo
    assert "600 runs in 2 rounds" in said[1] and said[1].startswith("1/3")
    assert (folder / "table.md").read_text() in said
    assert said[-1].endswith(f"everything is in {folder}/")


def test_exact_posterior_is_repeatable() -> None:
    task = lynx_hare.task()
    first, again = (exact_posterior(task, TINY, seed=2, show_progress_bar=False) for _ in range(2))
    assert first.report == again.report


def test_quick_is_less() -> None:
    assert sum(QUICK.simulations) < sum(FULL.simulations)
    assert QUICK.options is not None and FULL.options is None
