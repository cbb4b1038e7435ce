"""Runs that go on where they were killed."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from visbi.priors import BoxUniform
from visbi.simulators import simulate

PRIOR = BoxUniform(torch.zeros(2), torch.ones(2))


def noisy(theta):
    if theta[0] > 0.8:
        raise ArithmeticError(f"too much: {theta[0]:.4f}")
    return theta[0] + torch.randn(3)


def quiet(simulator=noisy, n=40, proposal=PRIOR, **options):
    return simulate(
        simulator, proposal, n, show_progress_bar=False, **{"seed": 1, "batch_size": 4, **options}
    )


def assert_same(a, b):
    for name in ("theta", "x", "failed_theta"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.failures == b.failures and a.seed == b.seed


SCRIPT = """
    import time, torch
    from visbi.priors import BoxUniform
    from visbi.simulators import simulate

    def noisy(theta):
        time.sleep(0.05)
        if theta[0] > 0.8:
            raise ArithmeticError(f"too much: {theta[0]:.4f}")
        return theta[0] + torch.randn(3)

    prior = BoxUniform(torch.zeros(2), torch.ones(2))
    simulate(noisy, prior, 40, seed=1, batch_size=4, store=%r, show_progress_bar=False)
"""


def chunks(folder):
    return sorted(folder.glob("chunk-*.safetensors"))


def test_killed_run_goes_on(tmp_path):
    folder = tmp_path / "runs"
    code = textwrap.dedent(SCRIPT) % str(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while len(chunks(folder)) < 3:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = len(chunks(folder))
    assert 3 <= found < 10
    written = {path: path.stat().st_mtime_ns for path in chunks(folder)}
    resumed = quiet(store=folder)
    assert len(chunks(folder)) == 10
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert resumed.n_failed > 0
    assert_same(resumed, quiet())


def test_finished_store_runs_nothing(tmp_path):
    calls = []

    def noisy(theta):
        calls.append(theta)
        return theta[0] + torch.randn(3)

    first = quiet(noisy, store=tmp_path)
    calls.clear()
    assert_same(first, quiet(noisy, store=tmp_path))
    assert not calls


def test_workers_may_change_on_the_way(tmp_path):
    quiet(store=tmp_path)
    for path in chunks(tmp_path)[::2]:
        path.unlink()
    assert_same(quiet(store=tmp_path, workers=2), quiet())


def test_seed_comes_from_the_store(tmp_path):
    torch.manual_seed(0)
    first = quiet(store=tmp_path, seed=None)
    chunks(tmp_path)[0].unlink()
    assert_same(first, quiet(store=tmp_path, seed=None))


def other(theta):
    return theta[0] + torch.randn(3)


CHANGES = [
    (dict(seed=2), "seed"),
    (dict(n=41), "n 41"),
    (dict(simulator=other), "simulator 'other'"),
    (dict(proposal=BoxUniform(torch.zeros(2), 2 * torch.ones(2))), "theta"),
    (dict(batch_size=5), "batch_size"),
]


def test_edited_code_of_the_same_name_is_told(tmp_path, recwarn):
    def version(body):
        path = tmp_path / f"model_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(f"import torch\ndef noisy(theta):\n{textwrap.indent(body, '    ')}\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.noisy

    first = quiet(version("return theta + 1"), store=tmp_path / "runs")
    quiet(version("# a remark\nreturn   theta + 1"), store=tmp_path / "runs")
    quiet(functools.partial(version("return theta + 1")), store=tmp_path / "runs")
    without_source = {}
    exec("def noisy(theta):\n    return theta + 2", without_source)
    quiet(without_source["noisy"], store=tmp_path / "runs")
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"`store`: expected runs of 'noisy' as it is now; got .*runs"
    ) as caught:
        again = quiet(version("return theta + 2"), store=tmp_path / "runs")
    assert [each.filename for each in caught] == [__file__]  # the line that called
    assert_same(first, again)


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_store_of_another_run_is_an_error(tmp_path, change, what):
    quiet(store=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"`store`: expected a store made with {what}"):
        quiet(**change, store=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_foreign_folder_and_unknown_version_are_errors(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="`store`: expected an empty folder"):
        quiet(store=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    folder = tmp_path / "runs"
    quiet(store=folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="`store`: expected version 1; got 99"):
        quiet(store=folder)


def test_damaged_chunk_is_named(tmp_path):
    quiet(store=tmp_path)
    path = chunks(tmp_path)[2]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=path.name):
        quiet(store=tmp_path)


def test_all_failing_chunk_is_kept(tmp_path):
    theta = torch.full((8, 2), 0.5)
    theta[:4] = 0.9
    first = quiet(n=8, proposal=theta, store=tmp_path)
    assert first.n_failed == 4
    assert_same(first, quiet(n=8, proposal=theta, store=tmp_path))
