"""How every method chooses: on training comparisons held out as the test is, see ``sides``."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lore.common.devices import rows_before, sum_over_processes
from lore.common.files import digest, require
from lore.common.kinds import KINDS, Judged
from lore.learning.comparisons import Comparisons, RowFeatures, Users
from lore.learning.kinds import Shares, judged, shares
from lore.learning.method import Fitted, Task
from lore.methods.fitting.geometry import DIRECTIONS, Geometry, measure

log = logging.getLogger(__name__)
Kinds = dict[str, Shares]  # of ``seen`` and ``unseen`` users

HELD = 0.2  # of a seen user's dialogues, or of groups of responses
RESPONSES = 0.4  # of the responses: comparisons of two of them are a sixth of all
NEW = 0.2  # of the seen users
SHOTS = (2, 9, 40)  # of pseudo-new users, where it is not said how many new users will have
GROUPS = 100  # of comparisons that share no response; a fifth of fewer says too little
CLOSE = 0.15  # shares of a kind that differ by less are alike
SOME = 0.1  # a smaller share of a kind is none
LEAST = 50  # held-out comparisons; with fewer, whole dialogues are held out
FIT, HELD_OUT, NEITHER = range(3)
ENOUGH = 40_000  # comparisons: with fewer, several splits are made, as one chooses by chance
ENOUGH_NEW = 20  # pseudo-new users, over all splits
MOST_SPLITS = 4
SURE = 1.0  # standard errors by which one of two is better, so that no further split is tried
MOST_USERS = 500  # whom a choice looks at: among a few strengths, more would not choose better
FLOORS = (None, 0.1, 0.01, 0.001)  # of the whitening of features, see ``Geometry``; None is plain
WHITER = 2.0  # standard errors by which whitened features have to be better than plain ones


@dataclass
class HeldOut:
    """Seen users' training comparisons: what is left of all users, the held-out ones of those who
    have any (None if none has), and the row of each of these among ``fit``'s users."""

    fit: Comparisons
    held: Comparisons | None
    whose: Tensor

    def logits_of_held(self, fitted: Fitted, users: Tensor) -> Tensor:
        """Log odds of ``held``'s comparisons, given the states [U, S] of ``fit``'s users."""
        states = users[self.whose.to(users.device)]
        return fitted.logits(fitted.view(self.held), states, self.held.user)


@dataclass
class PseudoNew:
    """Some seen users set apart whole, to be treated as new ones: their shots, their held-out
    comparisons, the same users in the same order, and who they are [U]."""

    few: Comparisons
    held: Comparisons
    chosen: Tensor


def _names(data: Comparisons) -> list[str]:
    return data.names or [str(u) for u in range(data.num_users)]


def _numbers(data: Comparisons, seed: int) -> list[int]:
    """A random number of each user, which goes by the name."""
    return [int(digest([name, seed])[:12], 16) for name in _names(data)]


def _shuffled(data: Comparisons, seed: int) -> list[list[Tensor]]:
    """Every user's dialogues or comparisons, in a random order that goes by the user's name."""
    found = []
    for number, units in zip(_numbers(data, seed), data.units, strict=True):
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(number))
        found.append([units[i] for i in order.tolist()])
    return found


def _pick(data: Comparisons, rows: list[Tensor]) -> Comparisons:
    keep = torch.zeros(len(data), dtype=torch.bool)
    keep[torch.cat(rows)] = True
    return data.select(keep)


def _uniform(numbers: NDArray[np.integer], seed: NDArray[np.uint64] | int) -> NDArray[np.float64]:
    """A number in [0, 1) for each number, the same wherever it stands (splitmix64)."""
    with np.errstate(over="ignore"):
        start = np.asarray(seed).astype(np.uint64) + np.uint64(1)
        x = numbers.astype(np.uint64) + np.uint64(1) + np.uint64(0x9E3779B97F4A7C15) * start
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) / 2.0**53


def _groups(data: Judged) -> tuple[NDArray[np.integer], float]:
    """What is held out whole, a number for each response [2, N], and what share: responses that are
    compared with each other, as of a prompt, where no such group is large; else each by itself."""
    from scipy.sparse import coo_array  # slow to import, and plain LoRe chooses nothing here
    from scipy.sparse.csgraph import connected_components

    rows, place = np.unique(np.stack([data.one, data.other]), return_inverse=True)
    place = place.reshape(2, -1)
    graph = coo_array((np.ones(place.shape[1]), tuple(place)), shape=(len(rows), len(rows)))
    _, group = connected_components(graph, directed=False)
    counts = np.bincount(group[place[0]])
    if len(counts) < GROUPS or counts.max() > HELD / 2 * place.shape[1]:
        return rows[place], RESPONSES
    first = np.full(len(counts), -1)
    first[group[::-1]] = rows[::-1]  # a name that no other user changes
    return first[group][place], HELD


def _by_unit(train: Comparisons, seed: int) -> NDArray[np.bool_]:
    """A fifth of each user's dialogues, at least one of those who have two [N]."""
    held = np.zeros(len(train), dtype=bool)
    for units in _shuffled(train, seed):
        count = max(1, round(HELD * len(units))) if len(units) > 1 else 0
        held[torch.cat([*units[:count], units[0][:0]]).numpy()] = True
    return held


def sides(train: Comparisons, seed: int, kinds: Kinds | None) -> dict[str, NDArray[np.int8]]:
    """Which comparisons are fitted, held out or neither [N], for users as ``seen``, ``unseen``.

    What is held out must be related to what is fitted as the test to the training set. Dialogues
    (or comparisons) of each user are held out at random where that gives about the test's shares
    of known, met and new comparisons (see ``Task``; all new if None, the most careful), or features
    are no rows of embeddings. Else, for new ones, some responses are held out of everybody's
    comparisons, and for met ones some of each user's own: fitted are comparisons of two other
    responses, judged are those of two held-out ones, and the rest is neither.
    """
    by_unit = _by_unit(train, seed)
    plain = {who: by_unit.astype(np.int8) for who in ("seen", "unseen")}
    if not isinstance(train.features, RowFeatures) or not by_unit.any():
        return plain
    data = judged(train)
    fit, held = (Judged(*(x[rows] for x in data)) for rows in (~by_unit, by_unit))
    have, wanted = shares(held, fit, fit), kinds or {"seen": {"new": 1.0}}
    wanted = {who: wanted.get(who, wanted["seen"]) for who in plain}
    new, met = (max(test.get(kind, 0) for test in wanted.values()) for kind in ("new", "met"))
    if new <= have["new"] + CLOSE and met <= have["met"] + have["new"] + 2 * CLOSE:
        return plain
    group, share = _groups(data)
    away = (_uniform(group, seed) < share).sum(0)
    seeds = np.array(_numbers(train, seed))[data.user] + seed
    own = (_uniform(group, seeds) < RESPONSES).sum(0)
    mixed = {who: _mixed(test, away, own, by_unit) for who, test in wanted.items()}
    enough = min(LEAST, max(train.num_users, len(train) * HELD / 4))
    if any((side == HELD_OUT).sum() < enough or not (side == FIT).any() for side in mixed.values()):
        log.warning("too few comparisons to hold out whole responses: dialogues are held out")
        return plain
    return mixed


def _mixed(
    wanted: Shares, away: NDArray[np.integer], own: NDArray[np.integer], by_unit: NDArray[np.bool_]
) -> NDArray[np.int8]:
    """The sides [N] for wanted shares, given how many of the two responses are held out of
    everybody's comparisons and of the user's own, and whether the dialogue is."""
    wanted = {kind: wanted.get(kind, 0) * (wanted.get(kind, 0) >= SOME) for kind in KINDS}
    apart = own if wanted["met"] else np.zeros_like(own)
    free = (away == 0) & (apart == 0)
    pools = {"new": away == 2, "met": (away == 0) & (apart == 2), "known": free & by_unit}
    side = np.where(free & ~(by_unit & (wanted["known"] > 0)), FIT, NEITHER).astype(np.int8)
    pools = {kind: pool for kind, pool in pools.items() if wanted[kind]}
    most = min(pool.sum() / wanted[kind] for kind, pool in pools.items())
    place = np.arange(len(away))
    for kind, pool in pools.items():
        rate = wanted[kind] * most / max(1, pool.sum())
        side[pool & (_uniform(place, 7) < rate)] = HELD_OUT
    return side


def _split(train: Comparisons, fit: Tensor, held: Tensor) -> HeldOut:
    """Two parts of the comparisons, by masks [N]; users of the second without the first drop."""
    user = train.user.cpu()
    known = torch.bincount(user[fit], minlength=train.num_users) > 0
    held = held & known[user]
    whose = (known.cumsum(0) - 1)[torch.unique(user[held])]
    part = train if bool(fit.all()) else train.select(fit)
    return HeldOut(part, train.select(held) if bool(held.any()) else None, whose)


def hold_out(
    train: Comparisons, seed: int, kinds: Kinds | None = None, validation: Comparisons | None = None
) -> HeldOut:
    """Hold out some comparisons, as ``sides`` says; or those of the dataset's validation set whose
    users are here, so that all of ``train`` is left."""
    if validation is None:
        side = torch.from_numpy(sides(train, seed, kinds)["seen"])
        return _split(train, side == FIT, side == HELD_OUT)
    row = {name: u for u, name in enumerate(_names(train))}
    here = torch.tensor([name in row for name in _names(validation)])
    held = validation.select(here[validation.user.cpu()]) if here.any() else None
    whose = [row[name] for name in _names(validation) if name in row]
    return HeldOut(train, held, torch.tensor(whose, dtype=torch.long))


def pseudo_new(
    train: Comparisons, seed: int, shots: int, side: NDArray[np.int8] | None = None
) -> PseudoNew | None:
    """Set apart a fifth of the users, who may adapt from so many shots at most; None where no user
    but one has two dialogues. Where dialogues are held out at random, a user's others, at least a
    fifth, are; ``side`` is of unseen users, see ``sides``, if None as if the test were all new."""
    names, units = _names(train), _shuffled(train, seed)
    side = torch.from_numpy(sides(train, seed, None)["unseen"] if side is None else side)
    at_random = bool(((side == HELD_OUT) == torch.from_numpy(_by_unit(train, seed))).all())
    able = [u for u in range(train.num_users) if len(units[u]) > 1]
    if not at_random:  # who has comparisons on either side
        able = [u for u in able if {FIT, HELD_OUT} <= set(side[torch.cat(units[u])].tolist())]
    able.sort(key=lambda u: digest([names[u], seed, "new"]))
    chosen = able[: min(max(1, round(NEW * train.num_users)), len(able), train.num_users - 1)]
    if not chosen:
        return None
    few, held, apart = [], [], torch.zeros(train.num_users, dtype=torch.bool)
    for u in chosen:
        rows = units[u]
        if at_random:
            count = min(max(shots, 1), len(rows) - max(1, round(HELD * len(rows))))
            few, held = few + rows[:count], held + rows[count:]
        else:
            fit = [row[side[row] == FIT] for row in rows]
            few += [row for row in fit if len(row)][: max(shots, 1)]
            held += [row[side[row] == HELD_OUT] for row in rows]
    apart[chosen] = True
    return PseudoNew(_pick(train, few), _pick(train, held), apart)


def subset(few: Comparisons, sizes: Sequence[int], seed: int) -> tuple[Tensor, Users]:
    """Numbers of everybody's first shots in a random order, as of one user a size, and whose."""
    units, none = _shuffled(few, seed), torch.empty(0, dtype=torch.long)
    rows = [torch.cat([none, *own[:shots]]) for shots in sizes for own in units]
    picked = torch.cat(rows)
    return picked, few.pick(picked, [len(x) for x in rows])


@dataclass
class Scores:
    """A candidate's log losses on validation, means over splits by user, who all count the same:
    of users it knew, on held-out dialogues [U], NaN where nothing was held out, and of users it did
    not know, adapted from few shots [U], NaN of those never set apart."""

    seen: Tensor
    new: Tensor

    @classmethod
    def mean(cls, parts: "Sequence[Scores]") -> "Scores":
        """The means over splits."""
        seen, new = (torch.stack([getattr(part, k) for part in parts]) for k in ("seen", "new"))
        return cls(seen.nanmean(0), new.nanmean(0))

    @property
    def by_user(self) -> Tensor:
        """Of each user who was judged, as one known, as a new one or as both [U]; else NaN."""
        return torch.stack([self.seen, self.new]).nanmean(0)

    def means(self) -> dict[str, float]:
        """Means over users: ``seen``, ``new``, and of all together, ``loss``."""
        values = {"seen": self.seen, "new": self.new, "loss": self.by_user}
        means = {key: float(value.nanmean()) for key, value in values.items()}
        return {key: value for key, value in means.items() if not math.isnan(value)}

    @property
    def loss(self) -> float:
        """What choices go by: the mean over users; infinity if there is none."""
        return self.means().get("loss", math.inf)

    def gain(self, other: "Scores") -> tuple[float, float]:
        """How much lower the loss is than another's, by user, and the standard error of that."""
        gains = other.by_user - self.by_user
        gains = gains[~gains.isnan()]
        error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
        return float(gains.mean()), error


class Split(HeldOut):
    """One random split of the training comparisons; ``fit`` is this process's, in memory unless
    streamed, ``new`` the users set apart, if any, the same on every process; ``seen_rows`` and
    ``new_rows`` are numbers of the users of ``held`` and ``new`` among all seen users."""

    def __init__(self, task: Task, seed: int, shots: tuple[int, ...], directions: int) -> None:
        self.seed, self.shots, self.directions = seed, shots, directions
        self.processes, self.num_users = task.processes, task.train.num_users
        self.subsets: dict[tuple[int, ...], tuple[Tensor, Users]] = {}
        train, user, found = task.train, task.train.user.cpu(), sides(task.train, seed, task.kinds)
        new = self.new = pseudo_new(train, seed, max(shots), found["unseen"]) if shots else None
        known = torch.ones(self.num_users, dtype=torch.bool) if new is None else ~new.chosen
        self.new_rows = (~known).nonzero()[:, 0]
        side = torch.from_numpy(found["seen"])
        fit = known[user] if task.validation is not None else (side == FIT) & known[user]
        rows = torch.unique(user[fit])  # of the users that candidates know
        whole = train.select(fit).share(task.process, task.processes)
        first = rows_before(whole.num_users, task.processes)[0]
        rows = rows[first : first + whole.num_users]
        if task.validation is not None:
            own = hold_out(whole, seed, validation=task.validation)
        else:
            there = torch.isin(user, rows)
            own = _split(train, fit & there, (side == HELD_OUT) & there)
        held = own.held
        if not task.stream:
            own.fit, held = (x and x.in_memory(rows=True) for x in (own.fit, held))
            if new is not None:
                few, there = (x.in_memory(rows=True) for x in (new.few, new.held))
                self.new = replace(new, few=few, held=there)
        super().__init__(own.fit, held, own.whose)
        self.seen_rows = rows[self.whose]

    @cached_property
    def geometry(self) -> Geometry:
        """Of the features that are fitted."""
        return measure(self.fit, self.processes, self.directions)

    def score(self, fitted: Fitted) -> Scores:
        """Log losses of a candidate fitted to ``fit``, whose users it knows, in that order."""
        return self.scores(*self.logits(fitted))

    def logits(self, fitted: Fitted) -> tuple[Tensor | None, list[Tensor]]:
        """Log odds of ``held``, and of the new users' held-out comparisons by number of shots."""
        seen = None if self.held is None else self.logits_of_held(fitted, fitted.users)
        if self.new is None:
            return seen, []
        few, held, data = fitted.view(self.new.few), fitted.view(self.new.held), self.new.held
        sizes = self.shots if fitted.personal else self.shots[:1]
        if sizes not in self.subsets:
            self.subsets[sizes] = subset(self.new.few, sizes, self.seed)
        rows, users = self.subsets[sizes]
        states = fitted.adapt(few[rows], users, self.seed).split(self.new.few.num_users)
        return seen, [fitted.logits(held, state, data.user) for state in states]

    def scores(self, held: Tensor | None, new: Sequence[Tensor]) -> Scores:
        """Log losses of what ``logits`` found."""
        seen, apart = torch.full((2, self.num_users), math.nan, dtype=torch.float64)
        if held is not None:
            seen[self.seen_rows] = self.held.log_losses(held).cpu()
        if self.processes > 1:  # each of which knows some users
            both = torch.stack([seen.nan_to_num(), (~seen.isnan()).double()])
            sums = sum_over_processes(both, self.processes)
            seen = torch.where(sums[1] > 0, sums[0], math.nan)
        if new:
            each = [self.new.held.log_losses(logits) for logits in new]
            apart[self.new_rows] = torch.stack(each).mean(0).cpu()
        return Scores(seen, apart)


class Validation:
    """What a choice is made on: random ``splits`` of the training comparisons, more of small data.

    A candidate is fitted to each split's ``fit`` and scored by its log loss on held-out comparisons
    of the users it knows and, where users are new, of pseudo-new ones who adapt from their first
    shots: as many as the task says, else ``SHOTS`` up to what new users mostly have. Of more than
    ``MOST_USERS`` users some are drawn; ``directions`` are the geometry's.
    """

    def __init__(self, task: Task, directions: int = DIRECTIONS) -> None:
        names, data = _names(task.train), task.train
        count = round(ENOUGH / len(data))
        if data.num_users > MOST_USERS:
            order = sorted(range(len(names)), key=lambda u: digest([names[u], task.seed, "choice"]))
            kept = torch.zeros(data.num_users, dtype=torch.bool, device=data.device)
            kept[order[:MOST_USERS]] = True
            task = replace(task, train=data.select(kept[data.user]))
        sizes = task.shots
        if task.few is None:
            sizes = ()
        elif not sizes:
            most = int(torch.tensor([len(unit) for unit in task.few.units]).median())
            sizes = [min(size, most) for size in SHOTS]
        shots = tuple(sorted(set(sizes)))
        if shots:
            count = max(count, round(ENOUGH_NEW / (NEW * task.train.num_users)))
        count = min(MOST_SPLITS, max(1, count))
        if task.validation is not None and task.few is None:
            count = 1  # others would be the same
        seeds = [task.seed + 10007 * i for i in range(count)]
        self.splits = [Split(task, seed, shots, directions) for seed in seeds]

    @property
    def possible(self) -> bool:
        """Whether anything is held out at all."""
        return any(split.new is not None or len(split.seen_rows) for split in self.splits)


Fit = Callable[[Split, Any, Any], tuple[Fitted, Any]]
Search = Callable[[Callable[[int], "Try"]], int]  # finds the best one's place from the scores


@dataclass
class Chosen:
    """The best candidate."""

    candidate: Any
    scores: Scores
    kept: Sequence[Any]  # what its fits to the splits returned beside them
    tried: list[dict[str, Any]]  # settings and log losses of all candidates


def choose(
    data: Validation, candidates: Sequence[Any], fit: Fit, search: Search | None = None
) -> Chosen:
    """The candidate with the lowest log loss on validation; every method chooses by this.

    ``fit`` takes a split, a candidate, and what the nearest candidate's fit to that split returned
    beside the fit (None at first), so neighbours in the order should be good starts for each other.
    All are tried without a ``search``. InputError where nothing is held out, or all losses are NaN.
    """
    require(data.possible, "no user has two dialogues, so nothing can be held out to choose by: "
            "give one value to choose from, not several")  # fmt: skip
    tries = Tries(data, lambda split, place, begin: fit(split, candidates[place], begin))
    best = tries(_best(tries, len(candidates), search))
    require(best.scores().loss < math.inf, "every candidate's log loss on validation is NaN: are "
            "the weights of the comparisons very small?")  # fmt: skip
    return Chosen(candidates[best.candidate], best.scores(), best.kept, tries.tried)


def _best(scores: Callable[[int], "Try"], count: int, search: Search | None) -> int:
    return min(range(count), key=scores) if search is None else search(scores)


class Try:
    """A candidate, fitted to one split after the other, as far as comparisons with others need."""

    def __init__(self, tries: "Tries", candidate: Any) -> None:
        self.tries, self.candidate = tries, candidate
        self.kept: list[Any] = []  # what its fits returned beside them, by split
        self.parts: list[Scores] = []  # its log losses, by split
        self.settings: dict[str, Any] = {}

    def scores(self, count: int | None = None) -> Scores:
        """Log losses on the first splits, if None on all."""
        count = len(self.tries.data.splits) if count is None else count
        while len(self.parts) < count:
            split = self.tries.data.splits[len(self.parts)]
            fitted, kept = self.tries.fit(split, self.candidate, self._begin(len(self.parts)))
            self.settings = fitted.settings
            self.kept.append(kept)
            self.parts.append(split.score(fitted))
        return Scores.mean(self.parts[:count])

    def _begin(self, place: int) -> Any:
        """What the nearest candidate's fit to a split returned beside it; None at first."""
        there = [one for one in self.tries.found.values() if len(one.kept) > place]
        near = min(there, key=lambda one: self.tries.apart(one.candidate, self.candidate),
                   default=None)  # fmt: skip
        return None if near is None else near.kept[place]

    def __lt__(self, other: "Try") -> bool:
        """Whether the log loss is lower, on as few splits as make it sure."""
        for count in range(1, len(self.tries.data.splits) + 1):
            two, one = other.scores(count), self.scores(count)  # in the order of the search
            gain, error = one.gain(two)
            if abs(gain) > SURE * error:
                break
        return one.loss < two.loss

    def gain(self, other: "Try") -> tuple[float, float]:
        """As of ``Scores``, on all splits."""
        return self.scores().gain(other.scores())


class Tries:
    """The candidates of a choice, see ``choose``. A fit begins where that of the nearest candidate,
    by how far they are ``apart``, ended."""

    def __init__(
        self, data: Validation, fit: Fit,
        apart: Callable[[Any, Any], float] = lambda one, other: abs(one - other),
    ) -> None:  # fmt: skip
        self.data, self.fit, self.apart = data, fit, apart
        self.found: dict[Any, Try] = {}

    def __call__(self, candidate: Any) -> Try:
        return self.found.setdefault(candidate, Try(self, candidate))

    @property
    def tried(self) -> list[dict[str, Any]]:
        """Settings and log losses of all candidates that were fitted, and on how many splits."""
        fitted = [one for one in self.found.values() if one.parts]
        return [{**one.settings, **one.scores(len(one.parts)).means(), "splits": len(one.parts)}
                for one in fitted]  # fmt: skip


def choose_whitened(
    data: Validation, strengths: Sequence[Any], fit: Fit, search: Search | None = None,
    floors: Sequence[float | None] = FLOORS,
) -> Chosen:  # fmt: skip
    """Choose (strength, floor of the features' whitening): the floor may be None, plain features.

    A strength is chosen on plain features, the best floor at that strength, and on it strengths,
    which are in order, to either side while the loss falls; whitening is taken if better by
    ``WHITER`` standard errors. For all else see ``choose``.
    """
    wide, grid = len(floors), [(strength, floor) for strength in strengths for floor in floors]

    def walk(scores: Callable[[int], Try]) -> int:
        plain = wide * _best(lambda place: scores(wide * place), len(strengths), search)
        if wide == 1:
            return plain
        white = min(range(plain + 1, plain + wide), key=scores)
        for step in (-wide, wide):
            while 0 <= white + step < len(grid) and scores(white + step) < scores(white):
                white += step
        gain, error = scores(white).gain(scores(plain))
        return white if gain > WHITER * error else plain

    return choose(data, grid, fit, walk)


@dataclass(frozen=True)
class Peer:
    """A published method: as published, or the same model fitted to a tolerance.

    Args:
        setting: published constants and budget (faithful), or fitted to tolerance, its settings
            chosen on validation (converged).
    """

    setting: Literal["faithful", "converged"] = "converged"

    @property
    def faithful(self) -> bool:
        """Whether the published constants and budget are kept."""
        return self.setting == "faithful"

    def named(self, name: str) -> str:
        """The name in tables."""
        return f"{name} faithful" if self.faithful else name
