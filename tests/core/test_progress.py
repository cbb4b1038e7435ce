"""Bars are shown where they are asked for, and leave no trace where they are not."""

import subprocess
import sys

import pytest

from visbi.core.progress import Progress


def test_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, range(3), desc="steps", mininterval=0) as bar:
        for step in bar:
            bar.note(f"at {step}")
            bar.title("further")
    said = capsys.readouterr().err
    assert "steps" in said and "further" in said and "at 2" in said and "3/3" in said


def test_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, total=4, initial=1) as bar:
        bar.update(3)
    assert "4/4" in capsys.readouterr().err


def test_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(False, range(3), desc="steps") as bar:
        bar.note("a")
        bar.title("b")
        bar.update(2)
        assert list(bar) == [0, 1, 2]
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_hidden_starts_no_thread() -> None:
    """Forks share the lock of one: whoever is killed while it holds it stops all others."""
    code = """
import threading, torch
from torch.distributions import Independent, Normal
from visbi import VIPosterior, fit_many
from visbi.simulators import simulate

prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
potential = lambda theta, x: prior.log_prob(theta)
simulate(lambda theta: theta, prior, 4, seed=1, show_progress_bar=False)
for q in ("auto", "gaussian"):
    told = {"seed": 1, "show_progress_bar": False}
    VIPosterior(potential, prior, q=q).train(torch.zeros(1, 2), **told)
    few = {"max_num_iters": 3} if q == "gaussian" else {}
    fit_many(potential, prior, torch.zeros(2, 2), q, quality_control=False, **few, **told)
assert not any("tqdm" in type(thread).__module__ for thread in threading.enumerate())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
