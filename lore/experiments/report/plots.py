"""Plots of a run: accuracy and log loss, training curves, spectrum, users' states.

A method has its colour from its name, whatever else is drawn. Controls are drawn in the colour of
their method, the broken lines.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lore.common.files import write_whole
from lore.experiments.report.intervals import Summary, held_out, level
from lore.experiments.results import (
    BT,
    CHOSEN,
    MEASURES,
    OWN,
    REFERENCE,
    Results,
    control_name,
    family,
    row_name,
    title,
)

if TYPE_CHECKING:  # matplotlib takes a second to import: functions that draw import what they need
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIXED = {REFERENCE: "0.55", BT: "0.1", OWN: "#8c564b"}
PALETTE = (
    "#637939",
    "#17becf",
    "#9467bd",
    "#ff7f0e",
    "#e377c2",
    "#2ca02c",
    "#1f77b4",
    "#393b79",
    "#ad1a72",
    "#008080",
    "#bcbd22",
    "#d62728",
)
MARKERS = "osD^vPX*"
BROKEN = {"": "-", "population": "--", "another": ":", "shuffled": "-."}
HOLLOW = {"population": "o", "another": "v", "shuffled": "x"}
LEVELS = {"accuracy": ("chance", 0.5), "log_loss": ("coin", float(np.log(2)))}
GAP = 0.055  # between two texts at the edge, as a share of the height
MOST_LABELS = 12  # with lines of their own in the plots of training and spectra


class Panel(NamedTuple):
    """One pair of axes: what it shows, and what draws it."""

    name: str
    caption: str
    draw: Callable[[Axes], None]


# ----------------------------------------------------------------------- Styles


def full_colour(results: Results, label: str) -> tuple[float, float, float]:
    """The colour of a label's method."""
    from matplotlib.colors import to_rgb

    number = zlib.adler32(results.methods[label].encode())
    return to_rgb(FIXED.get(label, PALETTE[number % len(PALETTE)]))


def colour(results: Results, label: str) -> tuple[float, float, float]:
    """A label's colour: its method's, paler the earlier it stands among the method's labels."""
    labels = results.of_method(results.methods[label])
    paler = 0.6 * (1 - (labels.index(label) + 1) / len(labels))
    red, green, blue = ((1 - paler) * part + paler for part in full_colour(results, label))
    return red, green, blue


def marker(results: Results, label: str) -> str:
    """A label's marker: its method's, then the following ones for the method's other labels."""
    labels = results.of_method(results.methods[label])
    first = zlib.crc32(results.methods[label].encode())
    return MARKERS[(first + len(labels) - 1 - labels.index(label)) % len(MARKERS)]


def _safe(text: str) -> str:
    """Text in which a dollar sign does not begin a formula."""
    return text.replace("$", r"\$")


# ------------------------------------------------------- Accuracy and log loss


def measure_panels(results: Results, judged: Collection[str]) -> list[Panel]:
    """Accuracy and log loss of seen and unseen users, or of new users against shots.

    Args:
        judged: the labels whose controls are drawn too where there is one line for each label.
    """
    panels = []
    setting = varying_setting(results)
    for measure, about in tuple(MEASURES.items())[:2]:
        what = f"{about.name} ({about.unit})"
        shared = {"results": results, "measure": measure}
        if results.sweep:
            draw = functools.partial(_draw_shots, judged=judged, **shared)
            panels.append(Panel("unseen users", what, draw))
            continue
        for name in held_out(results):
            if setting is None:
                draw = functools.partial(_draw_labels, name=name, **shared)
            else:
                draw = functools.partial(_draw_setting, name=name, setting=setting, **shared)
            panels.append(Panel(f"{name} users", what, draw))
    return panels


def varying_setting(results: Results) -> str | None:
    """The one numeric setting in which labels of the same method differ, if it is only one."""
    differing = set()
    for method in dict.fromkeys(results.methods.values()):
        swept = [settings for _, settings in _swept(results, method)]
        for key in {key for settings in swept for key in settings} if len(swept) > 1 else ():
            values = [settings.get(key) for settings in swept]
            if any(value != values[0] for value in values):
                numeric = all(isinstance(v, int | float) for v in values)
                differing.add(key if numeric and len(set(values)) == len(values) else None)
    return next(iter(differing)) if len(differing) == 1 else None


def _swept(results: Results, method: str) -> list[tuple[str, dict]]:
    """A method's labels with their settings, without the chosen one."""
    return [
        (label, results.fits(label)[0]["settings"])
        for label in results.of_method(method)
        if not label.endswith(CHOSEN)
    ]


def _draw_setting(axes: Axes, results: Results, measure: str, name: str, setting: str) -> None:
    """A line for each method in which the setting varies, level lines for the others."""
    lines = [_swept(results, method) for method in dict.fromkeys(results.methods.values())]
    lines = [line for line in lines if len(line) > 1]
    drawn = {label for line in lines for label, _ in line}
    places = sorted({settings[setting] for line in lines for _, settings in line})
    for label in results.labels:
        summary = level(results, label, "", measure, (name,))
        if label not in drawn and label != REFERENCE and summary:
            style = "-." if label.endswith(CHOSEN) else (0, (6, 2))
            _band(
                axes,
                [-0.25, len(places) - 0.75],
                [summary] * 2,
                measure,
                color=colour(results, label),
                ls=style,
                lw=1.2,
                label=_safe(label),
            )
    for line in lines:
        last = line[-1][0]
        style = {"color": full_colour(results, last), "marker": marker(results, last)}
        for control in ("", *dict.fromkeys(c for la, _ in line for c in results.controls(la))):
            found = [
                (places.index(settings[setting]), level(results, la, control, measure, (name,)))
                for la, settings in line
            ]
            name_drawn = family(results, results.methods[last])
            _line(axes, name_drawn, control, measure, found, **style)
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    axes.set_xlabel(setting)
    _level_marks(axes, results, measure, name)


def _draw_labels(axes: Axes, results: Results, measure: str, name: str) -> None:
    """A point with its interval for every label, its controls beside it."""
    labels = [label for label in results.labels if label != REFERENCE]
    for x, label in enumerate(labels):
        controls = ["", *results.controls(label)]
        for i, control in enumerate(controls):
            summary = level(results, label, control, measure, (name,))
            if summary:
                mean, low, high = (MEASURES[measure].scale * v for v in summary[:3])
                shape = HOLLOW.get(control, "s") if control else marker(results, label)
                axes.errorbar(
                    x + 0.16 * (i - (len(controls) - 1) / 2),
                    mean,
                    [[mean - low], [high - mean]],
                    fmt=shape,
                    ms=6 if not control else 5,
                    elinewidth=1.2,
                    c=colour(results, label),
                    mfc=None if not control else "white",
                )
    for control in dict.fromkeys(c for label in labels for c in results.controls(label)):
        axes.plot(
            [],
            [],
            HOLLOW.get(control, "s"),
            c="0.3",
            mfc="white",
            ms=5,
            label=control_name(control),
        )
    long = max(map(len, labels), default=0) * len(labels) > 50
    turned = {"rotation": 35, "ha": "right"} if long else {}
    axes.set_xticks(range(len(labels)), map(_safe, labels), **turned)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    _level_marks(axes, results, measure, name)


def _draw_shots(axes: Axes, results: Results, measure: str, judged: Collection[str]) -> None:
    """New users' figures against their number of shots, on a logarithmic axis that has a 0."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    shots = results.shots()
    for label in results.labels:
        if label == REFERENCE:
            continue
        for control in ("", *(results.controls(label) if label in judged else ())):
            found = [(s, level(results, label, control, measure, ("unseen",), s)) for s in shots]
            style = {"color": colour(results, label), "marker": marker(results, label)}
            _line(axes, label, control, measure, found, **style)
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.xaxis.set_major_locator(FixedLocator(shots))
    axes.xaxis.set_major_formatter(FixedFormatter([str(s) for s in shots]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"shots: {results.settings.get('unit', 'comparisons')} of each user")
    _level_marks(axes, results, measure, "unseen", shots[-1] if shots else None)


def _line(
    axes: Axes,
    name: str,
    control: str,
    measure: str,
    found: Sequence[tuple[float, Summary | None]],
    color: tuple[float, float, float],
    marker: str,
) -> None:
    """A line of a label or of one of its controls; only the former has a band and markers."""
    known = [(x, summary) for x, summary in found if summary]
    if not known:
        return
    x, summaries = zip(*known, strict=True)
    style = {"ls": BROKEN.get(control, (0, (1, 3))), "color": color}
    if control:
        told = _safe(row_name(name, control))
        _band(axes, x, summaries, measure, band=False, label=told, lw=1.1, **style)
    else:
        style |= {"marker": marker, "ms": 4.5, "lw": 1.6}
        _band(axes, x, summaries, measure, label=_safe(name), **style)


def _band(
    axes: Axes,
    x: Sequence[float],
    summaries: Sequence[Summary],
    measure: str,
    band: bool = True,
    **style: object,
) -> None:
    mean, low, high = MEASURES[measure].scale * np.array([s[:3] for s in summaries]).T
    axes.plot(x, mean, **style)
    if band:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.13, lw=0)


def _level_marks(
    axes: Axes, results: Results, measure: str, name: str, shots: int | None = None
) -> None:
    """Reference and chance at the right edge; with an arrow where they lie beyond the axis."""
    about, (text, chance) = MEASURES[measure], LEVELS[measure]
    values = {f"{text} {about.text(chance)}": about.scale * chance}
    reference = level(results, REFERENCE, "", measure, (name,), shots)
    if reference:
        values[f"reference {about.text(reference.mean)}"] = about.scale * reference.mean
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    heights: list[float] = []
    for told, value in sorted(values.items(), key=lambda item: item[1]):
        place = (value - bottom) / (top - bottom)
        values[told] = place
        heights.append(min(max(place, 0.0), 1.0))
        if 0 <= place <= 1:
            across = axes.get_yaxis_transform()
            axes.plot([0.97, 1], [value, value], c="0.4", lw=1.5, transform=across)
    if len(heights) == 2 and heights[1] - heights[0] < GAP:  # texts would lie on each other
        heights = [1 - GAP, 1.0] if heights[0] > 1 - GAP else [heights[0], heights[0] + GAP]
    for height, (told, place) in zip(heights, sorted(values.items(), key=_second), strict=True):
        beyond = " ↓" if place < 0 else " ↑" if place > 1 else ""
        axes.text(
            1.015,
            height,
            told + beyond,
            fontsize=7,
            c="0.35",
            va="center",
            transform=axes.transAxes,
        )


def _second(item: tuple[str, float]) -> float:
    return item[1]


# ------------------------------------------------------------- What was learned


def _drawn(results: Results, key: str) -> Iterator[tuple[str, dict]]:
    """The last labels that have something in their first fit."""
    found = [(label, results.fits(label)[0]) for label in results.labels]
    yield from [(label, fit) for label, fit in found if fit.get(key)][-MOST_LABELS:]


def _draw_training(axes: Axes, results: Results) -> None:
    """The objective over the steps, divided by its value at the start where that is positive."""
    from matplotlib.ticker import ScalarFormatter

    found = [(label, fit, np.array(fit["losses"])) for label, fit in _drawn(results, "losses")]
    positive = all((losses > 0).all() for _, _, losses in found)
    for label, fit, losses in found:
        steps = np.arange(len(losses)) * (fit.get("loss_step") or 1)
        axes.plot(
            steps,
            losses / (losses[0] if positive else 1),
            lw=1.3,
            c=colour(results, label),
            label=_safe(label),
        )
    if positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("step")


def _draw_spectrum(axes: Axes, results: Results) -> None:
    """Each fit's spectrum, the largest value being one."""
    for label, fit in _drawn(results, "spectrum"):
        values = np.array(fit["spectrum"])
        axes.plot(
            range(1, len(values) + 1),
            values / (np.abs(values).max() or 1),
            ms=4,
            marker=marker(results, label),
            c=colour(results, label),
            label=_safe(label),
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("number")


def _draw_states(axes: Axes, results: Results, label: str) -> None:
    """Heat map of the seen users' states, users in the order of their largest entry."""
    states = np.array(results.fits(label)[0]["states"])
    main = np.abs(states).argmax(1)
    order = np.lexsort((-np.abs(states).max(1), main))
    most = np.abs(states).max() or 1
    signed = (states < 0).any()
    image = axes.imshow(
        states[order],
        extent=(0.5, states.shape[1] + 0.5, len(states), 0),
        aspect="auto",
        interpolation="none",
        cmap="RdBu" if signed else "Greys",
        vmin=-most if signed else 0,
        vmax=most,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="entry of the state", yticks=[])
    axes.figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)


def learned_panels(results: Results, judged: Collection[str]) -> list[Panel]:
    """Training curves and spectra of the first repeat, and the states of judged labels."""
    panels = []
    if any(_drawn(results, "losses")):
        draw = functools.partial(_draw_training, results=results)
        panels.append(Panel("training", "objective (1 at the start)", draw))
    if any(_drawn(results, "spectrum")):
        draw = functools.partial(_draw_spectrum, results=results)
        panels.append(Panel("spectrum", "value (the largest being 1)", draw))
    for label, _ in _drawn(results, "states"):
        if label in judged:
            draw = functools.partial(_draw_states, results=results, label=label)
            panels.append(Panel(f"states of {label}", "seen users", draw))
    return panels


# ---------------------------------------------------------------------- Figures


def caption(results: Results) -> str:
    """What bands, broken lines and marks mean."""
    shown = "Bands are" if results.sweep or varying_setting(results) else "Bars are"
    return f"{shown} 95 % intervals over users; reference and chance are marked at the right edge."


def figure(
    panels: Sequence[Panel],
    title: str,
    note: str,
    size: tuple[float, float],
    room: bool = False,
) -> Figure:
    """Panels side by side, two a row, under one title, with one legend for all.

    Args:
        panels: what is drawn.
        title: above all.
        note: above the legend.
        size: width and height in inches.
        room: add to the height what the legend takes.
    """
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    made = Figure(figsize=size, layout="constrained")
    grid = made.subplots(rows, min(2, len(panels)), squeeze=False)
    entries = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel.draw(axes)
        axes.set_ylabel(_safe(panel.caption), fontsize=9)
        axes.xaxis.label.set_size(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)
        if len(panels) > 1:
            axes.set_title(panel.name, fontsize=9)
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    made.suptitle(_safe(title), fontsize=10)
    ncols = min(4, 1 + int(size[0] // 2.6))
    if room:
        made.set_size_inches(size[0], size[1] + 0.16 * math.ceil(len(entries) / ncols))
    if entries:
        made.legend(
            entries.values(),
            entries,
            loc="outside lower center",
            fontsize=7.5,
            ncols=ncols,
            frameon=False,
            title=note,
            title_fontsize=7.5,
        )
    return made


def write_plots(folder: Path, results: Results, judged: Collection[str]) -> list[str]:
    """Every plot of a run as PNG and PDF; returns their names without suffix."""
    panels = measure_panels(results, judged)
    main = "shots" if results.sweep else "accuracy"
    height = 7.4 if len(panels) > 2 else 4.4
    figures = {main: figure(panels, title(results), caption(results), (9.4, height))}
    for panel in learned_panels(results, judged):
        named = f"{title(results)}: {panel.name}"
        file = re.sub(r"\W+", "-", panel.name).strip("-").lower()
        figures[file] = figure([panel], named, "first repeat", (6.4, 4.4))
    for name, made in figures.items():
        for suffix in ("png", "pdf"):
            save = functools.partial(made.savefig, format=suffix, dpi=150, metadata={})
            write_whole(folder / f"{name}.{suffix}", save)
            made.set_layout_engine("none")  # it is laid out now; again would take as long
    return list(figures)
