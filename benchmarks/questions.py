"""What chosen questions are worth, on people and in planted worlds, and how long choosing takes.

    python benchmarks/questions.py                        # all that is prepared (make questions)
    python benchmarks/questions.py --only planted-5 --repeats 1
    python benchmarks/questions.py --tables-only          # tables of what is finished

Finished repeats are kept: the same command goes on where it was stopped. One thread is enough.
"""

import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from lore.common.cli import cli
from lore.common.files import read_json, require, write_text, write_whole
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.elicitation.criteria import (
    CRITERIA,
    Criterion,
    QuestionPool,
    UserPosterior,
    choose_shots,
    next_question,
)
from lore.experiments.report.intervals import bootstrap
from lore.experiments.report.tables import markdown
from lore.experiments.results import MEASURES
from lore.learning.comparisons import Comparisons, Shots, draw_shots
from lore.learning.method import Fitted, Task
from lore.methods.fitting.posterior import Prior
from question_data import POOL_WORLD, POOLS, WORLDS, World, able

log = logging.getLogger(__name__)

NAMES = tuple(world.name for world in WORLDS)
COLOURS = dict(zip(CRITERIA, ("0.5", "#1f77b4"), strict=True))
TRIALS = 3  # draws at random
TEN, MOST = 10, (20, 50)  # chosen questions; random ones whose level is to be reached
RESAMPLES = 1000
COUNTS = (10_000, 100_000)  # questions of the pools whose choices are timed
SIGN = {"accuracy": 1, "log_loss": -1}


def main(
    jokes: Path = ROOT / "OwnData" / "data-jokes",
    ukp: Path = ROOT / "RedditTLDR" / "data-ukp",
    prism: Path = ROOT / "PRISM" / "data",
    demo: Path = ROOT / "PersonalLLM" / "data" / "demo",
    only: tuple[Literal[NAMES], ...] = (),
    repeats: NonNegativeInt = 0,
    pools: bool = True,
    rounds: PositiveInt = 50,
    tables_only: bool = False,
    results: Path = ROOT / "results" / "questions",
    out: Path = ROOT / "results" / "questions",
) -> None:
    """Ask new users by every criterion; write questions.md and questions.svg.

    Args:
        jokes: prepared folder of the people who rate jokes, see docs/results.md; what is held out
            is drawn again for every repeat.
        ukp: prepared folder of the judges of arguments, see docs/results.md.
        prism: prepared and embedded folder of PRISM; its draw is made again for every repeat.
        demo: prepared folder of the demo.
        only: worlds by name; all by default.
        repeats: at most so many of each world; 0 for the full number.
        pools: also vary the size of the pool in a planted world.
        rounds: of the timing of a choice.
        tables_only: make tables and figure of what is finished; nothing is fitted or timed.
        results: folder of finished repeats.
        out: folder of the tables and the figure.
    """
    folders = {"jokes": jokes, "ukp": ukp, "prism": prism, "demo": demo, "": ROOT}
    worlds = [world for world in WORLDS if not only or world.name in only]
    if not tables_only:
        for world in worlds:
            if not folders[world.folder].exists():
                folder = f"--{world.folder} {folders[world.folder]}"
                log.info("%s left out: %s is not there", world.name, folder)
                continue
            for seed in world.seeds[: repeats or None]:
                ask_world(world, folders[world.folder], seed, results)
        if pools:
            for seed in range(repeats or 3):
                vary_pool(seed, results)
        write_text(results / "speed.json", json.dumps(speed(8, rounds)))
    found = [(world, answers) for world in worlds if (answers := finished(world, results))]
    require(bool(found), "nothing is finished: prepare a dataset first, see docs/asking.md")
    blocks = [block for world, answers in found for block in section(world, answers)]
    blocks += [*pool_table(results), *speed_table(results)]
    write_text(out / "questions.md", "\n\n".join(blocks) + "\n")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "questions"}):
        figure = draw(found)
        write_whole(
            out / "questions.svg",
            lambda path: figure.savefig(path, format="svg", metadata={"Date": None}),
        )
    print("\n\n".join([*blocks, f"Tables and figure: {out}"]))


# ------------------------------------------------------------------------------ Asking


def ask_world(world: World, folder: Path, seed: int, results: Path) -> None:
    """Ask a world's new users by every criterion, unless that is finished."""
    path = results / f"{world.name}-seed{seed}.json"
    if path.exists():
        return
    begin = time.process_time()
    task, truth = world.draw(folder, seed)
    fits = able(world, task, truth)
    found = {
        name: {rule: judged(fit, task, world.shots, rule, seed) for rule in CRITERIA}
        for name, fit in fits
    }
    assert task.few is not None
    facts = {"shots": world.shots, "users": task.few.names, "pool": _sizes(task.few),
             "seconds": time.process_time() - begin}  # fmt: skip
    write_text(path, json.dumps({**facts, "found": found}))
    log.info("%s, repeat %d: %.0f s of the processor", world.name, seed, facts["seconds"])


def _sizes(few: Comparisons) -> list[int]:
    """How many questions each user's pool has."""
    return [len(own) for own in few.units]


def judged(
    fit: Fitted, task: Task, sizes: Sequence[int], criterion: str, seed: int
) -> dict[str, list[list[float]]]:
    """Accuracy and log loss [S][U] of each new user, the mean over draws."""
    few, unseen, g = task.few, task.unseen, torch.Generator().manual_seed(seed)
    assert few is not None and unseen is not None
    if criterion == "random":
        shots = draw_shots(few, sizes, TRIALS, g)
    else:
        shots = choose_shots(fit, few, sizes, criterion, g)
    return measured(fit, few, unseen, shots)


def measured(
    fit: Fitted, few: Comparisons, unseen: Comparisons, shots: Shots
) -> dict[str, list[list[float]]]:
    """Accuracy and log loss [S][U] after some shots, the mean over their trials."""
    view, judge, g = fit.view(few), fit.view(unseen), torch.Generator().manual_seed(0)
    U, S = few.num_users, len(shots.sizes)
    found = {measure: np.zeros((S, U)) for measure in SIGN}
    for i in range(shots.trials * S):
        rows = shots.rows[i * U : (i + 1) * U]
        picked = torch.cat(rows)
        state = fit.adapt(view[picked], few.pick(picked, [len(row) for row in rows]), g)
        logits = fit.logits(judge, state, unseen.user)
        found["accuracy"][i % S] += unseen.accuracies(logits).numpy() / shots.trials
        found["log_loss"][i % S] += unseen.log_losses(logits).numpy() / shots.trials
    return {measure: values.round(6).tolist() for measure, values in found.items()}


# ------------------------------------------------------------------------------ Tables

Curves = dict[str, dict[str, np.ndarray]]  # criterion -> measure -> [S, U]


class Answers(NamedTuple):
    """What is finished of a world.

    Attributes:
        curves: of each fit's name; a user's figures are means over the repeats that ask the user.
        repeats: in how many each fit could ask.
        of: how many repeats there are.
        pool: the least, the median and the most questions of a user's pool.
    """

    curves: dict[str, Curves]
    repeats: dict[str, int]
    of: int
    pool: tuple[int, int, int]


def finished(world: World, results: Path) -> Answers | None:
    """What is finished of a world; None if nothing is."""
    paths = [results / f"{world.name}-seed{seed}.json" for seed in world.seeds]
    parts: list[dict[str, Any]] = [read_json(path) for path in paths if path.exists()]
    if not any(part["found"] for part in parts):
        return None
    for path, part in zip([path for path in paths if path.exists()], parts, strict=True):
        same = tuple(part["shots"]) == world.shots
        require(same, f"{path} has other numbers of questions: remove it")
    names = dict.fromkeys(name for part in parts for name in part["found"])
    curves = {name: _curves([part for part in parts if name in part["found"]], name)
              for name in names}  # fmt: skip
    repeats = {name: sum(name in part["found"] for part in parts) for name in names}
    pool = np.quantile(np.concatenate([part["pool"] for part in parts]), (0, 0.5, 1))
    return Answers(curves, repeats, len(parts), tuple(int(x) for x in pool))


def _curves(parts: Sequence[dict[str, Any]], name: str) -> Curves:
    number: dict[str, int] = {}
    for part in parts:
        for user in part["users"]:
            number.setdefault(user, len(number))
    rows = [[number[user] for user in part["users"]] for part in parts]
    counts = np.bincount(np.concatenate(rows), minlength=len(number))
    found: Curves = {}
    for rule, measures in parts[0]["found"][name].items():
        found[rule] = {}
        for measure in measures:
            total = np.zeros((len(parts[0]["shots"]), len(number)))
            for row, part in zip(rows, parts, strict=True):
                total[:, row] += part["found"][name][rule][measure]
            found[rule][measure] = total / counts
    return found


def section(world: World, answers: Answers) -> list[str]:
    """Heading, who was asked, and a table with rows for every fit that could ask."""
    low, middle, high = answers.pool
    pool = f"{low}" if low == high else f"{low} to {high}, median {middle}"
    users = max(curves["random"]["accuracy"].shape[1] for curves in answers.curves.values())
    about = f"{users} users in {answers.of} repeats; questions in a user's pool: {pool}."
    for name in world.methods:
        could = answers.repeats.get(name, 0)
        if could < answers.of:
            about += f" {name} had tastes to ask about in {could} of {answers.of}."
    tables = [table(world, curves).rename(lambda rule, name=name: f"{name}: {rule}")
              for name, curves in answers.curves.items()]  # fmt: skip
    return [f"## {world.title}", about, markdown(pd.concat(tables).fillna(""))]


def table(world: World, curves: Curves) -> pd.DataFrame:
    """A row for each criterion, differences and numbers of questions with 95 % intervals."""
    shots, random = list(world.shots), curves["random"]
    at = shots.index(TEN) if TEN in shots else 1
    shown = [i for i, s in enumerate(shots) if TEN not in shots or s in (0, 5, TEN, *MOST)]
    rows = {}
    for rule, chosen in curves.items():
        cells = {}
        for measure, sign in SIGN.items():
            figure, values, base = MEASURES[measure], chosen[measure], random[measure]
            about = f"{figure.name} after {', '.join(str(shots[i]) for i in shown)}"
            cells[about] = ", ".join(figure.text(values[i].mean()) for i in shown)
            if rule == "random":
                continue
            apart = values[at] - base[at]
            cells[f"{figure.name} at {shots[at]}, minus random"] = (
                f"{figure.text(apart.mean(), signed=True)} {figure.between(*bootstrap(apart))}"
            )
            if shots[at] == TEN:
                worth = crossing(shots, sign * base, sign * values[at])
                cells[f"{TEN} are worth, by {figure.name}"] = _span(worth, shots[-1])
            for most in (s for s in MOST if s in shots):
                needs = crossing(shots, sign * values, sign * base[shots.index(most)])
                cells[f"to reach random's {most}, by {figure.name}"] = _span(needs, shots[-1])
        rows[rule] = cells
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def shots_to_reach(shots: Sequence[float], values: Sequence[float], level: float) -> float:
    """The least number of shots at which a curve, straight between its values at ascending shots,
    reaches a level; infinity where it stays below."""
    for i, value in enumerate(values):
        if value >= level:
            if not i:
                return float(shots[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(shots[i - 1] + share * (shots[i] - shots[i - 1]))
    return math.inf


def crossing(
    shots: Sequence[int], curve: np.ndarray, target: np.ndarray
) -> tuple[float, float, float]:
    """Where a curve reaches a level, both of the same users, with its 95 % interval.

    Args:
        shots: ascending [S].
        curve: of every user [S, U]; more is better.
        target: the level, of every user [U].

    Returns:
        The number of shots and the ends of its interval over users; infinity for never.
    """
    found, U = [shots_to_reach(shots, curve.mean(1).tolist(), float(target.mean()))], len(target)
    rng = np.random.default_rng(0)
    for counts in rng.multinomial(U, np.full(U, 1 / U), RESAMPLES) / U:
        found.append(shots_to_reach(shots, (curve @ counts).tolist(), float(target @ counts)))
    low, high = np.quantile(found[1:], (0.025, 0.975), method="inverted_cdf")
    return found[0], float(low), float(high)


def _span(found: tuple[float, float, float], most: int) -> str:
    middle, low, high = (f"{x:.1f}" if math.isfinite(x) else f"over {most}" for x in found)
    return f"{middle} [{low}, {high}]"


# -------------------------------------------------------------------- The pool's size


def vary_pool(seed: int, results: Path) -> None:
    """Ten questions from ever larger pools, by the truth of a planted world of rank 5."""
    path = results / f"pools-seed{seed}.json"
    if path.exists():
        return
    task, truth = POOL_WORLD._replace(pool=max(POOLS)).draw(ROOT, seed)
    few, unseen = task.few, task.unseen
    assert few is not None and unseen is not None
    place = torch.arange(len(few)) % max(POOLS)
    found = {}
    for size in POOLS:
        task.few = few.select(place < size)
        for rule in CRITERIA:
            value = judged(truth, task, (TEN, MOST[0]), rule, seed)
            found[f"{rule} {size}"] = value["accuracy"]
    write_text(path, json.dumps(found))


def pool_table(results: Path) -> list[str]:
    """Accuracy by the size of the pool; nothing where that was not varied."""
    parts = [read_json(path) for path in sorted(results.glob("pools-seed*.json"))]
    if not parts:
        return []
    rows = {}
    for size in POOLS:
        rows[size] = {}
        for rule in CRITERIA:
            values = np.concatenate([part[f"{rule} {size}"] for part in parts], 1).mean(1)
            texts = [MEASURES["accuracy"].text(x) for x in values]
            rows[size][f"{rule}, after {TEN} and {MOST[0]}"] = ", ".join(texts)
    title = "## Accuracy by the number of pairs in a user's pool (rank 5, the truth)"
    return [title, markdown(pd.DataFrame.from_dict(rows, orient="index"))]


# ------------------------------------------------------------------------------- Speed


def speed(rank: int, rounds: int) -> list[dict[str, Any]]:
    """Processor milliseconds of a choice after five answers, from prepared pools."""
    rows = []
    for count in COUNTS:
        questions = torch.randn(count, 1 + rank, generator=torch.Generator().manual_seed(0))
        pool = QuestionPool(questions)
        prior = Prior(torch.zeros(rank).double(), torch.eye(rank).double())
        posterior = UserPosterior.after(prior, questions[:5])
        for rule in CRITERIA:
            times = [1000 * _seconds(posterior, pool, rule) for _ in range(rounds)]
            rows.append({"questions": count, "criterion": rule, "rank": rank,
                         "median": statistics.median(times), "least": min(times)})  # fmt: skip
    return rows


def _seconds(posterior: UserPosterior, pool: QuestionPool, criterion: Criterion) -> float:
    start = time.process_time()
    next_question(posterior, pool, criterion, range(5), 0)
    return time.process_time() - start


def speed_table(results: Path) -> list[str]:
    """The times that were measured last; nothing where there are none."""
    found = read_json(results / "speed.json")
    if not found:
        return []
    rows: dict[str, dict[str, str]] = {}
    for row in found:
        cell = f"{row['median']:.1f} ({row['least']:.1f})"
        rows.setdefault(row["criterion"], {})[f"{row['questions']:,} questions"] = cell
    title = (
        f"## A choice from a prepared pool, K = {found[0]['rank']}: milliseconds of the "
        "processor, median (least)"
    )
    return [title, markdown(pd.DataFrame.from_dict(rows, orient="index"))]


# ------------------------------------------------------------------------------ Figure


def draw(found: Sequence[tuple[World, Answers]]) -> Figure:
    """Levels above, differences from as many random questions with their intervals below."""
    columns = [
        (world, name, answers.curves[name])
        for world, answers in found
        for name in [n for n in answers.curves if n == "the truth" or n.startswith("Mixed")]
    ] or [(world, name, curves) for world, answers in found
          for name, curves in answers.curves.items()]  # fmt: skip
    figure = Figure(figsize=(2.6 * len(columns) + 0.8, 9), layout="constrained")
    panels = figure.subplots(4, len(columns), squeeze=False)
    for column, (world, name, curves) in enumerate(columns):
        panels[0, column].set_title(f"{world.name}\n{name}", fontsize=9)
        for row, measure in enumerate(SIGN):
            _draw_levels(panels[row, column], world.shots, curves, measure)
            _draw_differences(panels[2 + row, column], world.shots, curves, measure)
        panels[3, column].set_xlabel("questions", fontsize=8)
    for row, measure in enumerate(SIGN):
        name, unit = MEASURES[measure].name, MEASURES[measure].unit
        panels[row, 0].set_ylabel(f"{name} ({unit})", fontsize=8)
        panels[2 + row, 0].set_ylabel(f"{name}, minus random", fontsize=8)
    panels[0, 0].legend(fontsize=7)
    return figure


def _draw_levels(axes: Axes, shots: Sequence[int], curves: Curves, measure: str) -> None:
    scale = MEASURES[measure].scale
    for rule, values in curves.items():
        axes.plot(shots, scale * values[measure].mean(1), color=COLOURS[rule], label=rule,
                  linewidth=1.2)  # fmt: skip
    axes.tick_params(labelsize=7)


def _draw_differences(axes: Axes, shots: Sequence[int], curves: Curves, measure: str) -> None:
    scale = MEASURES[measure].scale
    axes.axhline(0, color=COLOURS["random"], linewidth=0.8)
    for place, rule in enumerate(rule for rule in curves if rule != "random"):
        apart = scale * (curves[rule][measure] - curves["random"][measure])
        low, high = np.array([bootstrap(values) for values in apart]).T
        at = np.array(shots) + (place - 1.5) * 0.02 * shots[-1] / 2
        axes.plot(at, apart.mean(1), color=COLOURS[rule], linewidth=1)
        axes.vlines(at, low, high, color=COLOURS[rule], linewidth=0.8)
    axes.tick_params(labelsize=7)


if __name__ == "__main__":
    cli(main)
