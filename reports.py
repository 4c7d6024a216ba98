"""Tables, verdicts and plots of a run, made from its results.json alone.

    python reports.py results/PRISM/train_basis-1a2b3c4d ...

makes them anew without training; several runs are also put side by side.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils import InputError, load_basis, write_whole

# --------------------------------------------------------- Tables and verdicts

SETS = ("train", "seen", "few_shot", "unseen")
ORDER = ("reference", "BT", "own model", "LoRe", "LoRe, chosen", "mean weights",
         "others' weights", "shuffled shots")  # fmt: skip
Interval = tuple[float, float]


def basis_file(settings: Mapping[str, Any], fitting: Mapping[str, Any]) -> str:
    """basis-K05.safetensors, with alpha, shrinkage or seed where the run has several."""
    name = f"basis-K{settings['rank']:02d}"
    for key, several in (("alpha", "alpha"), ("shrinkage", "shrinkage"), ("seed", "seeds")):
        if len(fitting[several]) > 1:
            name += f"-{key}{settings[key]:g}"
    return name + ".safetensors"


def report(folder: Path, ranks: Sequence[int] = ()) -> str:
    """Write a finished run's table, CSV and plots anew from results.json; nothing is trained.

    Args:
        folder: the run's folder.
        ranks: of the ranks above 1, show only these in the text returned; the files have all.

    Returns:
        The table, the paired differences, the verdict and where the files lie.

    Raises:
        InputError: there is no results.json, or no finished repeat in it.
    """
    results = read_results(folder)
    frame = _frame(results)
    figures = frame.drop(columns=["users", "names", "trials"]).to_csv(index=False)
    write_whole(folder / "results.csv", lambda draft: draft.write_text(figures))
    text = _text(results, frame, ())
    write_whole(folder / "table.md", lambda draft: draft.write_text(text + "\n"))
    plots = ", ".join(_plot_all(folder, results, frame))
    return f"{_text(results, frame, ranks)}\n\nResults, table and plots ({plots}): {folder}"


def _text(results: Mapping[str, Any], frame: pd.DataFrame, ranks: Sequence[int]) -> str:
    """Title, tables, what the bases look like and the verdict."""
    if ranks:
        frame = frame[~(frame["rank"] > 1) | frame["rank"].isin(ranks)]
    table, differences = summary_table(results, frame), difference_table(results, frame)
    lines = [_title(results), markdown(table), markdown(differences), *_notes(results, frame)]
    return "\n\n".join(line for line in lines if line)


def read_results(folder: Path) -> dict[str, Any]:
    """A run's results.json.

    Raises:
        InputError: it is missing, unreadable or holds no finished repeat.
    """
    results = read_json(folder / "results.json")
    if results is None or not results["seeds"]:
        raise InputError(f"{folder}: no finished repeat in results.json; run the script first")
    return results


def _frame(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per seed, method, rank and set; accuracies of the users and their names in cells."""
    rows = []
    for part in results["seeds"]:
        for r in part["records"]:
            side = "seen" if r["set"] in ("train", "seen") else "unseen"
            rows.append({"seed": part["seed"], "trials": None, **r, "names": part["users"][side]})
            if r["method"] in ("BT", "LoRe") and _is_chosen(r, part["chosen"]):
                rows.append({**rows[-1], "method": "LoRe, chosen", "rank": None, "alpha": None,
                             "shrinkage": None})  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["accuracy"] = [float(np.mean(users)) for users in frame["users"]]
    frame["std_over_users"] = [float(np.std(users)) for users in frame["users"]]
    frame["num_users"] = frame["users"].map(len)
    fitting = results["settings"]["fitting"]
    frame["label"] = [label_of(row, fitting) for row in frame.to_dict("records")]
    return frame.drop_duplicates(["seed", "label", "set", "shots"])  # one reference for all alphas


def _is_chosen(row: Mapping[str, Any], chosen: Mapping[str, float] | None) -> bool:
    return chosen is not None and all(row[key] == value for key, value in chosen.items())


def label_of(row: Mapping[str, Any], fitting: Mapping[str, Any]) -> str:
    """A method's name in tables: LoRe K=5, with alpha and shrinkage where there are several."""
    rank = row.get("rank")
    method = row.get("method") or ("reference", "BT", "LoRe")[min(rank, 2)]
    label = method
    if rank is not None and not pd.isna(rank) and method not in ("reference", "BT"):
        label += f" K={int(rank)}"
    for key, sign in (("alpha", "alpha"), ("shrinkage", "shrinkage")):
        value = row.get(key)
        several = len(fitting[key]) > 1 and method not in ("reference", "own model")
        if several and value is not None and not pd.isna(value) and not (
            key == "shrinkage" and method == "BT"
        ):  # fmt: skip
            label += f" {sign}={value:g}"
    return label


def bootstrap(values: np.ndarray) -> Interval:
    """95% interval of a mean over users [U], by the percentile bootstrap (2,000 resamples)."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    batch = max(1, 10_000_000 // len(values))
    result = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=0, batch=batch
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def per_user(rows: pd.DataFrame) -> pd.Series:
    """Accuracy of every user, by name, over the repeats in which the user is in the set."""
    accuracies = np.concatenate(rows["users"].map(np.asarray).tolist())
    names = np.concatenate(rows["names"].tolist())
    return pd.Series(accuracies, index=names).groupby(level=0).mean()


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over repeats, in percent."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def _between(interval: Interval) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _labels(frame: pd.DataFrame) -> list[str]:
    """Labels in the tables' order: references first, then by method, rank, alpha, shrinkage."""
    place = {method: i for i, method in enumerate(ORDER)}
    unique = frame.drop_duplicates("label")
    keys = ["place", "rank", "alpha", "shrinkage"]
    return unique.assign(place=unique["method"].map(place)).sort_values(keys)["label"].tolist()


def summary_table(results: Mapping[str, Any], frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies in percent: mean ± standard deviation over repeats [95% interval over users]."""
    if results["settings"]["script"] == "vary_fewshot":
        return _shots_table(frame)
    rows = {}
    for label in _labels(frame):
        own = frame[frame["label"] == label]
        sets = {name: own[own["set"] == name] for name in ("seen", "unseen")}
        cells = {
            name: f"{_spread(part['accuracy'].tolist())} {_between(bootstrap(per_user(part)))}"
            if len(part) else "" for name, part in sets.items()
        }  # fmt: skip
        both = own[own["set"].isin(sets)].groupby("seed")["accuracy"]
        complete = len(both) and (both.size() == 2).all()
        rows[label] = {**cells, "overall": _spread(both.mean().tolist()) if complete else ""}
    return pd.DataFrame.from_dict(rows, orient="index")


def _shots_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Held-out accuracy of new users by number of shots: mean ± standard deviation over trials."""
    rows = {}
    for label in _labels(frame):
        own = frame[(frame["label"] == label) & (frame["set"] == "unseen")]
        rows[label] = {
            f"{shots} shots": _spread(np.concatenate(part["trials"].tolist()))
            for shots, part in own.groupby("shots")
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def difference_table(results: Mapping[str, Any], frame: pd.DataFrame) -> pd.DataFrame:
    """Paired differences in points on the same users, with 95% intervals over users."""
    rows = {}
    for label in _labels(frame[frame["method"].isin(("LoRe", "LoRe, chosen"))]):
        cells = {
            f"{name}: - {other}": f"{100 * mean:+.1f} {_between(interval)}"
            for (name, other), (mean, interval) in paired(results, frame, label).items()
        }
        rows[label] = cells
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def paired(
    results: Mapping[str, Any], frame: pd.DataFrame, label: str
) -> dict[tuple[str, str], tuple[float, Interval]]:
    """Mean difference and interval of a method to each control, on every held-out set.

    For few-shot sweeps, at the largest number of shots.
    """
    if results["settings"]["script"] == "vary_fewshot":
        frame = frame[frame["shots"] == frame["shots"].max()]
    found = {}
    for name in ("seen", "unseen"):
        held_out = frame[frame["set"] == name]
        own = held_out[held_out["label"] == label]
        for other in ("BT", "others' weights", "reference"):
            matches = [_counterpart(row, held_out, other, results) for _, row in own.iterrows()]
            rest = pd.concat(matches) if matches else own
            if len(rest) and len(rest) == len(own):
                difference = (per_user(own) - per_user(rest)).to_numpy()
                found[name, other] = float(difference.mean()), bootstrap(difference)
    return found


def _counterpart(
    row: pd.Series, frame: pd.DataFrame, method: str, results: Mapping[str, Any]
) -> pd.DataFrame:
    """A control's row for the same repeat and, where that matters, the same rank and alpha."""
    same = frame[(frame["seed"] == row["seed"]) & (frame["method"] == method)]
    if method == "reference":
        return same.head(1)
    setting = row
    if row["method"] == "LoRe, chosen":
        chosen = next(p["chosen"] for p in results["seeds"] if p["seed"] == row["seed"])
        setting = pd.Series(chosen)
    if method == "others' weights" and setting["rank"] == 1:  # where all weights are one
        same = frame[(frame["seed"] == row["seed"]) & (frame["method"] == "BT")]
    same = same[same["alpha"] == setting["alpha"]]
    if method == "BT":
        return same.head(1)
    return same[(same["rank"] == setting["rank"]) & (same["shrinkage"] == setting["shrinkage"])]


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's content, None where there is no file; damage is an InputError."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); remove it") from error


def verdict(results: Mapping[str, Any], frame: pd.DataFrame) -> str:
    """One line: do personal weights beat one shared reward and another user's weights?

    Of the chosen rank; without one of the largest, at the first alpha and shrinkage given. They
    earn something only where both 95% intervals lie above zero.
    """
    judged = frame[frame["method"] == "LoRe, chosen"]
    if judged.empty:
        judged = frame[frame["method"] == "LoRe"]
        for key in ("alpha", "shrinkage"):
            judged = judged[judged[key] == results["settings"]["fitting"][key][0]]
    if judged.empty:
        return "Verdict: no rank above 1 was fitted, so there is nothing personal to judge."
    label = _labels(judged)[-1]
    differences, parts = paired(results, frame, label), []
    for name in ("seen", "unseen"):
        controls = [o for o in ("BT", "others' weights") if (name, o) in differences]
        told = {other: differences[name, other] for other in controls}
        if len(told) < 2:
            continue
        earns = all(low > 0 for _, (low, _) in told.values())
        figures = " and ".join(
            f"{100 * mean:+.1f} points {_between(interval)} against {other}"
            for other, (mean, interval) in told.items()
        )
        parts.append(f"{name} users: personal weights earn {'' if earns else 'nothing: '}{figures}")
    return f"Verdict ({label}): " + "; ".join(parts) + "."


def _title(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    fitting = settings["fitting"]
    sweep = settings["script"] == "vary_fewshot"
    spread = "± over trials" if sweep else "± over repeats, [95% interval over users]"
    known = {"script", "dataset", "warning", "prepared", "embeddings", "fitting"}
    details = ", ".join(f"{k} {v}" for k, v in settings.items() if k not in known)
    title = (
        f"{settings['dataset']}, {settings['script']}, {fitting['estimator']}, alpha "
        f"{' '.join(f'{a:g}' for a in fitting['alpha'])}, {len(results['seeds'])} repeat(s)"
        f"{', ' + details if details else ''}; accuracy in percent, {spread}"
    )
    marks = [settings["warning"]] if settings["warning"] else []
    if fitting["reference"] == "last_linear":
        marks.append("the reference is the published code's mistaken one (last_linear)")
    return "\n\n".join([title, *(f"**WARNING: {mark}**" for mark in marks)])


def _notes(results: Mapping[str, Any], frame: pd.DataFrame) -> list[str]:
    """What the bases look like, what was chosen, and the verdict."""
    bases = pd.DataFrame([base for part in results["seeds"] for base in part["bases"]])
    lines = []
    bases = bases[(bases["rank"] > 0) & bases["rank"].isin(frame["rank"])]
    for settings, group in bases.groupby(["rank", "alpha", "shrinkage"]):
        label = label_of(dict(zip(("rank", "alpha", "shrinkage"), settings, strict=True)),
                       results["settings"]["fitting"])  # fmt: skip
        cosines = [c for row in group["cosines"] if row is not None for c in row]
        to_reference = ""
        if cosines:
            to_reference = f", cosines to the reference {min(cosines):.2f} to {max(cosines):.2f}"
        lines.append(
            f"- {label}: {group['columns'].mean():.1f} columns kept, effective rank "
            f"{group['effective_rank'].mean():.2f}{to_reference}, "
            f"weights' entropy {group['weight_entropy'].mean():.2f} of its maximum"
        )
    chosen = Counter(
        ", ".join(f"{key} {value:g}" for key, value in part["chosen"].items())
        for part in results["seeds"] if part["chosen"]
    )  # fmt: skip
    told = "; ".join(f"{what} in {n} repeat(s)" for what, n in chosen.most_common())
    choice = f"Chosen on held-out training comparisons: {told}" if chosen else ""
    return ["Bases:\n" + "\n".join(lines), choice, verdict(results, frame)]


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, columns aligned."""
    if table.empty:
        return ""
    cells = table.fillna("").astype(str).reset_index(names="").T.reset_index().T.to_numpy()
    widths = [max(map(len, column)) for column in cells.T]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ------------------------------------------------------------------------ Plots

STYLES = {"train": (":", "s", "0.65"), "seen": ("-", "o", "#1f77b4"),
          "few_shot": (":", "^", "0.4"), "unseen": ("--", "D", "#d62728")}  # fmt: skip
DASHES = ("-", "--", ":", "-.")
LINES = {"LoRe": ("-", "o"), "mean weights": ("--", "s"), "others' weights": (":", "v"),
         "shuffled shots": ("-.", "x"), "own model": ((0, (5, 1, 1, 1)), "P")}  # fmt: skip


def _plot_all(folder: Path, results: Mapping[str, Any], frame: pd.DataFrame) -> list[str]:
    """Every plot of a run, as PNG and PDF; returns their names."""
    sweep = results["settings"]["script"] == "vary_fewshot"
    figures = {"shots" if sweep else "accuracy": (_plot_shots if sweep else _plot_ranks)(frame)}
    figures["training"] = _plot_training(results)
    figures["singular-values"] = _plot_singular(results)
    heat = None if sweep else _plot_weights(folder, results)
    if heat is not None:
        figures["weights"] = heat
    for name, figure in figures.items():
        for suffix in ("png", "pdf"):
            save = functools.partial(figure.savefig, format=suffix, dpi=150, metadata={})
            write_whole(folder / f"{name}.{suffix}", save)
    return [f"{name}.png" for name in figures]


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _levels(axes: Axes, frame: pd.DataFrame) -> None:
    """Chance, reference and BT on new users as level lines."""
    unseen = frame[frame["set"] == "unseen"]
    for method, style, grey in (("reference", "-.", "0.5"), ("BT", (0, (6, 2)), "0.2")):
        level = unseen[unseen["method"] == method]["accuracy"]
        if len(level):
            axes.axhline(100 * level.mean(), ls=style, c=grey, lw=1, label=f"{method}, unseen")
    axes.axhline(50, ls=":", c="0.8", lw=1, label="chance")


def _plot_ranks(frame: pd.DataFrame) -> Figure:
    """Accuracy against rank on the four sets, bands being intervals over users."""
    learned = frame[frame["method"].isin(("reference", "BT", "LoRe"))]
    learned = learned[learned["alpha"].isin((frame["alpha"].dropna().iloc[0], None))]
    ranks = sorted(learned["rank"].unique())
    figure, axes = _axes("Accuracy against rank", "rank K (0: reference, 1: BT)", "accuracy (%)")
    for name, (style, marker, colour) in STYLES.items():
        rows = learned[learned["set"] == name]
        rows = rows[rows["shrinkage"] == rows["shrinkage"].min()]
        users = [per_user(rows[rows["rank"] == rank]) for rank in ranks]
        bands = 100 * np.array([bootstrap(u.to_numpy()) for u in users])
        axes.fill_between(range(len(ranks)), *bands.T, color=colour, alpha=0.15, lw=0)
        axes.plot([100 * u.mean() for u in users], ls=style, marker=marker, c=colour, ms=5,
                  label=name.replace("_", "-"))  # fmt: skip
    _levels(axes, frame)
    axes.set_xticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
    axes.legend(fontsize=8, ncols=2)
    return figure


def _plot_shots(frame: pd.DataFrame) -> Figure:
    """New users' accuracy against shots, bands being standard deviations over trials."""
    figure, axes = _axes("New users by number of shots", "shots per user", "held-out accuracy (%)")
    unseen = frame[frame["set"] == "unseen"]
    rows = unseen[unseen["method"].isin(LINES)]
    for i, label in enumerate(_labels(rows)):
        own = rows[rows["label"] == label]
        style, marker = LINES[own["method"].iloc[0]]
        trials = own.groupby("shots")["trials"].apply(lambda t: 100 * np.concatenate(t.tolist()))
        mean, std = (np.array([f(t) for t in trials]) for f in (np.mean, np.std))
        axes.fill_between(trials.index, mean - std, mean + std, alpha=0.12, lw=0, color=f"C{i}")
        axes.plot(trials.index, mean, ls=style, marker=marker, ms=5, c=f"C{i}", label=label)
    _levels(axes, unseen)
    axes.set_xticks(sorted(unseen["shots"].unique()))
    axes.legend(fontsize=7, ncols=2)
    return figure


def _plot_training(results: Mapping[str, Any]) -> Figure:
    """The objective at every step of the first repeat, one line per basis."""
    figure, axes = _axes("Training", "step", "objective (its value at the start being 1)")
    for i, base in enumerate(b for b in results["seeds"][0]["bases"] if b["losses"]):
        losses, name = np.array(base["losses"]), label_of(base, results["settings"]["fitting"])
        steps = np.arange(len(losses)) * base["loss_step"]
        axes.plot(steps, losses / losses[0], lw=1.2, ls=DASHES[i % 4], label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=7, ncols=2)
    return figure


def _plot_singular(results: Mapping[str, Any]) -> Figure:
    """Singular values of each basis of the first repeat, the largest being one."""
    figure, axes = _axes("Singular values of the basis V", "number", "value, the largest being 1")
    for i, base in enumerate(b for b in results["seeds"][0]["bases"] if b["rank"] > 1):
        name = label_of(base, results["settings"]["fitting"])
        values = np.array(base["singular_values"])
        x, style = range(1, len(values) + 1), DASHES[i % 4]
        axes.plot(x, values / values[0], marker="os^Dvx"[i % 6], ms=4, ls=style, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize=7, ncols=2)
    return figure


def _plot_weights(folder: Path, results: Mapping[str, Any]) -> Figure | None:
    """Heat map of the seen users' weights at the largest rank, users by their main column."""
    fitting, base = results["settings"]["fitting"], results["seeds"][0]["bases"][-1]
    path = folder / basis_file({**base, "seed": results["seeds"][0]["seed"]}, fitting)
    if base["rank"] < 2 or not path.exists():
        return None
    W = load_basis(path).W.numpy()
    main = W.argmax(1)
    order = np.lexsort((-W.max(1), main))
    figure, axes = _axes(f"Weights of the seen users, rank {base['rank']}", "basis vector", "user")
    image = axes.imshow(W[order], aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="none")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="weight")
    return figure


def _combined(folders: Sequence[Path]) -> str:
    """Runs of train_basis side by side: a line per method; seen, unseen and overall of each."""
    names, columns = [folder.name for folder in folders], {}
    for folder in folders:
        results = read_results(folder)
        if results["settings"]["script"] != "train_basis":
            continue
        run = folder.name if names.count(folder.name) == 1 else folder
        frame = _frame(results)
        for label in _labels(frame[frame["method"].isin(ORDER[:5])]):
            own = frame[(frame["label"] == label) & frame["set"].isin(("seen", "unseen"))]
            by_set = own.groupby("set")["accuracy"].apply(list).to_dict()
            by_set["overall"] = own.groupby("seed")["accuracy"].mean().tolist()
            for name, values in by_set.items():
                columns.setdefault(f"{run} {name}", {})[label] = _spread(values)
    return markdown(pd.DataFrame(columns).fillna(""))


def main(runs: list[Path] = [], ranks: list[int] = []) -> None:  # noqa: B006
    """Make the tables and plots of runs anew from their results.json, without training.

    Args:
        runs: Folders of runs; several are also put side by side in one table.
        ranks: Of the ranks above 1, show only these; the files in the folders have all.
    """
    if not runs:
        raise InputError("name at least one run's folder: python reports.py results/PRISM/...")
    texts = [report(folder, ranks) for folder in runs]
    if len(runs) > 1:
        texts.append(_combined(runs))
    sys.stdout.write("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    from experiments import cli  # which imports this module

    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    cli(main)
