"""Tables, differences and verdict of a run, made from its results.json alone."""

from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from lore.common.files import write_text
from lore.common.kinds import KINDS
from lore.experiments.report import intervals
from lore.experiments.report.intervals import Column, Summary, columns, difference, level
from lore.experiments.report.page import write_report
from lore.experiments.report.plots import write_plots
from lore.experiments.report.verdict import CHANCE, others, verdict
from lore.experiments.results import ALWAYS, MEASURES, Results, read_results, row_name, shots_name

INTERVAL = "mean [95 % interval over users]"

Table = dict[str, dict[str, str]]  # row -> column -> cell
Cells = dict[tuple[str, str], Summary | None]  # by row and column


def _table(cells: Cells, measure: str, paired: bool = False) -> Table:
    """Means with intervals and, unless paired, deviations over repeats, in rows that have any."""
    unit, table = MEASURES[measure], defaultdict(dict)
    for (row, column), found in cells.items():
        text = "" if found is None else unit.text(found.mean, signed=paired)
        if found and len(found.repeats) > 1 and not paired:
            text += f" ± {unit.text(float(np.std(found.repeats, ddof=1)))}"
        end = unit.between(found.low, found.high) if found else ""
        table[row][column] = f"{text} {end}".rstrip()
    return {name: row for name, row in table.items() if any(row.values())}


def measure_table(results: Results, measure: str) -> Table:
    """A measure of every label and control: mean ± SD over repeats [95 % interval over users]."""
    shown = [*columns(results), *([] if results.sweep else [Column("train", ("train",))])]
    table = _table({
        (row_name(label, control), c.name): level(results, label, control, measure, *c[1:])
        for label in results.labels for control in ("", *results.controls(label)) for c in shown
    }, measure)  # fmt: skip
    if results.sweep and measure == "accuracy":  # the fewest and the most of the repeats
        unseen = pd.DataFrame(results.unseen).dropna(subset="shots")
        counts = unseen.groupby("shots")["users_with_that_many"].agg(["min", "max"]).astype(int).T
        row = {shots_name(s): " to ".join(map(str, dict.fromkeys(counts[s]))) for s in counts}
        table["users with at least that many shots"] = row
    return table


def difference_table(results: Results, measure: str) -> Table:
    """Every label minus what it is held against, paired by user and repeat."""
    return _table({
        (f"{label} minus {name}", c.name): difference(results, label, other, measure, *c[1:])
        for label in results.labels for name, other in others(results, label).items()
        for c in columns(results)
    }, measure, paired=True)  # fmt: skip


def unusual_table(results: Results) -> Table:
    """Accuracy among users in thirds, from usual to unusual ones, whose own training choices BT
    predicts badly. Empty without BT, or with fewer than three users."""
    shots, cells = max(results.shots(), default=None), {}
    for label, name in product(results.labels, intervals.held_out(results)):
        training = {"seen": "train", "unseen": "few_shot"}[name]
        losses = results.figures(results.label_of("bt") or "", "", training, "log_loss", shots)
        own = results.figures(label, "", name, "accuracy", shots)
        if own and set(own) <= set(losses) and min(map(len, own.values())) >= 3:
            order = {seed: losses[seed].to_numpy().argsort(kind="stable") for seed in own}
            rows = {seed: np.array_split(order[seed], 3) for seed in own}
            for part, third in enumerate(("usual", "between", "unusual")):
                users = {seed: own[seed].iloc[rows[seed][part]] for seed in own}
                cells[label, f"{name}, {third}"] = intervals.summarise([users])
    return _table(cells, "accuracy")


def kind_table(results: Results, measure: str) -> Table:
    """A measure of every label on each kind of held-out comparisons, where there are several."""
    return _table({
        (label, f"{c.name}, {kind}"): summary
        for label in results.labels for c in intervals.main_columns(results) for kind in KINDS
        if (summary := level(results, label, "", measure, *c[1:], kind))
    }, measure)  # fmt: skip


def sections(results: Results) -> dict[str, Table]:
    """All tables by caption: measures, differences, then parts of comparisons and of users."""
    several = len(results.repeats) > 1
    over = INTERVAL.replace("mean", "mean ± standard deviation over repeats" if several else "mean")
    names = {key: f"{m.name[0].upper()}{m.name[1:]} ({m.unit})" for key, m in MEASURES.items()}
    found = {}
    for key, name in names.items():
        also = f"; a coin's is ln 2 = {CHANCE:.3f}, lower is better" if key == "log_loss" else ""
        found[f"{name}: {over}{also}"] = measure_table(results, key)
    for key in (*ALWAYS, "brier"):
        unit = "points" if key == "accuracy" else f"{MEASURES[key].unit}, below 0 is better"
        caption = f"Differences of {MEASURES[key].name} ({unit}), paired by user: {INTERVAL}"
        found[caption] = difference_table(results, key)
    for key in ALWAYS:
        found[f"{names[key]} by kind of comparison: {over}"] = kind_table(results, key)
    caption = "Accuracy by how unusual a user is (thirds by BT's log loss on training choices)"
    found[f"{caption}: {over}"] = unusual_table(results)
    return {caption: table for caption, table in found.items() if table}


def markdown(table: Table | pd.DataFrame) -> str:
    """A table in Markdown, columns aligned."""
    if isinstance(table, pd.DataFrame):
        table = table.fillna("").astype(str).to_dict("index")
    if not table:
        return ""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [["", *names]] + [[key, *(row.get(n, "") for n in names)] for key, row in table.items()]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    first, *rest = (f"| {line} |" for line in lines)
    return "\n".join([first, f"|{rule}|", *rest])


def results_csv(results: Results) -> str:
    """One line per seed, label, control, set and number of shots."""
    whole = {name: "Int64" for name in ("shots", "users_with_that_many")}
    records = pd.DataFrame(results.records).astype(whole)
    table = records[["seed", "method", "label", "control", "set", "shots"]].copy()
    for measure in ALWAYS:
        table[measure] = records[measure].map(_mean)
        ends = [intervals.bootstrap(np.array(values)) for values in records[measure]]
        table[f"{measure}_low"], table[f"{measure}_high"] = zip(*ends, strict=True)
    table["num_users"] = records["users"].map(len)
    table["users_with_that_many"] = records["users_with_that_many"]
    table["trials_sd"] = [pd.Series(of, dtype=float).std() for of in records["trials"]]
    kinds = [name for name in records if name not in MEASURES and name.startswith(ALWAYS)]
    for measure in (*kinds, *(name for name in MEASURES if name in records)):
        table[measure] = records[measure].map(_mean)
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _mean(figures: list[float | None] | float) -> float:
    """A record's mean, never -0; NaN where it has no figures."""
    return pd.Series(figures, dtype=float).mean() + 0.0


def facts(results: Results) -> list[str]:
    """What is known of the data before any fit; of every repeat where they differ."""
    found: dict[str, list[int]] = {}
    for repeat in results.repeats:
        for fact in (repeat.get("facts") or {}).values():
            found.setdefault(str(fact), []).append(repeat["seed"])
    every = len(results.repeats)
    same = results.settings.get("same_tokens")
    left_out = f"{same} comparisons are left out: the model sees the same tokens on both sides."
    return [left_out] * bool(same) + [
        fact if len(seeds) == every else f"{fact} (seed {', '.join(map(str, seeds))})"
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
    lines, repeats = [], len(results.repeats)
    for label in results.labels:
        counts = Counter(fit["note"] for fit in results.fits(label) if fit.get("note"))
        for note, count in list(counts.items())[: 1 if len(counts) > 3 else None]:
            often = f" ({count} of {repeats} repeats)" if count < repeats else ""
            lines.append(f"{label}: {note}{often}")
    for method in dict.fromkeys(results.methods.values()):
        lines += _cost(results, method)
    return lines


def _cost(results: Results, method: str) -> list[str]:
    """Time, size and number of settings tried of a method, the mean over repeats."""
    times = [r["methods"][method]["seconds"] for r in results.repeats if method in r["methods"]]
    fits = results.fits(results.label_of(method) or "")
    sizes = [fit["parameters"] for fit in fits if fit.get("parameters")]
    tried = [len(fit.get("tried") or ()) for fit in fits]
    seconds, size, count = (np.mean(values) if values else 0 for values in (times, sizes, tried))
    texts = [f"{seconds:.1f} s"] if seconds > 0.05 else []
    texts += [f"{size:,.0f} parameters"] if size else []
    texts += [f"{count:,.0f} settings tried"] if count > 1 else []
    return [f"{method}: {', '.join(texts)}"] if texts else []


def _text(results: Results, tables: dict[str, Table]) -> str:
    """Title, facts, tables, notes and verdict."""
    blocks = [f"{results.title}; {_details(results)}", *facts(results)]
    blocks += [f"**WARNING: {mark}**" for mark in warnings(results)]
    blocks += [block for caption, table in tables.items() for block in (caption, markdown(table))]
    if lines := [f"- {line}" for line in notes(results)]:
        blocks.append("\n".join(["Notes:", *lines]))
    return "\n\n".join([*blocks, verdict(results)])


def _details(results: Results) -> str:
    """How it was run: script, repeats and the script's plain settings."""
    settings, count = results.settings, len(results.repeats)
    known = {"script", "dataset", "warning", "prepared", "embeddings", "seeds", "shots", "unit",
             "same_tokens"}  # fmt: skip
    rest = {key: value for key, value in settings.items() if key not in known and value != ""}
    details = [f"{k} {v}" for k, v in rest.items() if isinstance(v, int | float | str)]
    if settings.get("extra"):
        details.append(f"beside the embedding {' and '.join(settings['extra'])}")
    if results.sweep:
        details.append(f"a shot is one of a user's {settings.get('unit', 'comparisons')}")
    repeats = f"{count} repeat{'s' if count > 1 else ''}"
    return ", ".join([settings["script"], repeats, *details])


def report(folder: Path, labels: Collection[str] = ()) -> str:
    """Write a finished run's tables and plots again from results.json; nothing is trained.

    Returns what was run, tables, notes, the verdict and where the files lie, of some labels and the
    baselines if any are given. InputError without a whole results.json with a finished repeat.
    """
    results = read_results(folder)
    write_text(folder / "results.csv", results_csv(results))
    tables = sections(results)
    text = _text(results, tables)
    write_text(folder / "table.md", text + "\n")
    names = ", ".join(f"{name}.png" for name in write_plots(folder, results))
    said = {"heading": _details(results), "about": facts(results), "marks": warnings(results),
            "notes": notes(results)}  # fmt: skip
    write_report(folder, results, tables, said)
    if labels:
        some = results.only(la for la in results.labels if la in labels or results.is_baseline(la))
        text = _text(some, sections(some))
    return f"{text}\n\nResults, table, plots ({names}) and report.html: {folder}"
