"""PReF (Shenfeld et al., COLM 2025) on fixed embeddings: LoRe's reward with signed weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lore.common.settings import PositiveFloat, Rank
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Task
from lore.methods.fitting import linear
from lore.methods.fitting.geometry import Geometry
from lore.methods.fitting.linear import LinearFitted, LinearPeer, project

NORM_PENALTY = 0.02  # per comparison, on the length of x' A
COLLAPSED = 1e-2  # mean length of x' A below which nothing is left
STEPS, BATCH, RATE = 500, 64, 1e-3  # published SGD over comparisons
USER_STEPS, USER_RATE = 1000, 0.01  # published SGD for a new user


def svd_start(data: Comparisons, rank: int) -> tuple[Tensor, Tensor]:
    """A [F, K] and W [U, K] from the leading singular vectors of the users' own directions; the
    published ones, not centred either, need users who judged the same comparisons."""
    left, values, right = torch.linalg.svd(linear.ridge_directions(data), full_matrices=False)
    root = values[:rank].sqrt()
    return right[:rank].T * root, left[:, :rank] * root


def objective(
    data: Comparisons, A: Tensor, W: Tensor, ridge: float = 0.0, penalty: float = NORM_PENALTY
) -> tuple[Tensor, list[Tensor]]:
    """Sum of c (softplus(-x' A w_u) + penalty |x' A|) + ridge / 2 |W|^2, and its gradients by the
    loadings A [F, K] and users' weights W [U, K]."""
    loss, by_A, by_W, Z = linear.pair_loss(data, A, W)
    lengths = Z.square().sum(1).add(1e-12).sqrt()
    loss = loss + penalty * (data.weight @ lengths) + ridge / 2 * W.square().sum()
    if penalty:
        by_A = by_A + linear.backproject(data, (penalty * data.weight / lengths)[:, None] * Z)
    return loss, [by_A, by_W + ridge * W]


def published_weights(view: Tensor, users: Users, generator: torch.Generator | None) -> Tensor:
    """Weights [U', K] by SGD on every user's mean loss."""
    start = torch.randn(users.num_users, view.shape[1], generator=generator)
    w, mass = start.to(view), users.user_weight().clamp(min=1e-300)[:, None]
    for _ in range(USER_STEPS):
        logits = (view * w[users.user]).sum(1)
        w = w - USER_RATE * users.sum(view, linear.slopes(users, logits)) / mass
    return w


@dataclass(frozen=True)
class PReF(LinearPeer):
    """Rewards x' A w_u with signed weights w_u, and a penalty on the length of x' A.

    The population's state is the mean of the seen users' weights: zero, which the published random
    start amounts to, would call every comparison a tie. ``faithful`` follows the published
    training, 500 SGD steps of 64 comparisons, and 1,000 steps from a random draw for a new user
    with shots, without the language model's own training, the fit of A to the start, which hardly
    moved it, and the threshold chosen on test data. ``converged`` has a ridge on W and, among
    features of mean square length 1, on A, which may else shrink, as W grows, until the penalty is
    gone; by L-BFGS. New users are solved exactly, their ridge being about the seen users' mean.

    Args:
        rank: columns of A.
        strengths: of the ridge, from the strongest on; chosen on validation if several.
    """

    rank: Rank = 5
    strengths: tuple[PositiveFloat, ...] = linear.HALVINGS
    bounded = ("rank",)  # ranks that users or features limit

    def converged(
        self, data: Comparisons, geometry: Geometry, strength: float, warm: Any, tolerance: float
    ) -> tuple[LinearFitted, Any]:
        """The penalised objective's minimum; see ``LinearPeer``."""
        if warm is None:  # both of the same size, as the ridge would have them
            A, W = svd_start(data, self.rank)
            A = geometry.stretched(A)
            balance = (W.norm() / A.norm()).sqrt()
            A, W = A * balance, W / balance
        else:
            A, W = geometry.stretched(warm[0]), warm[1]
        lengths = project(data, geometry.raw(A)).norm(dim=1)
        extra = 5 * NORM_PENALTY / float(lengths.mean())
        inverses = linear.basis_inverses(data, geometry, A, W, (strength, strength), extra)

        def stretched(A: Tensor, W: Tensor) -> tuple[Tensor, list[Tensor]]:
            loss, (by_A, by_W) = objective(data, geometry.raw(A), W, strength)
            loss = loss + strength / 2 * A.square().sum()
            return loss, [geometry.raw(by_A) + strength * A, by_W]

        (A, W), losses = linear.fit_together(stretched, [A, W], inverses, tolerance, len(data))
        A = geometry.raw(A)
        # A ridge that shrinks all to nothing, a saddle for weaker ones, is no start for them
        collapsed = float(project(data, A).norm(dim=1).mean()) < COLLAPSED
        note = f"ridge {strength:g}, {len(losses)} steps of L-BFGS."
        settings, ridge = {"ridge": strength}, strength * torch.eye(W.shape[1]).to(W)
        fitted = self._fitted(settings, A, W, ridge, losses, note)
        return fitted, None if collapsed else (A, W)

    def published(self, task: Task) -> LinearFitted:
        """The published SGD."""
        data = task.local_train
        A, W = svd_start(data, self.rank)
        generator, losses = torch.Generator().manual_seed(task.seed), []
        order = torch.empty(0, dtype=torch.long)
        for _ in range(STEPS):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(data), generator=generator)])
            rows, order = order[:BATCH].sort().values, order[BATCH:]
            keep = torch.zeros(len(data), dtype=torch.bool).index_fill(0, rows, True)
            batch, here = data.select(keep), data.user[rows.to(data.device)].unique()
            loss, (by_A, by_W) = objective(batch, A, W[here])
            mass = batch.weight.sum()
            A = A - RATE * by_A / mass
            W = W.index_add(0, here, by_W / mass, alpha=-RATE)
            losses.append(float(loss / mass))
        note = f"published: {STEPS} steps of SGD on {BATCH} comparisons."
        return self._fitted({}, A, W, published_weights, losses, note)

    def _fitted(self, settings: dict[str, Any], A: Tensor, W: Tensor, *how: Any) -> LinearFitted:
        settings = {"rank": self.rank, **settings}
        return LinearFitted(self, f"PReF K={self.rank}", settings, A, W, W.mean(0), *how)
