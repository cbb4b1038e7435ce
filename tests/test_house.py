"""The house itself: modules stand alone, importing is cheap, and nothing in the tree points outside it."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import visbi

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ["visbi", *(module.name for module in pkgutil.walk_packages(visbi.__path__, prefix="visbi."))]
)
HEAVY = [
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "joblib",
    "matplotlib",
    "pandas",
    "sklearn",
    "typer",
    "xarray",
]

# One interpreter loads torch, then every module is imported alone in a child of its own: as good as a fresh
# interpreter for everything of visbi, and torch is paid for once.
IMPORT_ALONE = """
import importlib, os, sys, traceback
import torch
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print("cannot import " + name + " alone", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(name)
"""


def in_fresh_interpreter(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` without what this process has imported; OpenMP's threads would not survive a fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT)


def tracked_files() -> list[Path]:
    """What git knows of the tree; outside a checkout there is nothing to look at."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, cwd=ROOT).stdout
    paths = [ROOT / name for name in listed.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_imports_alone() -> None:
    done = in_fresh_interpreter(IMPORT_ALONE, *MODULES)
    assert done.stdout.split() == [], done.stderr


@pytest.mark.parametrize("name", ["visbi", "visbi.posterior"])
def test_import_loads_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = in_fresh_interpreter(code).stdout.split()
    assert "visbi" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_import_visbi_leaves_torch_settings_alone() -> None:
    code = """
import torch
from torch.distributions import Distribution
def settings():
    modes = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    return Distribution._validate_args, *modes
before = settings()
import visbi.posterior
print(settings() == before)
"""
    assert in_fresh_interpreter(code).stdout.strip() == "True"


def test_all_public_names_exist() -> None:
    for name in visbi.__all__:
        assert getattr(visbi, name) is not None
    assert set(visbi.__all__) <= set(dir(visbi))
    with pytest.raises(AttributeError, match="no attribute 'VIPosteriors'"):
        visbi.VIPosteriors  # type: ignore[attr-defined]  # noqa: B018


def test_nothing_tracked_points_outside() -> None:
    # Split, so that this file is not what it looks for.
    outside = ["pypi" + ".org", "pythonhosted" + ".org", "download.py" + "torch.org", "conda" + ".org"]
    outside += [
        "file:///" + "opt",
        "/wo" + "rk/",
        r"\.\./shar" + "ed",
        "shared/" + "(design|reference|hooks)",
    ]
    pattern = re.compile("|".join(outside).encode())
    found = [str(path.relative_to(ROOT)) for path in tracked_files() if pattern.search(path.read_bytes())]
    assert found == []


def test_version_is_that_of_the_project_file() -> None:
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written is not None
    assert visbi.__version__ == written[1]
