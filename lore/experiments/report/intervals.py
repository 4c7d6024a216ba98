"""Means over users with their intervals, and differences paired by user and repeat."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lore.experiments.results import Results, Samples, shots_name

RESAMPLES = 2000
MOST_RESAMPLED = 10_000  # users; of more, the normal interval is the bootstrap's to its own noise
LEAST_USERS = 5  # of an interval


class Summary(NamedTuple):
    """A mean over users with its 95 % interval, and the mean of every repeat."""

    mean: float
    low: float
    high: float
    repeats: list[float]


@functools.lru_cache(maxsize=4)
def _resamples(users: int) -> np.ndarray:
    """How often each user is drawn in every resample [2000, users]; the same at every call."""
    rng = np.random.default_rng(0)
    return rng.multinomial(users, np.full(users, 1 / users), RESAMPLES).astype(np.float32)


def bootstrap(sums: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Ends of a mean's 95 % interval over users, by the percentile bootstrap; NaN for fewer than
    five users. Weighted sums and weights are [U] or, for the average of S sets' means, [U, S]."""
    if len(sums) < LEAST_USERS:
        return math.nan, math.nan
    sums = np.asarray(sums, float).reshape(len(sums), -1)
    weights = np.ones_like(sums) if weights is None else weights.reshape(sums.shape)
    means = sums.sum(0) / weights.sum(0)
    mean, apart = float(means.mean()), sums - means * weights
    if np.abs(apart).max() < 1e-12 * max(1.0, np.abs(means).max()):
        return mean, mean  # no user differs from another
    if len(sums) > MOST_RESAMPLED:
        error = 1.96 * float(np.sqrt(((apart / weights.sum(0)).mean(1) ** 2).sum()))
        return mean - error, mean + error
    drawn = _resamples(len(sums))
    with np.errstate(invalid="ignore"):  # a small set may have no user in a resample: left out
        draws = ((drawn @ apart.astype(np.float32)) / (drawn @ weights.astype(np.float32))).mean(1)
    low, high = mean + np.quantile(draws[np.isfinite(draws)], (0.025, 0.975))
    return float(low), float(high)


def summarise(sets: Sequence[Samples]) -> Summary | None:
    """The mean over sets of the means over repeats and users; a user counts once, whatever the
    repeats. None unless every set has the same repeats, one at least."""
    if not all(samples and list(samples) == list(sets[0]) for samples in sets):
        return None
    every = [values.index for samples in sets for values in samples.values()]
    number = {user: row for row, user in enumerate(dict.fromkeys(itertools.chain(*every)))}
    sums, weights = np.zeros((2, len(number), len(sets)))
    for column, samples in enumerate(sets):
        for values in samples.values():
            rows = [number[user] for user in values.index]
            sums[rows, column] += values.to_numpy() / len(rows)
            weights[rows, column] += 1 / len(rows)
    means = [[values.mean() for values in samples.values()] for samples in sets]
    repeats = np.mean(means, axis=0)
    return Summary(float(repeats.mean()), *bootstrap(sums, weights), repeats.tolist())


def level(
    results: Results, label: str, control: str, measure: str, sets: Sequence[str],
    shots: int | None = None, kind: str = "",
) -> Summary | None:  # fmt: skip
    """A label's mean on the average of some sets; None where one of them was not recorded."""
    return summarise([results.figures(label, control, s, measure, shots, kind) for s in sets])


def difference(
    results: Results, label: str, other: tuple[str, str], measure: str, sets: Sequence[str],
    shots: int | None = None,
) -> Summary | None:  # fmt: skip
    """A label minus another (label, control), paired by user and repeat; None without a pair."""
    apart = []
    for name in sets:
        own = results.figures(label, "", name, measure, shots)
        rest = results.figures(*other, name, measure, shots)
        apart.append({seed: own[seed] - rest[seed] for seed in own if seed in rest})
    return summarise(apart)


class Column(NamedTuple):
    """A column of every table: the sets whose means are averaged, and the shots."""

    name: str
    sets: tuple[str, ...]
    shots: int | None = None


def columns(results: Results) -> list[Column]:
    """Seen, unseen and both, where there are both; in a sweep, each number of shots."""
    if results.sweep:
        return [Column(shots_name(s), ("unseen",), s) for s in results.shots()]
    names = held_out(results)
    both = [Column("overall", names)] if len(names) > 1 else []
    return [*(Column(name, (name,)) for name in names), *both]


def held_out(results: Results) -> tuple[str, ...]:
    """The sets of held-out comparisons that the run has, of seen and unseen."""
    there = {r["set"] for r in results.records}
    return tuple(name for name in ("seen", "unseen") if name in there)


def main_columns(results: Results) -> list[Column]:
    """What a verdict is of: each set or, in a sweep, the most shots that half of the users have."""
    found = columns(results)
    if not results.sweep:
        return found[:2]
    counts = [(r["shots"], r["users_with_that_many"], len(r["users"])) for r in results.unseen]
    too_many = {shots for shots, have, of in counts if have is not None and 2 * have < of}
    return [c for c in found if c == found[0] or c.shots not in too_many][-1:]
