"""Runs that are killed with SIGKILL at random moments and begun again until they are done.

A nursery process imports everything once and forks a child for each life, so that twenty deaths cost seconds.
A child writes down each piece of work that it begins; what is finished is what its store holds.

    python -c "from kill_cases import nursery; nursery('many_auto', '/tmp/somewhere', 20)"
"""

import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CASES", "Case", "in_nursery", "nursery"]


@dataclass(frozen=True)
class Case:
    """A run that can be killed.

    Attributes:
        run: does all of it in a folder; told whom to tell of each piece of work that it begins.
        pieces: by number, the file that says that a piece is finished.
    """

    run: Callable[[Path, Callable[[int], None]], Any]
    pieces: Callable[[Path], dict[int, Path]]


def in_nursery(case: str, folder: Path, kills: int) -> dict[str, Any]:
    """What `nursery` says, from a process of its own."""
    code = f"from kill_cases import nursery; nursery({case!r}, {str(folder)!r}, {kills})"
    path = os.pathsep.join(filter(None, sys.path))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
    }  # a fork would not survive more threads
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900
    )  # a child that hangs is a failure, not a reason to wait
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nursery(case: str, folder: str, kills: int) -> None:
    """Kill until `kills` children have died, in folders run-0, run-1, ..., and say as JSON how they lived.

    A life lasts up to half of what an undisturbed one takes; one is let through after ten deaths in a folder.

    Prints `folders`, all of them finished; `killed`; `midway`, how many died with pieces finished and others
    begun; `twice`, finished ones that were begun again; `lost`, finished ones whose file changed or is gone.
    """
    told, clock = CASES[case], random.Random(f"{case} {kills}")
    longest = _undisturbed(told, Path(folder) / "undisturbed") / 2
    found: dict[str, Any] = {"folders": [], "killed": 0, "midway": 0, "twice": [], "lost": []}
    while found["killed"] < kills:
        place, died = Path(folder) / f"run-{len(found['folders'])}", True
        for death in range(11):
            before = {number: _identity(path) for number, path in told.pieces(place).items()}
            died, begun = _life(told, place, clock.uniform(0.0, longest) if death < 10 else math.inf)
            after = {number: _identity(path) for number, path in told.pieces(place).items()}
            found["twice"] += sorted(set(begun) & set(before))
            found["lost"] += [number for number, which in before.items() if after.get(number) != which]
            found["killed"] += died
            found["midway"] += died and len(after) > 0 and len(begun) > 0
            if not died:
                break
        found["folders"].append(str(place))
    sys.stdout.write(json.dumps(found))


def _undisturbed(told: Case, place: Path) -> float:
    """Seconds of a second life: the first one loads what is loaded on first use."""
    told.run(place.with_suffix(".first"), lambda _: None)
    started = time.monotonic()
    died, _ = _life(told, place, math.inf)
    assert not died
    return time.monotonic() - started


def _life(told: Case, place: Path, seconds: float) -> tuple[bool, list[int]]:
    """Whether the child was killed, and which pieces it had begun."""
    diary = place.with_suffix(".begun")
    diary.parent.mkdir(parents=True, exist_ok=True)
    diary.write_text("")
    child = os.fork()
    if child == 0:
        try:
            with diary.open("a", buffering=1) as file:
                told.run(place, lambda number: print(number, file=file))
        except BaseException:  # noqa: BLE001 - a child must not go on as its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    died = os.WIFSIGNALED(ended[1])
    assert died or os.WEXITSTATUS(ended[1]) == 0, "a life ended with an error"
    return died, [int(line) for line in diary.read_text().split("\n") if line]


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_mtime_ns, found.st_ino, found.st_size]


def _chunks(place: Path) -> dict[int, Path]:
    return {
        int(path.stem.removeprefix("chunk-")): path
        for path in place.glob("chunk-*")
        if path.suffix != ".draft"
    }


def many_run(q: str, place: Path | None, begin: Callable[[int], None] = lambda _: None) -> Any:
    """Eight observations in four chunks."""
    import torch

    from many_cases import many
    from visbi.many import work

    x = torch.linspace(-2, 2, 16).reshape(8, 2)
    original = work.fit_chunk

    def spy(job: Any, some: Any, seed: int) -> Any:
        begin(int((x == some[0]).all(1).nonzero()) // 2)
        return original(job, some, seed)

    work.fit_chunk = spy  # type: ignore[assignment]
    try:
        return many(x, q, store=place)
    finally:
        work.fit_chunk = original


def simulate_run(place: Path | None, begin: Callable[[int], None] = lambda _: None) -> Any:
    """Forty runs in ten chunks, some of which fail."""
    import torch

    from visbi.simulators import simulate

    theta = torch.linspace(0, 1, 40)[:, None]

    def noisy(row: torch.Tensor) -> torch.Tensor:
        number = round(float(row) * 39)
        if number % 4 == 0:
            begin(number // 4)
        time.sleep(0.004)
        if number % 7 == 3:
            raise ArithmeticError(f"not {number}")
        return row + torch.randn(3)

    return simulate(
        noisy, theta, 40, seed=1, batch_size=4, batched=False, store=place, show_progress_bar=False
    )


def infer_run(place: Path | None, begin: Callable[[int], None] = lambda _: None) -> Any:
    """Two rounds of two chunks each, a network and an automatic fit."""
    from visbi.estimators import TrainingOptions
    from visbi.rounds import infer, learning, sequential
    from visbi.simulators.zoo import linear_gaussian

    task, round_of = linear_gaussian.task(), [-1]

    def simulator(theta: Any) -> Any:
        if len(theta) in _CHUNKS:  # whole calls; others find out how it wants to be called
            begin(10 * round_of[0] + _CHUNKS.index(len(theta)))
        time.sleep(0.05)
        return task.simulator(theta)

    originals = sequential.simulate, learning.fit_likelihood, sequential._fitted

    def simulate(*arguments: Any, **keywords: Any) -> Any:
        round_of[0] += 1
        return originals[0](*arguments, **keywords)

    def fit_likelihood(*arguments: Any, **keywords: Any) -> Any:
        begin(10 * round_of[0] + _NETWORK)
        return originals[1](*arguments, **keywords)

    def fitted(*arguments: Any) -> Any:
        begin(10 * round_of[0] + _FIT)
        return originals[2](*arguments)

    sequential.simulate, learning.fit_likelihood, sequential._fitted = simulate, fit_likelihood, fitted  # type: ignore[assignment]
    try:
        return infer(
            simulator,
            task.prior,
            task.x_o,
            simulations=(sum(_CHUNKS),) * 2,
            ensemble=2,
            num_transforms=1,
            hidden_features=8,
            stop_early=False,
            options=TrainingOptions(max_epochs=20),
            store=place,
            seed=1,
            show_progress_bar=False,
        )
    finally:
        sequential.simulate, learning.fit_likelihood, sequential._fitted = originals


_CHUNKS = (256, 44)  # rows of the chunks of a round
_NETWORK, _FIT = 8, 9


def _parts_of_rounds(place: Path) -> dict[int, Path]:
    parts = {f"simulations/chunk-{i:06d}.safetensors": i for i in range(len(_CHUNKS))}
    parts |= {"likelihood.visbi": _NETWORK, "round.visbi": _FIT}
    files = {10 * k + i: place / f"round-{k:02d}" / name for k in range(2) for name, i in parts.items()}
    return {number: path for number, path in files.items() if path.exists()}


CASES = {
    "many_gaussian": Case(functools.partial(many_run, "gaussian"), _chunks),
    "many_auto": Case(functools.partial(many_run, "auto"), _chunks),
    "simulate": Case(simulate_run, _chunks),
    "infer": Case(infer_run, _parts_of_rounds),
}
