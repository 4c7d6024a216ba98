"""report.html: a run in one file that needs nothing else, for phones and for large screens."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from lore.common.files import write_text
from lore.experiments.report import verdict
from lore.experiments.report.intervals import main_columns
from lore.experiments.report.plots import Panel, caption, figure, learned_panels, measure_panels
from lore.experiments.results import MEASURES, OWN, Results, row_name

TEMPLATES = Path(__file__).resolve().parent
MOST_USERS = 2000  # lines of the table of users
CLASSES = {verdict.BETTER: "better", verdict.WORSE: "worse", verdict.OPEN: "open"}
Table = Mapping[str, Mapping[str, str]]


def write_report(
    folder: Path, results: Results, tables: Mapping[str, Table], said: Mapping[str, Any]
) -> None:
    """Write report.html into a run's folder: tables by caption and, of what is said, ``heading``,
    ``marks`` before the figures are believed, ``about`` the data and ``notes`` on the fits."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    shown = (*results.judged, results.label_of(OWN))
    likes = {la: results.says(la, "likes") for la in results.labels if la in shown}
    text = environment.get_template("report.html").render(
        **said, title=results.title, kind=verdict.kind_sentence(results),
        verdicts=list(map(_card, verdict.verdicts(results))),
        tables=[_table(results, *table) for table in tables.items()],
        plots=_pictures(measure_panels(results), caption(results)),
        learned=_pictures(learned_panels(results), "Of the first repeat."),
        users=_users(results), likes={label: found for label, found in likes.items() if found},
    )  # fmt: skip
    write_text(folder / "report.html", text)


def _card(found: verdict.Verdict) -> dict[str, Any]:
    """A verdict with its intervals as bars on a scale that has zero in the middle: where each
    begins, how wide it is and where its middle lies, in percent of the width."""
    most, bars = dict.fromkeys(MEASURES, 1e-3), []
    for (_, measure), s in found.differences.items():
        most[measure] = np.nanmax(np.abs([*s[:3], most[measure]]))
    for (against, measure), s in found.differences.items():
        ends = s[1:3] if np.isfinite(s.low) else (s.mean, s.mean)
        low, high, mean = (50 + 48 * value / most[measure] for value in (*ends, s.mean))
        bars.append({"against": against, "text": verdict.difference_text(measure, s), "left": low,
                     "width": high - low, "mean": mean,
                     "outcome": CLASSES[verdict.outcome_of(measure, s)]})  # fmt: skip
    return {**found._asdict(), "outcome": CLASSES.get(found.outcome, "open"), "bars": bars}


def _table(results: Results, caption: str, table: Table) -> dict[str, Any]:
    """A table's title, what is to be known of it, its columns and rows."""
    heading, _, note = caption.partition(": ")
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    controls = {row_name(la, c) for la in results.labels for c in results.controls(la)}
    rows = [
        {"name": name, "control": name in controls, "cells": [row.get(n, "") for n in names]}
        for name, row in table.items()
    ]
    return {"title": heading, "note": note, "columns": names, "rows": rows}


def _users(results: Results) -> dict[str, Any]:
    """Every held-out user's accuracy under each method, the mean over repeats; in percent."""
    methods, parts = dict.fromkeys(results.methods.values()), []
    shown = [la for la in map(results.label_of, methods) if la]
    for _, (name, *_), shots in main_columns(results):
        tables = {la: results.figures(la, "", name, "accuracy", shots) for la in shown}
        means = {la: pd.DataFrame(one).mean(axis=1) for la, one in tables.items() if one}
        parts.append(pd.DataFrame(means, columns=shown).assign(side=name))
    table, text = pd.concat(parts), MEASURES["accuracy"].text
    rows = [
        {"name": user, "control": False,
         "cells": [side, *("" if np.isnan(value) else text(value) for value in values)]}
        for user, *values, side in table.head(MOST_USERS).itertuples()
    ]  # fmt: skip
    return {"columns": ["set", *shown], "rows": rows, "all": len(table), "shots": shots}


def _pictures(panels: Sequence[Panel], note: str) -> dict[str, Any]:
    """Every panel as an SVG of its own, the same bytes whenever it is drawn."""
    from matplotlib import rc_context  # takes a second, and who draws nothing does without

    drawn = []
    for panel in panels:
        name, picture = f"{panel.name}: {panel.caption}", io.BytesIO()
        with rc_context({"svg.hashsalt": "lore", "svg.fonttype": "path"}):
            made = figure([panel], "", "", (4.4, 3.2))
            made.savefig(picture, format="svg", metadata={"Date": None})
        source = f"data:image/svg+xml;base64,{base64.b64encode(picture.getvalue()).decode()}"
        drawn.append({"name": f"{name[0].upper()}{name[1:]}", "source": source})
    return {"note": note, "panels": drawn}
