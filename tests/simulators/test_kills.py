"""SIGKILL at random moments of `simulate`: no finished run is lost or made twice, same answer."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from kill_cases import in_nursery, simulate_run
from visbi.simulators import simulate

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    lived = in_nursery("simulate", tmp_path, 40)
    assert lived["killed"] >= 40 and lived["midway"] >= 10
    assert lived["twice"] == [] and lived["lost"] == []
    undisturbed = simulate_run(None)
    assert undisturbed.n_failed == 6
    for folder in lived["folders"]:
        begun: list[int] = []
        again = simulate_run(Path(folder), begun.append)
        assert begun == [] and again.failures == undisturbed.failures
        assert torch.equal(again.x, undisturbed.x) and torch.equal(again.theta, undisturbed.theta)


SCRIPT = """
    import os, time, torch
    from visbi.simulators import simulate

    def noisy(theta):
        number = round(float(theta) * 79)
        diary = os.open({diary!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(diary, b"%d\\n" % number)
        os.close(diary)
        time.sleep(0.02)
        return theta + torch.randn(3)

    if __name__ == "__main__":
        theta = torch.linspace(0, 1, 80)[:, None]
        options = dict(seed=1, batch_size=4, batched=False, show_progress_bar=False)
        simulate(noisy, theta, 80, workers=2, store={store!r}, **options)
"""


def test_killed_with_workers(tmp_path: Path) -> None:
    """The whole group dies three times, as when a batch system ends a job, and then it may finish."""
    store, diary = tmp_path / "runs", tmp_path / "begun"
    code = textwrap.dedent(SCRIPT).format(store=str(store), diary=str(diary))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in store.glob("chunk-*.safetensors")}

    for chunks in (3, 8, 13, None):
        before, seen = finished(), len(diary.read_text()) if diary.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
        try:
            while process.poll() is None and (chunks is None or len(finished()) < chunks):
                time.sleep(0.002)
            assert (process.poll() is None) == (chunks is not None), "the run ended before it could be killed"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        begun = {int(line) // 4 for line in diary.read_text()[seen:].split()}
        assert begun.isdisjoint(
            int(path.stem.removeprefix("chunk-")) for path in before
        )  # none is done twice
        assert before.items() <= finished().items()  # and none is lost
    assert process.returncode == 0 and len(finished()) == 20

    def noisy(theta: torch.Tensor) -> torch.Tensor:
        return theta + torch.randn(3)

    noisy.__qualname__ = "noisy"  # a store knows its simulator by it
    theta, options = torch.linspace(0, 1, 80)[:, None], dict(seed=1, batch_size=4, batched=False)
    undisturbed = simulate(noisy, theta, 80, show_progress_bar=False, **options)  # type: ignore[arg-type]
    again = simulate(noisy, theta, 80, show_progress_bar=False, store=store, **options)  # type: ignore[arg-type]
    assert torch.equal(again.x, undisturbed.x) and torch.equal(again.theta, undisturbed.theta)
