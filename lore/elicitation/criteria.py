"""Which comparison to ask a user about next, given what the answers so far say of the user.

A comparison is a row [1 + K], a and z, of log odds a + z . b: a is the shared reward difference,
b the user's K tastes, of which a Gaussian posterior is known. Its sign changes no choice.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lore.common.files import require
from lore.learning.comparisons import Comparisons, Seed, Shots, Users, as_generator
from lore.learning.method import Fitted
from lore.methods.fitting.posterior import Prior, covariances, posteriors

Criterion = Literal["random", "d_optimal"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
TIE = 1e-6  # gains nearer to the greatest than this share of it are as good
CELLS = 1 << 24  # numbers of the covariances that are formed at once


class UserPosterior(NamedTuple):
    """What is known of one user's tastes: mean [K] and covariance [K, K]."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def after(cls, prior: Prior, answers: Tensor, weight: Tensor | None = None) -> "UserPosterior":
        """The posterior after m answers [m, 1 + K], preferred minus other, of some weights [m]."""
        return user_posteriors(prior, answers.double(), Users([len(answers)], weight))[0]


def user_posteriors(prior: Prior, answers: Tensor, users: Users) -> list[UserPosterior]:
    """Each user's posterior, by Laplace's method, after answers [N, 1 + K] of several users."""
    found = posteriors(answers, users, prior)
    covs = covariances(answers, users, prior, found)
    return [UserPosterior(*both) for both in zip(found.mode, covs, strict=True)]


class QuestionPool:
    """Questions to a user, prepared once: comparisons [n, 1 + K], ``sizes`` of them in each."""

    def __init__(self, rows: Tensor, sizes: Sequence[int] | None = None) -> None:
        require(len(rows) > 0, "there is nothing to ask: no question in the pool")
        require(bool(torch.isfinite(rows).all()), "a question has NaN or infinity in it")
        self.rows, self.pair = rows, distinct(rows)
        self.sizes = [1] * len(rows) if sizes is None else sizes
        self.question = torch.repeat_interleave(torch.tensor(self.sizes))  # of each comparison

    def __len__(self) -> int:
        return len(self.sizes)

    def open(self, earlier: Sequence[int]) -> Tensor:
        """Which questions may be asked now; one with a pair that was asked only if all have one."""
        left = torch.ones(len(self), dtype=torch.bool)
        left[list(earlier)] = False
        require(bool(left.any()), "there is nothing left to ask: every question was asked")
        asked = torch.isin(self.pair, self.pair[~left[self.question]])
        new = left.clone()
        new[self.question[asked]] = False
        return new if new.any() else left


def distinct(rows: Tensor) -> Tensor:
    """A number for each distinct row [n, 1 + K], whichever its sign [n]."""
    first = (rows != 0).int().argmax(1, keepdim=True)
    turned = rows * rows.gather(1, first).sign() + 0.0  # no row begins with a minus, nor has -0
    return torch.unique(turned, dim=0, return_inverse=True)[1]


def next_question(
    posterior: UserPosterior, pool: QuestionPool, criterion: Criterion = "d_optimal",
    earlier: Sequence[int] = (), generator: Seed = None,
) -> int:  # fmt: skip
    """The number of the question of a pool to ask next; InputError if nothing is left to ask.

    It has the greatest sum over its comparisons of p (1 - p) z' S z, with the posterior's mode and
    covariance S: how much an answer shrinks the posterior's volume. The generator draws among equal
    ones, and for "random" all are. ``earlier`` numbers those asked before, answered or not.
    """
    require(criterion in CRITERIA, f"criterion {criterion}: there are {', '.join(CRITERIA)}")
    total, Z = pool.rows.new_zeros(len(pool)), pool.rows[:, 1:]
    if criterion == "d_optimal":
        mean, cov = (known.to(Z) for known in posterior)
        p = torch.sigmoid(pool.rows[:, 0] + Z @ mean)
        gains = p * (1 - p) * ((Z @ cov) * Z).sum(1).clamp(min=0)
        total.index_add_(0, pool.question, gains)
    total[~pool.open(earlier)] = -math.inf
    good = (total >= total.max() - TIE * total.max().abs()).nonzero()[:, 0]
    return int(good[torch.randint(len(good), (), generator=as_generator(generator))])


def choose_shots(
    fit: Fitted, few: Comparisons, sizes: Sequence[int], criterion: str, generator: torch.Generator
) -> Shots:
    """New users' shots in the order in which the criterion asks for them, instead of at random.

    A shot is one of ``few.units()``; the first of 10 shots are those of 5. No label is used before
    its question is asked. The fit's ``population`` must not be None.
    """
    units, population = few.units(), fit.population()
    prior = Prior(population.mean.double().cpu(), population.cov.double().cpu())
    questions, weight = fit.questions(fit.view(few)).cpu(), few.weight.cpu()
    orders: list[list[int]] = [[] for _ in units]

    def shots(u: int, size: int) -> Tensor:
        return torch.cat([units[u][0][:0], *(units[u][i] for i in orders[u][:size])])

    at_once = max(1, CELLS // prior.cov.numel())
    for first in range(0, len(units), at_once):
        block = range(len(units))[first : first + at_once]
        pools = [QuestionPool(questions[torch.cat(units[u])], [*map(len, units[u])]) for u in block]
        for number in range(min(max(sizes), max(map(len, pools)))):
            picked = [shots(u, number) for u in block]
            rows = torch.cat(picked)
            users = Users(list(map(len, picked)), weight[rows])
            known = user_posteriors(prior, questions[rows], users)
            for u, posterior, pool in zip(block, known, pools, strict=True):
                if len(orders[u]) < len(pool):
                    asked = next_question(posterior, pool, criterion, orders[u], generator)
                    orders[u].append(asked)
    rows = [shots(u, size) for size in sizes for u in range(len(units))]
    that_many = [sum(len(own) >= size for own in units) for size in sizes]
    return Shots(rows, list(sizes), 1, that_many)
