"""Splits of the training comparisons for choices: the same for every method, never a test pair.

What is held out depends on users' names and the seed, not on their order nor on who else is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from comparisons import Comparisons, Users
from files import digest
from methods.base import Fitted, Task
from methods.geometry import total

HELD = 0.2  # of a seen user's dialogues
NEW = 0.15  # of the seen users


@dataclass
class HeldOut:
    """Seen users' training comparisons, some dialogues of each held out.

    Attributes:
        fit: what is left of all users.
        held: held-out comparisons of those users who had at least two dialogues; None if none had.
        whose: row among ``fit``'s users of each user of ``held``.
    """

    fit: Comparisons
    held: Comparisons | None
    whose: Tensor


@dataclass
class PseudoNew:
    """Some seen users set apart whole, to be treated as new ones.

    Attributes:
        rest: comparisons of the other users.
        few: shots of those set apart.
        held: their held-out comparisons, the same users in the same order.
    """

    rest: Comparisons
    few: Comparisons
    held: Comparisons


def _names(data: Comparisons) -> list[str]:
    return data.names or [str(u) for u in range(data.num_users)]


def _draw(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest([name, seed])[:12], 16))


def _pick(data: Comparisons, rows: list[Tensor]) -> Comparisons:
    keep = torch.zeros(len(data), dtype=torch.bool)
    keep[torch.cat(rows)] = True
    return data.select(keep)


def hold_out(train: Comparisons, seed: int) -> HeldOut:
    """Hold out a fifth of each user's dialogues, at least one of those who have two.

    A dialogue is on one side only, and no pair of a user is on both.

    Args:
        train: comparisons of the seen users.
        seed: of the draws.
    """
    fit, held, whose = [], [], []
    for u, (name, units) in enumerate(zip(_names(train), train.units(), strict=True)):
        order = torch.randperm(len(units), generator=_draw(name, seed)).tolist()
        count = max(1, round(HELD * len(units))) if len(units) > 1 else 0
        held += [units[i] for i in order[:count]]
        fit += [units[i] for i in order[count:]]
        whose += [u] if count else []
    rest = _pick(train, fit) if held else train
    return HeldOut(rest, _pick(train, held) if held else None, torch.tensor(whose))


def pseudo_new(train: Comparisons, seed: int, shots: int) -> PseudoNew | None:
    """Set apart 15 % of the users; None where no user but one has two dialogues.

    Args:
        train: comparisons of the seen users.
        seed: of the draws.
        shots: dialogues (or comparisons) that each may adapt from, at most; a user's others, at
            least a fifth of them, are held out.
    """
    names, units = _names(train), train.units()
    able = [u for u in range(train.num_users) if len(units[u]) > 1]
    able.sort(key=lambda u: digest([names[u], seed, "new"]))
    chosen = set(able[: min(max(1, round(NEW * train.num_users)), len(able), train.num_users - 1)])
    if not chosen:
        return None
    few, held, rest = [], [], []
    for u in range(train.num_users):
        if u not in chosen:
            rest += units[u]
            continue
        order = torch.randperm(len(units[u]), generator=_draw(names[u], seed)).tolist()
        count = min(max(shots, 1), len(order) - max(1, round(HELD * len(order))))
        few += [units[u][i] for i in order[:count]]
        held += [units[u][i] for i in order[count:]]
    return PseudoNew(*(_pick(train, rows) for rows in (rest, few, held)))


def subset(few: Comparisons, shots: int, seed: int) -> tuple[Tensor, Users]:
    """Each user's first so many shots in a random order: their numbers, and whose they are."""
    rows = []
    for name, units in zip(_names(few), few.units(), strict=True):
        order = torch.randperm(len(units), generator=_draw(name, seed)).tolist()[:shots]
        rows.append(torch.cat([torch.empty(0, dtype=torch.long), *(units[i] for i in order)]))
    picked = torch.cat(rows)
    return picked, few.pick(picked, [len(x) for x in rows])


def shots_of(few: Comparisons, shots: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of shots that choices are made for: those given, else what new users mostly have."""
    if shots:
        return tuple(sorted(set(shots)))
    return (int(torch.tensor([len(unit) for unit in few.units()]).median()),)


class Validation:
    """What a choice is made on: training comparisons that a candidate has not been fitted to.

    A candidate is fitted to ``fit`` and scored by its log loss on held-out dialogues of the users
    it knows, and on pseudo-new users who adapt from their first shots.

    Attributes:
        fit: this process's comparisons to fit candidates to, in memory unless streamed.
        held: held-out comparisons of some of those users; None where there are none.
        whose: row among ``fit``'s users of each user of ``held``.
        new: the users set apart, the same on every process; None where there are none.
        shots: numbers of shots that they adapt from.
    """

    def __init__(self, task: Task) -> None:
        self.seed, self.processes = task.seed, task.processes
        self.shots = shots_of(task.few, task.shots)
        self.new = pseudo_new(task.train, task.seed, max(self.shots))
        rest = task.train if self.new is None else self.new.rest
        mine = hold_out(rest.share(task.process, task.processes), task.seed)
        self.fit, self.held, self.whose = mine.fit, mine.held, mine.whose
        if not task.stream:
            self.fit = self.fit.in_memory()
        if self.new is not None and not task.stream:
            self.new = PseudoNew(rest, self.new.few.in_memory(), self.new.held.in_memory())

    @property
    def possible(self) -> bool:
        """Whether anything is held out at all."""
        return self.new is not None or self.held is not None

    def score(self, fitted: Fitted) -> dict[str, float]:
        """Log losses, means over users: ``seen``, ``new``, and their mean ``loss``.

        Args:
            fitted: a candidate fitted to ``fit``; its users are ``fit``'s.
        """
        losses = {}
        seen = self._seen(fitted)
        if seen is not None:
            losses["seen"] = seen
        if self.new is not None:
            losses["new"] = self._new(fitted, self.new)
        return losses | {"loss": sum(losses.values()) / len(losses)}

    def _seen(self, fitted: Fitted) -> float | None:
        sums = torch.zeros(2, dtype=torch.float64, device=self.fit.device)
        if self.held is not None:
            state = fitted.users[self.whose.to(fitted.users.device)]
            logits = fitted.logits(fitted.view(self.held), state, self.held.user)
            sums[0], sums[1] = self.held.log_losses(logits).sum(), self.held.num_users
        loss, users = total(sums, self.processes).tolist()
        return loss / users if users else None

    def _new(self, fitted: Fitted, new: PseudoNew) -> float:
        few, held, losses = fitted.view(new.few), fitted.view(new.held), []
        for shots in self.shots if fitted.personal else self.shots[:1]:
            rows, users = subset(new.few, shots, self.seed)
            state = fitted.adapt(few[rows], users, self.seed)
            loss = new.held.log_losses(fitted.logits(held, state, new.held.user))
            losses.append(float(loss.mean()))
        return sum(losses) / len(losses)
