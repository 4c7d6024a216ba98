"""Which comparison to ask a user about next: criteria, and what is known of the user's tastes.

A question is a pair of responses, and its log odds are a + z . b: a is the shared reward
difference, z [K] what the pair asks of tastes, b the user's tastes, of which a Gaussian posterior
is known. Criteria see questions and the answers so far, no other answer.

Shape letters: U users, n questions, K directions of taste. A question is a row [1 + K], a and z;
which of its two responses comes first changes no score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lore.common.files import require
from lore.learning.comparisons import Seed, Users, as_generator
from lore.methods.fitting.posterior import Prior, covariances, posteriors

Criterion = Literal["random", "d_optimal", "information"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
SHORT_LIST = 512  # questions whose information is formed exactly, of those a closed form puts first
NODES = 32  # of the quadrature
TIE = 1e-6  # scores nearer to the best than this share of it are as good


@dataclass(frozen=True)
class Belief:
    """What is known of one user's tastes: the prior and the answers so far.

    Attributes:
        prior: the population's tastes.
        answers: rows of what was answered, preferred minus other [m, 1 + K].
        mean, covariance: of the posterior [K] and [K, K].
    """

    prior: Prior
    answers: Tensor
    mean: Tensor
    covariance: Tensor

    @classmethod
    def after(cls, prior: Prior, answers: Tensor) -> Belief:
        """After some answers [m, 1 + K], preferred minus other; m may be 0."""
        answers = answers.double()
        users = Users([len(answers)])
        found = posteriors(answers, users, prior)
        return cls(prior, answers, found.mode[0], covariances(answers, users, prior, found)[0])

    def update(self, question: Tensor, won: bool = True) -> Belief:
        """After one more answer.

        Args:
            question: first response minus second [1 + K].
            won: whether the first was preferred.
        """
        row = question.to(self.answers) * (1 if won else -1)
        return Belief.after(self.prior, torch.cat([self.answers, row[None]]))


class Pool:
    """Questions that may be asked of a user, prepared once so that each choice is quick.

    Args:
        questions: [n, 1 + K].

    Attributes:
        rows: the questions in float32, transposed [1, 1 + K, n].
        pair: a number for each distinct question [n]; the two orders of a pair are one question.
    """

    def __init__(self, questions: Tensor) -> None:
        require(len(questions) > 0, "there is nothing to ask: no question in the pool")
        require(bool(torch.isfinite(questions).all()), "a question has NaN or infinity in it")
        self.rows = questions.T.float().contiguous()[None]
        self.pair = distinct(questions)

    def __len__(self) -> int:
        return len(self.pair)


def distinct(questions: Tensor) -> Tensor:
    """A number for each distinct question [n]; rows that differ in sign alone are one [n, 1 + K].

    Rows are told apart by a random product, formed column by column so that equal rows have equal
    products to the last bit.
    """
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(questions.shape[1], generator=g, dtype=torch.float64).tolist()
    key = questions.new_zeros(len(questions), dtype=torch.float64)
    for column, factor in zip(questions.double().T, factors, strict=True):
        key = key + column * factor
    return torch.unique(key.abs(), return_inverse=True)[1]


def next_question(
    belief: Belief,
    pool: Pool | Tensor,
    criterion: Criterion = "information",
    asked: Sequence[int] = (),
    generator: Seed = None,
) -> int:
    """The number of the question of a pool to ask next.

    A question that was asked, also the other way round or as another row, is asked again only when
    no other is left; a row comes up once. Among questions of the same score one is drawn.

    Args:
        belief: what is known of the user.
        pool: the questions, or a tensor of them [n, 1 + K].
        criterion: see ``score``.
        asked: numbers of the questions that were asked, answered or not.
        generator: of the draw among the best.

    Raises:
        InputError: nothing is left to ask, or there is no such criterion.
    """
    require(criterion in CRITERIA, f"criterion {criterion}: there are {', '.join(CRITERIA)}")
    pool = pool if isinstance(pool, Pool) else Pool(pool)
    still, rows = _still_open(pool, asked), torch.arange(len(pool))
    moments = belief.mean[None], belief.covariance[None]
    if criterion == "information" and len(pool) > SHORT_LIST:
        rough = rough_information(*_reach(*moments, pool.rows))[0]
        rows = rough.masked_fill(~still, -math.inf).topk(SHORT_LIST).indices
        rows = rows[still[rows]]
    found = score(criterion, *moments, pool.rows[:, :, rows])
    return int(rows[best(found, still[rows][None], generator)[0]])


def _still_open(pool: Pool, asked: Sequence[int]) -> Tensor:
    """Which questions [n] may be asked: none a second time as long as there are others."""
    still = torch.ones(len(pool), dtype=torch.bool)
    if len(asked):
        still[list(asked)] = False
        require(bool(still.any()), "there is nothing left to ask: every question was asked")
        was_asked = torch.zeros(len(pool), dtype=torch.bool)
        was_asked[pool.pair[list(asked)]] = True
        new = still & ~was_asked[pool.pair]
        still = new if new.any() else still
    return still


def best(scores: Tensor, still: Tensor, generator: Seed = None) -> Tensor:
    """The place of the best score of each user [U], drawn among those as good.

    Args:
        scores: [U, n].
        still: which may be taken [U, n]; at least one of each user.
        generator: of the draws, one number a user.
    """
    scores = scores.masked_fill(~still, -math.inf)
    top = scores.amax(1, keepdim=True)
    good = still & (scores >= top - TIE * top.abs())
    counts, places = good.sum(1), good.nonzero()[:, 1]
    share = torch.rand(len(scores), generator=as_generator(generator)).to(scores.device)
    pick = (share * counts).long().clamp(max=counts - 1)
    return places[counts.cumsum(0) - counts + pick]


# ---------------------------------------------------------------------- The criteria


def score(criterion: str, mean: Tensor, cov: Tensor, rows: Tensor) -> Tensor:
    """How much each question is worth [U, n]; more is better.

    - random: all the same.
    - d_optimal: p (1 - p) z' S z with the posterior's mode and covariance S: how much an answer
      shrinks the posterior's volume.
    - information: mutual information of the answer and b, in nats (BALD; Houlsby et al., 2011).

    Args:
        mean, cov: of the users' posteriors [U, K] and [U, K, K].
        rows: questions [U, 1 + K, n]; one user's may serve all.
    """
    if criterion == "random":
        return rows.new_zeros(len(mean), rows.shape[2])
    logits, variance = _reach(mean, cov, rows)
    if criterion == "information":
        return information(logits, variance)
    p = torch.sigmoid(logits)
    return p * (1 - p) * variance


def _reach(mean: Tensor, cov: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of log odds [U, n]; all is formed in the questions' precision."""
    a, Z = rows[:, 0], rows[:, 1:]
    mean, cov = mean.to(rows), cov.to(rows)
    logits = a + (mean[:, None] @ Z)[:, 0]
    return logits, (cov @ Z).mul_(Z).sum(1).clamp_(min=0)  # in place: new memory costs more


def information(a: Tensor, v: Tensor) -> Tensor:
    """Mutual information [U, n] of an answer and the tastes: H(E p) - E H(p), in nats.

    Log odds are one-dimensional, so both expectations are quadratures over a normal variable.

    Args:
        a, v: means and variances of the log odds [U, n].
    """
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    t = a[..., None] + v.sqrt()[..., None] * torch.from_numpy(points).to(a)
    weights = torch.from_numpy(weights / weights.sum()).to(a)
    return (_entropy(torch.sigmoid(t) @ weights) - _uncertainty(t) @ weights).clamp(min=0)


def _entropy(p: Tensor) -> Tensor:
    """Of a yes with probability p, in nats."""
    p = p.clamp(0, 1)
    return torch.special.entr(p) + torch.special.entr(1 - p)


def _uncertainty(t: Tensor) -> Tensor:
    """Entropy of a yes with log odds t, in nats; also where the probability rounds to 1."""
    size = t.abs()
    less = torch.exp(-size)
    return torch.log1p(less) + size * less / (1 + less)


def rough_information(a: Tensor, v: Tensor) -> Tensor:
    """``information`` in closed form [U, n], for a short list; a few per cent off.

    The sigmoid is taken for a normal distribution function, and the entropy of an answer for
    log 2 exp(-t^2 / (8 log 2)), which has its height and curvature at t = 0.
    """
    width = 2 * v + 8 * math.log(2)
    noise = (-a.square() / width).exp() * (8 * math.log(2) / width).sqrt() * math.log(2)
    return _uncertainty(a * (1 + math.pi / 8 * v).rsqrt()) - noise
