"""Tables, differences and verdict of a run, made from its results.json alone.

    python reports.py results/PRISM/train_basis-1a2b3c4d ...

makes them and the plots anew without training; several runs are also put side by side.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli import cli
from files import require, write_text
from plots import write_plots
from records import (
    ALWAYS,
    BT,
    CHOSEN,
    MEASURES,
    OWN,
    REFERENCE,
    Results,
    Summary,
    control_name,
    difference,
    level,
    read_results,
    results_csv,
    shots_name,
    title,
)

INTERVAL = "mean [95 % interval over users]"
AGAINST = (BT, "nobody's", "another's", REFERENCE)  # labels and controls
COIN = float(np.log(2))

Table = dict[str, dict[str, str]]  # row -> column -> cell


class Column(NamedTuple):
    """A column of every table: the sets whose means are averaged, and the shots."""

    name: str
    sets: tuple[str, ...]
    shots: int | None = None


def columns(results: Results) -> list[Column]:
    """Seen, unseen and both; or new users at every number of shots."""
    if results.sweep:
        return [Column(shots_name(s), ("unseen",), s) for s in results.shots()]
    sets = (("seen",), ("unseen",), ("seen", "unseen"))
    return [Column(name, s) for name, s in zip(("seen", "unseen", "overall"), sets, strict=True)]


# ----------------------------------------------------------------------- Tables


def measure_table(results: Results, measure: str) -> Table:
    """A measure of every label and control: mean ± SD over repeats [95 % interval over users]."""
    table: Table = {}
    also = [] if results.sweep else [Column("train", ("train",))]
    for label in results.labels:
        for control in ("", *results.controls(label)):
            row = {
                column.name: _cell(measure, level(results, label, control, measure, *column[1:]))
                for column in [*columns(results), *also]
            }
            if any(row.values()):
                table[f"{label}: {control_name(control)}" if control else label] = row
    if results.sweep and measure == "accuracy":
        table |= _enough(results)
    return table


def _enough(results: Results) -> Table:
    """How many users have as many shots, in the fewest and the most of the repeats."""
    row = {}
    for column in columns(results):
        counts = [
            r.enough
            for r in results.records
            if r.set == "unseen" and r.shots == column.shots and r.enough is not None
        ]
        if counts:
            ends = sorted({min(counts), max(counts)})
            row[column.name] = " to ".join(map(str, ends))
    return {"users with as many": row} if row else {}


def _cell(measure: str, summary: Summary | None, paired: bool = False) -> str:
    """Mean, interval over users and, but for differences, standard deviation over repeats."""
    if summary is None:
        return ""
    told = MEASURES[measure]
    text = told.text(summary.mean, signed=paired)
    if len(summary.repeats) > 1 and not paired:
        text += f" ± {told.text(float(np.std(summary.repeats, ddof=1)))}"
    return f"{text} {_interval(measure, summary)}".rstrip()


def _interval(measure: str, summary: Summary) -> str:
    """[low, high], nothing where there is none."""
    known = np.isfinite(summary.low)
    return MEASURES[measure].between(summary.low, summary.high) if known else ""


def difference_table(results: Results, measure: str) -> Table:
    """Every label minus BT, its controls and the reference, paired by user and repeat."""
    table: Table = {}
    for label in results.labels:
        for against in AGAINST if label != REFERENCE else ():
            row = {
                column.name: _cell(measure, _minus(results, label, against, measure, column), True)
                for column in columns(results)
            }
            if any(row.values()):
                table[f"{label} minus {control_name(against)}"] = row
    return table


def _minus(
    results: Results, label: str, against: str, measure: str, column: Column
) -> Summary | None:
    """A label minus another label or one of its own controls; None where there is no such pair."""
    other = (against, "") if against in (BT, REFERENCE) else (label, against)
    if other == (label, ""):
        return None
    return difference(results, label, other, measure, *column[1:])


class Section(NamedTuple):
    """A table and what its figures are."""

    caption: str
    table: Table


def sections(results: Results) -> list[Section]:
    """All tables: each measure, then the differences."""
    several = len(results.repeats) > 1
    over = INTERVAL.replace("mean", "mean ± standard deviation over repeats" if several else "mean")
    found = []
    for key, measure in MEASURES.items():
        caption = f"{measure.name[0].upper()}{measure.name[1:]} ({measure.unit}): {over}"
        if key == "log_loss":
            caption += f"; a coin's is ln 2 = {COIN:.3f}, lower is better"
        found.append(Section(caption, measure_table(results, key)))
    for key in ALWAYS:
        unit = "points" if key == "accuracy" else f"{MEASURES[key].unit}, below 0 is better"
        caption = f"Differences of {MEASURES[key].name} ({unit}), paired by user: {INTERVAL}"
        found.append(Section(caption, difference_table(results, key)))
    return [section for section in found if section.table]


def markdown(table: Table | Any) -> str:
    """A table in Markdown, columns aligned.

    Args:
        table: row -> column -> cell, or a data frame.
    """
    if not isinstance(table, dict):  # a data frame
        table = table.fillna("").astype(str).to_dict("index")
    if not table:
        return ""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [["", *names]] + [[key, *(row.get(n, "") for n in names)] for key, row in table.items()]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ---------------------------------------------------------------------- Verdict

EARN, COST, OPEN = "earn", "cost", "cannot be told apart"


class Verdict(NamedTuple):
    """What a label's personal states bring on one set.

    Attributes:
        where: the users, and the number of shots.
        outcome: earn, cost or cannot be told apart; "" where nothing is personal.
        text: the whole sentence.
        points: against what -> difference in accuracy.
    """

    label: str
    where: str
    outcome: str
    text: str
    points: dict[str, Summary]


def verdicts(results: Results) -> list[Verdict]:
    """Of every method with personal states: do they beat BT, nobody's state and another's?

    A method is judged by its chosen label, else by its last one, on the held-out comparisons; in
    a sweep at the largest number of shots.
    """
    found = []
    for label in judged(results):
        if not results.personal(label):
            chosen = any(fit["settings"].get("rank") == 1 for fit in results.fits(label))
            why = "rank 1 was chosen: " if chosen else ""
            found.append(Verdict(label, "", "", f"{label}: {why}nothing is personal", {}))
            continue
        for column in columns(results)[-1:] if results.sweep else columns(results)[:2]:
            found += _judge(results, label, column)
    return found


def judged(results: Results) -> list[str]:
    """The label that stands for each method: the chosen one, else the last.

    Without the methods that no control was recorded for although they are personal, and the two
    that never are.
    """
    last: dict[str, str] = {}
    for label, method in results.methods.items():
        if not last.get(method, "").endswith(CHOSEN):
            last[method] = label
    found = [label for label in last.values() if label not in (REFERENCE, BT)]
    return [la for la in found if results.controls(la) or not results.personal(la)]


def _judge(results: Results, label: str, column: Column) -> list[Verdict]:
    """The verdict on one set, in a list; an empty list where nothing was recorded for it."""
    points, losses = {}, {}
    for against in AGAINST[:3]:
        for measure, found in (("accuracy", points), ("log_loss", losses)):
            summary = _minus(results, label, against, measure, column)
            if summary is not None:
                found[against] = summary
    if not points:
        return []
    outcome = judge(points)
    where = f"unseen users at {column.name}" if results.sweep else f"{column.name} users"
    told = ", ".join(
        f"{MEASURES['accuracy'].text(s.mean, signed=True)} points {_interval('accuracy', s)} "
        f"against {control_name(against)}"
        for against, s in points.items()
    )
    subject = "personal and shared" if outcome == OPEN else "personal states"
    text = f"{label}, {where}: {subject} {outcome}: {told}{_loss(results, label, column, losses)}"
    return [Verdict(label, where, outcome, text, points)]


def judge(points: dict[str, Summary]) -> str:
    """The outcome of differences: all above zero earn, below BT cost, else it cannot be told."""
    if all(s.low > 0 for s in points.values()):
        return EARN
    return COST if BT in points and points[BT].high < 0 else OPEN


def outcome_of(summary: Summary) -> str:
    """The outcome of one difference in accuracy by its interval."""
    return judge({BT: summary})


def _loss(results: Results, label: str, column: Column, losses: dict[str, Summary]) -> str:
    """The log loss, against BT's and, where it is worse, a coin's."""
    own = level(results, label, "", "log_loss", *column[1:])
    if own is None or BT not in losses:
        return ""
    told = MEASURES["log_loss"]
    text = f"; log loss {told.text(own.mean)} nats, {told.text(losses[BT].mean, signed=True)} "
    text += f"{_interval('log_loss', losses[BT])} against BT"
    return text + (f", worse than a coin's {COIN:.3f}" if own.mean > COIN else "")


def verdict(results: Results) -> str:
    """The verdicts as one paragraph, a line for each if several."""
    found = verdicts(results)
    if not found:
        return "Verdict: no personal method was fitted, so there is nothing to judge."
    lines = [f"{v.text}." for v in found]
    return "\n".join(
        [f"Verdict: {lines[0]}"]
        if len(lines) == 1
        else ["Verdict:", *(f"- {line}" for line in lines)]
    )


# ------------------------------------------------------------------------- Text


def facts(results: Results) -> list[str]:
    """What is known of the data before any fit; of every repeat where they differ."""
    found: dict[str, list[int]] = {}
    for repeat in results.repeats:
        for fact in (repeat.get("facts") or {}).values():
            found.setdefault(str(fact), []).append(repeat["seed"])
    everywhere = len(results.repeats)
    return [
        fact if len(seeds) == everywhere else f"{fact} (seed {', '.join(map(str, seeds))})"
        for fact, seeds in found.items()
    ]


def warnings(results: Results) -> list[str]:
    """What must be known before the figures are believed."""
    found = [results.settings["warning"]] if results.settings.get("warning") else []
    if results.settings.get("reference") == "last_linear":
        found.append("the reference is the published code's mistaken one (last_linear)")
    return found


def notes(results: Results) -> list[str]:
    """A line for each label's fits, if they have something to say, and what the methods cost."""
    lines = []
    for label in results.labels:
        told = Counter(fit["note"] for fit in results.fits(label) if fit.get("note"))
        repeats = len(results.repeats)
        for note, count in list(told.items())[: 1 if len(told) > 3 else None]:
            often = f" ({count} of {repeats} repeats)" if count < repeats else ""
            lines.append(f"- {label}: {note}{often}")
    for method in dict.fromkeys(results.methods.values()):
        lines += _cost(results, method)
    return lines


def _cost(results: Results, method: str) -> list[str]:
    """Time, size and number of settings tried of a method, the mean over repeats."""
    told = []
    parts = [r["methods"][method] for r in results.repeats if method in r["methods"]]
    for key, unit in (("seconds", "s"), ("parameters", "parameters"), ("tried", "settings tried")):
        values = [part[key] for part in parts if part.get(key)]
        mean = float(np.mean(values)) if values else 0.0
        if mean > (1 if key == "tried" else 0):
            told.append(f"{mean:.1f} {unit}" if key == "seconds" else f"{mean:,.0f} {unit}")
    return [f"- {method}: {', '.join(told)}"] if told else []


def _text(results: Results) -> str:
    """Title, facts, tables, notes and verdict."""
    blocks = [_heading(results), *facts(results)]
    blocks += [f"**WARNING: {mark}**" for mark in warnings(results)]
    for section in sections(results):
        blocks += [section.caption, markdown(section.table)]
    lines = notes(results)
    blocks += ["Notes:\n" + "\n".join(lines)] if lines else []
    return "\n\n".join([*blocks, verdict(results)])


def _heading(results: Results) -> str:
    """What was run: dataset, script, model, methods, repeats and the script's plain settings."""
    settings, count = results.settings, len(results.repeats)
    known = {"script", "dataset", "warning", "prepared", "embeddings", "seeds", "shots", "unit"}
    details = [
        f"{key} {value}"
        for key, value in settings.items()
        if key not in known and isinstance(value, int | float | str) and value != ""
    ]
    if results.sweep:
        details.append(f"a shot is one of a user's {settings.get('unit', 'comparisons')}")
    repeats = f"{count} repeat{'s' if count > 1 else ''}"
    return f"{title(results)}; " + ", ".join([settings["script"], repeats, *details])


def report(folder: Path, labels: Collection[str] = ()) -> str:
    """Write a finished run's tables and plots anew from results.json; nothing is trained.

    Args:
        folder: the run's folder.
        labels: show only these in the text returned, beside reference, BT and own models; the
            files have all.

    Returns:
        What was run, tables, paired differences, notes, the verdict and where the files lie.

    Raises:
        InputError: there is no results.json, no finished repeat in it, or it is damaged.
    """
    results = read_results(folder)
    write_text(folder / "results.csv", results_csv(results))
    text = _text(results)
    write_text(folder / "table.md", text + "\n")
    names = ", ".join(f"{name}.png" for name in write_plots(folder, results, judged(results)))
    if labels:
        text = _text(results.only({REFERENCE, BT, OWN, *labels}))
    return f"{text}\n\nResults, table and plots ({names}): {folder}"


def _side_by_side(runs: dict[str, Results]) -> str:
    """The accuracy of several runs in one table, a column for each set or number of shots."""
    together: Table = {}
    for name, results in runs.items():
        shown = {column.name for column in columns(results)}
        for row, cells in measure_table(results, "accuracy").items():
            for column, cell in cells.items():
                if column in shown:
                    together.setdefault(row, {})[f"{name} {column}"] = cell.split(" [")[0]
    return markdown(together)


def _shown(results: Results, only: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """The labels asked for; of ranks above 1 those listed."""
    found = [label for label in results.labels if not only or label in only]
    if ranks:
        rank = {la: results.fits(la)[0]["settings"].get("rank") or 0 for la in found}
        found = [label for label in found if rank[label] in (0, 1, *ranks)]
    return found


def main(
    runs: tuple[Path, ...] = (), only: tuple[str, ...] = (), ranks: tuple[int, ...] = ()
) -> None:
    """Make the tables and plots of runs anew from their results.json, without training.

    Args:
        runs: Folders of runs; several are also put side by side in one table.
        only: Print only these labels, such as "LoRe K=5"; the files in the folders have all.
        ranks: Of the fits with a rank above 1, print only these; the files have all.
    """
    require(bool(runs), "name at least one run's folder: python reports.py results/PRISM/...")
    names = [run.name for run in runs]
    read = {run.name if names.count(run.name) == 1 else str(run): read_results(run) for run in runs}
    known = {label for results in read.values() for label in results.labels}
    unknown = [label for label in only if label not in known]
    require(not unknown, f"--only {' '.join(unknown)}: these runs have {', '.join(sorted(known))}")
    texts = []
    for run, results in zip(runs, read.values(), strict=True):
        labels = [REFERENCE, *_shown(results, only, ranks)] if only or ranks else []
        texts.append(report(run, labels))
    if len(runs) > 1:
        texts.append(_side_by_side(read))
    sys.stdout.write("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    cli(main)
