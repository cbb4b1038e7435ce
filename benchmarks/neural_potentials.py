"""The automatic fit and sbi's VI on the same learned potentials: likelihoods and ratios of three simulators.

Networks and references are made once, by `neural_targets.py`, and kept under benchmarks/cache/. Fits run and
are scored as in `auto_fit.py`, whose time limit and way of resuming this shares; both tools call the same
network.

    make neural-potentials
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from auto_fit import done_before, measure, say, source_state
from auto_fit_page import BASELINE, OURS, Row, cpu, latest, read_rows
from neural_targets import NAMES, SIMULATIONS, make_reference

HERE = Path(__file__).parent


def _cells(rows: list[Row]) -> list[str]:
    """Status, C2ST of draws with the worst, that of q, CPU and wall seconds, evaluations; medians."""
    done = [row for row in rows if row["outcome"] == "done"]
    if not done:
        return [rows[-1]["outcome"] if rows else "-", "-", "-", "-", "-", "-"]
    status = sorted({row["report"].get("status", "-") if row in done else row["outcome"] for row in rows})
    c2st = [row["scores"]["c2st"] for row in done]
    raw = [row.get("raw_scores", row["scores"])["c2st"] for row in done]
    wall = [row["seconds"] + row["draw_seconds"] for row in done]
    rows_seen = [row["n_values"] + row["n_gradients"] for row in done]
    return [
        ", ".join(status),
        f"{statistics.median(c2st):.3f} ({max(c2st):.3f})",
        f"{statistics.median(raw):.3f}",
        f"{statistics.median(map(cpu, done)):.1f}",
        f"{statistics.median(wall):.1f}",
        f"{statistics.median(rows_seen):,.0f}",
    ]


def page(rows: list[Row]) -> str:
    """The result as a page of Markdown."""
    rows = latest(rows)
    loads = [load for row in rows for load in row["load"]]
    versions = sorted({f"{k} {v}" for row in rows for k, v in row.get("versions", {}).items()})
    columns = "status | C2ST of draws (worst) | C2ST of q | CPU s | wall s | evaluations"
    lines = [
        "# The automatic fit on learned potentials",
        "",
        f"Networks of visbi, {SIMULATIONS:,} simulations from the prior. C2ST of 2000 draws against long "
        "tempered SMC on the same potential; `halves` is that of two independent runs of the reference. "
        "Medians over seeds; one thread; seconds without imports.",
        f"{', '.join(versions)}; {', '.join(sorted({row['processor'] for row in rows}))}; load average "
        f"{min(loads):.1f} to {max(loads):.1f} (other work ran beside, which wall seconds feel)."
        if rows
        else "Nothing measured.",
        "",
        f"| potential | D | halves | tool | seeds | {columns} |",
        f"|{'---|' * 11}",
    ]
    for name in NAMES:
        for tool in (OURS, BASELINE):
            own = [row for row in rows if (row["target"], row["tool"]) == (name, tool)]
            if own:
                halves = f"{own[-1]['reference_c2st']:.3f}"
                head = [name, str(own[0]["dim"]), halves, tool, str(len(own))]
                lines.append(f"| {' | '.join([*head, *_cells(own)])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing, run what is asked for and not there yet, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--visbi-python")
    parser.add_argument("--sbi-python")
    parser.add_argument("--targets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tools", nargs="+", choices=[OURS, BASELINE], default=[OURS, BASELINE])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds of one run")
    parser.add_argument("--patience", type=float, default=8.0, help="wall seconds for each of them")
    parser.add_argument("--any-source", action="store_true", help="lines of other states of src/ do too")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path, source = options.output / "neural_potentials.jsonl", source_state()
    pythons = {OURS: options.visbi_python, BASELINE: options.sbi_python}
    wanted = [
        (tool, name, seed) for name in options.targets for seed in options.seeds for tool in options.tools
    ]
    for tool, name, seed in wanted:
        if done_before(read_rows(path), (tool, name, seed), source, any_source=options.any_source):
            continue
        python = pythons[tool]
        if python is None:
            parser.error(f"{tool} needs --{tool.split('-')[0]}-python")
        reference = make_reference(name)
        row = measure(tool, name, seed, python, limit=options.limit, patience=options.patience)
        row["reference_c2st"] = float(reference["c2st"])
        row["source"] = source if tool == OURS else None
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(row)
    (options.output / "neural_potentials.md").write_text(page(read_rows(path)))


if __name__ == "__main__":
    main()
