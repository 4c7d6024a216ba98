"""How sure the answers make us, and what more of them would add.

What is hoped for is *expected accuracy*: the chance that the better of two responses, as the
posterior has it, is the one that the person prefers, on average over pairs. Its future is known
before a question is answered: an answer may move the posterior's mean either way, but how much the
covariance shrinks does not depend, nearly, on which way.

Shape letters: T target pairs, N pairs of the pool, K directions of taste, H questions ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HORIZON = 20  # questions ahead
MOST_TARGETS = 2000
# The logistic function as a mixture of normal ones (Monahan and Stefanski, 1992), within 6e-5.
SHARES, SLOPES = (0.25220, 0.58522, 0.16257), (0.90793, 0.57778, 0.36403)
POINTS = 64  # of the average over where the mean moves; the integrand has a kink


@dataclass(frozen=True)
class Outlook:
    """Expected accuracy now and after 1, 2, ... more questions.

    Attributes:
        accuracy: [1 + H], each in 0.5 to 1.
        tolerance: a gain in accuracy that is not worth another question.
    """

    accuracy: tuple[float, ...]
    tolerance: float

    @property
    def now(self) -> float:
        """Expected accuracy now."""
        return self.accuracy[0]

    @property
    def best(self) -> float:
        """Expected accuracy after the last question looked ahead to."""
        return max(self.accuracy)

    @property
    def useful(self) -> int:
        """After how many more questions the rest of those looked ahead to gains too little."""
        enough = self.best - self.tolerance
        return next(i for i, accuracy in enumerate(self.accuracy) if accuracy >= enough)


def look_ahead(
    state: tuple[Tensor, Tensor],
    targets: Tensor,
    pool: Tensor,
    tolerance: float,
    horizon: int = HORIZON,
) -> Outlook:
    """The outlook of asking the D-optimal questions of a pool, one after another.

    Args:
        state: mean [K] and covariance [K, K] of the person's tastes.
        targets: pairs whose order matters, as differences [T, 1 + K] of log odds.
        pool: pairs that may still be asked [N, 1 + K].
        tolerance: see ``Outlook``.
        horizon: most questions ahead.
    """
    mean, cov = state
    logits = targets[:, 0] + targets[:, 1:] @ mean
    covs = torch.stack([cov, *_plan(mean, cov, pool, min(horizon, len(pool)))])
    Z = targets[:, 1:]
    variances = ((Z @ covs) * Z).sum(2).clamp(min=0)  # [1 + H, T]
    accuracy = [float(expected_accuracy(logits, variances[0], later)) for later in variances]
    return Outlook(tuple(accuracy), tolerance)


def expected_accuracy(logits: Tensor, now: Tensor, later: Tensor) -> Tensor:
    """Chance that the preferred response is foretold, averaged over pairs.

    Until ``later`` the mean of a pair's log odds is to move by a normal variable of variance now -
    later; the response that is then the better one by the mean is foretold.

    Args:
        logits: means [T] of the log odds.
        now, later: their variances [T] now and when the pair is foretold.
    """
    share = (torch.arange(POINTS).to(logits) + 0.5) / POINTS
    moved = (now - later).clamp(min=0).sqrt()[:, None] * torch.special.ndtri(share)
    sure = (logits[:, None] + moved).abs()
    parts = [
        weight * torch.special.ndtr(sure * (slope / (1 + slope**2 * later).sqrt())[:, None]).mean()
        for weight, slope in zip(SHARES, SLOPES, strict=True)
    ]
    return torch.stack(parts).sum()


def _plan(mean: Tensor, cov: Tensor, pool: Tensor, steps: int) -> list[Tensor]:
    """Covariances after 1, 2, ... questions, each the D-optimal one of those that are left."""
    logits, Z = pool[:, 0] + pool[:, 1:] @ mean, pool[:, 1:]
    covs, left = [], torch.ones(len(pool), dtype=torch.bool)
    for _ in range(steps):
        variance = ((Z @ cov) * Z).sum(1).clamp(min=0)
        information = _information(logits, variance)
        gain = information * variance
        best = int(torch.where(left, gain, -1.0).argmax())
        left[best] = False
        spread = cov @ Z[best]
        cov = cov - torch.outer(spread, spread) * (information[best] / (1 + gain[best]))
        covs.append(cov)
    return covs


def _information(logits: Tensor, variance: Tensor) -> Tensor:
    """E[p (1 - p)] of answers [N] whose log odds are normal: at the mean alone it is too high."""
    total = torch.zeros_like(logits)
    for weight, slope in zip(SHARES, SLOPES, strict=True):
        scale = slope / (1 + slope**2 * variance).sqrt()
        total += weight * scale * torch.exp(-(scale * logits).square() / 2) / math.sqrt(2 * math.pi)
    return total


def same_prompt_pairs(prompts: list[str], rng: torch.Generator) -> Tensor:
    """Rows of two responses to the same prompt [T, 2]: all pairs, or T drawn at random.

    Args:
        prompts: what tells each response's dialogue from others.
        rng: of the draw where there are too many.
    """
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    parts = [torch.combinations(torch.tensor(rows), 2) for rows in groups.values()]
    pairs = torch.cat([torch.empty(0, 2, dtype=torch.long), *parts])
    return pairs[thinned(len(pairs), rng)]


def thinned(count: int, rng: torch.Generator) -> Tensor:
    """Which of so many pairs stand for all: every one, or as many as are quickly looked at."""
    if count <= MOST_TARGETS:
        return torch.arange(count)
    return torch.randperm(count, generator=rng)[:MOST_TARGETS].sort().values
