r"""`fit_many`: one q for each of many observations.

The observations are cut into chunks, whose size depends on their number, D, the potential and `memory`
alone. Each chunk has a seed of its own, derived from `seed` and from its number: what comes out does not
depend on how many workers there are, on the order in which they finish, or on which chunks an earlier,
killed call had finished.
"""

import contextlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from visbi.core.checks import positive, positive_int, violation
from visbi.core.folders import as_folder
from visbi.core.parallel import check_workers, in_parallel
from visbi.core.progress import Progress
from visbi.core.random import root_seed, seeded, spawn_seeds
from visbi.families.base import Family
from visbi.fitting.auto import CONCERNS_AUTO, idle_options
from visbi.fitting.config import TrainOptions
from visbi.many.posteriors import Posteriors
from visbi.many.record import NOT_YET, Record, no_fit
from visbi.many.rows import Probe, probe, takes_rows
from visbi.many.size import draw_width, rows_per_chunk, width
from visbi.many.store import FitStore, fingerprint, read_fits_manifest
from visbi.many.work import Job, records_of, run_chunk
from visbi.posterior import VIPosterior

__all__ = ["fit_many"]

_MEMORY = 2.0**30
_DEFAULTS: dict[str, Any] = {"retrain_from_scratch": True}  # where they differ from those of `train`
_INIT_DRAWS = 4096  # of an earlier posterior given as `init`


def fit_many(
    potential: Any,
    prior: Distribution | None,
    x: Tensor,
    q: Any = "auto",
    *,
    seed: int | Tensor | None = None,
    workers: int | None = 1,
    chunk_size: int | None = None,
    memory: float = _MEMORY,
    store: str | Path | None = None,
    x_is_iid: bool = False,
    show_progress_bar: bool = True,
    quality_control: bool = True,
    **train: Any,
) -> Posteriors:
    """Fit one q to each of many observations.

    Args:
        potential: log p(theta | x) + const, as for `VIPosterior`. One that takes rows of theta (N, D) and x
            (N, ...) is evaluated for many observations at once; any other for one at a time, which is slower.
        prior: as for `VIPosterior`.
        x: (n_obs, ...), each row one observation; one with NaN or Inf gets no fit and the status "failed".
        q: as for `VIPosterior`. One given as `q` brings also its coordinates, its divergence and the size
            of its flows.
        seed: repeats everything, whatever `workers`; None draws one from torch's global generator, or takes
            that of an existing `store`.
        workers: processes; -1 for all cores, None to follow the enclosing `joblib.parallel_config`, which
            also chooses the backend (loky, Dask, Ray, ...). Each works in one thread.
        chunk_size: observations that one worker fits together. They share random numbers, so it belongs to
            the seed. None: as many as `memory` allows, 64 at most.
        memory: bytes that a worker may use, roughly, for the draws and gradients of a chunk.
        store: a folder that keeps finished chunks. The same call on the same folder goes on where a killed
            one stopped, and gives the same answer as an undisturbed one.
        x_is_iid: whether an observation is itself rows of independent trials, x (n_obs, T, ...), whose
            log-likelihoods add up; then each is evaluated by itself.
        show_progress_bar: show one, over observations.
        quality_control: warn if fits failed or are suspect.
        **train: further keywords of `VIPosterior.train`, for every fit. Unlike there, each starts from fresh
            weights unless `retrain_from_scratch=False`.

    Returns:
        `Posteriors`, a sequence of `VIPosterior`. Ctrl-C ends the run: what was finished is in it, the others
        have no fit.

    Raises:
        TypeError: an argument of the wrong kind, or an unknown keyword.
        ValueError: a value out of range, no observations, a potential that does not depend on x, a `store` of
            other fits, or not one observation for which a fit could be tried (the message shows the first
            error).

    >>> from visbi.priors import BoxUniform
    >>> prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
    >>> def potential(theta, x):
    ...     return -0.5 * ((theta - x) / 0.5).square().sum(-1)
    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> posteriors = fit_many(potential, prior, x, seed=1, show_progress_bar=False)
    >>> posteriors.sample((500,)).shape, posteriors[1].default_x, len(posteriors.failed)
    (torch.Size([500, 3, 2]), tensor([[1., 0.]]), 0)
    """
    x, options = _observations(x), _options(train)
    check_workers(workers)
    positive("memory", memory)
    folder = None if store is None else as_folder(store)
    manifest = None if folder is None else read_fits_manifest(folder)
    root = root_seed(seed, None if manifest is None else int(manifest["seed"]))
    template_seed, init_seed, run_seed = spawn_seeds(root, 3)
    with seeded(template_seed):
        template = VIPosterior(potential, prior, q=q)
    with seeded(init_seed):
        options = _fitting(template, options)
    x = x.to(template.coordinates.low.device)
    tried, job = _job(template, x, options, x_is_iid)
    rows = _rows(job, tried, len(x), chunk_size, memory)
    chunks = None
    if folder is not None:
        told = {
            "seed": root,
            "chunk_size": rows,
            "x_is_iid": x_is_iid,
            **fingerprint(template, q, x, options),
        }
        chunks = FitStore.open(folder, told, tried.one_by_one, job, x)
    records = _run(
        job, x, rows, spawn_seeds(run_seed, -(-len(x) // rows)), chunks, workers, show_progress_bar
    )
    posteriors = Posteriors(job, x, tuple(records))
    _say(posteriors, quality_control)
    return posteriors


# -- the door -----------------------------------------------------------------------------------------------


def _observations(x: Any) -> Tensor:
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(violation("x", "a tensor", type(x).__name__)) from error
    if x.ndim == 0 or not len(x):
        raise ValueError(violation("x", "observations (n_obs, ...), one at least", f"shape {tuple(x.shape)}"))
    x = x[:, None] if x.ndim == 1 else x
    return x.detach() if x.is_floating_point() else x.to(torch.get_default_dtype())


def _options(train: dict[str, Any]) -> TrainOptions:
    lender = train.get("init")
    if isinstance(lender, VIPosterior):
        train = {**train, "init": lender.sample((_INIT_DRAWS,))}
    options = TrainOptions.from_keywords({**_DEFAULTS, **train})
    return replace(options, show_progress_bar=False, quality_control=False, allow_failed=True)


def _fitting(template: VIPosterior, options: TrainOptions) -> TrainOptions:
    """The options that concern the fits; one warning about the others, not one for each fit."""
    if not template.automatic:
        return options
    if idle := idle_options(options):
        names = ", ".join(f"`{name}`" for name in idle)
        warnings.warn(f"{names}: of no use to q='auto', which takes no steps of this kind.", stacklevel=4)
    kept = {name: getattr(options, name) for name in CONCERNS_AUTO if name not in idle}
    return TrainOptions(**kept)


def _job(template: VIPosterior, x: Tensor, options: TrainOptions, x_is_iid: bool) -> tuple[Probe, Job]:
    finite = x[x.isfinite().flatten(1).all(1)]
    if not len(finite):
        raise ValueError(violation("x", "an observation without NaN or Inf", "none"))
    tried = probe(template.potential_fn, template.prior, finite, x_is_iid=x_is_iid)
    return tried, Job(template, options, not x_is_iid and takes_rows(tried), x_is_iid)


def _rows(job: Job, tried: Probe, n_obs: int, chunk_size: int | None, memory: float) -> int:
    if chunk_size is not None:
        return min(positive_int("chunk_size", chunk_size), n_obs)
    theta, x = tried.theta[tried.answered], tried.x[tried.answered]
    x = x if job.in_rows else job.observations(x)[0]
    wide = width(job.template.potential_fn, theta, x, in_rows=job.in_rows)
    step = None
    if job.side_by_side and not job.template.automatic:
        assert isinstance(job.template.q, Family)
        step = job.options.n_particles * (draw_width(job.template.q) + wide)
    return rows_per_chunk(n_obs, job.template.coordinates.dim_theta, wide, memory, step=step)


# -- the run ------------------------------------------------------------------------------------------------


def _run(
    job: Job,
    x: Tensor,
    rows: int,
    seeds: list[int],
    store: FitStore | None,
    workers: int | None,
    show_progress_bar: bool,
) -> list[Record]:
    """The records of all observations: from the store where it has them, else fitted now."""
    done = {i: r for i in range(len(seeds)) if store is not None and (r := store.load(i)) is not None}
    todo = [i for i in range(len(seeds)) if i not in done]
    array = x.cpu().numpy()
    tasks = ((i, job, array[i * rows : (i + 1) * rows], seeds[i]) for i in todo)
    failed = sum(not record.has_fit for records in done.values() for record in records)
    with (
        Progress(
            show_progress_bar, total=len(x), initial=sum(map(len, done.values())), desc="fitting"
        ) as bar,
        contextlib.suppress(KeyboardInterrupt),
    ):  # what is finished stays
        for index, records in in_parallel(run_chunk, tasks, workers):
            done[index] = records_of(records)
            if store is not None:
                store.save(index, done[index])
            failed += sum(not record.has_fit for record in done[index])
            bar.note(f"{failed} without a fit" if failed else "")
            bar.update(len(done[index]))
    missing = {i: [no_fit(NOT_YET)] * len(array[i * rows : (i + 1) * rows]) for i in todo if i not in done}
    return [record for _, records in sorted({**done, **missing}.items()) for record in records]


def _say(posteriors: Posteriors, quality_control: bool) -> None:
    without = [i for i, record in enumerate(posteriors.records) if not record.has_fit]
    unfinished = sum(posteriors.reports[i].sentence == NOT_YET for i in without)
    if len(without) == len(posteriors) and not unfinished:
        first = f"observation {without[0]}: {posteriors.reports[without[0]].sentence}"
        raise ValueError(violation("potential", "one that can be fitted to an observation at least", first))
    if unfinished:
        said = f"Interrupted: {unfinished} of {len(posteriors)} observations have no fit."
        warnings.warn(f"{said} With a `store`, the same call goes on.", stacklevel=3)
    bad = {"failed": len(posteriors.failed) - unfinished, "suspect": len(posteriors.suspect)}
    if quality_control and any(bad.values()):
        counts = " and ".join(f"{n} {status}" for status, n in bad.items() if n)
        said = f"Of {len(posteriors)} fits {counts}: see `failed`, `suspect` and `reports`."
        warnings.warn(said, stacklevel=3)
