"""Running a simulator many times: seeded, in parallel, resumable.

The thetas are drawn once, under a seed derived from `seed`, and cut into chunks. Each call of the
simulator has a seed of its own, derived from `seed` and from its place in the row of calls, so that
neither the number of workers, nor the backend, nor the order in which chunks finish changes a number.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visbi.core.checks import finite_tensor, positive_int, violation
from visbi.core.folders import as_folder
from visbi.core.parallel import check_workers
from visbi.core.random import root_seed, spawn_seeds
from visbi.core.words import digest
from visbi.simulators.calling import CallStyle, Simulator, detect
from visbi.simulators.chunk import ChunkResult, check_shape
from visbi.simulators.execution import Look, Plan, run_plan
from visbi.simulators.generators import all_generators
from visbi.simulators.identity import code_of, name_of
from visbi.simulators.simulations import Simulations
from visbi.simulators.store import ChunkStore, read_manifest

__all__ = ["simulate"]

_MOST_ROWS = 256  # in a chunk: many enough to hide the price of a call, few enough for memory
_FEWEST_CHUNKS = 64  # for simulators of single thetas, so that few slow runs still spread over workers


def simulate(
    simulator: Simulator,
    proposal: Any,
    n: int,
    *,
    seed: int | Tensor | None = None,
    workers: int | None = 1,
    batch_size: int | None = None,
    show_progress_bar: bool = True,
    batched: bool | None = None,
    store: str | Path | None = None,
    look: Look | None = None,
) -> Simulations:
    """Draw `n` thetas from `proposal` and run `simulator` on each.

    Runs that raise, or whose output holds NaN or Inf, are kept apart with their theta and the reason.

    Args:
        simulator: theta (D,) -> x (...), or theta (B, D) -> x (B, ...), in torch or NumPy. It may draw from
            the global generators of torch, NumPy and `random`, which are seeded for every call and
            restored afterwards; a parameter named `rng` receives a NumPy Generator, one named `seed` an
            int. A number as output counts as x of shape (1,).
        proposal: anything with `sample((n,))` (a prior, a posterior), or the thetas themselves, (n, D).
        n: number of runs.
        seed: repeats the runs, whatever `workers`; None draws one from torch's global generator, or takes
            that of an existing `store`.
        workers: processes; -1 for all cores, None to follow the enclosing `joblib.parallel_config`, which
            also chooses the backend (loky, Dask, Ray, ...).
        batch_size: rows in a chunk of work, which for a batched simulator is one call. A batched simulator
            draws the noise of a call at once, so there `batch_size` belongs to the seed; for a simulator
            of single thetas it changes nothing. None is up to 256.
        show_progress_bar: show tqdm's bar.
        batched: whether the simulator takes a batch; None to find out (rules in `simulators.calling`).
        store: a folder that keeps finished chunks. The same call on the same folder goes on where a killed
            one stopped and gives the same numbers as an undisturbed run.
        look: called with the x (K, ...) of each chunk's successful runs as it is finished, those in `store`
            included; what it raises ends the run, with the chunk kept.

    Returns:
        `Simulations` in the order of the thetas; x has the dtype of theta.

    Raises:
        TypeError: `simulator` is not callable, `proposal` neither samples nor is a tensor, or `store` is no
            path.
        ValueError: a number out of range, thetas not (n, D) or not finite, outputs of unlike shapes, a
            `store` of another run, or not one successful run (the message shows the first failure).

    Warns:
        UserWarning: the runs in `store` were made by other code of the same name; see `simulators.identity`.

    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(torch.zeros(2), torch.ones(2))
    >>> pairs = simulate(lambda t: t + torch.randn_like(t), prior, 100, seed=0, show_progress_bar=False)
    >>> pairs.theta.shape, pairs.x.shape, pairs.n_failed
    (torch.Size([100, 2]), torch.Size([100, 2]), 0)
    """
    n = positive_int("n", n)
    if not callable(simulator):
        raise TypeError(violation("simulator", "a callable, theta -> x", type(simulator).__name__))
    check_workers(workers)
    if batch_size is not None:
        batch_size = positive_int("batch_size", batch_size)
    folder = None if store is None else as_folder(store)
    manifest = None if folder is None else read_manifest(folder)

    root = root_seed(seed, None if manifest is None else int(manifest["seed"]))
    theta_seed, probe_seed, run_seed = spawn_seeds(root, 3)
    theta = _draw(proposal, n, theta_seed)
    style = _style(simulator, theta, probe_seed, batched, manifest)
    plan = Plan(simulator, style, theta, run_seed, _rows_per_chunk(n, style, batch_size))
    chunks = None if folder is None else ChunkStore.open(folder, _manifest(plan, root), code_of(simulator))
    return _gather(theta, run_plan(plan, chunks, workers, show_progress_bar, look), root)


def _draw(proposal: Any, n: int, seed: int) -> Tensor:
    """Thetas (n, D), floating, finite, on the CPU."""
    if callable(getattr(proposal, "sample", None)):
        with all_generators(seed), torch.no_grad():
            theta = proposal.sample((n,))
        if isinstance(theta, Tensor) and theta.ndim == 1:
            theta = theta[:, None]
    elif isinstance(proposal, Tensor | np.ndarray):
        theta = proposal
    else:
        rule = "something with `sample((n,))`, or a tensor of thetas"
        raise TypeError(violation("proposal", rule, type(proposal).__name__))
    theta = finite_tensor("proposal", theta).detach().cpu()
    if theta.ndim != 2 or theta.shape[0] != n or theta.shape[1] == 0:
        raise ValueError(
            violation("proposal", f"thetas of shape (n, D) with n = {n}", f"shape {tuple(theta.shape)}")
        )
    theta = theta if theta.is_floating_point() else theta.to(torch.get_default_dtype())
    return theta.contiguous()


def _style(
    simulator: Simulator, theta: Tensor, seed: int, batched: bool | None, manifest: dict[str, Any] | None
) -> CallStyle:
    if manifest is not None and batched in (None, manifest["style"]["batched"]):
        known = manifest["style"]
        return CallStyle(known["batched"], known["numpy"], tuple(known["keywords"]))
    return detect(simulator, theta, seed, batched=batched)


def _rows_per_chunk(n: int, style: CallStyle, batch_size: int | None) -> int:
    if batch_size is not None:
        return batch_size
    return _MOST_ROWS if style.batched else min(_MOST_ROWS, -(-n // _FEWEST_CHUNKS))


def _manifest(plan: Plan, root: int) -> dict[str, Any]:
    style = asdict(plan.style)
    return {
        "simulator": name_of(plan.simulator),
        "seed": root,
        "n": len(plan.theta),
        "theta": f"{plan.theta.dtype} {digest(plan.theta)}",
        "style": {**style, "keywords": list(style["keywords"])},
        "batch_size": plan.rows,
    }


def _gather(theta: Tensor, results: list[ChunkResult], seed: int) -> Simulations:
    xs = [torch.from_numpy(result.x) for result in results if result.x is not None]
    failures = tuple(text for result in results for text in result.failures)
    if not xs:
        hint = "if it takes only batches (B, D), or only single thetas (D,), say so with `batched`"
        got = f"{len(failures)} failures of {len(theta)}; the first: {failures[0]}"
        raise ValueError(violation("simulator", f"at least one finite run ({hint})", got))
    for x in xs:
        check_shape(tuple(xs[0].shape[1:]), tuple(x.shape[1:]))
    succeeded = torch.from_numpy(np.concatenate([result.succeeded for result in results]))
    return Simulations(theta[succeeded], torch.cat(xs), theta[~succeeded], failures, seed)
