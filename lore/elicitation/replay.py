"""New users' shots chosen by a criterion instead of at random, replayed from recorded comparisons.

All users are asked at the same time, one question a round. A question is a shot: a comparison, or a
whole dialogue, whose comparisons' scores are summed. Records are chosen minus rejected, but scores
do not depend on the order within a pair, so no label is seen before its question is asked.

Shape letters: U users, m comparisons of a user at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lore.elicitation.criteria import NODES, best, distinct, score
from lore.learning.comparisons import Comparisons, Shots, Users
from lore.learning.method import Fitted
from lore.methods.fitting.posterior import Prior, covariances, posteriors

CELLS = 1 << 21  # numbers that are formed at once


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
    fit: Fitted, few: Comparisons, sizes: Sequence[int], criterion: str, generator: torch.Generator
) -> Shots:
    """Every new user's shots in the order in which the criterion asks for them.

    What was asked for 5 shots is the beginning of what is asked for 10.

    Args:
        fit: of which ``population`` is not None.
        few: the new users' comparisons.
        sizes: numbers of shots.
        criterion: see ``criteria.score``; not "random".
        generator: of the draw among equally good questions.
    """
    units, population = few.units(), fit.population()
    assert population is not None
    asked = fit.questions(fit.view(few)).double().cpu()
    prior = Prior(population.mean.double().cpu(), population.cov.double().cpu())
    pools = _Pools.of(units, distinct(asked))
    orders: list[list[int]] = [[] for _ in units]
    for _ in range(max(sizes)):
        left = [u for u, order in enumerate(orders) if len(order) < len(units[u])]
        if not left:
            break
        found = _scores(criterion, few, prior, pools, asked, _picked(units, orders))
        chosen = _choose(found, pools, orders, left, generator)
        for u, unit in zip(left, chosen, strict=True):
            orders[u].append(unit)
    rows = [
        one for size in sizes for one in _picked(units, [order[:size] for order in orders])
    ]
    enough = [sum(len(unit) >= size for unit in units) for size in sizes]
    return Shots(rows, list(sizes), 1, enough)


def _picked(
    units: Sequence[Sequence[Tensor]], orders: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The numbers of the comparisons that were asked of each user."""
    none = torch.empty(0, dtype=torch.long)
    return [
        torch.cat([none, *(own[i] for i in order)])
        for own, order in zip(units, orders, strict=True)
    ]


def _scores(
    criterion: str, few: Users, prior: Prior, pools: _Pools, asked: Tensor,
    picked: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Of every comparison [U, m], given the answers so far."""
    m, K = pools.rows.shape[1], asked.shape[1] - 1
    at_once = max(1, CELLS // max(m * NODES, m * K, K * K))
    found = []
    for first in range(0, len(picked), at_once):
        some = picked[first : first + at_once]
        rows = torch.cat(list(some))
        users = Users([len(one) for one in some], few.weight.cpu()[rows])
        known = posteriors(asked[rows], users, prior, tolerance=1e-6)
        cov = covariances(asked[rows], users, prior, known)
        pool = asked[pools.rows[first : first + at_once]].mT
        found.append(score(criterion, known.mode, cov, pool))
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
    was_asked = (done.gather(1, pools.unit) & pools.there).long()
    pairs = int(pools.pair.max()) + 1
    seen = was_asked.new_zeros(U, pairs).scatter_add_(1, pools.pair, was_asked) > 0
    again = seen.gather(1, pools.pair) & pools.there
    old = torch.zeros_like(exists)
    old[places[again], pools.unit[again]] = True
    still = exists & ~done
    new = still & ~old
    still = torch.where(new.any(1, keepdim=True), new, still)
    rows = torch.tensor(left)
    return best(gain[rows], still[rows], generator).tolist()
