"""Tables, differences and verdict of a run, made from its results.json alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lore.common.files import write_text
from lore.experiments.report.intervals import (
    THIRDS,
    Column,
    Summary,
    by_third,
    columns,
    interval,
    level,
    minus,
    results_csv,
    worth,
)
from lore.experiments.report.page import write_report
from lore.experiments.report.plots import write_plots
from lore.experiments.report.verdict import AGAINST, COIN, judged, verdict
from lore.experiments.results import (
    ALWAYS,
    ASKS,
    BT,
    MEASURES,
    OWN,
    REFERENCE,
    RIDGE,
    Results,
    control_name,
    read_results,
    row_name,
    title,
)

INTERVAL = "mean [95 % interval over users]"
BASELINES = ("ridge_bt", "lore")  # methods that those after them and all others are held against
ABOUT = 10  # chosen shots that are counted in random ones

Table = dict[str, dict[str, str]]  # row -> column -> cell


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
                table[row_name(label, control)] = row
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
    return f"{text} {interval(measure, summary)}".rstrip()


def difference_table(results: Results, measure: str) -> Table:
    """Every label minus BT, its controls, the reference and ``BASELINES``, paired by user and
    repeat."""
    table: Table = {}
    for label in results.labels:
        random = (label.split(ASKS)[0],) if ASKS in label else ()
        every = (BT, *AGAINST[1:], REFERENCE, *_baselines(results, label), *random)
        for against in every if label != REFERENCE else ():
            row = {
                column.name: _cell(measure, minus(results, label, against, measure, column), True)
                for column in columns(results)
            }
            if any(row.values()):
                name = "random ones" if against in random else control_name(against)
                table[f"{label} minus {name}"] = row
    return table


def _baselines(results: Results, label: str) -> list[str]:
    """The labels of ``BASELINES`` that a method's label is held against."""
    method = results.methods[label]
    if label in (REFERENCE, BT, OWN):
        return []
    places = [*BASELINES, method]
    before = places[: places.index(method)]
    there = [label for label in (RIDGE, *judged(results)) if label in results.methods]
    return [other for other in there if results.methods[other] in before]


def unusual_table(results: Results) -> Table:
    """Accuracy among users whom BT's shared reward describes well, less well and badly."""
    shots = max(results.shots(), default=None)
    sets = [("unseen", shots)] if results.sweep else [("seen", None), ("unseen", None)]
    table: Table = {}
    for label in results.labels:
        row = {}
        for name, count in sets:
            found = by_third(results, label, name, count) or ()
            for third, summary in zip(THIRDS, found, strict=False):  # all three or none
                row[f"{name}, {third}"] = _cell("accuracy", summary)
        if row:
            table[label] = row
    return table


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
    for key in (*ALWAYS, "brier"):
        unit = "points" if key == "accuracy" else f"{MEASURES[key].unit}, below 0 is better"
        caption = f"Differences of {MEASURES[key].name} ({unit}), paired by user: {INTERVAL}"
        found.append(Section(caption, difference_table(results, key)))
    caption = "Accuracy by how unusual a user is (thirds by BT's log loss on training choices)"
    found.append(Section(f"{caption}: {over}", unusual_table(results)))
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
    lines += [line for label in results.labels if ASKS in label for line in _worth(results, label)]
    for method in dict.fromkeys(results.methods.values()):
        lines += _cost(results, method)
    return lines


def _worth(results: Results, label: str) -> list[str]:
    """How many random shots about ten chosen ones are worth, by accuracy and log loss."""
    sizes = [size for size in results.shots() if size]
    if not sizes:
        return []
    shots = min(sizes, key=lambda size: abs(size - ABOUT))
    told = []
    for measure in ALWAYS:
        found = worth(results, label, measure, shots)
        if found:
            mean, low, high = (
                f"{x:.1f}" if np.isfinite(x) else f"more than {sizes[-1]}" for x in found
            )
            told.append(f"{mean} [{low}, {high}] by {MEASURES[measure].name}")
    return [f"- {label}: {shots} are worth as many drawn at random: {', '.join(told)}"]


def _cost(results: Results, method: str) -> list[str]:
    """Time, size and number of settings tried of a method, the mean over repeats."""
    told = []
    parts = [r["methods"][method] for r in results.repeats if method in r["methods"]]
    for key, unit in (("seconds", "s"), ("parameters", "parameters"), ("tried", "settings tried")):
        values = [part[key] for part in parts if part.get(key)]
        mean = float(np.mean(values)) if values else 0.0
        if mean > {"tried": 1, "seconds": 0.05}.get(key, 0):
            told.append(f"{mean:.1f} {unit}" if key == "seconds" else f"{mean:,.0f} {unit}")
    return [f"- {method}: {', '.join(told)}"] if told else []


def _text(results: Results) -> str:
    """Title, facts, tables, notes and verdict."""
    blocks = [f"{title(results)}; {_details(results)}", *facts(results)]
    blocks += [f"**WARNING: {mark}**" for mark in warnings(results)]
    for section in sections(results):
        blocks += [section.caption, markdown(section.table)]
    lines = notes(results)
    blocks += ["Notes:\n" + "\n".join(lines)] if lines else []
    return "\n\n".join([*blocks, verdict(results)])


def _details(results: Results) -> str:
    """How it was run: script, repeats and the script's plain settings."""
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
    return ", ".join([settings["script"], repeats, *details])


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
    lines = [line.removeprefix("- ") for line in notes(results)]
    about = _details(results), facts(results), warnings(results)
    write_report(folder, results, *about, sections(results), lines)
    if labels:
        text = _text(results.only({REFERENCE, BT, OWN, *labels}))
    return f"{text}\n\nResults, table, plots ({names}) and report.html: {folder}"
