"""The demonstration: lynx and hare of the Hudson Bay, 1900 to 1920, without and with their likelihood.

The model is treated as a simulator: its likelihood is learnt from runs of it, in rounds, and q is fitted to
the posterior that follows. Beside it q is fitted to the posterior of the exact likelihood, which for this
model is known, by the same automatic fit. Both are certified, compared, drawn and written to a folder.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from visbi.core.random import seeded
from visbi.estimators import TrainingOptions
from visbi.plots import pair_plot, predictive_band, trace_plot
from visbi.posterior import VIPosterior
from visbi.rounds import Inference, Round, infer
from visbi.simulators.zoo import lynx_hare
from visbi.simulators.zoo.task import Task

__all__ = [
    "Effort",
    "FULL",
    "QUICK",
    "WORKERS",
    "compare",
    "exact_posterior",
    "run_demo",
    "simulation_posterior",
]

_DRAWS = 20_000
_FAR = 8.0  # a count e^8 times larger or smaller than the data's is produced by no theta of interest

WORKERS = 2  # processes that simulate, unless told otherwise


@dataclass(frozen=True)
class Effort:
    """How much work the demonstration does.

    Attributes:
        simulations: runs of the simulator at draws of the prior, then in each round.
        options: of the likelihood's training in each round; None takes those of `infer`.
        q: the variational family.
        train: keywords for `VIPosterior.train`.
    """

    simulations: tuple[int, ...]
    options: TrainingOptions | None = None
    q: str = "auto"
    train: Mapping[str, Any] = field(default_factory=dict)


FULL = Effort(simulations=(3000, 2000, 2500, 2500))
QUICK = Effort(simulations=(2000, 1000, 1000), options=TrainingOptions(max_epochs=100))


def run_demo(
    output: Path,
    *,
    effort: Effort = FULL,
    seed: int = 0,
    workers: int = WORKERS,
    say: Callable[[str], None] = print,
) -> Path:
    """Run it and write everything to the folder `output`, which is returned.

    Writes `posterior.visbi` (reload with `VIPosterior.load`), `pairs.png`, `prediction.png`, `trace.png`,
    `table.md` and `certificate.json`.

    Args:
        output: a folder; made if missing.
        effort: how much work.
        seed: of everything random.
        workers: processes that simulate.
        say: where progress goes, line by line.
    """
    task = lynx_hare.task()
    output.mkdir(parents=True, exist_ok=True)
    say(f"{task.name}: {len(task.theta_names)} parameters, {len(lynx_hare.YEARS)} years of two series")
    began = time.perf_counter()
    runs, rounds = sum(effort.simulations), len(effort.simulations)
    say(f"1/3 simulations only, {runs} runs in {rounds} rounds")
    inference = simulation_posterior(task, effort, seed=seed, workers=workers, say=say)
    say("2/3 exact likelihood, the same VIPosterior")
    exact = exact_posterior(task, effort, seed=seed)
    report = exact.report
    say(f"    {report.status}, k-hat {report.khat:.2f}, ESS {100 * report.ess_fraction:.0f} %")
    say("3/3 tables and pictures")
    table = compare(task, inference, exact, seed=seed)
    _write(output, task, inference, exact, table, seed)
    say("")
    say(table)
    say(f"{inference}\n")
    say(f"certificate of q against the exact likelihood\n{exact.report}\n")
    say(f"{time.perf_counter() - began:.0f} s; everything is in {output}/")
    return output


def simulation_posterior(
    task: Task,
    effort: Effort,
    *,
    seed: int = 0,
    workers: int = WORKERS,
    say: Callable[[str], None] | None = None,
) -> Inference:
    """The posterior of the lynx and hare from simulations alone.

    With `say` each round is told in a line, and progress bars are shown.
    """

    def usable(x: Tensor) -> Tensor:
        return ((x - task.x_o).abs() < _FAR).all(-1)

    def tell(done: Round) -> None:
        report = done.posterior.report
        if say is not None:
            loss = done.likelihood.traces[0].best_loss
            learnt = f"learnt from {done.n_used} runs, held-out loss {loss:.2f}"
            say(f"    {learnt}; q {report.status}, k-hat {report.khat:.2f}; next: {done.errors.spend_on}")

    return infer(
        task.simulator,
        task.prior,
        task.x_o,
        simulations=effort.simulations,
        q=effort.q,
        usable=usable,
        stop_early=False,
        options=effort.options,
        train={**effort.train, "quality_control": False},  # the report says it
        workers=workers,
        seed=seed,
        show_progress_bar=say is not None,
        on_round=tell,
    )


def exact_posterior(
    task: Task, effort: Effort, *, seed: int = 0, show_progress_bar: bool = True
) -> VIPosterior:
    """The posterior of a task's exact likelihood."""
    assert task.log_likelihood is not None
    log_likelihood = task.log_likelihood

    def potential(theta: Tensor, x_o: Tensor | None) -> Tensor:
        return log_likelihood(theta, x_o) + task.prior.log_prob(theta)  # type: ignore[arg-type]

    posterior = VIPosterior(potential, task.prior, q=effort.q)
    keywords = {
        "seed": seed,
        "show_progress_bar": show_progress_bar,
        **effort.train,
        "quality_control": False,
    }
    posterior.train(task.x_o, **keywords)
    with seeded(seed):
        _ = posterior.report  # made on first use: here, under the seed
    return posterior


def compare(task: Task, inference: Inference, exact: VIPosterior, *, seed: int = 0) -> str:
    """A table in Markdown: both posteriors, and how far the first is off in units of the second's sd."""
    with seeded(seed):
        ours, truth = (p.sample((_DRAWS,)).double() for p in (inference.posterior, exact))
    lines = [
        f"| parameter | from {inference.n_simulations} simulations | exact likelihood "
        "| mean off, in sd | ratio of sd |",
        "|---|---|---|---|---|",
    ]
    for i, name in enumerate(task.theta_names):
        a, b = ours[:, i], truth[:, i]
        off, ratio = float((a.mean() - b.mean()) / b.std()), float(a.std() / b.std())
        lines.append(f"| {name} | {_pm(a)} | {_pm(b)} | {off:+.2f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def _pm(values: Tensor) -> str:
    mean, sd = f"{float(values.mean()):#.3g}", f"{float(values.std()):#.2g}"
    return f"{mean.rstrip('.')} +- {sd.rstrip('.')}"


def _write(output: Path, task: Task, inference: Inference, exact: VIPosterior, table: str, seed: int) -> None:
    posterior = inference.posterior
    posterior.save(output / "posterior.visbi")
    (output / "table.md").write_text(table)
    reports = {"simulations": asdict(posterior.report), "exact likelihood": asdict(exact.report)}
    (output / "certificate.json").write_text(json.dumps(reports, indent=1))
    with seeded(seed):
        draws = {"from simulations": posterior.sample((_DRAWS,)), "exact likelihood": exact.sample((_DRAWS,))}
        counts = lynx_hare.to_pelts(task.simulator(draws["from simulations"][:4000]))
    pair_plot(draws, task.theta_names).savefig(output / "pairs.png")
    predictive_band(
        lynx_hare.YEARS,
        {"hare": counts[..., 0], "lynx": counts[..., 1]},
        {"hare": lynx_hare.HARE, "lynx": lynx_hare.LYNX},
        xlabel="year",
        ylabel="thousand pelts",
    ).savefig(output / "prediction.png")
    losses = {
        f"round {number}, first network: held-out loss": done.likelihood.traces[0].validation
        for number, done in enumerate(inference.rounds, 1)
    }
    trace_plot(losses, xlabel="epoch").savefig(output / "trace.png")
