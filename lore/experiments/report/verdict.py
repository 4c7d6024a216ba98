"""The verdict: do users' own weights beat ridge BT, the population average and another user's?

A difference in accuracy or log loss counts where its 95 % interval over users leaves zero out; the
worst outcome is the headline.
"""

from typing import NamedTuple

import numpy as np

from lore.common.kinds import KINDS
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
    differences: dict[str, dict[str, Summary]]  # against what -> measure -> difference
    loss: str  # the log loss, in words

    @property
    def text(self) -> str:
        """The whole sentence."""
        who = f"{self.label}, {self.where}" if self.where else self.label
        parts = [
            " and ".join(difference_text(m, s) for m, s in found.items()) + f" against {against}"
            for against, found in self.differences.items()
        ]
        found = f"{who}: {self.claim}" + (f": {', '.join(parts)}" if parts else "")
        return f"{found}; {self.loss}" if self.loss else found


def difference_text(measure: str, summary: Summary) -> str:
    """A difference in points or nats with its interval."""
    unit = "points" if measure == "accuracy" else "nats"
    value = MEASURES[measure].text(summary.mean, signed=True)
    return f"{value} {unit} {intervals.interval(measure, summary)}".rstrip()


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
    found: dict[str, dict[str, Summary]] = {}
    for against, other in rivals.items():
        for measure in ALWAYS:
            summary = intervals.difference(results, label, other, measure, *column[1:])
            if summary is not None:
                found.setdefault(against, {})[measure] = summary
    outcomes = [outcome_of(m, s) for one in found.values() for m, s in one.items()]
    better = outcomes == [BETTER] * 3 * len(ALWAYS)  # one that is missing leaves it open
    outcome, loss = WORSE if WORSE in outcomes else BETTER if better else OPEN, ""
    where = f"unseen users at {column.name}" if results.sweep else f"{column.name} users"
    own = intervals.level(results, label, "", "log_loss", *column[1:])
    if own is not None:
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
    every = [repeat.get("kinds") or {} for repeat in results.repeats]
    shares: dict[str, dict[str, str]] = {}
    for name in intervals.held_out(results):
        found = [kinds[name] for kinds in every if name in kinds]
        means = {kind: np.mean([one[kind] for one in found]) for kind in KINDS if found}
        shares[name] = {k: f"{share:.0%}" for k, share in means.items() if share >= 0.005}
    known = {name: one for name, one in shares.items() if one}
    alike = len({str(one) for one in known.values()}) == 1
    parts = []
    for kind, meaning in MEANING.items():
        there = {name: one[kind] for name, one in known.items() if kind in one}
        if there:
            each = [f"{share} of {name} users'" for name, share in there.items()]
            share = next(iter(there.values())) if alike else " and ".join(each)
            parts.append(f"{share} are {kind} ({meaning})")
    return f"Of the held-out comparisons {', '.join(parts)}." if parts else ""


def verdict(results: Results) -> str:
    """The verdicts as one paragraph, a line for each if several."""
    found, kind = verdicts(results), kind_sentence(results)
    first = f"{kind} " if kind else ""
    lines = [f"{v.text}." for v in found]
    lines = lines or ["no personal method was fitted, so there is nothing to judge."]
    if len(lines) == 1:
        return f"Verdict: {first}{lines[0]}"
    return "\n".join([f"Verdict: {kind}".rstrip(), *(f"- {line}" for line in lines)])
