"""Which comparison to ask a user about next, how sure the answers make us, what more would add.

A comparison is a row [1 + K], a and z, of log odds a + z . b: a is the shared reward difference,
b the user's K tastes, of which a Gaussian posterior is known. Its sign changes no choice. We are as
sure as the *expected accuracy*: the chance that the better of two responses by the posterior is the
one that the person prefers, on average over pairs. It can be foretold: how much an answer shrinks
the posterior's covariance hardly depends on which answer it is.
"""

import math
from collections.abc import Iterator, Sequence
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
HORIZON = 20  # questions ahead
# The logistic function as a mixture of normal ones (Monahan and Stefanski, 1992), within 6e-5.
SHARES, SLOPES = (0.25220, 0.58522, 0.16257), (0.90793, 0.57778, 0.36403)
POINTS = 64  # of the average over where the mean moves; the integrand has a kink


class UserPosterior(NamedTuple):
    """What is known of one user's tastes: mean [K] and covariance [K, K]."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def after(cls, prior: Prior, answers: Tensor, weight: Tensor | None = None) -> "UserPosterior":
        """The posterior, by Laplace's method, after m answers [m, 1 + K], preferred minus other, of
        some weights [m]."""
        answers, users = answers.double(), Users([len(answers)], weight)
        found = posteriors(answers, users, prior)
        return cls(found.mode[0], covariances(answers, users, prior, found)[0])


class QuestionPool:
    """Questions to a user, prepared once: comparisons [n, 1 + K], ``sizes`` of them in each."""

    def __init__(self, rows: Tensor, sizes: Sequence[int] | None = None) -> None:
        self.rows, self.sizes = rows, [1] * len(rows) if sizes is None else sizes
        self.question = torch.repeat_interleave(torch.tensor(self.sizes))  # of each comparison
        first = (rows != 0).int().argmax(1, keepdim=True)
        turned = rows * rows.gather(1, first).sign() + 0.0  # no row begins with a minus, nor has -0
        self.pair = torch.unique(turned, dim=0, return_inverse=True)[1]  # alike whichever the sign


def next_question(
    posterior: UserPosterior, pool: QuestionPool, criterion: Criterion = "d_optimal",
    earlier: Sequence[int] = (), generator: Seed = None,
) -> int:  # fmt: skip
    """The number of the question of a pool to ask next; InputError if nothing is left to ask.
    It has the greatest sum over its comparisons of p (1 - p) z' S z, with the posterior's mode and
    covariance S: how much an answer shrinks the posterior's volume. The generator draws among equal
    ones, and for "random" all are. ``earlier`` numbers those asked before, answered or not; a
    question with a pair that was asked comes only if all that are left have one."""
    left = torch.ones(len(pool.sizes), dtype=torch.bool)
    left[list(earlier)] = False
    require(bool(left.any()), "there is nothing left to ask: every question was asked")
    asked, new = torch.isin(pool.pair, pool.pair[~left[pool.question]]), left.clone()
    new[pool.question[asked]] = False
    total, Z = pool.rows.new_zeros(len(left)), pool.rows[:, 1:]
    if criterion == "d_optimal":
        mean, cov = (known.to(Z) for known in posterior)
        p = torch.sigmoid(pool.rows[:, 0] + Z @ mean)
        total.index_add_(0, pool.question, p * (1 - p) * ((Z @ cov) * Z).sum(1).clamp(min=0))
    total[~(new if new.any() else left)] = -math.inf
    good = (total >= total.max() - TIE * total.max().abs()).nonzero()[:, 0]
    return int(good[torch.randint(len(good), (), generator=as_generator(generator))])


def choose_shots(
    fit: Fitted, few: Comparisons, sizes: Sequence[int], criterion: str, generator: torch.Generator
) -> Shots:
    """New users' shots in the order in which the criterion asks for them, instead of at random. A
    shot is one of ``few.units``; the first of 10 shots are those of 5. No label is used before
    its question is asked. The fit's ``population`` must not be None."""
    units, population = few.units, fit.population()
    prior = Prior(population.mean.double().cpu(), population.cov.double().cpu())
    questions, weight = fit.questions(fit.view(few)).cpu(), few.weight.cpu()
    orders: list[list[int]] = [[] for _ in units]

    def shots(u: int, size: int) -> Tensor:
        return torch.cat([units[u][0][:0], *(units[u][i] for i in orders[u][:size])])

    at_once = max(1, CELLS // prior.cov.numel())
    for first in range(0, len(units), at_once):
        block = range(len(units))[first : first + at_once]
        pools = [QuestionPool(questions[torch.cat(units[u])], [*map(len, units[u])]) for u in block]
        for number in range(min(max(sizes), max(len(units[u]) for u in block))):
            picked = [shots(u, number) for u in block]
            rows = torch.cat(picked)
            answers, users = questions[rows], Users(list(map(len, picked)), weight[rows])
            found = posteriors(answers, users, prior)
            covs = covariances(answers, users, prior, found)
            for u, pool, *known in zip(block, pools, found.mode, covs, strict=True):
                if number < len(units[u]):
                    given = UserPosterior(*known), pool, criterion, orders[u], generator
                    orders[u].append(next_question(*given))
    rows = [shots(u, size) for size in sizes for u in range(len(units))]
    that_many = [sum(len(own) >= size for own in units) for size in sizes]
    return Shots(rows, list(sizes), 1, that_many)


def look_ahead(posterior: UserPosterior, targets: Tensor, pool: Tensor) -> list[float]:
    """Expected accuracies, 0.5 to 1, now and after 1, 2, ... more questions, the D-optimal ones of
    a pool [N, 1 + K]; the targets [T, 1 + K] are the pairs whose order matters."""
    Z = targets[:, 1:]
    logits = targets[:, 0] + Z @ posterior.mean
    covs = [posterior.covariance, *_shrunk(posterior, pool)]
    variances = [((Z @ cov) * Z).sum(1).clamp(min=0) for cov in covs]
    return [float(expected_accuracy(logits, variances[0], later)) for later in variances]


def useful_questions(accuracy: Sequence[float], tolerance: float) -> int:
    """After how many questions looked ahead to the rest of them gains no more than a tolerance."""
    enough = max(accuracy) - tolerance
    return next(number for number, value in enumerate(accuracy) if value >= enough)


def expected_accuracy(logits: Tensor, now: Tensor, later: Tensor) -> Tensor:
    """Chance that the preferred response is foretold later, averaged over pairs, from means [T] and
    variances [T] of their log odds now and later: the means move by normal variables of variance
    now - later."""
    levels = (torch.arange(POINTS).to(logits) + 0.5) / POINTS
    moved = (now - later).clamp(min=0).sqrt()[:, None] * torch.special.ndtri(levels)
    sure = (logits[:, None] + moved).abs()
    parts = _normal_parts(later)
    return sum(share * torch.special.ndtr(sure * slope[:, None]).mean() for share, slope in parts)


def _normal_parts(variance: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Shares and slopes of normal distribution functions that make E sigmoid(t) for normal t."""
    for share, slope in zip(SHARES, SLOPES, strict=True):
        yield share, slope / (1 + slope**2 * variance).sqrt()


def _shrunk(posterior: UserPosterior, pool: Tensor) -> Iterator[Tensor]:
    """Covariances after 1, 2, ... questions, each the D-optimal one of those that are left."""
    Z, cov = pool[:, 1:], posterior.covariance
    logits, left = pool[:, 0] + Z @ posterior.mean, torch.ones(len(pool), dtype=torch.bool)
    for _ in range(min(HORIZON, len(pool))):
        variance = ((Z @ cov) * Z).sum(1).clamp(min=0)
        information = sum(  # E[p (1 - p)] over the log odds: at their mean alone it is too high
            share * slope * (-(slope * logits).square() / 2).exp() / math.sqrt(2 * math.pi)
            for share, slope in _normal_parts(variance)
        )
        gain = information * variance
        best = int(torch.where(left, gain, -1.0).argmax())
        left[best] = False
        spread = cov @ Z[best]
        cov = cov - torch.outer(spread, spread) * (information[best] / (1 + gain[best]))
        yield cov
