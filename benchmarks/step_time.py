"""Milliseconds per gradient step of visbi and of sbi, side by side: same machine, same run, one thread.

One worker process per tool, each in its own environment, takes its turn at every case, so that a busy moment
of the machine hits both alike. The table has the median over the repeats, the worst of them, and the ratio of
the medians.

    make step-time
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETTINGS = {"n_particles": 256, "num_transforms": 5, "hidden_features": 50}
DIMENSIONS = (2, 5, 10, 20)


class Worker:
    """A tool's process and the line-by-line conversation with it."""

    def __init__(self, tool: str, python: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [python, str(HERE / "workers" / "step_time_worker.py"), tool]
        self.tool = tool
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.tool} ended with code {self.process.wait()}")
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the conversation; the process ends with its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(workers: list[Worker], case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Medians, worst and all repeats of one case for every tool, the order of the tools turning each time."""
    answers: dict[str, list[dict[str, Any]]] = {worker.tool: [] for worker in workers}
    for repeat in range(repeats):
        for worker in workers if repeat % 2 == 0 else reversed(workers):
            answers[worker.tool].append(worker.ask(case))
    row: dict[str, Any] = {key: case[key] for key in ("family", "method", "dim")}
    for tool, given in answers.items():
        times = [answer["ms"] for answer in given]
        row[tool] = {
            "median_ms": statistics.median(times),
            "worst_ms": max(times),
            "all_ms": times,
            "steps": given[-1]["steps"],
        }
    if "sbi" in answers and "visbi" in answers:
        row["ratio"] = row["sbi"]["median_ms"] / row["visbi"]["median_ms"]
    return row


def processor() -> str:
    """The processor's name where Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def table(result: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    tools = result["tools"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    heads = [f"{tool} median ms | {tool} worst ms" for tool in tools]
    head = " | ".join(["family", "method", "D", *heads, *(["sbi / visbi"] if len(tools) == 2 else [])])
    lines = [
        "# Milliseconds per gradient step",
        "",
        f"{SETTINGS['n_particles']} particles, {SETTINGS['num_transforms']} transforms, "
        f"{SETTINGS['hidden_features']} hidden features, one thread, {result['repeats']} repeats, "
        "tools taking turns. Gaussian target, standard normal prior. "
        f"Further options of train: {result['train'] or 'none, the defaults of each tool'}.",
        f"{versions}; {result['processor']}, {result['cores']} cores; {result['when']}; load average "
        f"{result['load_before']:.1f} before, {result['load_after']:.1f} after.",
        "",
        f"| {head} |",
        f"|{'---|' * (head.count('|') + 1)}",
    ]
    for row in result["rows"]:
        cells = [row["family"], row["method"], str(row["dim"])]
        for tool in tools:
            cells += [f"{row[tool]['median_ms']:.1f}", f"{row[tool]['worst_ms']:.1f}"]
        if "ratio" in row:
            cells.append(f"{row['ratio']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--visbi-python", help="python of visbi's environment; without it visbi is left out")
    parser.add_argument("--sbi-python", help="python of sbi's environment; without it sbi is left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--target-seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--families", nargs="+", default=["maf", "nsf"])
    parser.add_argument("--methods", nargs="+", default=["rKL", "fKL"])
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMENSIONS))
    parser.add_argument(
        "--train",
        type=json.loads,
        default={},
        help='further options of train(), e.g. {"stick_the_landing": true}',
    )
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args()

    pythons = {"visbi": options.visbi_python, "sbi": options.sbi_python}
    workers = [Worker(tool, python) for tool, python in pythons.items() if python]
    load_before = os.getloadavg()[0]
    rows = []
    for family in options.families:
        for method in options.methods:
            for dim in options.dims:
                case = {
                    "family": family,
                    "method": method,
                    "dim": dim,
                    "settings": SETTINGS,
                    "train": options.train,
                }
                row = measure(workers, {**case, "target_seconds": options.target_seconds}, options.repeats)
                medians = "  ".join(f"{w.tool} {row[w.tool]['median_ms']:8.1f} ms" for w in workers)
                print(f"{family} {method} D={dim:<3d} {medians}", flush=True)
                rows.append(row)
    result = {
        "what": "milliseconds per gradient step",
        "tools": [worker.tool for worker in workers],
        "versions": {name: version for worker in workers for name, version in worker.versions.items()},
        "settings": SETTINGS,
        "train": options.train,
        "repeats": options.repeats,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rows": rows,
    }
    for worker in workers:
        worker.close()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "step_time.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "step_time.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
