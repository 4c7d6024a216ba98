"""The verdict: do users' own weights beat ridge BT, the population average and another user's?

A difference counts where its 95 % interval over users leaves zero out, which is about two standard
errors. Accuracy and log loss both count, and the worst outcome is the headline.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lore.experiments.report.intervals import Column, Summary, columns, interval, level, minus
from lore.experiments.results import (
    ASKS,
    BT,
    CHOSEN,
    MEASURES,
    REFERENCE,
    RIDGE,
    Results,
    control_name,
)

AGAINST = (RIDGE, "population", "another")
COIN = float(np.log(2))

BETTER, WORSE, OPEN = "better", "worse", "no difference detected"


class Verdict(NamedTuple):
    """What a label's own weights bring on one set.

    Attributes:
        where: the users, and the number of shots.
        outcome: better, worse or no difference detected; "" where nothing is personal.
        claim: the outcome in words.
        points, nats: against what -> difference in accuracy and in log loss.
        loss: the log loss, in words.
    """

    label: str
    where: str
    outcome: str
    claim: str
    points: dict[str, Summary]
    nats: dict[str, Summary]
    loss: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        who = f"{self.label}, {self.where}" if self.where else self.label
        parts = []
        for against, s in self.points.items():
            part = f"{MEASURES['accuracy'].text(s.mean, signed=True)} points "
            part += f"{interval('accuracy', s)}"
            if against in self.nats:
                loss = self.nats[against]
                part += f" and {MEASURES['log_loss'].text(loss.mean, signed=True)} nats "
                part += f"{interval('log_loss', loss)}"
            parts.append(f"{part} against {control_name(against)}")
        found = f"{who}: {self.claim}" + (f": {', '.join(parts)}" if parts else "")
        return f"{found}; {self.loss}" if self.loss else found


def verdicts(results: Results) -> list[Verdict]:
    """Of every method with weights of users: do they beat what they are held against?

    A method is judged by its chosen label, else by its last one, on the held-out comparisons; in
    a sweep at the largest number of shots that at least half of the users have.
    """
    found = []
    for label in judged(results):
        if not results.personal(label):
            chosen = any(fit["settings"].get("rank") == 1 for fit in results.fits(label))
            why = "rank 1 was chosen: " if chosen else ""
            claim = f"{why}no personal weights to judge"
            found.append(Verdict(label, "", "", claim, {}, {}, ""))
            continue
        for column in [_enough(results)] if results.sweep else columns(results)[:2]:
            found += _judge(results, label, column)
    return found


def _enough(results: Results) -> Column:
    """The largest number of shots that at least half of the users have."""
    users: dict[int, bool] = {}
    for record in results.records:
        if record.set == "unseen" and record.shots is not None and record.enough is not None:
            half = 2 * record.enough >= len(record.users)
            users[record.shots] = users.get(record.shots, True) and half
    there = columns(results)
    return [c for c in there if c == there[0] or users.get(c.shots or 0, True)][-1]


def judged(results: Results) -> list[str]:
    """The label that stands for each method: the chosen one, else the last.

    Without the methods that no control was recorded for although they are personal, and those
    that never are.
    """
    last: dict[str, str] = {}
    for label, method in results.methods.items():
        if ASKS in label:
            continue
        if not last.get(method, "").endswith(CHOSEN):
            last[method] = label
    found = [label for label in last.values() if label not in (REFERENCE, BT, RIDGE)]
    return [la for la in found if results.controls(la) or not results.personal(la)]


def _judge(results: Results, label: str, column: Column) -> list[Verdict]:
    """The verdict on one set, in a list; an empty list where nothing was recorded for it."""
    points, losses = {}, {}
    ridge = RIDGE if RIDGE in results.methods else BT  # runs of before had no ridge BT
    for against in (ridge, *AGAINST[1:]):
        for measure, found in (("accuracy", points), ("log_loss", losses)):
            summary = minus(results, label, against, measure, column)
            if summary is not None:
                found[against] = summary
    if not points:
        return []
    outcome = judge(points, losses)
    where = f"unseen users at {column.name}" if results.sweep else f"{column.name} users"
    loss = _loss(results, label, column)
    return [Verdict(label, where, outcome, f"personal weights: {outcome}", points, losses, loss)]


def judge(points: dict[str, Summary], losses: dict[str, Summary]) -> str:
    """The worst outcome of all differences in accuracy and log loss."""
    found = {outcome_of(s) for s in points.values()}
    found |= {outcome_of(s, -1) for s in losses.values()}
    if WORSE in found:
        return WORSE
    return BETTER if found == {BETTER} and len(points) == len(AGAINST) else OPEN


def outcome_of(difference: Summary, sign: int = 1) -> str:
    """The outcome of one difference by its interval; the sign is -1 where less is better."""
    low, high = sorted((sign * difference.low, sign * difference.high))
    return BETTER if low > 0 else WORSE if high < 0 else OPEN


def _loss(results: Results, label: str, column: Column) -> str:
    """The log loss, and whether it is worse than chance."""
    own = level(results, label, "", "log_loss", *column[1:])
    if own is None:
        return ""
    text = f"log loss {MEASURES['log_loss'].text(own.mean)} nats"
    return text + (f", worse than chance (ln 2 = {COIN:.3f})" if own.mean > COIN else "")


def kind_sentence(results: Results) -> str:
    """What kind of comparisons was held out, in a sentence; "" where it is not known."""
    kinds = results.repeats[0].get("kinds") or {}
    shares = kinds.get("unseen" if results.sweep else "seen") or {}
    named = {kind: share for kind, share in shares.items() if share >= 0.005}
    if not named:
        return ""
    meaning = {
        "known": "between responses that the same user had judged in training",
        "met": "between responses that were judged in training, but not both by this user",
        "new": "with at least one response that nobody had judged in training",
    }
    parts = [f"{share:.0%} are {kind} ({meaning[kind]})" for kind, share in named.items()]
    return f"Of the held-out comparisons {', '.join(parts)}."


def verdict(results: Results) -> str:
    """The verdicts as one paragraph, a line for each if several."""
    found, kind = verdicts(results), kind_sentence(results)
    first = f"{kind} " if kind else ""
    if not found:
        return f"Verdict: {first}no personal method was fitted, so there is nothing to judge."
    lines = [f"{v.text}." for v in found]
    if len(lines) == 1:
        return f"Verdict: {first}{lines[0]}"
    return "\n".join([f"Verdict: {kind}".rstrip(), *(f"- {line}" for line in lines)])
