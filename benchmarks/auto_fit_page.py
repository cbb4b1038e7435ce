"""The page, the verdicts and the picture of `auto_fit.py`, from its lines."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["Row", "picture", "read_rows", "requirements", "write_page"]

Row = dict[str, Any]
OURS, BASELINE = "visbi", "sbi-maf-rKL"
# what the automatic fit is held to
MEDIAN_C2ST, WORST_C2ST = 0.53, 0.56
MASS, RATIO, ROWS, ROWS_UP_TO_DIM = 0.03, 20.0, 300_000, 10
CHEAP_RATIO = 50.0
# Asked for "on the cheap ones", which nobody named: here those on which ours takes at most so many
# CPU seconds (median). By our time, so a fit that grew slow could leave them: RATIO holds for every target.
CHEAP = 0.25
GOOD, BAD = 0.53, 0.58  # C2ST below which an alarm is false, above which an acceptance is
FALSE_ALARMS, SIGMAS, EVIDENCE_SHARE = 0.05, 3.0, 0.95
ACCEPTED = ("ok", "corrected")


def read_rows(path: Path) -> list[Row]:
    """All lines of the file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(rows: list[Row]) -> list[Row]:
    """The last line of every (tool, target, seed)."""
    return list({(row["tool"], row["target"], row["seed"]): row for row in rows}.values())


def cpu(row: Row) -> float:
    """CPU seconds of the fit and the first draws; of a run that did not end, what it had had."""
    if row["outcome"] != "done":
        return float(row.get("stopped_after", row["limit"]))
    return row["cpu_seconds"] + row["draw_cpu_seconds"]


def wall(row: Row) -> float:
    """The same by the clock, of a run that ended."""
    return row["seconds"] + row["draw_seconds"]


def evaluations(row: Row) -> int | None:
    """Rows of theta at which the potential was evaluated, with and without gradient; None if not counted."""
    return None if row["n_values"] is None else row["n_values"] + row["n_gradients"]


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _done(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["outcome"] == "done"]


def ratio(rows: list[Row], name: str) -> tuple[float, bool] | None:
    """Median CPU seconds of the baseline over ours, and whether that is only a lower bound."""
    ours, theirs = _done(_of(rows, tool=OURS, target=name)), _of(rows, tool=BASELINE, target=name)
    theirs = [row for row in theirs if row["outcome"] != "error"]
    if not ours or not theirs:
        return None
    value = statistics.median(map(cpu, theirs)) / statistics.median(map(cpu, ours))
    return value, any(row["outcome"] == "time limit" for row in theirs)


def requirements(rows: list[Row]) -> list[tuple[str, str, bool | None]]:
    """What is asked of the automatic fit, what was measured, whether that is enough (None: not measured)."""
    ours = _done(_of(rows, tool=OURS))
    unfinished = len(_of(rows, tool=OURS)) - len(ours)
    if not ours:
        return []
    c2st = [row["scores"]["c2st"] for row in ours]
    masses = [row["scores"]["mode_error"] for row in ours if row["scores"]["mode_error"] is not None]
    names = dict.fromkeys(row["target"] for row in ours)
    ratio_of = {name: found[0] for name in names if (found := ratio(rows, name))}
    ratios = list(ratio_of.values())
    cheap = {name: value for name, value in ratio_of.items() if _is_cheap(_of(ours, target=name))}
    accepted = [row for row in ours if row["report"]["status"] in ACCEPTED]
    false = [row for row in accepted if row["scores"]["c2st"] > BAD]
    good = [row for row in ours if row["scores"]["c2st"] < GOOD]
    alarms = [row for row in good if row["report"]["status"] not in ACCEPTED]
    z = [abs(row["evidence_z"]) for row in ours if "evidence_z" in row]
    low = [row for row in ours if row["dim"] <= ROWS_UP_TO_DIM]

    def entry(text: str, values: list[float], fold: Callable[..., float], form: str, limit: float) -> Any:
        if not values:
            return text, "not measured", None
        value = fold(values)
        return text, format(value, form), value <= limit

    share = sum(value <= SIGMAS for value in z) / len(z) if z else 0.0
    alarm_share = len(alarms) / len(good) if good else 0.0
    return [
        ("every run ends", f"{unfinished} did not", unfinished == 0),
        entry(f"C2ST of draws, median at most {MEDIAN_C2ST}", c2st, statistics.median, ".3f", MEDIAN_C2ST),
        entry(f"C2ST of draws, worst at most {WORST_C2ST}", c2st, max, ".3f", WORST_C2ST),
        entry(f"masses of modes, worst error at most {MASS}", masses, max, ".3f", MASS),
        (
            f"CPU seconds of {BASELINE} over ours, median at least {RATIO:g}",
            f"{statistics.median(ratios):.0f}" if ratios else "not measured",
            statistics.median(ratios) >= RATIO if ratios else None,
        ),
        (
            f"the same, least at least {RATIO:g}",
            f"{min(ratios):.1f} over {len(ratios)} targets" if ratios else "not measured",
            min(ratios) >= RATIO if ratios else None,
        ),
        (
            f"the same on cheap targets (ours within {CHEAP:g} s), least at least {CHEAP_RATIO:g}",
            ", ".join(f"{name} {value:.1f}" for name, value in cheap.items()) or "not measured",
            min(cheap.values()) >= CHEAP_RATIO if cheap else None,
        ),
        (
            f"no false acceptance ({' or '.join(ACCEPTED)} with C2ST above {BAD})",
            f"{len(false)} of {len(accepted)}: {_names(false)}",
            not false,
        ),
        (
            f"false alarms (other status with C2ST below {GOOD}) at most {FALSE_ALARMS:.0%}",
            f"{len(alarms)} of {len(good)}: {_names(alarms)}",
            alarm_share <= FALSE_ALARMS,
        ),
        (
            f"log-evidence within {SIGMAS:g} standard errors in at least {EVIDENCE_SHARE:.0%}",
            f"{share:.0%} of {len(z)}",
            share >= EVIDENCE_SHARE if z else None,
        ),
        entry(
            f"evaluations for D up to {ROWS_UP_TO_DIM}, worst at most {ROWS:,}",
            [count for row in low if (count := evaluations(row)) is not None],
            max,
            ",.0f",
            ROWS,
        ),
    ]


def _is_cheap(ours: list[Row]) -> bool:
    return statistics.median(map(cpu, ours)) <= CHEAP


def _names(rows: list[Row]) -> str:
    counts = Counter(row["target"] for row in rows)
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "none"


def _requirement_table(rows: list[Row]) -> list[str]:
    words = {True: "pass", False: "**FAIL**", None: "-"}
    lines = ["| asked | measured | |", "|---|---|---|"]
    return lines + [f"| {text} | {value} | {words[met]} |" for text, value, met in requirements(rows)]


def _spread(values: Iterable[float | None], form: str) -> str:
    """The median and, of several, the worst in brackets: the one farthest from 0."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    worst = f" ({max(present, key=abs):{form}})" if len(present) > 1 else ""
    return f"{statistics.median(present):{form}}{worst}"


def _own_table(rows: list[Row], group: str) -> list[str]:
    heads = ["target", "D", "runs", "status", "C2ST of q", "C2ST of draws", "sliced W of q"]
    heads += [
        "sliced W of draws",
        "mode mass off",
        "log-evidence off",
        "in se",
        "CPU s",
        "wall s",
        "evaluations",
        "rung",
    ]
    heads += [f"{BASELINE} / ours, CPU"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name in dict.fromkeys(row["target"] for row in rows if row["group"] == group):
        own = _of(rows, tool=OURS, target=name)
        done = _done(own)
        if not own:
            continue
        status = Counter(row["report"].get("status", "?") if row in done else row["outcome"] for row in own)
        draws = [row["scores"] for row in done]
        raw = [row.get("raw_scores", row["scores"]) for row in done]
        found = ratio(rows, name)
        rungs = Counter(str(row["report"].get("rung", "-")) for row in done)
        cells = [
            name,
            str(own[0]["dim"]),
            str(len(own)),
            ", ".join(f"{word} x {count}" for word, count in status.items()),
            _spread((score["c2st"] for score in raw), ".3f"),
            _spread((score["c2st"] for score in draws), ".3f"),
            _spread((score["sliced_wasserstein"] for score in raw), ".3f"),
            _spread((score["sliced_wasserstein"] for score in draws), ".3f"),
            _spread((score["mode_error"] for score in draws), ".3f"),
            _spread((row.get("evidence_error") for row in done), "+.3f"),
            _spread((row.get("evidence_z") for row in done), "+.1f"),
            _spread(map(cpu, done), ".2f"),
            _spread(map(wall, done), ".2f"),
            _spread(map(evaluations, done), ",.0f"),
            ", ".join(rungs),
            "-" if found is None else f"{'> ' if found[1] else ''}{found[0]:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cold(rows: list[Row]) -> str:
    """Runs of the torch world that were timed without a first fit to load everything."""
    own = [row for row in _done(rows) if row["tool"].startswith(("sbi", "visbi"))]
    cold = [row for row in own if not row.get("warmed_up")]
    return _names(cold) if cold else ""


def _peer_cell(rows: list[Row]) -> str:
    """Median C2ST, worst in brackets, and CPU seconds."""
    if not rows:
        return "-"
    done = _done(rows)
    if not done:
        word = rows[-1]["outcome"]
        return f"not within {cpu(rows[-1]):.0f} s" if word == "time limit" else word
    c2st = _spread((row["scores"]["c2st"] for row in done), ".2f")
    left = len(rows) - len(done)
    note = f", {left} of {len(rows)} did not end" if left else ""
    return f"{c2st}, {statistics.median(map(cpu, done)):.1f} s{note}"


def _peer_cost_cell(rows: list[Row]) -> str:
    """Median sliced W, worst in brackets, wall seconds, and evaluations in thousands."""
    done = _done(rows)
    if not done:
        return "-"
    distance = _spread((row["scores"]["sliced_wasserstein"] for row in done), ".2f")
    counts = [count for row in done if (count := evaluations(row)) is not None]
    counted = f"{statistics.median(counts) / 1000:,.0f}k" if counts else "-"
    return f"{distance}, {statistics.median(map(wall, done)):.1f} s, {counted}"


def _peer_table(rows: list[Row], cell: Callable[[list[Row]], str]) -> list[str]:
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    tools.sort(key=lambda tool: (tool != OURS, tool != BASELINE, tool))
    lines = [f"| target | {' | '.join(tools)} |", f"|{'---|' * (len(tools) + 1)}"]
    for name in dict.fromkeys(row["target"] for row in rows):
        cells = [cell(_of(rows, tool=tool, target=name)) for tool in tools]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _in_order(rows: list[Row]) -> list[Row]:
    from targets import NAMES

    rows = [row for row in rows if row["target"] in NAMES]
    return sorted(rows, key=lambda row: (NAMES.index(row["target"]), row["tool"], row["seed"]))


def write_page(rows: list[Row], path: Path) -> None:
    """The result as a page of Markdown."""
    rows = _in_order(latest(rows))
    versions = sorted({f"{k} {v}" for row in rows for k, v in row.get("versions", {}).items()})
    machines = sorted({row["processor"] for row in rows})
    loads = [load for row in rows for load in row["load"]]
    sources = sorted({row["source"] for row in rows if row["source"]})
    cold = _cold(rows)
    lines = [
        "# The automatic fit beside its peers",
        "",
        "C2ST: accuracy of the better of two classifiers between 2000 draws and 2000 exact ones; .5 is "
        "perfect, noise about .01. Sliced W: Wasserstein-1 distance of projections in standard deviations, "
        "about .03 between exact samples. CPU s: seconds of CPU for the fit and the first 2000 draws, one "
        "thread, imports left out, compilation (JAX) counted. Wall s: the same by the clock, beside other "
        "work. Evaluations: rows of theta at which the potential was evaluated, gradients included. Medians "
        "over seeds, in brackets the worst. `q` is drawn from as it is, `draws` are what a user gets. A "
        "standard error of the log-evidence below .001 counts as .001.",
        f"{', '.join(versions)}; {', '.join(machines)}; one thread; load average {min(loads):.1f} to "
        f"{max(loads):.1f} (other work ran beside); src/ of visbi at {', '.join(sources) or '-'}."
        if rows
        else "Nothing measured.",
    ]
    if cold:
        lines.append(f"Seconds of {cold} contain what a tool loads on first use, .5 (sbi) to 1 (visbi).")
    from targets import GROUPS

    for group in GROUPS:
        own = [row for row in rows if row["group"] == group]
        if own and _of(own, tool=OURS):
            lines += ["", f"## Ours, {group} targets", "", *_own_table(own, group)]
            lines += ["", f"Requirements, {group} targets:", "", *_requirement_table(own)]
    compared = {row["target"] for row in rows if row["tool"] != OURS}
    lines += [
        "",
        "## All tools",
        "",
        "C2ST, median (worst), and CPU seconds. `exact`: other exact draws.",
        "",
        *_peer_table(rows, _peer_cell),
        "",
        "Sliced W, median (worst), wall seconds, and evaluations in thousands (-: not counted), where a peer "
        "was run.",
        "",
        *_peer_table([row for row in rows if row["target"] in compared], _peer_cost_cell),
        "",
    ]
    path.write_text("\n".join(lines))


def picture(rows: list[Row], path: Path) -> None:
    """C2ST against CPU seconds, one point for each tool and target."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in _in_order(latest(_done(rows))) if row["tool"] != "exact"]
    figure, axes = plt.subplots(figsize=(8, 5))
    tools = sorted({row["tool"] for row in rows}, key=lambda tool: (tool != OURS, tool))
    for tool, mark in zip(tools, "os^vDPX*<>", strict=False):
        own = _of(rows, tool=tool)
        points = [_of(own, target=name) for name in dict.fromkeys(row["target"] for row in own)]
        seconds = [statistics.median(map(cpu, part)) for part in points]
        c2st = [statistics.median(row["scores"]["c2st"] for row in part) for part in points]
        axes.plot(seconds, c2st, mark, label=tool, alpha=0.8, markersize=8 if tool == OURS else 6)
    axes.axhline(0.5, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="CPU seconds", ylabel="C2ST (.5: like exact draws)", ylim=(0.47, 1.02))
    if tools:
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
