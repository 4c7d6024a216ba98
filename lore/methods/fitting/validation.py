"""Splits of the training comparisons for choices: the same for every method, never a test pair.

What is held out depends on users' names and the seed, not on their order nor on who else is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lore.common.files import digest
from lore.learning.comparisons import Comparisons, RowFeatures, Users
from lore.learning.method import Fitted, Task
from lore.methods.fitting.geometry import place, total

HELD = 0.2  # of a seen user's dialogues
NEW = 0.2  # of the seen users
GROUPS = 100  # of comparisons that share no response; a fifth of fewer says too little
OFTEN = 2  # users of a prompt, in the mean, from which on prompts count as shared
ENOUGH = 2000  # comparisons: with fewer, several splits are made
ENOUGH_NEW = 20  # pseudo-new users, over all splits
MOST_SPLITS = 4


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
        chosen: who was set apart [U].
    """

    rest: Comparisons
    few: Comparisons
    held: Comparisons
    chosen: Tensor


def _names(data: Comparisons) -> list[str]:
    return data.names or [str(u) for u in range(data.num_users)]


def _draw(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest([name, seed])[:12], 16))


def _pick(data: Comparisons, rows: list[Tensor]) -> Comparisons:
    keep = torch.zeros(len(data), dtype=torch.bool)
    keep[torch.cat(rows)] = True
    return data.select(keep)


def shared_prompts(train: Comparisons, seed: int) -> Tensor | None:
    """Responses whose comparisons are held out of all users' at once [R]; None where none need be.

    Where users answer the same prompts, what is held out of one user's comparisons would be learned
    from the others', and every prior would look too strong. So whole groups of comparisons that
    have a response in common, a fifth of the groups, are held out of everybody's.

    Args:
        train: comparisons of the seen users, by rows of the embeddings; others cannot be told
            apart.
        seed: of the draw.
    """
    if not isinstance(train.features, RowFeatures):
        return None
    from scipy.sparse import coo_array  # slow to import, and plain LoRe chooses nothing here
    from scipy.sparse.csgraph import connected_components

    x = train.features
    chosen, rejected = x.chosen.cpu().numpy(), x.rejected.cpu().numpy()
    size, link = len(x.index), np.ones(len(chosen))
    graph = coo_array((link, (chosen, rejected)), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    mine = group[chosen]
    pairs = np.unique(np.stack([mine, train.user.cpu().numpy()]), axis=1).shape[1]
    counts = np.bincount(mine, minlength=group.max() + 1)
    if len(counts) < GROUPS or pairs < OFTEN * len(counts) or counts.max() > HELD / 2 * len(chosen):
        return None
    first = np.full(len(counts), -1)
    first[group[::-1]] = x.index.cpu().numpy()[::-1]  # a name that no other user changes
    order = sorted(range(len(counts)), key=lambda g: digest([int(first[g]), seed]))
    held = np.isin(group, order[: round(HELD * len(order))])
    return x.index[torch.from_numpy(held)]


def _of(data: Comparisons, responses: Tensor) -> Tensor:
    """Which comparisons are about some of the responses [N]."""
    assert isinstance(data.features, RowFeatures)
    x = data.features
    return torch.isin(x.index[x.chosen.cpu()], responses)


def hold_out(
    train: Comparisons,
    seed: int,
    responses: Tensor | None = None,
    validation: Comparisons | None = None,
) -> HeldOut:
    """Hold out a fifth of each user's dialogues, at least one of those who have two.

    A dialogue is on one side only, and no pair of a user is on both.

    Args:
        train: comparisons of the seen users.
        seed: of the draws.
        responses: whose comparisons are held out instead, from ``shared_prompts``.
        validation: comparisons of seen users outside ``train`` that take their place, so that all
            of ``train`` is left.
    """
    if validation is not None:
        return _given(train, validation)
    if responses is not None:
        keep = ~_of(train, responses)
        left = torch.bincount(train.user.cpu()[keep], minlength=train.num_users)
        keep |= (left == 0)[train.user.cpu()]
        held = torch.bincount(train.user.cpu()[~keep], minlength=train.num_users)
        some = train.select(~keep) if bool((~keep).any()) else None
        return HeldOut(train.select(keep), some, held.nonzero()[:, 0])
    fit, held, whose = [], [], []
    for u, (name, units) in enumerate(zip(_names(train), train.units(), strict=True)):
        order = torch.randperm(len(units), generator=_draw(name, seed)).tolist()
        count = max(1, round(HELD * len(units))) if len(units) > 1 else 0
        held += [units[i] for i in order[:count]]
        fit += [units[i] for i in order[count:]]
        whose += [u] if count else []
    rest = _pick(train, fit) if held else train
    return HeldOut(
        rest, _pick(train, held) if held else None, torch.tensor(whose, dtype=torch.long)
    )


def _given(train: Comparisons, validation: Comparisons) -> HeldOut:
    """The validation comparisons of those users whose training comparisons are here."""
    row = {name: u for u, name in enumerate(_names(train))}
    here = torch.tensor([name in row for name in _names(validation)])
    held = validation.select(here[validation.user.cpu()]) if here.any() else None
    whose = [row[name] for name in _names(validation) if name in row]
    return HeldOut(train, held, torch.tensor(whose, dtype=torch.long))


def pseudo_new(
    train: Comparisons, seed: int, shots: int, responses: Tensor | None = None
) -> PseudoNew | None:
    """Set apart 15 % of the users; None where no user but one has two dialogues.

    Args:
        train: comparisons of the seen users.
        seed: of the draws.
        shots: dialogues (or comparisons) that each may adapt from, at most; a user's others, at
            least a fifth of them, are held out.
        responses: whose comparisons are held out instead, from ``shared_prompts``.
    """
    names, units = _names(train), train.units()
    away = torch.zeros(len(train), dtype=torch.bool)
    if responses is not None:
        away = _of(train, responses)
    able = [u for u in range(train.num_users) if len(units[u]) > 1]
    if responses is not None:  # who has comparisons on either side
        able = [u for u in able if 0 < int(away[torch.cat(units[u])].sum()) < len(units[u])]
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
        if responses is not None:
            out = [i for i in order if bool(away[units[u][i]].any())]
            order = [i for i in order if i not in out]
            few += [units[u][i] for i in order[: max(shots, 1)]]
            held += [units[u][i] for i in out]
            continue
        count = min(max(shots, 1), len(order) - max(1, round(HELD * len(order))))
        few += [units[u][i] for i in order[:count]]
        held += [units[u][i] for i in order[count:]]
    apart = torch.tensor([u in chosen for u in range(train.num_users)])
    return PseudoNew(*(_pick(train, rows) for rows in (rest, few, held)), apart)


def subset(few: Comparisons, shots: int, seed: int) -> tuple[Tensor, Users]:
    """Each user's first so many shots in a random order: their numbers, and whose they are."""
    rows = []
    for name, units in zip(_names(few), few.units(), strict=True):
        order = torch.randperm(len(units), generator=_draw(name, seed)).tolist()[:shots]
        rows.append(torch.cat([torch.empty(0, dtype=torch.long), *(units[i] for i in order)]))
    picked = torch.cat(rows)
    return picked, few.pick(picked, [len(x) for x in rows])


def shots_of(few: Comparisons | None, shots: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of shots that choices are made for: those given, else what new users mostly have;
    none where nobody is new."""
    if few is None:
        return ()
    if shots:
        return tuple(sorted(set(shots)))
    return (int(torch.tensor([len(unit) for unit in few.units()]).median()),)


@dataclass
class Scores:
    """A candidate's log losses on validation, by user: means over splits.

    Attributes:
        seen: of users it knew, on their held-out dialogues [U]; NaN where nothing was held out.
        new: of users it did not know, adapted from few shots [U]; NaN of those never set apart.
    """

    seen: Tensor
    new: Tensor

    def means(self) -> dict[str, float]:
        """Means over users: ``seen``, ``new``, and of all together, ``loss``."""
        means = {key: float(value.nanmean()) for key, value in vars(self).items()}
        means |= {"loss": float(torch.cat([self.seen, self.new]).nanmean())}
        return {key: value for key, value in means.items() if not math.isnan(value)}

    @property
    def loss(self) -> float:
        """What choices go by: the few pseudo-new users weigh no more than other users do."""
        return self.means()["loss"]

    def gain(self, other: Scores) -> tuple[float, float]:
        """How much lower the loss is than another candidate's, and the standard error of that.

        Differences are paired by user.
        """
        gains = torch.cat([other.seen - self.seen, other.new - self.new])
        gains = gains[~gains.isnan()]
        error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
        return float(gains.mean()), error


class Split:
    """One random split of the training comparisons for a choice.

    Attributes:
        fit: this process's comparisons to fit candidates to, in memory unless streamed.
        held: held-out comparisons of some of those users; None where there are none.
        whose: row among ``fit``'s users of each user of ``held``.
        new: the users set apart, the same on every process; None where there are none.
        seen_rows, new_rows: numbers of the users of ``held`` and ``new`` among all seen users.
    """

    def __init__(self, task: Task, seed: int, shots: tuple[int, ...]) -> None:
        self.seed, self.shots, self.processes = seed, shots, task.processes
        self.num_users = task.train.num_users
        self.subsets: dict[tuple[int, ...], tuple[Tensor, Users]] = {}
        responses = shared_prompts(task.train, seed)
        self.new = pseudo_new(task.train, seed, max(shots), responses) if shots else None
        rest = task.train if self.new is None else self.new.rest
        rows = torch.arange(self.num_users)
        self.new_rows = rows[:0]
        if self.new is not None:
            self.new_rows, rows = rows[self.new.chosen], rows[~self.new.chosen]
        share = rest.share(task.process, task.processes)
        mine = hold_out(share, seed, responses, task.validation)
        first = place(share.num_users, task.processes)[0]
        self.fit, self.held, self.whose = mine.fit, mine.held, mine.whose
        self.seen_rows = rows[first + self.whose]
        if not task.stream:
            self.fit = self.fit.in_memory()
            self.held = None if self.held is None else self.held.in_memory()
            if self.new is not None:
                few, held = self.new.few.in_memory(), self.new.held.in_memory()
                self.new = replace(self.new, few=few, held=held)

    def score(self, fitted: Fitted) -> Scores:
        """Log losses of a candidate fitted to ``fit``, whose users it knows, in that order."""
        seen, new = torch.full((2, self.num_users), math.nan, dtype=torch.float64)
        if self.held is not None:
            state = fitted.users[self.whose.to(fitted.users.device)]
            logits = fitted.logits(fitted.view(self.held), state, self.held.user)
            seen[self.seen_rows] = self.held.log_losses(logits).cpu()
        seen = _gather(seen, self.processes)
        if self.new is not None:
            new[self.new_rows] = self._new(fitted, self.new).cpu()
        return Scores(seen, new)

    def _new(self, fitted: Fitted, new: PseudoNew) -> Tensor:
        few, held = fitted.view(new.few), fitted.view(new.held)
        rows, users = self._subsets(new, self.shots if fitted.personal else self.shots[:1])
        states = fitted.adapt(few[rows], users, self.seed).split(new.few.num_users)
        logits = [fitted.logits(held, state, new.held.user) for state in states]
        return torch.stack([new.held.log_losses(each) for each in logits]).mean(0)

    def _subsets(self, new: PseudoNew, sizes: tuple[int, ...]) -> tuple[Tensor, Users]:
        """Everybody's first shots, as those of a user for each number of shots."""
        if sizes not in self.subsets:
            rows, users = zip(*(subset(new.few, shots, self.seed) for shots in sizes), strict=True)
            counts = torch.cat([some.counts for some in users])
            picked = torch.cat(rows)
            self.subsets[sizes] = picked, new.few.pick(picked, counts.tolist())
        return self.subsets[sizes]


def _gather(values: Tensor, processes: int) -> Tensor:
    """Values [U] of all processes, each of which knows some and has NaN elsewhere."""
    if processes == 1:
        return values
    known = ~values.isnan()
    sums = total(torch.stack([values.nan_to_num(), known.double()]), processes)
    return torch.where(sums[1] > 0, sums[0], math.nan)


class Validation:
    """What a choice is made on: random splits of the training comparisons, more of small data.

    A candidate is fitted to each split's ``fit`` and scored by its log loss on held-out dialogues
    of the users it knows, and on pseudo-new users who adapt from their first shots. Where nobody
    is new, the former are all; and with a validation set of the dataset's own there is one split.

    Attributes:
        splits: one or more.
    """

    def __init__(self, task: Task) -> None:
        shots = shots_of(task.few, task.shots)
        count = round(ENOUGH / len(task.train))
        if shots:
            count = max(count, round(ENOUGH_NEW / (NEW * task.train.num_users)))
        count = min(MOST_SPLITS, max(1, count))
        if task.validation is not None and task.few is None:
            count = 1  # others would be the same
        self.splits = [Split(task, task.seed + 10007 * i, shots) for i in range(count)]

    @property
    def possible(self) -> bool:
        """Whether anything is held out at all."""
        return any(split.new is not None or len(split.seen_rows) for split in self.splits)

    def score(self, fits: Sequence[Fitted]) -> Scores:
        """Log losses by user of a candidate, fitted to each split."""
        parts = [split.score(fit) for split, fit in zip(self.splits, fits, strict=True)]
        seen, new = (torch.stack([getattr(part, k) for part in parts]) for k in ("seen", "new"))
        return Scores(seen.nanmean(0), new.nanmean(0))
