"""Is there anything personal here? A score test of users' tastes, before any fit of them: under a
reward that all users share, the residuals of a user's comparisons point nowhere together.
U users, N comparisons, D leading directions of the features."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lore.learning.comparisons import Comparisons, RowFeatures
from lore.methods.fitting.geometry import measure
from lore.methods.ridge_bt import ROUGH, fit_shared, precision

DIRECTIONS = 32
LEVEL = 0.05


class ScoreTest(NamedTuple):
    """What the test found."""

    p: float  # of as great a statistic where users are alike
    variance: float  # of tastes along each of the scaled features; below 0: less than by chance
    needed: float  # comparisons until a user's own weigh as much as everyone's; may be infinite

    @property
    def sentence(self) -> str:
        """The answer in words."""
        if self.p > LEVEL or self.variance <= 0:
            return f"No sign that users differ (score test, p = {self.p:.3f})."
        return (
            f"Users differ (score test, p = {self.p:.3f}): from about {max(1, self.needed):.0f} "
            "comparisons on, a user's own choices weigh as much as everyone else's."
        )


def score_test(data: Comparisons) -> ScoreTest:
    """Test whether users' rewards differ, on training comparisons.

    The statistic is the score for a variance component of users (Verbeke and Molenberghs 2003) at
    ridge BT of strength 1: the products of residuals times features over a user's pairs of
    comparisons, but for those that share a response (told by rows of the embeddings) or a dialogue:
    what the features do not show of a response, and the noise of one rating, make those agree. It
    is held against the users' own spread.
    """
    geometry = measure(data, directions=DIRECTIONS)
    mu = fit_shared(data, geometry, 1.0, tolerance=ROUGH).x
    columns = geometry.raw(torch.cat([mu, geometry.directions], 1))
    Z = data.project(columns.to(precision(data))).double()
    p, Z = torch.sigmoid(Z[:, 0]), Z[:, 1:]
    own = _apart(data, (data.weight * (1 - p))[:, None] * Z)
    pairs = float((data.counts.square() - data.counts).sum())
    kept = float(_apart(data, torch.ones_like(p)[:, None]).sum()) / max(1.0, pairs)
    slope, counts = data.weight * p * (1 - p), data.counts.tolist()
    # How fast the statistic grows with the variance, by a user's pairs: less each one with itself
    information = -(slope * Z.square().sum(1)).square().sum()
    for part, weight in zip(Z.split(counts), slope.split(counts), strict=True):
        information = information + ((part.T * weight) @ part).square().sum()
    information = float(kept * information)
    error, found = float(own.square().sum().sqrt()), float(own.sum())
    statistic = found / error if error > 0 else 0.0  # in standard errors
    variance = found / max(information, 1e-300)
    each = slope @ Z.square() / geometry.count  # what a comparison tells along each direction
    typical = float(each.square().sum() / each.sum())
    needed = 1 / (variance * typical) if variance > 0 else math.inf
    return ScoreTest(math.erfc(statistic / 2**0.5) / 2, variance, needed)


def _apart(data: Comparisons, Y: Tensor) -> Tensor:
    """Sum of the products of Y [N, D] over each user's pairs of comparisons with nothing in common
    [U], each pair twice."""

    def squares(user: Tensor, Y: Tensor, *keys: Tensor) -> Tensor:
        """Squared sums of Y over rows of equal keys [N], added up for each user."""
        _, place = torch.unique(user, return_inverse=True)
        for key in keys:  # unique(dim=1) of all of them takes many times as long
            _, key = torch.unique(key, return_inverse=True)
            _, place = torch.unique(place * len(key) + key, return_inverse=True)
        owner = torch.zeros_like(user).scatter_(0, place, user)
        each = torch.zeros_like(Y).index_add_(0, place, Y).square().sum(1)
        return each.new_zeros(data.num_users).index_add_(0, owner, each)

    alike = partial(squares, data.user, Y)  # of equal keys, a comparison with itself included

    alone, x = torch.arange(len(Y), device=data.device), data.features
    dialog = alone if data.dialogs is None else data.dialogs.to(data.device)
    if not isinstance(x, RowFeatures):
        return alike() - alike(dialog)
    ends = torch.stack([x.chosen, x.rejected]).sort(0).values

    def response(*keys: Tensor) -> Tensor:
        """The same over pairs that share a response."""
        twice = [key.repeat(2) for key in keys]
        both = squares(data.user.repeat(2), Y.repeat(2, 1), ends.flatten(), *twice)
        return both - alike(*ends, *keys)  # those that share two were counted twice

    return alike() - (alike(dialog) + (response() - response(dialog)))
