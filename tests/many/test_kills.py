"""SIGKILL at random moments of `fit_many`: nothing finished is lost or done twice, same answer."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kill_cases import in_nursery, many_run
from many_cases import equal, many
from posterior_cases import alone_and_seeded

__all__ = ["alone_and_seeded"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.mark.parametrize("q", ["gaussian", "auto"])
def test_killed_at_random_moments(tmp_path: Path, q: str) -> None:
    lived = in_nursery(f"many_{q}", tmp_path, 20)
    assert lived["killed"] >= 20
    assert lived["midway"] >= 5
    assert lived["twice"] == [] and lived["lost"] == []
    undisturbed = many_run(q, None)
    for folder in lived["folders"]:
        begun: list[int] = []
        assert equal(undisturbed, many_run(q, Path(folder), begun.append)) and begun == []


SCRIPT = """
    from many_cases import many
    if __name__ == "__main__":
        many(store=%r, workers=2, max_num_iters=200)
"""


def test_killed_with_workers(tmp_path: Path) -> None:
    """The whole group dies, as when a batch system ends a job."""
    folder = tmp_path / "fits"
    code = textwrap.dedent(SCRIPT) % str(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    try:
        while not (found := list(folder.glob("chunk-*.visbi"))):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    written = {path: path.stat().st_mtime_ns for path in found}
    assert equal(many(store=folder, max_num_iters=200), many(max_num_iters=200))
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
