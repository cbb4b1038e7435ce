"""The floor of each stage of the automatic fit, and the time it takes.

A stage can be no faster than its evaluations of the potential. For each stage and target: how many it asks
for, with and without gradient; what those cost in one batch of the stage's largest size; the CPU time that
the stage takes; and the ratio. These potentials cost microseconds, a user's may cost more: what stands beside
the floor does not depend on the potential.

    python benchmarks/floors.py
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from step_time import processor
from targets import NAMES, target
from visbi.families.coupling_stack import CouplingStack
from visbi.families.gaussians import Mixture
from visbi.fitting.bridge import bridge
from visbi.fitting.climbing import ALONE, Group, Record
from visbi.fitting.explore import Exploration, explore
from visbi.fitting.flow import FlowProposal, flow_body, train_flows
from visbi.fitting.looking import look
from visbi.fitting.match import match_gaussian
from visbi.fitting.mixture import defended
from visbi.fitting.pool import Pool
from visbi.fitting.refine import from_particles, refined
from visbi.fitting.target import Target as Ell
from visbi.fitting.verdicts import SPARE, certified
from visbi.priors import coordinates

HERE = Path(__file__).parent
STEPS, BATCH = 200, 256


@dataclass(frozen=True)
class Row:
    """One stage on one target.

    Attributes:
        values, gradients: rows at which the potential was evaluated, without and with gradient.
        batch: rows in one call.
        floor, measured: milliseconds of CPU.
    """

    target: str
    dim: int
    stage: str
    values: int
    gradients: int
    batch: int
    floor: float
    measured: float


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of CPU of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


class Bench:
    """The stages on one target, each from a state like that in which the ladder enters it."""

    def __init__(self, name: str, seed: int, repeats: int) -> None:
        torch.manual_seed(seed)
        goal = target(name)
        self.name, self.repeats = name, repeats
        self.ell = Ell(lambda theta: goal.potential(theta), coordinates(goal.prior))
        self.seen: Exploration = explore(self.ell, ALONE.particles)
        self.mixture: Mixture = from_particles(self.seen)

    def row(self, stage: str, run: Callable[[], object], batch: int) -> Row:
        """Measured once for its evaluations and several times for its time."""
        ell, d = self.ell, self.ell.dim
        values, gradients = ell.n_values, ell.n_gradients
        run()
        values, gradients = ell.n_values - values, ell.n_gradients - gradients
        measured = fastest(run, self.repeats)
        z = self.seen.z[0, torch.randint(self.seen.z.shape[1], (batch,))].reshape(1, batch, d)
        again = max(1, 4096 // batch)
        a_value = fastest(lambda: [ell.value(z) for _ in range(again)], 5) / (again * batch)
        a_gradient = fastest(lambda: [ell.value_and_gradient(z) for _ in range(again)], 5) / (again * batch)
        floor = values * a_value + gradients * a_gradient
        return Row(self.name, d, stage, values, gradients, batch, floor, measured)

    def rows(self) -> list[Row]:
        """All stages."""
        d = self.ell.dim
        eye = torch.eye(d, dtype=torch.float64)[None]
        zero = torch.zeros(1, d, dtype=torch.float64)
        flows = CouplingStack([flow_body(d)]).placed(*_moments(self.seen.z))
        return [
            self.row("look", lambda: look(self.group()), ALONE.look),
            self.row("match", lambda: match_gaussian(self.ell, zero, eye), max(128, 2 * d)),
            self.row("explorer", lambda: explore(self.ell, ALONE.particles), ALONE.particles),
            self.row("mixture and one refit", self.refit, ALONE.trial),
            self.row(
                f"flow, {STEPS} steps",
                lambda: train_flows(flows, self.ell, round_=2, steps=STEPS, batch=BATCH),
                BATCH,
            ),
            self.row("certificate", lambda: self.certify(defended(self.mixture)), ALONE.draws),
            self.row("certificate of a flow", lambda: self.certify(FlowProposal.widened(flows)), ALONE.draws),
            self.row("bridge", lambda: self.bridge(FlowProposal.widened(flows)), ALONE.particles),
        ]

    def group(self) -> Group:
        """The target alone, with what the explorer has seen."""
        return Group(self.ell, [Record()], ALONE, Pool(self.ell), seen=self.seen)

    def refit(self) -> None:
        """EM on the explorer's particles, a trial, a refit and its trial."""
        pool = Pool(self.ell)
        q = from_particles(self.seen)
        refined(pool, q, pool.draw(defended(q), ALONE.trial), rounds=1)

    def certify(self, q: Mixture | FlowProposal) -> None:
        """Draws, weights and doubts."""
        certified(self.group(), "q", q, spare=SPARE)

    def bridge(self, q: FlowProposal) -> None:
        """Particles carried from a flow, which trains on with them; its certificate, and what follows."""
        group = self.group()
        group.consider("a flow", q, group.pool.draw(q, ALONE.trial))
        bridge(group, spare=SPARE)


def compiled() -> str:
    """What `torch.compile` would gain where most of a flow's time goes, and what it costs."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a user's first fit has no cache
    flows = CouplingStack([flow_body(10)])

    def draw() -> object:
        return flows.draw(BATCH)

    plain = fastest(lambda: [draw() for _ in range(50)], 5) / 50
    compiled_draw = torch.compile(draw)
    start = time.perf_counter()  # the compiler is another process
    compiled_draw()
    seconds = time.perf_counter() - start
    fused = fastest(lambda: [compiled_draw() for _ in range(50)], 5) / 50
    return (
        f"`torch.compile`, which the fit does not use: {BATCH} draws of a flow in ten dimensions with their "
        f"densities take {fused:.2f} instead of {plain:.2f} ms, after {seconds:.0f} seconds of compiling."
    )


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    mean = z.mean(1)
    centred = z - mean[:, None]
    return mean, torch.linalg.cholesky(centred.mT @ centred / z.shape[1])


def page(rows: list[Row], about_compiling: str = "") -> str:
    """The table in Markdown."""
    lines = [
        "# Floors of the automatic fit's stages",
        "",
        "Written by `benchmarks/floors.py`, which says how it is measured. One thread, "
        + processor()
        + f", torch {torch.__version__}.",
        "",
        "| target | D | stage | values | with gradient | rows a call | floor, ms | measured, ms | ratio "
        "| beside it, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.target} | {r.dim} | {r.stage} | {r.values:,} | {r.gradients:,} | {r.batch:,} "
            f"| {r.floor:.1f} | {r.measured:.1f} | {r.measured / max(r.floor, 1e-9):.1f} "
            f"| {r.measured - r.floor:.1f} |"
        )
    lines += ["", about_compiling] if about_compiling else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=NAMES, default=["slcp", "funnel_d10", "gaussian_d50"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "floors.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in options.targets:
        rows += Bench(name, options.seed, options.repeats).rows()
    text = page(rows, compiled())
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
