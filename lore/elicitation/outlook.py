"""How sure the answers make us, and what more of them would add.

The measure is *expected accuracy*: the chance that the better of two responses by the posterior is
the one that the person prefers, on average over pairs. It can be foretold: how much an answer
shrinks the posterior's covariance hardly depends on which answer it is.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lore.elicitation.criteria import UserPosterior

HORIZON = 20  # questions ahead
# The logistic function as a mixture of normal ones (Monahan and Stefanski, 1992), within 6e-5.
SHARES, SLOPES = (0.25220, 0.58522, 0.16257), (0.90793, 0.57778, 0.36403)
POINTS = 64  # of the average over where the mean moves; the integrand has a kink


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
    """Covariances after 1, 2, ... questions, each the D-optimal one of those that are left.

    An answer's information is E[p (1 - p)] over its log odds: at their mean alone it is too high.
    """
    Z, cov = pool[:, 1:], posterior.covariance
    logits, left = pool[:, 0] + Z @ posterior.mean, torch.ones(len(pool), dtype=torch.bool)
    for _ in range(min(HORIZON, len(pool))):
        variance = ((Z @ cov) * Z).sum(1).clamp(min=0)
        information = sum(
            share * slope * (-(slope * logits).square() / 2).exp() / math.sqrt(2 * math.pi)
            for share, slope in _normal_parts(variance)
        )
        gain = information * variance
        best = int(torch.where(left, gain, -1.0).argmax())
        left[best] = False
        spread = cov @ Z[best]
        cov = cov - torch.outer(spread, spread) * (information[best] / (1 + gain[best]))
        yield cov
