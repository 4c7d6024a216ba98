"""report.html: a run in one file that needs nothing else, for phones and for large screens."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from lore.common.files import write_text
from lore.experiments.report.intervals import Summary, columns, interval
from lore.experiments.report.plots import Panel, caption, figure, learned_panels, measure_panels
from lore.experiments.report.verdict import (
    BETTER,
    OPEN,
    WORSE,
    Verdict,
    judged,
    outcome_of,
    verdicts,
)
from lore.experiments.results import MEASURES, OWN, Results, control_name, row_name, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).resolve().parent
MOST_USERS = 2000  # lines of the table of users
LENGTHS = {"prompt": 200, "response": 400}  # letters of a text that are shown
CLASSES = {BETTER: "better", WORSE: "worse", OPEN: "open"}
Table = Mapping[str, Mapping[str, str]]


def write_report(
    folder: Path, results: Results, heading: str, about: Sequence[str], marks: Sequence[str],
    tables: Sequence[tuple[str, Table]], notes: Sequence[str],
) -> None:  # fmt: skip
    """Write report.html into a run's folder.

    Args:
        folder: of the run.
        results: what is drawn.
        heading: what was run.
        about: sentences about the data.
        marks: what must be known before the figures are believed.
        tables: caption and rows of each.
        notes: lines on the fits.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    text = environment.get_template("report.html").render(
        title=title(results), heading=heading, about=about, marks=marks, notes=notes,
        verdicts=[_card(v) for v in verdicts(results)],
        tables=[_table(results, *table) for table in tables],
        plots=_svgs(measure_panels(results, judged(results)), caption(results)),
        learned=_svgs(learned_panels(results, judged(results)), "Of the first repeat."),
        users=_users(results), likes=_likes(results),
    )  # fmt: skip
    write_text(folder / "report.html", text)


# ---------------------------------------------------------------------- Verdict


def _card(verdict: Verdict) -> dict[str, Any]:
    """A verdict with its intervals as bars on a scale that has zero in the middle."""
    told = MEASURES["accuracy"]
    ends = [abs(end) for s in verdict.points.values() for end in s[:3] if np.isfinite(end)]
    most = max([*ends, 0.01])
    bars = [
        {
            "against": control_name(against),
            "text": f"{told.text(s.mean, signed=True)} {interval('accuracy', s)}",
            "outcome": CLASSES[outcome_of(s)],
            **_bar(s, most),
        }
        for against, s in verdict.points.items()
    ]
    return {
        "label": verdict.label,
        "where": verdict.where,
        "badge": verdict.claim,
        "outcome": CLASSES.get(verdict.outcome, "open"),
        "loss": verdict.loss,
        "bars": bars,
    }


def _bar(summary: Summary, most: float) -> dict[str, float]:
    """Where a bar begins, how wide it is and where its middle lies, in percent of the width."""
    low, high = summary.low, summary.high
    if not np.isfinite(low):
        low = high = summary.mean
    place = [50 + 48 * value / most for value in (low, high, summary.mean)]
    return {"left": place[0], "width": place[1] - place[0], "mean": place[2]}


# ----------------------------------------------------------------------- Tables


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
    last = columns(results)[-1].shots if results.sweep else None
    shown = [
        label
        for label in results.labels
        if label in judged(results) or len(results.of_method(results.methods[label])) == 1
    ]
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for label in shown:
        for name in ("seen", "unseen"):
            for record in results.find(label, "", name, last):
                for user, value in zip(record.users, record.values["accuracy"], strict=True):
                    found.setdefault((user, name), {}).setdefault(label, []).append(value)
    told = MEASURES["accuracy"]
    rows = [
        {
            "name": user,
            "control": False,
            "cells": [
                side,
                *(told.text(float(np.mean(row[la]))) if la in row else "" for la in shown),
            ],
        }
        for (user, side), row in list(found.items())[:MOST_USERS]
    ]
    return {"columns": ["set", *shown], "rows": rows, "all": len(found), "shots": last}


# ------------------------------------------------------------------ What is liked


def _likes(results: Results) -> list[dict[str, Any]]:
    """Per judged label that has them: the responses each direction likes most and least."""
    found = []
    for label in results.labels:
        if label not in judged(results) and label != OWN:
            continue
        for likes in [fit.get("likes") for fit in results.fits(label)[:1]]:
            if likes:
                found.append({"label": label, "directions": [_direction(one) for one in likes]})
    return found


def _direction(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": one["direction"],
        "sides": [
            {"name": side, "texts": [_shortened(entry) for entry in one.get(side, [])]}
            for side in ("most", "least")
        ],
    }


def _shortened(entry: Mapping[str, str]) -> dict[str, str]:
    """A prompt and response, cut at a word."""
    texts = {}
    for key, most in LENGTHS.items():
        text = " ".join(entry[key].split())
        texts[key] = text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"
    return texts


# ------------------------------------------------------------------------ Plots


def _svgs(panels: Sequence[Panel], note: str) -> dict[str, Any]:
    """Every panel as an SVG of its own, so that they stand in one column on a phone."""
    drawn = []
    for panel in panels:
        made = figure([panel], "", "", (4.4, 3.2), room=True)
        name = f"{panel.name}: {panel.caption}"
        drawn.append({"name": f"{name[0].upper()}{name[1:]}", "svg": _svg(made, name)})
    return {"note": note, "panels": drawn}


def _svg(made: Figure, name: str) -> Markup:
    """A figure as SVG to stand within a page; the same bytes whenever it is drawn."""
    import matplotlib  # takes a second, and who draws nothing does without

    text = io.StringIO()
    # Without a salt of its own every figure would draw numbers for the names of its parts.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        made.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg)
    label = Markup.escape(name)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
