"""Judging a fit: every user's accuracy and log loss on held-out comparisons, beside controls that
have another row in the place of a user's own weights."""

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lore.common.files import require
from lore.common.kinds import KINDS, kinds
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.elicitation.criteria import CRITERIA, Criterion, choose_shots
from lore.experiments import metrics
from lore.experiments.results import ALWAYS
from lore.learning.comparisons import Comparisons, Shots, Users, draw_shots
from lore.learning.kinds import judged_sets
from lore.learning.method import Fitted, Task, View

PERMUTATIONS = 10  # over which other users' weights are averaged
SHUFFLES = 3  # over which weights from shuffled labels are averaged
BATCH = 1 << 24  # numbers of a view that few-shot fits take at once


def judge(fits: Sequence[Fitted], task: Task) -> list[dict[str, Any]]:
    """Records of fits and their controls, new users having all their shots; of the first process
    alone."""
    if task.process:
        return []
    records, few = [], task.few
    for fit in fits:
        fit.new_users = fit.users[:0] if few is None else fit.adapt(fit.view(few), few, task.seed)
        records += evaluate(fit, task, fit.new_users)
    return records


@dataclass(frozen=True)
class Sweep:
    """New users' numbers of shots.

    Args:
        shots: numbers of shots of an unseen user; 0 is none.
        trials: random draws of the shots, for each number.
        ask: how shots are chosen: random or d_optimal; random is always there, others
            are for the methods that know how tastes vary.
    """

    shots: tuple[NonNegativeInt, ...] = (1, 2, 3)
    trials: PositiveInt = 20
    ask: tuple[Criterion, ...] = ("random",)
    drawn: dict[int, Shots] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def criteria(self) -> list[str]:
        """Those beside random."""
        return [name for name in dict.fromkeys(self.ask) if name != "random"]

    def about(self) -> dict[str, Any]:
        """What a run's settings say of it; a criterion that is not there is refused."""
        for name in self.ask:
            require(name in CRITERIA, f"--ask {name}: there are {', '.join(CRITERIA)}")
        ask = {"ask": self.criteria} if self.criteria else {}
        return {"shots": list(self.shots), "trials": self.trials, **ask}

    def asking(self, fits: Sequence[Fitted]) -> list[Fitted]:
        """The fits, and copies whose new users' shots are picked by each criterion; those are not
        saved and have no controls."""
        found = list(fits)
        for fit in fits if self.criteria else ():
            for criterion in self.criteria if fit.population() is not None else ():
                found.append(copy.copy(fit))
                found[-1].shots_chosen_by, found[-1].random_label = criterion, fit.label
                found[-1].label = f"{fit.label}, shots by {criterion}"
                found[-1].file, found[-1].controlled = "", False
        return found

    def judge(self, fits: Sequence[Fitted], task: Task) -> list[dict[str, Any]]:
        """Records of fits and their controls on new users, at every number of shots."""
        if task.seed not in self.drawn:
            self.drawn[task.seed] = draw_shots(task.few, self.shots, self.trials, task.seed)
        records = []
        for fit in fits:
            draws = self.drawn[task.seed]
            if fit.shots_chosen_by != "random":
                g = torch.Generator().manual_seed(task.seed)
                draws = choose_shots(fit, task.few, self.shots, fit.shots_chosen_by, g)
            records += sweep(fit, task, draws)
        return records


def evaluate(fit: Fitted, task: Task, own: Tensor) -> Iterator[dict[str, Any]]:
    """Records of a fit and its controls on all sets there are, new users having all their shots
    and their own states [U', S]."""
    every = [("train", task.train, fit.users), ("seen", task.seen, fit.users),
             ("few_shot", task.few, own), ("unseen", task.unseen, own)]  # fmt: skip
    sets = {name: (fit.view(data), data, state) for name, data, state in every if data is not None}
    held_out, of_kind = [name for name in ("seen", "unseen") if name in sets], _kinds(task)
    controlled = fit.personal and fit.controlled
    for name, (view, data, state) in sets.items():
        more = [name in held_out, of_kind.get(name)]
        if name == "unseen" and controlled:
            more += [fit.adapt(_relabelled(fit, task.few), task.few, task.seed)[None]]
        yield _record(fit, "", name, _measure(fit, view, data, state[None], *more))
    if not controlled:
        return
    g = torch.Generator().manual_seed(task.seed)
    swaps = [[swap(len(sets[name][2]), g) for name in held_out] for _ in range(PERMUTATIONS)]
    for name, *orders in zip(held_out, *swaps, strict=True):
        view, data, state = sets[name]
        population = fit.population_state.expand(1, len(state), -1)
        others = torch.stack([state[order] for order in orders])
        yield _record(fit, "population", name, _measure(fit, view, data, population))
        yield _record(fit, "another", name, _measure(fit, view, data, others))
    if task.few is not None:
        again = [fit.adapt(_relabelled(fit, task.few, g), task.few, g) for _ in range(SHUFFLES)]
        measured = _measure(fit, *sets["unseen"][:2], torch.stack(again))
        yield _record(fit, "shuffled", "unseen", measured)


def _kinds(task: Task) -> dict[str, np.ndarray]:
    """Kinds of the held-out comparisons by set, where there are several in a set."""
    sets = judged_sets(task.train, task.few, task.seen, task.unseen)
    found = {name: kinds(*parts) for name, parts in sets.items()}
    return {name: kind for name, kind in found.items() if len(np.unique(kind)) > 1}


def _relabelled(fit: Fitted, few: Comparisons, g: torch.Generator | None = None) -> View:
    """New users' shots with random labels or, without a generator, with all labels swapped."""
    coin = torch.ones(len(few)) if g is None else torch.randint(2, (len(few),), generator=g)
    return fit.view(few.flipped(coin.bool()))


def swap(users: int, generator: torch.Generator) -> Tensor:
    """A random permutation that gives every user another one's place (where there are two)."""
    order = torch.randperm(users, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _measure(
    fit: Fitted, view: View, data: Users, states: Tensor, whole: bool = False,
    kind: np.ndarray | None = None, swapped: Sequence[Tensor] = (),
) -> dict[str, Any]:  # fmt: skip
    """Figures of every user with each of the states [T, U, S]: [T, U], or [T] of all comparisons
    together where ``whole``; also by ``kind`` [N], and against states from ``swapped`` labels."""
    logits = [fit.logits(view, state, data.user) for state in states]
    found = _figures(data, logits)
    if whole:
        pooled = [metrics.pooled(data, z) for z in logits]
        found |= {key: torch.tensor([part[key] for part in pooled]) for key in pooled[0]}
    if kind is not None:
        found["kinds"] = {}
        for place in np.unique(kind):
            rows = torch.from_numpy(np.flatnonzero(kind == place)).to(data.device)
            counts = torch.bincount(data.user[rows], minlength=data.num_users)
            part = _figures(data.pick(rows, counts), [z[rows] for z in logits])
            found["kinds"][KINDS[place]] = {key: part[key] for key in ALWAYS}
    if len(swapped):
        pairs = [(z, fit.logits(view, s, data.user)) for z, s in zip(logits, swapped, strict=False)]
        rates = [metrics.label_sensitivity(data, *pair) for pair in pairs]
        found["label_sensitivity"] = torch.stack(rates)
    return found


def _figures(data: Users, logits: Sequence[Tensor]) -> dict[str, Any]:
    """Figures [T, U] of every user; NaN for those without comparisons."""
    measures = {"accuracy": data.accuracies, "log_loss": data.log_losses,
                "brier": functools.partial(metrics.brier, data)}  # fmt: skip
    return {key: torch.stack([of(z) for z in logits]) for key, of in measures.items()}


def sweep(fit: Fitted, task: Task, draws: Shots) -> Iterator[dict[str, Any]]:
    """Records of a fit and its controls on new users at every number of shots."""
    g, U = torch.Generator().manual_seed(task.seed), task.few.num_users
    trials = min(draws.trials, fit.max_trials or draws.trials)
    few, unseen = fit.view(task.few), fit.view(task.unseen)
    W, fitted = _sweep_states(fit, few, task.few, draws, trials, g, True)  # [trials, S, U, ...]
    counts = draws.users_with_that_many
    for s, size in enumerate(draws.sizes):
        if size:
            judged = {key: x[:, s] for key, x in fitted.items()}
            yield _record(fit, "", "few_shot", judged, size, counts[s])
    states, swapped, kind = {"": W}, [()] * len(draws.sizes), _kinds(task).get("unseen")
    if fit.personal and fit.controlled:
        states["population"] = fit.population_state.expand(1, len(draws.sizes), U, -1)
        states["another"] = W[:, :, swap(U, g)]
        shuffled = _relabelled(fit, task.few, g)
        states["shuffled"] = _sweep_states(fit, shuffled, task.few, draws, trials, g, False)[0]
        # Swapped labels for the first draw of shots alone, as the sweep has a price
        again, view = torch.Generator().manual_seed(task.seed), _relabelled(fit, task.few)
        swapped = _sweep_states(fit, view, task.few, draws, 1, again, False)[0].unbind(1)
    knows_nothing = fit.personal and not fit.controlled and fit.random_label is None
    for control, some in states.items():
        measured = None
        for s, size in enumerate(draws.sizes):
            if not size and knows_nothing:
                continue  # each user's own model says nothing yet
            if measured is None or (fit.personal and control != "population"):
                own = (True, kind, swapped[s]) if not control else ()
                measured = _measure(fit, unseen, task.unseen, some[:, s], *own)
            yield _record(fit, control, "unseen", measured, size, counts[s])


def _sweep_states(
    fit: Fitted, view: View, few: Users, draws: Shots, trials: int, g: torch.Generator, judge: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """States [trials, S, U, state] from the shots and, if to ``judge``, figures of the shots."""
    S, U = len(draws.sizes), few.num_users
    width = view.numel() // max(1, len(view)) if isinstance(view, Tensor) else view.num_features
    at_once = max(1, BATCH // (len(few) * S * max(width, 1))) * U * S
    states, parts, rows = [], [], draws.rows[: trials * S * U]
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        picked = torch.cat(some).to(few.device)
        users = few.pick(picked, [len(row) for row in some])
        states.append(fit.adapt(view[picked], users, g))
        if judge:
            z = fit.logits(view[picked], states[-1], users.user)
            parts.append({"accuracy": users.accuracies(z), "log_loss": users.log_losses(z)})
    shape = (trials, S, U)
    judged = {key: torch.cat([part[key] for part in parts]).view(shape) for key in ALWAYS if judge}
    return torch.cat(states).view(*shape, -1), judged


def _record(
    fit: Fitted, control: str, name: str, measured: dict[str, Any], shots: int | None = None,
    users_with_that_many: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One line of the results: means over trials of every user's figures [T, U], or of [T]."""
    figures = {key: _rounded(of.mean(0)) for key, of in measured.items() if key != "kinds"}
    for kind, part in measured.get("kinds", {}).items():  # None for users without any
        means = {key: _rounded(values.mean(0)) for key, values in part.items()}
        known = {key: [None if math.isnan(x) else x for x in some] for key, some in means.items()}
        figures.setdefault("kinds", {})[kind] = known
    return {
        "label": fit.label, "control": control, "set": name, "shots": shots, **figures,
        "trials": None if shots is None else _rounded(measured["accuracy"].mean(1)),
        "users_with_that_many": users_with_that_many,
    }  # fmt: skip


def _rounded(values: Tensor) -> Any:
    """Numbers, one or a list, to the fifth digit."""
    return ((values.double() * 1e5).round() / 1e5).tolist()
