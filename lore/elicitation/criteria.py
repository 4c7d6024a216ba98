"""Which comparison to ask a user about next: criteria, and what is known of the user's tastes.

A question is a pair of responses, and its log odds are a + z . b: a is the shared reward
difference, z [K] what the pair asks of tastes, b the user's tastes. What is known of b is a
Gaussian or a mixture of C of them. Criteria see questions and the answers so far, no other answer.

Shape letters: U users, n questions, K directions of taste, C components, T target pairs. A question
is a row [1 + K], a and z; which of its two responses comes first changes no score.
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
from lore.methods.fitting.posterior import (
    NODES_OF_PROBABILITIES,
    Evidence,
    Prior,
    moments,
    posterior_states,
    quadrature,
    unpack,
)

Criterion = Literal["random", "pref", "d_optimal", "information", "ranking"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
PREF_RIDGE = 1e-3  # of PReF's published matrix
# Questions that a criterion looks at exactly, of those that a closed form puts first.
SHORT_LIST = {"information": 512, "ranking": 64}
SHORT_LIST_OF_MIXTURES = 512  # which closed forms know less well
MOST_TARGETS = 50  # pairs of the pool whose order "ranking" asks about, if none are given
TIE = 1e-6  # scores nearer to the best than this share of it are as good
# The logistic function as a mixture of normal ones (Monahan and Stefanski, 1992), within 6e-5.
SHARES, SLOPES = (0.25220, 0.58522, 0.16257), (0.90793, 0.57778, 0.36403)
ARC = 10  # nodes of the integral over correlations


@dataclass(frozen=True)
class Belief:
    """What is known of one user's tastes: the prior and the answers so far.

    Attributes:
        prior: the population's tastes.
        answers: rows of what was answered, preferred minus other [m, 1 + K].
        state: the posterior [S], exactly as the mixed logit has it.
    """

    prior: Prior
    answers: Tensor
    state: Tensor

    @classmethod
    def start(cls, prior: Prior) -> Belief:
        """Before any answer."""
        return cls(prior, prior.mean.new_zeros(0, 1 + prior.mean.shape[1]), prior.state)

    def update(self, question: Tensor, won: bool = True) -> Belief:
        """After one more answer.

        Args:
            question: first response minus second [1 + K].
            won: whether the first was preferred.
        """
        row = question.to(self.answers) * (1 if won else -1)
        answers = torch.cat([self.answers, row[None]])
        state = posterior_states(Evidence(answers, Users([len(answers)])), self.prior)[0]
        return Belief(self.prior, answers, state)

    @property
    def mean(self) -> Tensor:
        """Mean of the tastes [K]."""
        return moments(self.state[None], len(self.prior.weight))[0][0]

    @property
    def covariance(self) -> Tensor:
        """Covariance of the tastes [K, K]."""
        return moments(self.state[None], len(self.prior.weight))[1][0]


@dataclass(frozen=True)
class Known:
    """What is known of U users.

    Attributes:
        state: their posteriors [U, S].
        components: C.
        asked: questions already answered [U, m, 1 + K], padded with zeros.
        point: estimates of the tastes [U, K] for PReF's criterion; the posterior means if None.
    """

    state: Tensor
    components: int
    asked: Tensor
    point: Tensor | None = None


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
    criterion: Criterion = "d_optimal",
    asked: Sequence[int] = (),
    generator: Seed = None,
    targets: Tensor | None = None,
    point: Tensor | None = None,
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
        targets: pairs whose order matters [T, 1 + K], for "ranking"; the pool's own if None.
        point: estimate of the tastes [K] for "pref"; the belief's mean if None.

    Raises:
        InputError: nothing is left to ask, or there is no such criterion.
    """
    require(criterion in CRITERIA, f"criterion {criterion}: there are {', '.join(CRITERIA)}")
    pool = pool if isinstance(pool, Pool) else Pool(pool)
    generator = as_generator(generator)
    still = _still_open(pool, asked)
    known = Known(
        belief.state[None], len(belief.prior.weight), belief.answers[None],
        None if point is None else point[None],
    )  # fmt: skip
    if criterion != "ranking":
        targets = None
    elif targets is None:
        some = torch.randperm(len(pool), generator=generator)[:MOST_TARGETS]
        targets = pool.rows[0, :, some].T
    several = None if targets is None else targets[None]
    most = SHORT_LIST.get(criterion, len(pool))
    if criterion in SHORT_LIST and known.components > 1:
        most = SHORT_LIST_OF_MIXTURES
    if len(pool) <= most:
        found = score(criterion, known, pool.rows, several)
        return int(best(found, still[None], generator)[0])
    short = _short_list(most, known, pool, still, several)
    found = score(criterion, known, pool.rows[:, :, short], several)
    return int(short[best(found, torch.ones_like(found, dtype=torch.bool), generator)[0]])


def _short_list(
    most: int, known: Known, pool: Pool, still: Tensor, targets: Tensor | None
) -> Tensor:
    """Numbers of questions that may be asked: those with most information by a closed form, on
    the order of target pairs if there are any."""
    if targets is None:
        rough = rough_information(known, pool.rows)
    else:
        rough = rough_ranking_information(known, pool.rows, targets)
    first = rough[0].masked_fill_(~still, -math.inf).topk(most).indices
    return first[still[first]]


def _still_open(pool: Pool, asked: Sequence[int]) -> Tensor:
    """Which questions [n] may be asked: none a second time as long as there are others."""
    still = torch.ones(len(pool), dtype=torch.bool)
    if len(asked):
        still[list(asked)] = False
        require(bool(still.any()), "there is nothing left to ask: every question was asked")
        told = torch.zeros(len(pool), dtype=torch.bool)
        told[pool.pair[list(asked)]] = True
        new = still & ~told[pool.pair]
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


def score(criterion: str, known: Known, rows: Tensor, targets: Tensor | None = None) -> Tensor:
    """How much each question is worth [U, n]; more is better.

    - random: all the same.
    - pref: (p (1 - p))^2 z' M^-1 z with M = 1e-3 I + sum over what was asked of p (1 - p) z z', the
      rule of PReF's published code, p being the point estimate's; the first question is random.
    - d_optimal: p (1 - p) z' S z with the posterior's mean and covariance S, which has the
      population's prior in it: how much an answer shrinks the posterior's volume.
    - information: mutual information of the answer and b, in nats (BALD; Houlsby et al., 2011).
    - ranking: mutual information of the answer and which of a target pair's responses has the
      higher reward, the mean over target pairs.

    Args:
        known: what is known of the users.
        rows: questions [U, 1 + K, n]; one user's may serve all.
        targets: pairs [U, T, 1 + K] for "ranking".
    """
    if criterion == "random" or (criterion == "pref" and known.asked.shape[1] == 0):
        return rows.new_zeros(len(known.state), rows.shape[2])
    if criterion == "pref":
        return _pref(known, rows)
    if criterion == "d_optimal":
        logits, variance = _reach(*_moments(known), rows)
        return _slope(logits) * variance
    if criterion == "information":
        weight, mean, cov = unpack(known.state, known.components)
        return information(weight, *_reach(mean, cov, rows[:, None].to(mean)))
    assert targets is not None
    return ranking_information(known, rows, targets)


def _moments(known: Known) -> tuple[Tensor, Tensor]:
    return moments(known.state, known.components)


def _reach(mean: Tensor, cov: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of log odds [..., n]; all is formed in the questions' precision."""
    a, Z = rows[..., 0, :], rows[..., 1:, :]
    mean, cov = mean.to(rows), cov.to(rows)
    logits = a + (mean[..., None, :] @ Z)[..., 0, :]
    return logits, (cov @ Z).mul_(Z).sum(-2).clamp_(min=0)  # in place: new memory costs more


def _slope(logits: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return p * (1 - p)


def _pref(known: Known, rows: Tensor) -> Tensor:
    point = _moments(known)[0] if known.point is None else known.point.to(known.state)
    asked = known.asked.to(point)
    Z = asked[..., 1:]
    slope = _slope(asked[..., 0] + (Z @ point[:, :, None])[..., 0])
    M = PREF_RIDGE * torch.eye(Z.shape[2]).to(Z) + Z.mT @ (slope[..., None] * Z)
    logits, spread = _reach(point, torch.linalg.inv(M), rows)
    return _slope(logits).square() * spread


def information(weight: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """Mutual information [U, n] of an answer and the tastes: H(E p) - E H(p), in nats.

    Log odds are one-dimensional, so both expectations are quadratures over a normal variable.

    Args:
        weight: of the components [U, C].
        a, v: means and variances of the log odds under each [U, C, n].
    """
    points, weights = quadrature(NODES_OF_PROBABILITIES, a)
    t = a[..., None] + v.sqrt()[..., None] * points
    yes, noise = torch.sigmoid(t) @ weights, _uncertainty(t) @ weights
    mixed = (weight[:, :, None] * torch.stack([yes, noise])).sum(2)
    return (_entropy(mixed[0]) - mixed[1]).clamp(min=0)


def _entropy(p: Tensor) -> Tensor:
    """Of a yes with probability p, in nats."""
    p = p.clamp(0, 1)
    return torch.special.entr(p) + torch.special.entr(1 - p)


def _uncertainty(t: Tensor) -> Tensor:
    """Entropy of a yes with log odds t, in nats; also where the probability rounds to 1."""
    size = t.abs()
    less = torch.exp(-size)
    return torch.log1p(less) + size * less / (1 + less)


def rough_information(known: Known, rows: Tensor) -> Tensor:
    """``information`` in closed form [U, n], for a short list; a few per cent off.

    The sigmoid is taken for a normal distribution function, and the entropy of an answer for
    log 2 exp(-t^2 / (8 log 2)), which has its height and curvature at t = 0.
    """
    a, v = _reach(*_moments(known), rows)
    width = (2 * v).add_(8 * math.log(2))
    noise = (-a.square() / width).exp_() * (8 * math.log(2) / width).sqrt_() * math.log(2)
    return _uncertainty(a * (1 + math.pi / 8 * v).rsqrt()) - noise


def ranking_information(known: Known, rows: Tensor, targets: Tensor) -> Tensor:
    """Mean over target pairs of the information [U, n] on which response has the higher reward.

    Never more than ``information``. The logistic function is a mixture of three normal ones, so
    that an answer and an order are jointly a mixture of bivariate normal variables.

    Args:
        known: what is known of the users.
        rows: questions [U, 1 + K, n].
        targets: pairs [U, T, 1 + K].
    """
    weight, mean, cov = unpack(known.state, known.components)
    rows, targets = rows[:, None].to(mean), targets[:, None].to(mean).mT
    a, v = _reach(mean, cov, rows)
    m, s = _reach(mean, cov, targets)
    together = (rows[:, :, 1:].mT @ cov) @ targets[:, :, 1:]  # covariances [U, C, n, T]
    sd = s.clamp(min=1e-18).sqrt()
    k, w = (m / sd)[:, :, None], weight[:, :, None]
    above = (w * torch.special.ndtr(k[:, :, 0])).sum(1)[:, None]  # [U, 1, T]
    shares, slopes = a.new_tensor([SHARES, SLOPES])[:, :, None, None, None]
    wide = (v + slopes**-2).sqrt()
    h = a / wide  # [3, U, C, n], one for each normal distribution
    r = together / (wide[..., None] * sd[:, :, None])
    yes = (shares * torch.special.ndtr(h)).sum(0)
    both = both_above(h[..., None], k, r.clamp(-0.9999, 0.9999))
    both = (shares[..., None] * both).sum(0)
    yes, both = (w * yes).sum(1)[..., None], (w[..., None] * both).sum(1)
    cells = torch.stack([both, yes - both, above - both, 1 - yes - above + both])
    joint = torch.special.entr(cells.clamp(min=0)).sum(0)
    return (_entropy(yes) + _entropy(above) - joint).clamp(min=0).mean(2)


def rough_ranking_information(known: Known, rows: Tensor, targets: Tensor) -> Tensor:
    """``ranking_information`` in closed form [U, n], for a short list; in order, not in nats.

    Two events of probabilities p and q with a small covariance c have information
    c^2 / (2 p (1 - p) q (1 - q)). Here c is, to first order, the covariance of two log odds times a
    factor for each, so that the mean over target pairs is a quadratic form in z.

    Args:
        known, rows, targets: as there.
    """
    mean, cov = _moments(known)
    a, v = _reach(mean, cov, rows)
    m, s = _reach(mean, cov, targets.to(mean).mT)
    s = s.clamp(min=1e-18)
    above = torch.special.ndtr(m / s.sqrt())
    size = torch.exp(-m.square() / s) / s / (above * (1 - above)).clamp(min=1e-18)
    tells = targets[..., 1:].to(mean) @ cov
    form = (tells.mT @ (size[..., None] * tells)).to(rows)
    flatter = (1 + math.pi / 8 * v).reciprocal_()
    quadratic = (form @ rows[:, 1:]).mul_(rows[:, 1:]).sum(1)
    return _slope(a * flatter.sqrt()) * flatter * quadratic


def both_above(h: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """P(X < h and Y < k) of standard normal X and Y with correlation r; shapes are broadcast.

    The derivative in r is the density; it is integrated over the arc sine of r (Drezner and
    Wesolowsky, 1990).
    """
    nodes, weights = _legendre()
    arc, total = torch.asin(r), torch.zeros_like(r)
    squares, product = h.square() + k.square(), 2 * h * k
    for x, w in zip(nodes, weights, strict=True):
        sine = torch.sin(arc * x)
        power = (product * sine).sub_(squares).div_(2 - 2 * sine.square())
        total.add_(power.exp_(), alpha=w)
    return torch.special.ndtr(h) * torch.special.ndtr(k) + arc * total / (2 * math.pi)


def _legendre() -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss and Legendre on 0 to 1."""
    x, w = np.polynomial.legendre.leggauss(ARC)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()
