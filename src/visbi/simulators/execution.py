"""Chunks of runs over joblib's workers (`core.parallel`), with a progress bar and a store.

Chunks finish in any order and are put back into theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from visbi.core.parallel import in_parallel
from visbi.core.progress import Progress
from visbi.core.random import spawn_seeds
from visbi.simulators.calling import CallStyle, Simulator
from visbi.simulators.chunk import ChunkResult, run_chunk
from visbi.simulators.store import ChunkStore

__all__ = ["Look", "Plan", "run_plan"]

Look: TypeAlias = Callable[[Tensor], None]
"""Shown the x (K, ...) of each chunk's successful runs; what it raises ends the run."""


@dataclass(frozen=True)
class Plan:
    """All that fixes the numbers of a run.

    Attributes:
        simulator: theta -> x.
        style: how it wants to be called.
        theta: all thetas, (n, D).
        seed: from which every call's seed is derived.
        rows: thetas in a chunk.
    """

    simulator: Simulator
    style: CallStyle
    theta: Tensor
    seed: int
    rows: int

    @property
    def n_chunks(self) -> int:
        """How many chunks there are; the last one may be short."""
        return -(-len(self.theta) // self.rows)

    def slice(self, index: int) -> slice:
        """The rows of a chunk."""
        return slice(index * self.rows, (index + 1) * self.rows)

    def seeds(self) -> list[list[int]]:
        """For each chunk the seeds of its calls: one if batched, else one for each row."""
        if self.style.batched:
            return [[seed] for seed in spawn_seeds(self.seed, self.n_chunks)]
        seeds = spawn_seeds(self.seed, len(self.theta))
        return [seeds[self.slice(i)] for i in range(self.n_chunks)]


def run_plan(
    plan: Plan, store: ChunkStore | None, workers: int | None, show_progress_bar: bool, look: Look | None
) -> list[ChunkResult]:
    """The results of all chunks, in order: from the store where it has them, else run."""
    done = {i: r for i in range(plan.n_chunks) if store is not None and (r := store.load(i)) is not None}
    todo = [(i, s) for i, s in enumerate(plan.seeds()) if i not in done]
    for result in done.values():
        _show(result, look)
    failed = sum(len(result.failures) for result in done.values())
    with Progress(
        show_progress_bar,
        total=len(plan.theta),
        initial=sum(len(result.succeeded) for result in done.values()),
        desc="simulating",
    ) as bar:
        theta = plan.theta.numpy()
        tasks = ((i, plan.simulator, plan.style, theta[plan.slice(i)], seeds) for i, seeds in todo)
        for index, result in in_parallel(_task, tasks, workers):
            if store is not None:
                store.save(index, result)
            _show(result, look)
            done[index] = result
            failed += len(result.failures)
            bar.note(f"{failed} failed" if failed else "")
            bar.update(len(result.succeeded))
    return [done[i] for i in range(plan.n_chunks)]


def _show(result: ChunkResult, look: Look | None) -> None:
    if look is not None and result.x is not None:
        look(torch.from_numpy(result.x))


def _task(
    index: int, simulator: Simulator, style: CallStyle, theta: np.ndarray, seeds: list[int]
) -> tuple[int, ChunkResult]:
    return index, run_chunk(simulator, style, theta, seeds)
