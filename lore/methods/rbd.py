"""RBD (LoRe-BasisInterp): signed weights, a population's and each user's deviation from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lore.common.files import require
from lore.common.settings import PositiveFloat, Rank
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Task
from lore.methods.fitting import linear
from lore.methods.fitting.geometry import Geometry
from lore.methods.fitting.linear import LinearFitted, LinearPeer, project
from lore.methods.fitting.validation import hold_out
from lore.methods.ridge_bt import ROUGH, fit_shared

RATE, STEPS, PATIENCE, LEAST = 1e-4, 3000, 100, 1e-5  # published training, as tuned
POPULATION, DEVIATION = 0.01, 10.0  # published strengths, of means
USER_RATE, USER_STEPS, USER_PATIENCE = 1e-2, 1000, 50  # published adaptation
START = 1e-3  # size of the first deviations

Parameters = Sequence[Tensor]  # V [F, K], mean weights w [K], deviations d [U, K]


def objective(
    data: Comparisons, given: Parameters, population: float, deviation: float,
    geometry: Geometry | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Sum of c softplus(-y' V w_u) + population / 2 |V w|^2 + deviation / 2 sum_u |V d_u|^2, where
    w_u = w + d_u and y are the features, stretched if there is a geometry; and its gradients."""
    (V, mean, away), raw = given, geometry.raw if geometry else lambda V: V
    loss, by_V, by_W, _ = linear.pair_loss(data, raw(V), mean + away)
    gram = V.T @ V
    ridge_mean, ridge_away = population * gram @ mean, deviation * away @ gram
    loss = loss + (mean @ ridge_mean + (away * ridge_away).sum()) / 2
    inner = population * torch.outer(mean, mean) + deviation * away.T @ away
    return loss, [raw(by_V) + V @ inner, by_W.sum(0) + ridge_mean, by_W + ridge_away]


def svd_start(
    data: Comparisons, geometry: Geometry, rank: int, strengths: tuple[float, float]
) -> Parameters:
    """The ridge Bradley-Terry direction, the leading ones of the users' own beside it, orthonormal
    among stretched features, and the best deviations that these and the strengths allow."""
    shared = fit_shared(data, geometry, strengths[0], tolerance=ROUGH).x.double()
    own = geometry.stretched(linear.ridge_directions(data).T).T
    first = shared / shared.norm().clamp(min=1e-12)
    beside = own - own @ first @ first.T
    V = torch.cat([first, torch.linalg.svd(beside, full_matrices=False)[2][: rank - 1].T], 1)
    mean, ridge = V.T @ shared[:, 0], strengths[1] * torch.eye(V.shape[1]).to(V)
    return V, mean, linear.solve_users(project(data, geometry.raw(V)), data, ridge, mean) - mean


def published_weights(
    V: Tensor, mean: Tensor, view: Tensor, users: Users, generator: torch.Generator | None
) -> Tensor:
    """Weights [U', K], mean and deviations, by Adam on the deviations of all users together."""
    start = torch.randn(users.num_users, view.shape[1], generator=generator)
    away, total = START * start.to(view), users.weight.sum().clamp(min=1e-300)
    ridge = 2 * DEVIATION * V.T @ V / users.num_users
    adam, best, waited = torch.optim.Adam([away], lr=USER_RATE), float("inf"), 0
    for _ in range(USER_STEPS):
        logits = (view * (mean + away)[users.user]).sum(1)
        slope = linear.slopes(users, logits) / total
        lost = float(users.weight @ softplus(-logits) / total)
        lost += float((away @ ridge * away).sum()) / 2
        best, waited = (lost, 0) if lost < best - LEAST else (best, waited + 1)
        if waited >= USER_PATIENCE:
            break
        away.grad = users.sum(view, slope) + away @ ridge
        adam.step()
    return mean + away


@dataclass(frozen=True)
class RBD(LinearPeer):
    """Rewards x' V (w + d_u) with signed weights; ridges act on the directions V w and V d_u.

    The population's state is w. ``faithful`` follows the published training as tuned: Adam at 1e-4
    from random values, strengths .01 and 10 on the means over comparisons and over users, the best
    step by the log loss of held-out dialogues kept, 100 steps after which it stops; new users by
    Adam at 1e-2, all together; without the stop on test data that the public code has for PRISM,
    and the rotated axes, which change no reward. ``converged`` minimises the same by L-BFGS, and
    solves new users exactly; strengths are precisions of Gaussian priors on directions among
    features of mean square length 1, so a new user's ridge fades as a seen one's does.

    Args:
        rank: columns of V.
        strengths: of the population's and of users' directions; chosen on validation if several.
    """

    rank: Rank = 8
    strengths: tuple[tuple[PositiveFloat, PositiveFloat], ...] = tuple(
        (shared, ratio * shared) for shared in (10.0, 1.0, 0.1, 0.01) for ratio in (100, 10, 1)
    )
    bounded = ("rank",)  # ranks that users or features limit

    def converged(
        self, data: Comparisons, geometry: Geometry, strength: Any, warm: Any, tolerance: float
    ) -> tuple[LinearFitted, None]:
        """The objective's minimum, always from the same start; see ``LinearPeer``."""
        start = svd_start(data, geometry, self.rank, strength)
        V, mean, away = start
        by_V, by_W = linear.basis_inverses(data, geometry, V, mean + away, strength)
        inverses = [by_V, lambda g: by_W(g) / data.num_users, by_W]  # of the mean: everyone's

        def stretched(*given: Tensor) -> tuple[Tensor, list[Tensor]]:
            return objective(data, given, *strength, geometry)

        found, losses = linear.fit_together(stretched, start, inverses, tolerance, len(data))
        V, mean, away = found
        population, deviation = strength
        strengths = f"{population:g} (population) and {deviation:g} (users)"
        note = f"strengths {strengths}, {len(losses)} steps of L-BFGS."
        settings = {"population": population, "deviation": deviation}
        ridge = deviation * (V.T @ V + 1e-6 * V.square().sum() * torch.eye(V.shape[1]).to(V))
        raw = geometry.raw(V), mean, away
        return self._fitted(settings, raw, ridge, losses, note), None

    def _fitted(self, settings: dict[str, Any], found: Parameters, *how: Any) -> LinearFitted:
        (V, mean, away), settings = found, {"rank": self.rank, **settings}
        label = f"RBD K={self.rank}"
        fitted = LinearFitted(self, label, settings, V, mean + away, mean, *how)
        fitted.facts["parameters"] += len(mean)
        return fitted

    def published(self, task: Task) -> LinearFitted:
        """The published Adam, stopped on held-out dialogues."""
        split = hold_out(task.local_train, task.seed, task.kinds, task.validation)
        require(split.held is not None, "no user has two dialogues: RBD cannot stop on validation")
        data, held, K = split.fit, split.held, self.rank
        generator = torch.Generator().manual_seed(task.seed)
        sizes = (data.num_features, K), (K,), (task.local_train.num_users, K)
        drawn = (torch.randn(*size, generator=generator).double() for size in sizes)
        V, mean, away = (x.to(data.device) for x in drawn)
        V, mean, away = V / V.norm(dim=0), mean / K**0.5, START * away
        first = (project(data, V) * (mean + away)[data.user]).sum(1)
        given = [V / first.std().clamp(min=1e-12), mean, away]
        best, kept, waited, losses = float("inf"), given, 0, []
        total = data.weight.sum()
        ridges = float(2 * POPULATION * total), float(2 * DEVIATION * total / len(away))
        adam = torch.optim.Adam(given, lr=RATE)
        user = split.whose.to(data.device)[held.user]
        for _ in range(STEPS):
            V, mean, away = given
            logits = (project(held, V) * (mean + away)[user]).sum(1)
            lost = float(held.weight @ softplus(-logits) / held.weight.sum())
            losses.append(lost)
            if lost < best - LEAST:
                best, kept, waited = lost, [x.clone() for x in given], 0
            elif (waited := waited + 1) >= PATIENCE:
                break
            _, gradients = objective(data, (V, mean, away), *ridges)
            V.grad, mean.grad, away.grad = (gradient / total for gradient in gradients)
            adam.step()
        note = f"published: held-out log loss {best:.4f} at best, {len(losses)} steps."
        solve = partial(published_weights, *kept[:2])
        return self._fitted({}, kept, solve, losses, note)
