"""Is there anything personal here? A score test of users' tastes, before any fit of them.

Under a reward that all users share, the residuals of a user's comparisons point nowhere together.
Shape letters: U users, N comparisons, M units, D leading directions of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lore.learning.comparisons import Comparisons
from lore.methods.fitting.geometry import Geometry, everyones, measure, total
from lore.methods.ridge_bt import ROUGH, fit_shared, precision

DIRECTIONS = 32
PERMUTATIONS = 499
LEVEL = 0.05
ROUNDING = 1e-5  # of the statistic: so close is the same


@dataclass
class ScoreTest:
    """What the test found.

    Attributes:
        statistic: sum over users of |sum of residuals times features|^2, less its mean over
            permutations, in their standard deviations.
        p: share of permutations with as great a statistic.
        variance: of tastes along each direction of the features (divided by their scale), by
            moments; below 0 where residuals agree less than by chance.
        needed: comparisons after which a user's own choices weigh as much as everyone's; infinity
            where tastes have no variance.
    """

    statistic: float
    p: float
    variance: float
    needed: float

    @property
    def sentence(self) -> str:
        """The answer in words."""
        if self.p > LEVEL or self.variance <= 0:
            return f"No sign that users differ (score test, p = {self.p:.3f})."
        return (
            f"Users differ (score test, p = {self.p:.3f}): from about {max(1, self.needed):.0f} "
            "comparisons on, a user's own choices weigh as much as everyone else's."
        )


def score_test(
    data: Comparisons,
    strength: float = 1.0,
    group: Tensor | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    geometry: Geometry | None = None,
    processes: int = 1,
) -> ScoreTest:
    """Test whether users' rewards differ, by permuting whose the comparisons are.

    The statistic is the score for a variance component of users (Verbeke and Molenberghs 2003) at
    ridge BT. The comparisons of one dialogue stay together, as they may share a response.

    Args:
        data: the training comparisons, or this process's share.
        strength: of ridge BT's prior.
        group: number of each comparison's prompt [N], if users share prompts: labels are then
            permuted among the comparisons of a prompt.
        permutations: how many.
        seed: of the permutations.
        geometry: of the features, if it is known.
        processes: over which users are spread; all get the same answer.
    """
    geometry = replace(geometry or measure(data, processes, DIRECTIONS), floor=None)
    mu = fit_shared(data, geometry, strength, processes=processes, tolerance=ROUGH).x
    Q = geometry.directions[:, :DIRECTIONS]
    Z = data.project(geometry.raw(torch.cat([mu, Q], 1)).to(precision(data))).double()
    p, Z = torch.sigmoid(Z[:, 0]), Z[:, 1:]
    Y, counts, group = _units(data, (data.weight * (1 - p))[:, None] * Z, group)
    Y, counts, group = (everyones(value, processes) for value in (Y.float(), counts, group))
    starts = counts.cumsum(0) - counts

    def statistic(order: Tensor) -> float:
        # In float32, in which PyTorch sums bags of few columns 30 times as fast as in float64
        return float(embedding_bag(order, Y, starts, mode="sum").double().square().sum())

    generator = torch.Generator().manual_seed(seed)
    found = statistic(torch.arange(len(Y), device=Y.device))
    drawn = [statistic(order.to(Y.device)) for order in _orders(group, permutations, generator)]
    chance = torch.tensor(drawn, dtype=torch.float64)
    slope = data.weight * p * (1 - p)
    information = float(total(_information(data, Z, slope), processes))
    variance = (found - float(chance.mean())) / max(information, 1e-300)
    # What a comparison tells along each direction
    each = total(slope @ Z.square(), processes) / geometry.count
    typical = float(each.square().sum() / each.sum())
    return ScoreTest(
        (found - float(chance.mean())) / float(chance.std().clamp(min=1e-300)),
        (1 + int((chance >= found * (1 - ROUNDING)).sum())) / (1 + permutations),
        variance,
        1 / (variance * typical) if variance > 0 else float("inf"),
    )


def _units(
    data: Comparisons, Y: Tensor, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over each user's dialogues [M, D], how many each user has [U], and their prompts [M]."""
    if group is None:
        group = torch.zeros(len(Y), dtype=torch.long)
    group = group.to(data.device)
    if data.dialogs is None:
        return Y, data.counts, group
    dialogs = data.dialogs.to(data.device)
    keys = data.user * (int(dialogs.max()) + 1) + dialogs  # ascending by user
    units, place = torch.unique(keys, return_inverse=True)
    sums = Y.new_zeros(len(units), Y.shape[1]).index_add_(0, place, Y)
    owner = torch.empty_like(units).scatter_(0, place, data.user)
    prompts = torch.empty_like(units).scatter_(0, place, group)
    return sums, torch.bincount(owner, minlength=data.num_users), prompts


def _orders(group: Tensor, permutations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random orders [M] that exchange units of the same group alone."""
    place = torch.argsort(group.cpu(), stable=True)
    for _ in range(permutations):
        shuffled = torch.randperm(len(group), generator=generator)
        if place[0] != 0 or bool((group != group[0]).any()):
            shuffled = shuffled[torch.argsort(group.cpu()[shuffled], stable=True)]
            order = torch.empty_like(place)
            order[place] = shuffled
            shuffled = order
        yield shuffled


def _information(data: Comparisons, Z: Tensor, slope: Tensor) -> Tensor:
    """How fast the statistic grows with the variance of tastes, by pairs of comparisons of a user:
    sum over users of |H_u|^2 less what every comparison has with itself."""
    counts, pairs = data.counts.tolist(), -(slope * Z.square().sum(1)).square().sum()
    for part, weight in zip(Z.split(counts), slope.split(counts), strict=True):
        pairs = pairs + ((part.T * weight) @ part).square().sum()
    return pairs
