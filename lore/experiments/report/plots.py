"""Plots of a run: accuracy and log loss, training curves, spectrum, users' weights. A method's
colour and marker follow from its name; its controls are the broken lines."""

import functools
import itertools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lore.common.files import write_whole
from lore.experiments.report.intervals import Summary, held_out, level
from lore.experiments.results import ALWAYS, BASELINES, CONTROLS, MEASURES, Results, row_name

if TYPE_CHECKING:  # matplotlib takes a second to import: functions that draw import what they need
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIXED = dict(zip(BASELINES, ("0.55", "0.1", "#8c564b", "0.45"), strict=True))  # colours
PALETTE = (
    "#637939", "#17becf", "#9467bd", "#ff7f0e", "#e377c2", "#2ca02c", "#1f77b4", "#393b79",
    "#ad1a72", "#008080", "#bcbd22", "#d62728",
)  # fmt: skip
MARKERS = "osDp^vPX*<h"  # those of the baselines first
BROKEN = {"": "-", "population": "--", "another": ":", "shuffled": "-."}
SHAPES = {"": "o", "population": "s", "another": "v", "shuffled": "x"}
CONSTANT = ((0, (6, 2)), (0, (6, 2, 1, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (2, 1)))  # dashes
CHANCE = {"accuracy": 0.5, "log_loss": float(np.log(2))}
MOST_LABELS = 12  # with lines of their own in the plots of training and spectra


class Panel(NamedTuple):
    """One pair of axes: what it shows, and what draws it."""

    name: str
    caption: str
    draw: "Callable[[Axes], None]"


def full_colour(results: Results, label: str) -> tuple[float, float, float]:
    """The colour of a label's method."""
    from matplotlib.colors import to_rgb

    method = results.methods[label]
    return to_rgb(FIXED.get(method, PALETTE[zlib.adler32(method.encode()) % len(PALETTE)]))


def colour(results: Results, label: str) -> tuple[float, ...]:
    """A label's colour: its method's, paler the earlier it stands among the method's labels."""
    labels = results.of_method(results.methods[label])
    paler = 0.6 * (1 - (labels.index(label) + 1) / len(labels))
    return tuple((1 - paler) * part + paler for part in full_colour(results, label))


def marker(results: Results, label: str) -> str:
    """A label's marker: its method's, then the following ones for the method's other labels."""
    method = results.methods[label]
    labels, own = results.of_method(method), len(MARKERS) - len(BASELINES)
    first = len(BASELINES) + zlib.crc32(method.encode()) % own
    first = BASELINES.index(method) if method in BASELINES else first
    return MARKERS[(first + len(labels) - 1 - labels.index(label)) % len(MARKERS)]


def measure_panels(results: Results) -> list[Panel]:
    """Accuracy and log loss of seen and unseen users, or of new users against shots."""
    return [
        Panel(f"{name} users", f"{MEASURES[measure].name} ({MEASURES[measure].unit})",
              functools.partial(_draw_measure, results=results, measure=measure, name=name))
        for measure in ALWAYS
        for name in (("unseen",) if results.sweep else held_out(results))
    ]  # fmt: skip


def _draw_measure(axes: "Axes", results: Results, measure: str, name: str) -> None:
    """The labels' figures, and level lines of reference and chance, which stretch no axis."""
    setting = varying_setting(results)
    draw = _draw_shots if results.sweep else _draw_setting if setting else _draw_labels
    draw(axes, results, measure, name, *([setting] if draw is _draw_setting else []))
    most, reference = max(results.shots(), default=None), results.label_of("reference") or ""
    found = level(results, reference, "", measure, (name,), most)
    limits, lines = axes.get_ylim(), [("chance", CHANCE[measure], ":")]
    for text, value, style in lines + ([("reference", found.mean, "-")] if found else []):
        value *= MEASURES[measure].scale
        axes.axhline(value, c="0.6", lw=1, ls=style, label=text, zorder=0)
    axes.set_ylim(limits)


def varying_setting(results: Results) -> str | None:
    """The one numeric setting in which labels of the same method differ, if it is only one."""
    differing = set()
    for method in dict.fromkeys(results.methods.values()):
        swept = [settings for _, settings in _swept(results, method)]
        for key in {key for settings in swept for key in settings}:
            values = [settings.get(key) for settings in swept]
            if any(value != values[0] for value in values):
                numeric = all(isinstance(v, int | float) for v in values)
                differing.add(key if numeric and len(set(values)) == len(values) else None)
    return differing.pop() if len(differing) == 1 else None


def _swept(results: Results, method: str) -> list[tuple[str, dict[str, Any]]]:
    """A method's labels with their settings, without the chosen one."""
    labels = [label for label in results.of_method(method) if not results.says(label, "chosen")]
    return [(label, results.fits(label)[0]["settings"]) for label in labels]


def _draw_setting(axes: "Axes", results: Results, measure: str, name: str, setting: str) -> None:
    """A line for each method in which the setting varies, level lines for the others."""
    lines = [_swept(results, method) for method in dict.fromkeys(results.methods.values())]
    lines = [line for line in lines if len(line) > 1]
    drawn = {label for line in lines for label, _ in line}
    places = sorted({settings[setting] for line in lines for _, settings in line})
    ends, dashes = [-0.25, len(places) - 0.75], itertools.cycle(CONSTANT)
    for label in results.labels:
        summary = level(results, label, "", measure, (name,))
        if label not in drawn and results.methods[label] != "reference" and summary:
            style = {"color": colour(results, label), "marker": marker(results, label)}
            found = [(x, summary) for x in ends]
            _line(axes, measure, found, label, ls=next(dashes), lw=1.2, **style)
    for line in lines:
        last = line[-1][0]
        for control in ("", *dict.fromkeys(c for la, _ in line for c in results.controls(la))):
            means = [level(results, la, control, measure, (name,)) for la, _ in line]
            found = [(places.index(s[setting]), m) for (_, s), m in zip(line, means, strict=True)]
            style = {"color": full_colour(results, last), "ls": BROKEN[control]}
            style |= {} if control else {"marker": marker(results, last)}
            text = row_name(results.family(results.methods[last]), control)
            _line(axes, measure, found, text, line is lines[-1] and not control, **style)
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    axes.set_xlabel(setting)


def _draw_labels(axes: "Axes", results: Results, measure: str, name: str) -> None:
    """A point with its interval for every label, its controls beside it."""
    labels = [label for label in results.labels if results.methods[label] != "reference"]
    controls = ["", *dict.fromkeys(c for label in labels for c in results.controls(label))]
    for i, control in enumerate(controls):
        found = [(x, level(results, la, control, measure, (name,))) for x, la in enumerate(labels)]
        found = [(x + 0.16 * (i - (len(controls) - 1) / 2), s) for x, s in found if s]
        if found:  # labels are shuffled for new users alone
            x, mean, low, high = _scaled(measure, found)
            style = {"ms": 5, "mfc": "white"} if control else {"ms": 6}
            style |= {"fmt": SHAPES[control], "label": CONTROLS.get(control, "as fitted")}
            axes.errorbar(x, mean, [mean - low, high - mean], elinewidth=1.2, **style)
    long = max(map(len, labels), default=0) * len(labels) > 50
    turned = {"rotation": 35, "ha": "right"} if long else {}
    axes.set_xticks(range(len(labels)), labels, **turned)
    axes.set_xlim(-0.6, len(labels) - 0.4)


def _draw_shots(axes: "Axes", results: Results, measure: str, name: str) -> None:
    """New users' figures against their number of shots, on a logarithmic axis that has a 0."""
    shots, main = results.shots(), results.judged[-1:]
    for label in results.labels:
        if results.methods[label] == "reference":
            continue
        for control in ("", *(results.controls(label) if label in results.judged else ())):
            found = [(s, level(results, label, control, measure, (name,), s)) for s in shots]
            style = {"color": colour(results, label), "ls": BROKEN[control]}
            style |= {} if control else {"marker": marker(results, label)}
            banded = label in main and not control
            _line(axes, measure, found, row_name(label, control), banded, **style)
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xticks(shots, map(str, shots))
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"shots: {results.settings.get('unit', 'comparisons')} of each user")


def _scaled(measure: str, found: Sequence[tuple[float, Summary]]) -> np.ndarray:
    """Places, means and ends of the intervals, in the measure's unit [4, n]."""
    return np.array([(x, *(MEASURES[measure].scale * v for v in s[:3])) for x, s in found]).T


def _line(
    axes: "Axes", measure: str, found: Sequence[tuple[float, Summary | None]], text: str,
    band: bool = False, **style: Any,
) -> None:  # fmt: skip
    """A line through what is known, with its band if it is the one that has one."""
    known = [(x, summary) for x, summary in found if summary]
    if known:
        x, mean, low, high = _scaled(measure, known)
        style = {"ms": 4.5, "lw": 1.6 if "marker" in style else 1.1} | style
        axes.plot(x, mean, label=text, **style)
        if band:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def _drawn(results: Results, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The last labels that have something in their first fit."""
    found = [(label, results.fits(label)[0]) for label in results.labels]
    return [(label, fit) for label, fit in found if fit.get(key)][-MOST_LABELS:]


def _draw_training(axes: "Axes", results: Results) -> None:
    """The objective over the steps, divided by its value at the start where that is positive."""
    from matplotlib.ticker import ScalarFormatter

    found = [(label, fit, np.array(fit["losses"])) for label, fit in _drawn(results, "losses")]
    positive = all((losses > 0).all() for _, _, losses in found)
    for label, fit, losses in found:
        steps = np.arange(len(losses)) * (fit.get("loss_step") or 1)
        style = {"marker": marker(results, label), "ms": 4, "markevery": max(1, len(losses) // 8)}
        values = losses / (losses[0] if positive else 1)
        axes.plot(steps, values, lw=1.3, c=colour(results, label), label=label, **style)
    if positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("step")


def _draw_spectrum(axes: "Axes", results: Results) -> None:
    """Each fit's spectrum, the largest value being one."""
    for label, fit in _drawn(results, "spectrum"):
        values = np.array(fit["spectrum"]) / (np.abs(fit["spectrum"]).max() or 1)
        style = {"c": colour(results, label), "marker": marker(results, label), "ms": 4}
        axes.plot(range(1, len(values) + 1), values, label=label, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="number", ylim=(0, None))


def _draw_weights(axes: "Axes", results: Results, label: str) -> None:
    """Heat map of the seen users' weights, users in the order of their largest one."""
    weights = np.array(results.fits(label)[0]["weights"])
    order = np.lexsort((-np.abs(weights).max(1), np.abs(weights).argmax(1)))
    most, signed = np.abs(weights).max() or 1, (weights < 0).any()
    scale = {"cmap": "RdBu", "vmin": -most} if signed else {"cmap": "Greys", "vmin": 0}
    extent = 0.5, weights.shape[1] + 0.5, len(weights), 0
    shape = {"extent": extent, "aspect": "auto", "interpolation": "none"}
    image = axes.imshow(weights[order], vmax=most, **shape, **scale)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="number of the weight", yticks=[])
    axes.figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)


def learned_panels(results: Results) -> list[Panel]:
    """Training curves and spectra of the first repeat, and the weights of judged labels."""
    panels = {
        "losses": Panel("training", "objective (1 at the start)", _draw_training),
        "spectrum": Panel("spectrum", "value (the largest being 1)", _draw_spectrum),
    }
    found = [panel for key, panel in panels.items() if _drawn(results, key)]
    for label in [la for la, _ in _drawn(results, "weights") if la in results.judged]:
        draw = functools.partial(_draw_weights, label=label)
        found.append(Panel(f"weights of {label}", "seen users", draw))
    return [p._replace(draw=functools.partial(p.draw, results=results)) for p in found]


def caption(results: Results) -> str:
    """What the band or the bars mean."""
    if results.sweep or varying_setting(results):
        return "The band is one line's 95 % interval over users; the tables have the others'."
    return "Bars are 95 % intervals over users."


def figure(panels: Sequence[Panel], title: str, note: str, size: tuple[float, float]) -> "Figure":
    """Panels, two a row, under one title, with one legend for all below its note; the size in
    inches is without the legend."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    entries: dict[str, Any] = {}
    ncols = min(4, 1 + int(size[0] // 2.6))
    with rc_context({"text.parse_math": False}):  # a dollar sign in a label begins no formula
        made = Figure(figsize=size, layout="constrained")
        grid = made.subplots((len(panels) + 1) // 2, min(2, len(panels)), squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel.draw(axes)
            axes.set_ylabel(panel.caption, fontsize=9)
            axes.xaxis.label.set_size(9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(which="both", labelsize=8)
            if len(panels) > 1:
                axes.set_title(panel.name, fontsize=9)
            handles, names = axes.get_legend_handles_labels()
            entries |= dict(zip(names, handles, strict=True))
        made.suptitle(title, fontsize=10)
        made.set_size_inches(size[0], size[1] + 0.16 * math.ceil(len(entries) / ncols))
        if entries:
            made.legend(
                entries.values(), entries, loc="outside lower center", fontsize=7.5, ncols=ncols,
                frameon=False, title=note, title_fontsize=7.5,
            )  # fmt: skip
    return made


def write_plots(folder: Path, results: Results) -> list[str]:
    """Every plot of a run as PNG and PDF; returns their names without suffix."""
    panels = measure_panels(results)
    main = "shots" if results.sweep else "accuracy"
    height = 6.6 if len(panels) > 2 else 3.8
    figures = {main: figure(panels, results.title, caption(results), (9.4, height))}
    for panel in learned_panels(results):
        named = f"{results.title}: {panel.name}"
        file = re.sub(r"\W+", "-", panel.name).strip("-").lower()
        figures[file] = figure([panel], named, "first repeat", (6.4, 4.0))
    for name, made in figures.items():
        for suffix in ("png", "pdf"):
            save = functools.partial(made.savefig, format=suffix, dpi=150, metadata={})
            write_whole(folder / f"{name}.{suffix}", save)
            made.set_layout_engine("none")  # it is laid out now; again would take as long
    return list(figures)
