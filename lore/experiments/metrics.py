"""What is measured of predictions, the log odds of the chosen responses, beside accuracy and log
loss. Shapes: U users, N comparisons."""

import torch
from torch import Tensor

from lore.learning.comparisons import Users

BINS = 15
MOST_CONFIDENT = 0.25  # share of the comparisons
FOLDS = 2  # of the users, each scaled by the temperature of the other
STEPS = 50  # of the bisection for a temperature, between 1/1000 and 1000


def brier(data: Users, logits: Tensor) -> Tensor:
    """Mean of (1 - P(the choice))^2 by user [U]; a coin's is a quarter."""
    return data.mean(torch.sigmoid(-logits.double()).square())


def calibration_error(logits: Tensor, weight: Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015), from 0 to 1, of logits and weights [N]: how
    far confidence and accuracy differ in 15 bins of equal weight by confidence."""
    order = logits.abs().argsort(stable=True)
    z, weight = logits.double()[order], weight.double()[order]
    share = (weight.cumsum(0) - weight / 2) / weight.sum()
    part = (BINS * share).long().clamp(max=BINS - 1)
    gap = z.abs().sigmoid() - (z.sign() + 1) / 2  # a tie is half right
    gaps = torch.zeros(BINS).to(z).index_add_(0, part, weight * gap)
    return float(gaps.abs().sum() / weight.sum())


def temperature(logits: Tensor, weight: Tensor) -> float:
    """The number by which to divide the logits [N] for the least log loss."""
    z, low, high = logits.double(), -3.0, 3.0  # of the inverse's decimal logarithm
    for _ in range(STEPS):
        middle = (low + high) / 2
        rises = float(weight @ (z * torch.sigmoid(-(10**middle) * z))) > 0
        low, high = (middle, high) if rises else (low, middle)
    return 10 ** -((low + high) / 2)


def tempered(data: Users, logits: Tensor) -> Tensor:
    """The logits [N] divided by one temperature, which was chosen on the other half of users."""
    scaled = logits.double().clone()
    fold = data.user % FOLDS
    for f in range(FOLDS if data.num_users >= FOLDS else 0):
        here, there = fold == f, fold != f
        scaled[here] /= temperature(logits[there], data.weight[there])
    return scaled


def most_confident(logits: Tensor, weight: Tensor) -> float:
    """Accuracy of the 25 % most confident predictions."""
    order = logits.abs().argsort(descending=True, stable=True)
    before = weight[order].cumsum(0) - weight[order]
    kept = order[before < MOST_CONFIDENT * weight.sum()]
    return float((weight[kept] @ (logits[kept] > 0).double()) / weight[kept].sum())


def label_sensitivity(data: Users, logits: Tensor, swapped: Tensor) -> Tensor:
    """Share of each user's predictions [U] that change when the shots' labels are swapped: logits
    [N] from the shots as they are and as they were swapped."""
    return data.mean((logits > 0) != (swapped > 0))


def pooled(data: Users, logits: Tensor) -> dict[str, float]:
    """Figures of all comparisons together: calibration, before and after tempering, and more."""
    return {
        "ece": calibration_error(logits, data.weight),
        "ece_tempered": calibration_error(tempered(data, logits), data.weight),
        "most_confident": most_confident(logits, data.weight),
    }
