"""New users' shots chosen by a criterion instead of at random, replayed from recorded comparisons.

All users are asked at the same time, one question a round. A question is a shot: a comparison, or a
whole dialogue, whose comparisons' scores are summed. Records are chosen minus rejected, but scores
do not depend on the order within a pair, so no label is seen before its question is asked.

Shape letters: U users times trials, m comparisons of a user at most, T target pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lore.elicitation.criteria import SHARES, Known, best, distinct, score
from lore.learning.comparisons import Comparisons, Shots, Users
from lore.learning.method import Fitted, View
from lore.methods.fitting.posterior import NODES_OF_PROBABILITIES, Evidence, Prior, posterior_states

TARGETS = 20  # pairs of a user's pool whose order the criterion "ranking" asks about
CELLS = 1 << 21  # numbers that are formed at once, of every comparison those of WIDTH
WIDTH = {"information": NODES_OF_PROBABILITIES, "ranking": len(SHARES) * TARGETS}


@dataclass
class _Pools:
    """The comparisons of U users, padded to m each.

    Attributes:
        rows: numbers of the comparisons [U, m]; 0 where there is none.
        unit: number of each one's shot among the user's [U, m]; the last where there is none.
        there: whether there is one [U, m].
        pair: number of each one's distinct question among the user's [U, m].
    """

    rows: Tensor
    unit: Tensor
    there: Tensor
    pair: Tensor

    @classmethod
    def of(cls, units: Sequence[Sequence[Tensor]], pair: Tensor) -> _Pools:
        most = max(sum(map(len, own)) for own in units)
        shots = max(map(len, units))
        rows = torch.zeros(len(units), most, dtype=torch.long)
        unit, there = torch.full_like(rows, shots), torch.zeros_like(rows, dtype=torch.bool)
        same = torch.zeros_like(rows)
        for u, own in enumerate(units):
            numbers = torch.cat(list(own))
            rows[u, : len(numbers)] = numbers
            sizes = torch.tensor([len(one) for one in own])
            unit[u, : len(numbers)] = torch.repeat_interleave(sizes)
            there[u, : len(numbers)] = True
            same[u, : len(numbers)] = torch.unique(pair[numbers], return_inverse=True)[1]
        return cls(rows, unit, there, same)


def choose_shots(
    fit: Fitted,
    few: Comparisons,
    sizes: Sequence[int],
    criterion: str,
    trials: int,
    generator: torch.Generator,
) -> Shots:
    """Every new user's shots in the order in which the criterion asks for them.

    The belief is the posterior under the fit's population; PReF's criterion has the method's own
    estimate, fitted anew after every answer. What was asked for 5 shots is the beginning of what is
    asked for 10. Draws differ in the first question of "pref" alone, so other criteria have one.

    Args:
        fit: of which ``population`` is not None.
        few: the new users' comparisons.
        sizes: numbers of shots.
        criterion: see ``asking.score``; not "random".
        trials: draws of "pref".
        generator: of what is drawn.
    """
    trials, view, own = trials if criterion == "pref" else 1, fit.view(few), few.units()
    population = fit.population()
    assert population is not None
    asked = fit.questions(view).double().cpu()
    prior = Prior(*(x.double().cpu() for x in vars(population).values()))
    units = [*own] * trials
    pools = _Pools.of(units, distinct(asked))
    targets = _targets(pools, asked, generator) if criterion == "ranking" else None
    orders: list[list[int]] = [[] for _ in units]
    for _ in range(max(sizes)):
        left = [u for u, order in enumerate(orders) if len(order) < len(units[u])]
        if not left:
            break
        known = _known(fit, view, few, asked, prior, units, orders, criterion, generator)
        found = _scores(criterion, known, pools, asked, targets)
        chosen = _choose(found, pools, orders, left, generator)
        for u, unit in zip(left, chosen, strict=True):
            orders[u].append(unit)
    none, users, rows = torch.empty(0, dtype=torch.long), len(own), []
    for trial in range(trials):
        for size in sizes:
            for u in range(trial * users, (trial + 1) * users):
                rows.append(torch.cat([none, *(units[u][i] for i in orders[u][:size])]))
    enough = [sum(len(unit) >= size for unit in own) for size in sizes]
    return Shots(rows, list(sizes), trials, enough)


def _targets(pools: _Pools, asked: Tensor, generator: torch.Generator) -> Tensor:
    """Some of each user's own pairs [U, T, 1 + K]."""
    draws = torch.rand(pools.there.shape, generator=generator).masked_fill(~pools.there, 2.0)
    some = draws.argsort(1)[:, :TARGETS]
    some = torch.where(pools.there.gather(1, some), some, some[:, :1])
    return asked[pools.rows.gather(1, some)]


def _known(
    fit: Fitted, view: View, few: Users, asked: Tensor, prior: Prior,
    units: Sequence[Sequence[Tensor]], orders: Sequence[Sequence[int]], criterion: str,
    generator: torch.Generator,
) -> Known:  # fmt: skip
    """What the answers so far say of every user."""
    none = torch.empty(0, dtype=torch.long)
    picked = [
        torch.cat([none, *(own[i] for i in order)])
        for own, order in zip(units, orders, strict=True)
    ]
    rows, counts = torch.cat(picked), [len(one) for one in picked]
    users = Users(counts, few.weight.cpu()[rows])
    state = prior.state.repeat(len(units), 1)
    if len(rows):
        state = posterior_states(Evidence(asked[rows], users), prior, tolerance=1e-6)
    if criterion != "pref":
        return Known(state, len(prior.weight), asked.new_zeros(len(units), 0, asked.shape[1]))
    padded = torch.nn.utils.rnn.pad_sequence([asked[one] for one in picked], batch_first=True)
    there = rows.to(few.device)
    point = fit.point(fit.adapt(view[there], few.pick(there, counts), generator))
    return Known(state, len(prior.weight), padded, point.double().cpu())


def _scores(
    criterion: str, known: Known, pools: _Pools, asked: Tensor, targets: Tensor | None
) -> Tensor:
    """Of every comparison [U, m], as many users at once as memory holds."""
    m, width = pools.rows.shape[1], known.components * WIDTH.get(criterion, 1)
    found = []
    for some in torch.arange(len(pools.rows)).split(max(1, CELLS // (m * width))):
        here = Known(known.state[some], known.components, known.asked[some],
                     None if known.point is None else known.point[some])  # fmt: skip
        rows = asked[pools.rows[some]].mT
        found.append(score(criterion, here, rows, None if targets is None else targets[some]))
    return torch.cat(found)


def _choose(
    found: Tensor, pools: _Pools, orders: Sequence[Sequence[int]], left: Sequence[int],
    generator: torch.Generator,
) -> list[int]:  # fmt: skip
    """The next shot of every user who has one left."""
    U, shots = len(found), int(pools.unit.max()) + 1
    gain = found.new_zeros(U, shots + 1).scatter_add_(1, pools.unit, found * pools.there)
    places = torch.arange(U)[:, None].expand_as(pools.unit)
    exists = torch.zeros(U, shots + 1, dtype=torch.bool)
    exists[places[pools.there], pools.unit[pools.there]] = True
    done = torch.zeros_like(exists)
    for u, order in enumerate(orders):
        done[u, list(order)] = True
    told = (done.gather(1, pools.unit) & pools.there).long()
    seen = told.new_zeros(U, int(pools.pair.max()) + 1).scatter_add_(1, pools.pair, told) > 0
    again = seen.gather(1, pools.pair) & pools.there
    old = torch.zeros_like(exists)
    old[places[again], pools.unit[again]] = True
    still = exists & ~done
    new = still & ~old
    still = torch.where(new.any(1, keepdim=True), new, still)
    rows = torch.tensor(left)
    return best(gain[rows], still[rows], generator).tolist()
