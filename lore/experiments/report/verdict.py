"""The verdict: do users' own weights beat ridge BT, the population average and another user's?

A difference in accuracy or log loss counts where its 95 % interval over users leaves zero out; the
worst outcome is the headline.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from lore.experiments.report import intervals
from lore.experiments.report.intervals import Column, Summary
from lore.experiments.results import ALWAYS, BT, CONTROLS, MEASURES, OWN, REFERENCE, RIDGE, Results

CHANCE = float(np.log(2))  # log loss of a coin
BETTER, WORSE, OPEN = "better", "worse", "no difference detected"
HELD_AGAINST = (RIDGE, "lore")  # methods that those after them and all others are held against
SIGN = {"accuracy": 1, "log_loss": -1}  # of what is better
MEANING = {
    "known": "between responses that the same user had judged in training",
    "met": "between responses that were judged in training, but not both by this user",
    "new": "with at least one response that nobody had judged in training",
}


class Verdict(NamedTuple):
    """What a label's own weights bring on one set."""

    label: str
    where: str  # the users, and the number of shots
    outcome: str  # better, worse or no difference detected; "" where nothing is personal
    claim: str  # the outcome in words
    differences: dict[tuple[str, str], Summary]  # by against what, and measure
    loss: str  # the log loss, in words

    @property
    def text(self) -> str:
        """The whole sentence."""
        who = f"{self.label}, {self.where}" if self.where else self.label
        against: dict[str, list[str]] = {}
        for (rival, measure), summary in self.differences.items():
            against.setdefault(rival, []).append(difference_text(measure, summary))
        parts = [f"{' and '.join(texts)} against {rival}" for rival, texts in against.items()]
        found = f"{who}: {self.claim}" + (f": {', '.join(parts)}" if parts else "")
        return f"{found}; {self.loss}" if self.loss else found


def difference_text(measure: str, summary: Summary) -> str:
    """A difference in points or nats with its interval."""
    unit = "points" if measure == "accuracy" else "nats"
    figure, (mean, low, high, _) = MEASURES[measure], summary
    return f"{figure.text(mean, signed=True)} {unit} {figure.between(low, high)}".rstrip()


def verdicts(results: Results) -> list[Verdict]:
    """Of every method by its chosen or last label on the held-out comparisons; in a sweep at the
    largest number of shots that at least half of the users have."""
    found = []
    for label in results.judged:
        if not results.personal(label):
            rank_one = any(fit["settings"].get("rank") == 1 for fit in results.fits(label))
            why = "rank 1 was chosen: " if rank_one else ""
            found.append(Verdict(label, "", "", f"{why}no personal weights to judge", {}, ""))
            continue
        judged = [_judge(results, label, column) for column in intervals.main_columns(results)]
        found += [one for one in judged if one.differences]
    return found


def others(results: Results, label: str) -> dict[str, tuple[str, str]]:
    """What tables hold a label against, as label and control, by name."""
    method = results.methods[label]
    if method == REFERENCE:
        return {}
    place = 0 if method in (BT, OWN) else [*HELD_AGAINST, method].index(method)
    controls = {CONTROLS[c]: (label, c) for c in ("population", "another")}
    before, after = (
        {la: (la, "") for la in map(results.label_of, methods) if la and la != label}
        for methods in ([BT], [REFERENCE, *HELD_AGAINST[:place]])
    )
    random = results.says(label, "random_label")
    last = {"the same with random shots": (random, "")} if random else {}
    return before | controls | after | last


def _judge(results: Results, label: str, column: Column) -> Verdict:
    shared = results.label_of(RIDGE)
    rivals = {shared: (shared, "")} if shared else {}
    rivals |= {f"the {CONTROLS['population']}": (label, "population"),
               CONTROLS["another"]: (label, "another")}  # fmt: skip
    every = {
        (rival, measure): intervals.difference(results, label, other, measure, *column[1:])
        for rival, other in rivals.items() for measure in ALWAYS
    }  # fmt: skip
    found = {place: summary for place, summary in every.items() if summary}
    outcomes = [outcome_of(measure, summary) for (_, measure), summary in found.items()]
    better = outcomes == [BETTER] * 3 * len(ALWAYS)  # one that is missing leaves it open
    outcome, loss = WORSE if WORSE in outcomes else BETTER if better else OPEN, ""
    where = f"unseen users at {column.name}" if results.sweep else f"{column.name} users"
    if own := intervals.level(results, label, "", "log_loss", *column[1:]):
        loss = f"log loss {MEASURES['log_loss'].text(own.mean)} nats"
        loss += f", worse than chance (ln 2 = {CHANCE:.3f})" if own.mean > CHANCE else ""
    return Verdict(label, where, outcome, f"personal weights: {outcome}", found, loss)


def outcome_of(measure: str, difference: Summary) -> str:
    """The outcome of one difference by its interval."""
    low, high = sorted(SIGN[measure] * end for end in (difference.low, difference.high))
    return BETTER if low > 0 else WORSE if high < 0 else OPEN


def kind_sentence(results: Results) -> str:
    """Which kinds of comparisons were held out, of seen and unseen users apart where they differ;
    "" where it is not known."""
    shares = {}
    for name in intervals.held_out(results):
        every = [(repeat.get("kinds") or {}).get(name) for repeat in results.repeats]
        shares[name] = pd.DataFrame([one for one in every if one]).mean()
    table = pd.DataFrame(shares, list(MEANING)).dropna(axis=1, how="all")
    texts, parts = table.map("{:.0%}".format).where(table >= 0.005), []
    alike = (texts.nunique(axis=1, dropna=False) < 2).all()
    for kind, row in texts.T.items():
        there = row.dropna()
        each = [f"{share} of {name} users'" for name, share in there.items()]
        share = " and ".join(there.unique() if alike else each)
        parts += [f"{share} are {kind} ({MEANING[kind]})"] if each else []
    return f"Of the held-out comparisons {', '.join(parts)}." if parts else ""


def verdict(results: Results) -> str:
    """The verdicts as one paragraph, a line for each if several."""
    kind, lines = kind_sentence(results), [f"{v.text}." for v in verdicts(results)]
    lines = lines or ["no personal method was fitted, so there is nothing to judge."]
    if len(lines) == 1:
        return " ".join(filter(None, ["Verdict:", kind, *lines]))
    return "\n".join([f"Verdict: {kind}".rstrip(), *(f"- {line}" for line in lines)])
