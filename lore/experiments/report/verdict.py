"""The verdict: do users' own states beat one shared reward, population average and another's?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lore.experiments.report.intervals import Column, Summary, columns, interval, level, minus
from lore.experiments.results import ASKS, BT, CHOSEN, MEASURES, REFERENCE, Results, control_name

AGAINST = (BT, "population", "another")
COIN = float(np.log(2))

EARN, COST, OPEN = "earn", "cost", "cannot be told apart"


class Verdict(NamedTuple):
    """What a label's personal states bring on one set.

    Attributes:
        where: the users, and the number of shots.
        outcome: earn, cost or cannot be told apart; "" where nothing is personal.
        claim: the outcome in words.
        points: against what -> difference in accuracy.
        loss: the log loss, in words.
    """

    label: str
    where: str
    outcome: str
    claim: str
    points: dict[str, Summary]
    loss: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        who = f"{self.label}, {self.where}" if self.where else self.label
        points = ", ".join(
            f"{MEASURES['accuracy'].text(s.mean, signed=True)} points {interval('accuracy', s)} "
            f"against {control_name(against)}"
            for against, s in self.points.items()
        )
        told = f"{who}: {self.claim}" + (f": {points}" if points else "")
        return f"{told}; {self.loss}" if self.loss else told


def verdicts(results: Results) -> list[Verdict]:
    """Of every method with personal states: do they beat BT, population average and another's?

    A method is judged by its chosen label, else by its last one, on the held-out comparisons; in
    a sweep at the largest number of shots.
    """
    found = []
    for label in judged(results):
        if not results.personal(label):
            chosen = any(fit["settings"].get("rank") == 1 for fit in results.fits(label))
            why = "rank 1 was chosen: " if chosen else ""
            found.append(Verdict(label, "", "", f"{why}nothing is personal", {}, ""))
            continue
        for column in columns(results)[-1:] if results.sweep else columns(results)[:2]:
            found += _judge(results, label, column)
    return found


def judged(results: Results) -> list[str]:
    """The label that stands for each method: the chosen one, else the last.

    Without the methods that no control was recorded for although they are personal, and the two
    that never are.
    """
    last: dict[str, str] = {}
    for label, method in results.methods.items():
        if ASKS in label:
            continue
        if not last.get(method, "").endswith(CHOSEN):
            last[method] = label
    found = [label for label in last.values() if label not in (REFERENCE, BT)]
    return [la for la in found if results.controls(la) or not results.personal(la)]


def _judge(results: Results, label: str, column: Column) -> list[Verdict]:
    """The verdict on one set, in a list; an empty list where nothing was recorded for it."""
    points, losses = {}, {}
    for against in AGAINST:
        for measure, found in (("accuracy", points), ("log_loss", losses)):
            summary = minus(results, label, against, measure, column)
            if summary is not None:
                found[against] = summary
    if not points:
        return []
    outcome = judge(points)
    where = f"unseen users at {column.name}" if results.sweep else f"{column.name} users"
    claim = f"{'personal and shared' if outcome == OPEN else 'personal states'} {outcome}"
    loss = _loss(results, label, column, losses)
    return [Verdict(label, where, outcome, claim, points, loss)]


def judge(points: dict[str, Summary]) -> str:
    """The outcome of differences: all three above zero earn, below BT cost, else it stays open."""
    if all(against in points and points[against].low > 0 for against in AGAINST):
        return EARN
    return COST if BT in points and points[BT].high < 0 else OPEN


def outcome_of(points: Summary) -> str:
    """The outcome of one difference in accuracy by its interval."""
    return EARN if points.low > 0 else COST if points.high < 0 else OPEN


def _loss(results: Results, label: str, column: Column, losses: dict[str, Summary]) -> str:
    """The log loss, against BT's and, where it is worse, a coin's."""
    own = level(results, label, "", "log_loss", *column[1:])
    if own is None or BT not in losses:
        return ""
    told = MEASURES["log_loss"]
    text = f"log loss {told.text(own.mean)} nats, {told.text(losses[BT].mean, signed=True)} "
    text += f"{interval('log_loss', losses[BT])} against BT"
    return text + (f", worse than a coin's {COIN:.3f}" if own.mean > COIN else "")


def verdict(results: Results) -> str:
    """The verdicts as one paragraph, a line for each if several."""
    found = verdicts(results)
    if not found:
        return "Verdict: no personal method was fitted, so there is nothing to judge."
    lines = [f"{v.text}." for v in found]
    return "\n".join(
        [f"Verdict: {lines[0]}"]
        if len(lines) == 1
        else ["Verdict:", *(f"- {line}" for line in lines)]
    )
