"""Every method on several datasets, one repeat after the other: tables and a figure (make compare).

    python benchmarks/compare.py                            # all that is prepared: some hours
    python benchmarks/compare.py --only prism --repeats 2
    python benchmarks/compare.py --tables-only               # tables of what is finished

Runs are kept in results/ and go on where they were left; more repeats fit what is missing.
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from comparison_data import WORLDS, World
from lore.common.cli import cli
from lore.common.files import require, write_text, write_whole
from lore.common.settings import NonNegativeInt
from lore.experiments.judging import Sweep, judge
from lore.experiments.report.intervals import Summary, difference, level
from lore.experiments.report.plots import full_colour
from lore.experiments.report.tables import markdown
from lore.experiments.results import CONTROLS, MEASURES, Results, read_results, shots_name
from lore.experiments.runner import Settings, open_run
from lore.methods import METHODS
from lore.methods.lore import Lore

log = logging.getLogger(__name__)

NAMES = tuple(world.name for world in WORLDS)
PEERS = ("pal", "vpl", "pref", "mrm", "rbd", "pebs", "mlp")
# Lightest first, so that a run that is cut short has as much as possible.
ORDER = ("ridge_bt", "lore", "mixed_logit", "pebs", "mrm", "pref", "rbd", "mlp", "pal", "vpl")
BT = "BT"  # label of Bradley-Terry
TRIALS = 2  # draws of the shots of a repeat


def main(
    jokes: Path = ROOT / "OwnData" / "data-jokes",
    ukp: Path = ROOT / "RedditTLDR" / "data-ukp",
    prism: Path = ROOT / "PRISM" / "data",
    demo: Path = ROOT / "PersonalLLM" / "data" / "demo",
    only: tuple[Literal[NAMES], ...] = (),
    methods: tuple[Literal[ORDER], ...] = ORDER,
    repeats: NonNegativeInt = 0,
    faithful: tuple[Literal[PEERS], ...] = (),
    tables_only: bool = False,
    results: Path = ROOT / "results",
    out: Path = ROOT / "results" / "comparison",
) -> None:
    """Fit all methods on all datasets that are there; write comparison.md and comparison.svg.

    Args:
        jokes: prepared folder of people who rate jokes, see docs/results.md; its draw is made again
            for every repeat.
        ukp: prepared folder of the judges of arguments, see docs/results.md.
        prism: prepared and embedded folder of PRISM; its draw is made again for every repeat.
        demo: prepared folder of the demo, for the demo's users and the planted ones.
        only: datasets by name; all by default.
        methods: to fit; the reference, BT and own models always are. Those that were fitted before
            stay in the tables.
        repeats: at most so many of each dataset; 0 for the full number.
        faithful: also fit these peers with their published constants and budget, such as pal.
        tables_only: make tables of what is finished, without fitting.
        results: folder of all runs.
        out: folder of the tables and the figure.
    """
    folders = {"jokes": jokes, "ukp": ukp, "prism": prism, "demo": demo}
    found = []
    for world in WORLDS:
        if only and world.name not in only:
            continue
        count = repeats or len(world.seeds)
        if not tables_only and folders[world.folder].exists():
            fit(world, folders[world.folder], count, methods, faithful, results)
        elif not tables_only:
            log.info(
                "%s left out: --%s %s is not there", world.name, world.folder, folders[world.folder]
            )
        runs = finished(world, results)
        if runs:
            found.append((world, runs))
    require(bool(found), "nothing to compare: prepare a dataset first, see docs/comparison.md")
    blocks = [block for world, runs in found for block in section(world, runs)]
    write_text(out / "comparison.md", "\n\n".join(blocks) + "\n")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "comparison"}):
        figure, about = draw(found), {"Date": None}
        write_whole(
            out / "comparison.svg",
            lambda path: figure.savefig(path, format="svg", metadata=about),
        )
    print("\n\n".join([*blocks, f"Tables and figure: {out}"]))


# ------------------------------------------------------------------------------- Runs


def fit(
    world: World, folder: Path, repeats: int, methods: Sequence[str], faithful: Sequence[str],
    results: Path,
) -> None:  # fmt: skip
    """Fit what is missing of a dataset's repeats, every method with each seed before the next."""
    tasks = world.tasks(folder)
    lore = Lore(ranks=(5,))
    published = {
        name: dataclasses.replace(METHODS[name](), setting="faithful") for name in faithful
    }
    for suffix, some, given in (("", methods, {}), ("-faithful", faithful, published)):
        if not some:
            continue
        settings = Settings(
            methods=tuple(some), lore=lore, seeds=world.seeds[:repeats], results=results,
            name=f"compare-{world.name}{suffix}", checkpoint_every=0, progress=False, **given,
        )  # fmt: skip
        sweep = Sweep(tuple(world.shots), TRIALS)
        with open_run("train_basis", tasks, settings, sweep) as run:
            for task, name, method in run.unfinished():
                fits = method.fit(task)
                run.save(task, name, fits, [*judge(fits, task), *sweep.judge(fits, task)])
        run.report()


def finished(world: World, results: Path) -> list[Results]:
    """The finished runs of a dataset, converged settings first."""
    names = (f"compare-{world.name}", f"compare-{world.name}-faithful")
    paths = [path.parent for name in names for path in results.glob(f"*/{name}/results.json")]
    return [read_results(path) for path in paths]


# ------------------------------------------------------------------------------ Tables


class Row(NamedTuple):
    """A label of a run."""

    results: Results
    label: str


def rows(runs: Sequence[Results]) -> list[Row]:
    """What a table has a row for, baselines first; what every run has only once."""
    found: dict[str, Row] = {}
    for run in runs:
        for label in run.labels:
            found.setdefault(label, Row(run, label))
    place = {method: number for number, method in enumerate(ORDER)}
    return sorted(
        found.values(), key=lambda row: place.get(row.results.methods[row.label], -1)
    )


def opening(run: Results) -> list[str]:
    """What is known before any fit: in how many repeats users differ, and what the sides share."""
    facts = [str(fact) for one in run.repeats for fact in (one.get("facts") or {}).values()]
    tests = [fact for fact in facts if "score test" in fact]
    others = list(dict.fromkeys(fact for fact in facts if "score test" not in fact))
    found = [fact for fact in tests if fact.startswith("Users differ")]
    if not tests:
        return others
    line = f"The score test finds that users differ in {len(found)} of {len(tests)} repeats"
    counts = [int(count.replace(",", "")) for count in re.findall(r"about ([\d,]+)", str(found))]
    if counts:
        most = f" to {max(counts):,}" if max(counts) > min(counts) else ""
        line += (
            f"; a user's own choices weigh as much as everyone else's from about {min(counts):,}"
            f"{most} comparisons on"
        )
    return [line + ".", *others]


def section(world: World, runs: Sequence[Results]) -> list[str]:
    """Heading, what the repeats are, and the two tables of a dataset."""
    table = rows(runs)
    about = (
        f"{len(world.seeds)} repeats make the full comparison (a row's number of them is in the "
        f"second table), with {TRIALS} draws of the shots in each. A shot is one of a user's "
        f"{world.unit}."
    )
    return [
        f"## {world.title}", about, *dict.fromkeys(line for run in runs for line in opening(run)),
        "Accuracy in percent (minus BT, paired by user, with 95 % interval over users):",
        markdown({row.label: accuracies(world, row) for row in table}),
        f"Log loss (minus BT's); unseen users' accuracy at {shots_name(world.shots[-1])} with "
        "another user's weights (their own minus that); cost of one fit, its choice included:",
        markdown({row.label: further(world, row) for row in table}),
    ]  # fmt: skip


def accuracies(world: World, row: Row) -> dict[str, str]:
    """Cells of seen users, and of unseen ones at every number of shots."""
    cells = {"seen": cell(row, "accuracy", "seen")}
    known = {r["shots"] for r in row.results.unseen if r["label"] == row.label}
    for shots in world.shots:
        if shots in known or shots == world.shots[-1]:  # where shots did not vary: all of them
            cells[shots_name(shots)] = cell(row, "accuracy", "unseen", shots)
    return cells


def further(world: World, row: Row) -> dict[str, str]:
    """Cells of log loss, controls, seconds, parameters and configurations tried."""
    most = world.shots[-1]
    cells = {
        "log loss, seen": cell(row, "log_loss", "seen"),
        f"log loss, {shots_name(most)}": cell(row, "log_loss", "unseen", most),
    }
    for control in ("population", "another"):
        other = level(row.results, row.label, control, "accuracy", ("unseen",), most)
        text = "" if other is None else MEASURES["accuracy"].text(other.mean)
        paired = difference(
            row.results, row.label, (row.label, control), "accuracy", ("unseen",), most
        )
        if paired is not None and other is not None:
            text += f" ({change('accuracy', paired)})"
        cells[CONTROLS[control]] = text
    return cells | cost(row)


def cell(row: Row, measure: str, name: str, shots: int | None = None) -> str:
    """A figure, and how much it differs from BT's."""
    value = level(row.results, row.label, "", measure, (name,), shots)
    if value is None:
        return ""
    paired = against_bt(row, measure, name, shots)
    text = MEASURES[measure].text(value.mean)
    return text if paired is None else f"{text} ({change(measure, paired)})"


def against_bt(row: Row, measure: str, name: str, shots: int | None = None) -> Summary | None:
    """A label minus Bradley-Terry, paired by user and repeat."""
    if row.label == BT:
        return None
    return difference(row.results, row.label, (BT, ""), measure, (name,), shots)


def change(measure: str, paired: Summary) -> str:
    """A difference with its interval."""
    unit, (mean, low, high, _) = MEASURES[measure], paired
    return f"{unit.text(mean, signed=True)} {unit.between(low, high)}".strip()


def cost(row: Row) -> dict[str, str]:
    """Mean processor seconds of fitting, numbers learned, and configurations tried."""
    method = row.results.methods[row.label]
    parts = [r["methods"][method] for r in row.results.repeats if method in r["methods"]]
    busy = [part["processor_seconds"] for part in parts if "processor_seconds" in part]
    fits: list[dict[str, Any]] = row.results.fits(row.label)
    sizes = [fit["parameters"] for fit in fits if fit.get("parameters")]
    tried = [len(fit.get("tried") or []) or 1 for fit in fits]
    return {
        "repeats": str(len(parts)),
        "processor s": f"{np.mean(busy):.1f}" if busy else "",
        "parameters": f"{np.mean(sizes):,.0f}" if sizes else "",
        "tried": f"{np.mean(tried):.0f}",
    }


# ------------------------------------------------------------------------------ Figure


def draw(found: Sequence[tuple[World, Sequence[Results]]]) -> Figure:
    """Every method minus BT: accuracy above, log loss below, a panel for each dataset."""
    labels = list(dict.fromkeys(row.label for _, runs in found for row in rows(runs)))
    labels = [label for label in labels if label != BT]
    figure = Figure(figsize=(2.4 * len(found) + 1.2, 0.5 * len(labels) + 2), layout="constrained")
    panels = figure.subplots(2, len(found), sharey=True, squeeze=False)
    for column, (world, runs) in enumerate(found):
        for axes, measure in zip(panels[:, column], ("accuracy", "log_loss"), strict=True):
            _draw_panel(axes, world, runs, labels, measure)
    panels[0, 0].legend(loc="lower left", fontsize=7)
    return figure


def _draw_panel(
    axes: Axes, world: World, runs: Sequence[Results], labels: Sequence[str], measure: str
) -> None:
    table, shown = {row.label: row for row in rows(runs)}, MEASURES[measure]
    axes.axvline(0, color="0.6", linewidth=0.8)
    sides = (("seen", None, True, 0.15), ("unseen", world.shots[-1], False, -0.15))
    for name, shots, fill, up in sides:
        legend: str | None = name if shots is None else f"{name}, most shots"
        for place, label in enumerate(labels):
            paired = label in table and against_bt(table[label], measure, name, shots)
            if not paired:
                continue
            low, mid, high = (shown.scale * x for x in (paired.low, paired.mean, paired.high))
            colour = full_colour(table[label].results, label)
            axes.plot([low, high], [place - up] * 2, color=colour, linewidth=1)
            axes.plot(mid, place - up, "o", markersize=4, color=colour, label=legend,
                      markerfacecolor=colour if fill else "white")  # fmt: skip
            legend = None
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    unit = "points of accuracy" if measure == "accuracy" else "log loss in nats"
    axes.set_xlabel(f"{unit}, minus BT", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    if measure == "log_loss":
        axes.set_xscale("symlog", linthresh=0.1)
    else:
        axes.set_title(world.name, fontsize=9)


if __name__ == "__main__":
    cli(main)
