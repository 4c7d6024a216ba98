"""What methods with linear rewards share: products with V, convex user problems, L-BFGS. All is
float64 but for ``project`` and ``backproject``, which alone touch features, in their own precision.
Shape letters as in comparisons.py, with K the width of a user's state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from lore.learning.comparisons import Comparisons, Seed, Users, as_generator
from lore.learning.method import Fitted, Task
from lore.methods.fitting.geometry import Geometry, measure
from lore.methods.fitting.lbfgs import minimise
from lore.methods.fitting.posterior import Prior, posteriors
from lore.methods.fitting.validation import FLOORS, Peer, Split, Validation, choose_whitened
from lore.methods.ridge_bt import FINE, ROUGH, inverse_curvature, precision

TRIES = 12  # configurations that every method may try
HALVINGS = tuple(2.0**k for k in range(4, 4 - TRIES, -1))  # ridges to try, 16 to 1/128
Solver = Callable[[Tensor, Users, torch.Generator | None], Tensor]


class LinearFitted(Fitted):
    """Log odds x' V s: a shared basis V [F, K], and a user's state s [K]; questions are 0 and X V,
    the population is a Gaussian like the seen users' states.

    ``solve(view, users, generator)`` gives users' states [U', K]; if it is a ridge [K, K], they are
    the least of loss and ridge about the population's state. The method's setting is added to label
    and settings; of the losses at most 400 are kept.
    """

    def __init__(
        self, method: Peer, label: str, settings: dict[str, Any], basis: Tensor, users: Tensor,
        population: Tensor, solve: Solver | Tensor, losses: Sequence[float], note: str,
    ) -> None:  # fmt: skip
        self.label = method.named(label)
        self.settings = {"setting": method.setting, **settings}
        self.basis, self.users, self.population_state, self.solve = basis, users, population, solve
        step, size = max(1, math.ceil(len(losses) / 400)), basis.numel() + users.numel()
        self.facts = {
            "parameters": size, "tried": [], "losses": list(losses[::step]), "loss_step": step,
            "note": f"{self.label}: {note}",
        }  # fmt: skip

    def view(self, data: Comparisons) -> Tensor:
        """X V [N, K] in float64."""
        return project(data, self.basis)

    def adapt(self, view: Tensor, users: Users, seed: Seed) -> Tensor:
        if isinstance(self.solve, Tensor):
            return solve_users(view, users, self.solve, self.population_state)
        found = self.solve(view, users, as_generator(seed))
        return torch.where(users.counts[:, None] > 0, found, self.population_state)

    def logits(self, view: Tensor, state: Tensor, user: Tensor) -> Tensor:
        return (view * state[user]).sum(1)

    def population(self) -> Prior | None:
        return Prior.of_users(self.users) if len(self.users) > 1 else None

    def questions(self, view: Tensor) -> Tensor:
        return pad(view, (1, 0))

    def describe(self) -> dict[str, Any]:
        """The facts, with root mean square singular values of users' directions less their mean."""
        away = self.users - self.users.mean(0)
        directions = away @ torch.linalg.qr(self.basis.double()).R.T / math.sqrt(len(away))
        return {**self.facts, "spectrum": torch.linalg.svdvals(directions).tolist()}


def project(data: Comparisons, V: Tensor) -> Tensor:
    """X V [N, K] in float64, the product formed in the features' precision."""
    return data.project(V.to(precision(data))).double()


def backproject(data: Comparisons, G: Tensor) -> Tensor:
    """X^T G [F, K] in float64, the product formed in the features' precision."""
    return data.backproject(G.to(precision(data))).double()


def slopes(users: Users, logits: Tensor) -> Tensor:
    """Derivative of each comparison's weighted loss c softplus(-logit) by its logit [N]."""
    return -users.weight * torch.sigmoid(-logits)


def pair_loss(data: Comparisons, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of c softplus(-x_i' V w_u) over all comparisons, for a basis V [F, K] and users' weights
    W [U, K]; its gradients by V and W, and Z = X V [N, K]."""
    Z, own = project(data, V), W[data.user]
    logits = (Z * own).sum(1)
    slope = slopes(data, logits)
    loss = data.weight @ softplus(-logits)
    return loss, backproject(data, slope[:, None] * own), data.sum(Z, slope), Z


def ridge_directions(data: Comparisons) -> Tensor:
    """Every user's own direction [U, F]: least squares to log odds of 1, with a ridge of the mean
    squared length of the user's features: of few comparisons it is near their mean."""
    found = []
    for u in range(data.num_users):
        own = data.select(data.user == u)
        rows = backproject(own, torch.eye(len(own), device=data.device))
        gram = rows.T @ rows
        ridge = gram.diagonal().mean().clamp(min=1e-12) / own.weight
        found.append(rows @ torch.linalg.solve(gram + torch.diag(ridge), gram.new_ones(len(own))))
    return torch.stack(found)


def fit_together(
    objective: Callable[..., tuple[Tensor, Sequence[Tensor]]], start: Sequence[Tensor],
    inverses: Sequence[Callable[[Tensor], Tensor]], tolerance: float, count: int,
) -> tuple[list[Tensor], list[float]]:  # fmt: skip
    """The tensors, in float64, where a smooth objective of them is least, by ``minimise``, and the
    objective over the count of comparisons after every step. It returns its value and its gradient
    by each tensor; ``inverses`` apply an estimate of each one's inverse curvature."""
    sizes = [tensor.numel() for tensor in start]

    def unpack(flat: Tensor) -> list[Tensor]:
        return [x.view(like.shape) for x, like in zip(flat.split(sizes), start, strict=True)]

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def value(flat: Tensor) -> tuple[float, Tensor]:
        loss, gradients = objective(*unpack(flat))
        return float(loss), pack(gradients)

    def inverse(flat: Tensor) -> Tensor:
        return pack([apply(g) for apply, g in zip(inverses, unpack(flat), strict=True)])

    found = minimise(value, pack([t.double() for t in start]), inverse, tolerance, 1000)
    return unpack(found.x), [loss / count for loss in found.values]


def basis_inverses(
    data: Comparisons, geometry: Geometry, V: Tensor, W: Tensor, strengths: tuple[float, float],
    extra: float = 0.0,
) -> list[Callable[[Tensor], Tensor]]:  # fmt: skip
    """Inverse curvatures, roughly, of ``pair_loss`` with ridges of these strengths, near V [F, K]
    (of stretched features) and W [U, K]; ``extra`` squared weights stand for another term's by V.
    """
    squares = W.square().mean(0) + extra + 1e-12
    by_V = inverse_curvature(geometry, strengths[0] / squares + 1e-3)
    lengths = project(data, geometry.raw(V)).square().mean(0)
    curvature = 0.2 * len(data) / len(W) * lengths + strengths[1] + 1e-12
    return [lambda G: by_V(G) / squares, lambda G: G / curvature]


def solve_users(Z: Tensor, users: Users, precision: Tensor, centre: Tensor) -> Tensor:
    """Every user's least sum_i c_i softplus(-z_i' w) + (w - centre)' P (w - centre) / 2 [U, K]: the
    mode of the posterior under a Gaussian prior with precision P [K, K]."""
    prior = Prior(centre, torch.linalg.inv(precision))
    return posteriors(pad(Z, (1, 0)), users, prior).mode


@dataclass(frozen=True)
class LinearPeer(Peer):
    """A method with linear rewards: rough fits choose a strength, then all is fitted finely.

    ``converged(data, geometry, strength, warm, tolerance)`` is a ``LinearFitted`` to comparisons,
    of whose features the geometry is, and what one with a neighbouring strength may begin with;
    ``warm`` is what a neighbour returned, None at first. ``published(task)`` is the fit with the
    published constants and budget.
    """

    alone: ClassVar[bool] = True  # fitted by one process
    whitens: ClassVar[bool] = True  # whether whitened features are tried too
    strengths: ClassVar[Sequence[Any]]  # in order

    def fit(self, task: Task) -> list[Fitted]:
        """Choose the strength, then fit all training comparisons; or as published."""
        return [self.published(task) if self.faithful else self.chosen(task)]

    def chosen(self, task: Task) -> LinearFitted:
        """The fit with the strength, and whitening, that is best on validation."""

        def fit(data: Comparisons, geometry: Geometry, candidate: Any, *how: Any) -> Any:
            strength, floor = candidate
            fitted, warm = self.converged(data, replace(geometry, floor=floor), strength, *how)
            fitted.settings |= {"floor": floor} if self.whitens else {}
            return fitted, warm

        def roughly(split: Split, candidate: Any, warm: Any) -> Any:
            return fit(split.fit, split.geometry, candidate, warm, ROUGH)

        best, tried, data = (self.strengths[0], None), [], task.local_train
        if len(self.strengths) > 1:
            floors = FLOORS if self.whitens else FLOORS[:1]
            found = choose_whitened(Validation(task), self.strengths, roughly, floors=floors)
            best, tried = found.candidate, found.tried
        fitted, _ = fit(data, measure(data), best, None, FINE)
        fitted.facts["tried"] = tried
        return fitted
