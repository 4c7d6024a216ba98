"""Means over users with their intervals, and differences paired by user."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lore.experiments.results import ALWAYS, ASKS, BT, MEASURES, Record, Results, shots_name

RESAMPLES = 2000
MOST_RESAMPLED = 10_000  # users; of more, the normal interval is the bootstrap's to its own noise

LEAST_USERS = 5  # of an interval


class Summary(NamedTuple):
    """A mean over users with its 95 % interval, and the mean of every repeat."""

    mean: float
    low: float
    high: float
    repeats: list[float]


Sample = tuple[Sequence[str], np.ndarray]  # users, and a figure of each


@functools.lru_cache(maxsize=4)
def _resamples(users: int) -> np.ndarray:
    """How often each user is drawn in every resample [2000, users]; the same at every call."""
    rng = np.random.default_rng(0)
    return rng.multinomial(users, np.full(users, 1 / users), RESAMPLES).astype(np.float32)


def bootstrap(sums: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """95 % interval of a mean over users, by the percentile bootstrap with 2,000 resamples.

    Args:
        sums: weighted sums [U] or, for the average of S sets' means, [U, S].
        weights: of the same shape; None for ones.

    Returns:
        Its ends; NaN for fewer than five users, who say too little of others.
    """
    if len(sums) < LEAST_USERS:
        return math.nan, math.nan
    sums = np.asarray(sums, float).reshape(len(sums), -1)
    weights = np.ones_like(sums) if weights is None else weights.reshape(sums.shape)
    means = sums.sum(0) / weights.sum(0)
    apart = sums - means * weights  # all zero where no user differs from another
    if np.abs(apart).max() < 1e-12 * max(1.0, np.abs(means).max()):
        return float(means.mean()), float(means.mean())
    if len(sums) > MOST_RESAMPLED:
        error = float(np.sqrt(((apart / weights.sum(0)).mean(1) ** 2).sum()))
        return float(means.mean()) - 1.96 * error, float(means.mean()) + 1.96 * error
    drawn = _resamples(len(sums))
    with np.errstate(invalid="ignore"):  # a small set may have no user in a resample: left out
        draws = (drawn @ apart.astype(np.float32)) / (drawn @ weights.astype(np.float32))
    draws = draws.mean(1)
    low, high = means.mean() + np.quantile(draws[np.isfinite(draws)], (0.025, 0.975))
    return float(low), float(high)


def summarise(samples: Sequence[Sequence[Sample]]) -> Summary:
    """The mean over repeats of the means over users; a user counts once, whatever the repeats.

    Args:
        samples: for every set (their means are averaged), a sample for every repeat.
    """
    number: dict[str, int] = {}
    for users, _ in (sample for one_set in samples for sample in one_set):
        for user in users:
            number.setdefault(user, len(number))
    sums, weights = np.zeros((2, len(number), len(samples)))
    for column, one_set in enumerate(samples):
        for users, values in one_set:
            rows = np.array([number[user] for user in users])
            sums[rows, column] += values / len(rows)
            weights[rows, column] += 1 / len(rows)
    means = np.array([[values.mean() for _, values in one_set] for one_set in samples])
    repeats = means.mean(0).tolist()
    return Summary(float(np.mean(repeats)), *bootstrap(sums, weights), repeats)


def level(
    results: Results,
    label: str,
    control: str,
    measure: str,
    sets: Sequence[str],
    shots: int | None = None,
) -> Summary | None:
    """A label's mean on the average of some sets; None where one of them was not recorded."""
    found = [results.find(label, control, name, shots) for name in sets]
    values = [[r.values.get(measure) for r in records] for records in found]
    if not _complete(found) or any(v is None for row in values for v in row):
        return None
    if any(np.ndim(v) == 0 for row in values for v in row):  # one figure for all users
        repeats = [float(np.mean([np.mean(v) for v in row])) for row in zip(*values, strict=True)]
        return Summary(float(np.mean(repeats)), math.nan, math.nan, repeats)
    return summarise([[(r.users, r.values[measure]) for r in records] for records in found])


def difference(
    results: Results,
    label: str,
    other: tuple[str, str],
    measure: str,
    sets: Sequence[str],
    shots: int | None = None,
) -> Summary | None:
    """A label minus another (label, control), paired by user and repeat; None without a pair."""
    samples, found = [], []
    for name in sets:
        rest = {r.seed: r for r in results.find(*other, name, shots)}
        pairs = [(r, rest[r.seed]) for r in results.find(label, "", name, shots) if r.seed in rest]
        pairs = [pair for pair in pairs if all(measure in r.values for r in pair)]
        found.append([record for record, _ in pairs])
        samples.append([(a.users, a.values[measure] - b.values[measure]) for a, b in pairs])
    return summarise(samples) if _complete(found) else None


def _complete(found: Sequence[Sequence[Record]]) -> bool:
    """Whether every set has records, of the same repeats."""
    seeds = [[record.seed for record in records] for records in found]
    return bool(seeds) and bool(seeds[0]) and all(s == seeds[0] for s in seeds)


def reached(shots: Sequence[float], values: Sequence[float], level: float) -> float:
    """The least number of shots at which a curve, drawn with straight lines, reaches a level.

    Args:
        shots: ascending.
        values: of the curve at each; more is better.
        level: to be reached.

    Returns:
        The number, or infinity where the curve stays below.
    """
    for i, value in enumerate(values):
        if value >= level:
            if not i:
                return float(shots[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(shots[i - 1] + share * (shots[i] - shots[i - 1]))
    return math.inf


class Worth(NamedTuple):
    """How many random shots some chosen ones are worth, with the 95 % interval over users."""

    shots: float
    low: float
    high: float


def worth(results: Results, label: str, measure: str, shots: int) -> Worth | None:
    """How many shots at random reach what chosen ones do; None where either was not recorded.

    Users are resampled with both curves of theirs. Infinity means more than were drawn at random.

    Args:
        results: of a sweep.
        label: of the fit that asks.
        measure: accuracy or log_loss.
        shots: how many were chosen.
    """
    sizes = results.shots()
    there = [results.find(label.split(ASKS)[0], "", "unseen", s) for s in sizes]
    sizes = [s for s, found in zip(sizes, there, strict=True) if found and found[0].shots == s]
    curves = [_of_users(results, label.split(ASKS)[0], measure, s) for s in sizes]
    asked = _of_users(results, label, measure, shots)
    if not curves or not asked:
        return None
    users = [user for user in asked if all(user in curve for curve in curves)]
    sign = 1 if measure == "accuracy" else -1
    drawn = sign * np.array([[curve[u] for u in users] for curve in curves])
    chosen = sign * np.array([asked[u] for u in users])
    found = [reached(sizes, drawn.mean(1).tolist(), float(chosen.mean()))]
    for counts in _resamples(len(users)):
        share = counts / counts.sum()
        found.append(reached(sizes, (drawn @ share).tolist(), float(chosen @ share)))
    ends = np.quantile(found[1:], (0.025, 0.975), method="inverted_cdf")
    return Worth(found[0], float(ends[0]), float(ends[1]))


def _of_users(results: Results, label: str, measure: str, shots: int) -> dict[str, float]:
    """Every user's figure at a number of shots, the mean over repeats."""
    found: dict[str, list[float]] = {}
    for record in results.find(label, "", "unseen", shots):
        for user, value in zip(record.users, record.values[measure], strict=True):
            found.setdefault(user, []).append(value)
    return {user: float(np.mean(values)) for user, values in found.items()}


def interval(measure: str, summary: Summary) -> str:
    """[low, high] in the measure's unit, nothing where there is none."""
    known = np.isfinite(summary.low)
    return MEASURES[measure].between(summary.low, summary.high) if known else ""


THIRDS = ("usual", "between", "unusual")


def by_third(results: Results, label: str, name: str, shots: int | None) -> list[Summary] | None:
    """A label's accuracy among users in thirds, from the usual to the unusual ones.

    A user is unusual whose own training choices BT predicts badly; held-out ones, which the
    accuracy is of, say nothing of it.

    Args:
        results: of the run.
        label: whose accuracy.
        name: set of held-out comparisons, seen or unseen.
        shots: of the new users.

    Returns:
        A summary for every third; None without BT or with fewer than three users.
    """
    training = {"seen": "train", "unseen": "few_shot"}[name]
    told = {r.seed: r.values["log_loss"] for r in results.find(BT, "", training, shots)}
    records = results.find(label, "", name, shots)
    if not records or any(r.seed not in told or len(r.users) < 3 for r in records):
        return None
    samples: list[list[Sample]] = [[], [], []]
    for r in records:
        order = np.argsort(told[r.seed], kind="stable")
        for third, rows in zip(samples, np.array_split(order, 3), strict=True):
            third.append(([r.users[row] for row in rows], r.values["accuracy"][rows]))
    return [summarise([third]) for third in samples]


class Column(NamedTuple):
    """A column of every table: the sets whose means are averaged, and the shots."""

    name: str
    sets: tuple[str, ...]
    shots: int | None = None


def columns(results: Results) -> list[Column]:
    """Seen, unseen and both, or seen alone where nobody is new; or new users at every number of
    shots."""
    if results.sweep:
        return [Column(shots_name(s), ("unseen",), s) for s in results.shots()]
    names = held_out(results)
    both = [Column("overall", names)] if len(names) > 1 else []
    return [*(Column(name, (name,)) for name in names), *both]


def held_out(results: Results) -> tuple[str, ...]:
    """The sets of held-out comparisons that the run has, of seen and unseen."""
    there = {record.set for record in results.records}
    return tuple(name for name in ("seen", "unseen") if name in there)


def minus(
    results: Results, label: str, against: str, measure: str, column: Column
) -> Summary | None:
    """A label minus another label or one of its own controls; None where there is no such pair."""
    other = (against, "") if against in results.methods else (label, against)
    if other == (label, ""):
        return None
    return difference(results, label, other, measure, *column[1:])


def results_csv(results: Results) -> str:
    """One line per seed, label, control, set and number of shots."""
    head = [
        "seed",
        "method",
        "label",
        "control",
        "set",
        "shots",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "log_loss",
        "num_users",
        "log_loss_low",
        "log_loss_high",
        "enough",
        "trials_sd",
    ]
    extra = [m for m in MEASURES if m not in ALWAYS and any(m in r.values for r in results.records)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *extra])
    for r in results.records:
        further = [np.mean(r.values[m]) if m in r.values else None for m in extra]
        writer.writerow([_plain(v) for v in [*_line(r), *further]])
    return text.getvalue()


def _line(r: Record) -> list[Any]:
    accuracy, log_loss = r.values["accuracy"], r.values["log_loss"]
    spread = None if r.trials is None or len(r.trials) < 2 else np.std(r.trials, ddof=1)
    return [
        r.seed,
        r.method,
        r.label,
        r.control,
        r.set,
        r.shots,
        accuracy.mean(),
        *bootstrap(accuracy),
        log_loss.mean(),
        len(r.users),
        *bootstrap(log_loss),
        r.enough,
        spread,
    ]


def _plain(value: Any) -> Any:
    """A figure as text that means it to the tenth digit; nothing for what is not known."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value + 0.0:.10g}"
    return "" if value is None else value
