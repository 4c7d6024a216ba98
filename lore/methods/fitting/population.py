"""The population of a mixed logit: shared reward mu and directions of taste B, by empirical Bayes.

Shape letters: U users, N comparisons, F features, K directions of taste. Columns 0 and 1 .. K of
a tensor [F, 1 + K] are mu and B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lore.learning.comparisons import Comparisons
from lore.methods.fitting.geometry import Geometry, total
from lore.methods.fitting.journal import Kept, anew
from lore.methods.fitting.lbfgs import minimise
from lore.methods.fitting.posterior import NODES, Evidence, Posterior, solve
from lore.methods.ridge_bt import inverse_curvature, precision

ROUGH, FINE = 1e-4, 1e-6  # tolerances while choosing and at the end, shares of the objective
INNER = 10  # a user's bound may be this many times the tolerance below its maximum


@dataclass
class Population:
    """Maximum of the evidence bound over mu and B, given the strengths of their priors.

    Attributes:
        theta: mu and B among the stretched features [F, 1 + K].
        strengths: precisions of the priors of mu and of B's columns.
        values: negative bound plus penalties at each accepted step; they never rise.
        evaluations: passes over the features, there and back.
        posterior: of this process's users.
    """

    theta: Tensor
    strengths: tuple[float, float]
    values: list[float]
    evaluations: int
    posterior: Posterior


class Objective:
    """Negative evidence bound of all users, plus the penalties, as a function of [mu, B].

    For every [mu, B] the users' posteriors are found first, from where they were last; by the
    envelope theorem the gradient may then take them as given.
    """

    def __init__(
        self,
        data: Comparisons,
        geometry: Geometry,
        strengths: tuple[float, float],
        processes: int = 1,
        inner: float = 1e-8,
        nodes: int = NODES,
    ) -> None:
        self.data, self.geometry, self.processes, self.inner = data, geometry, processes, inner
        self.nodes = nodes
        self.strengths = strengths
        self.dtype = precision(data)
        self.posterior: Posterior | None = None
        self.inverse: Callable[[Tensor], Tensor] | None = None  # of the curvature at the first call

    def column_strengths(self, K: int) -> Tensor:
        """Precision of the prior of each column [1 + K]."""
        mu, B = self.strengths
        return self.geometry.values.new_tensor([mu] + [B] * K)

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        """Value and gradient [F, 1 + K] at [mu, B] among the stretched features."""
        data, geometry, K = self.data, self.geometry, theta.shape[1] - 1
        Z = data.project(geometry.raw(theta).to(self.dtype))
        evidence = Evidence(Z, data, self.nodes)
        zero, one = theta.new_zeros(K), torch.eye(K).to(theta)
        q = self.posterior = solve(evidence, zero, one, self.posterior, self.inner)
        strengths = self.column_strengths(K)
        if self.inverse is None:
            bend = total(evidence.curvature(q.mean, q.cov), self.processes) / geometry.count
            self.inverse = inverse_curvature(geometry, strengths, bend)
        G = evidence.slopes(q.mean, q.cov).to(self.dtype)
        gradient = data.backproject(-G).double()
        flat = total(torch.cat([-q.bound.sum()[None], gradient.flatten()]), self.processes)
        value = float(flat[0] + (strengths * theta * theta).sum() / 2)
        return value, geometry.raw(flat[1:].reshape(theta.shape)) + strengths * theta


def fit_population(
    data: Comparisons,
    geometry: Geometry,
    strengths: tuple[float, float],
    start: Tensor,
    posterior: Posterior | None = None,
    processes: int = 1,
    tolerance: float = FINE,
    iterations: int = 100,
    nodes: int = NODES,
    kept: Kept = anew,
) -> Population:
    """Maximise the evidence bound over mu and B; each user's posterior is found at every step.

    Args:
        data: this process's comparisons.
        geometry: of all comparisons.
        strengths: precisions of the priors of mu and of B's columns.
        start: mu and B to begin with [F, 1 + K]; B = 0 is a stationary point, so it must not be 0.
        posterior: of the users at the start, if known.
        processes: over which users are spread.
        tolerance, iterations: of the minimisation.
        nodes: of the quadrature.
        kept: keeps the minimum, see journal.py.
    """
    objective = Objective(data, geometry, strengths, processes, INNER * tolerance, nodes)
    objective.posterior = posterior

    def inverse(G: Tensor) -> Tensor:
        assert objective.inverse is not None  # the minimiser has called the objective before
        return objective.inverse(G)

    what = f"tastes, white {geometry.white}, strengths {strengths}, tolerance {tolerance}"
    found = kept(what, lambda: minimise(objective, start, inverse, tolerance, iterations))
    x = found.x.to(start)
    objective.posterior = None  # so that it follows from mu and B alone, and is not kept
    objective(x)
    q = objective.posterior
    assert q is not None
    return Population(x, strengths, found.values, found.evaluations + 1, q)


def first_tastes(
    data: Comparisons, geometry: Geometry, mu: Tensor, K: int, processes: int = 1
) -> tuple[Tensor, Tensor]:
    """Directions [F, K] in which the evidence rises fastest from B = 0, and how fast [K].

    With residuals r = 1 - p of the shared reward, the evidence's slope in B B^T is half of
    sum_u s_u s_u^T - sum_i w_i p (1 - p) x x^T, s_u = sum_i w_i r_i x_i. B = 0 is a maximum where
    the prior's precision exceeds its greatest eigenvalue. Directions are sought among the leading
    ones of the features, and have the length that a moment estimate of the variance gives.

    Args:
        data: this process's comparisons.
        geometry: of all comparisons.
        mu: shared reward among stretched features [F, 1].
        K: number of directions.
        processes: over which users are spread.
    """
    dtype, Q = precision(data), geometry.directions
    Z = data.project(geometry.raw(torch.cat([mu, Q], 1)).to(dtype)).double()
    a, Z = Z[:, 0], Z[:, 1:]
    p = torch.sigmoid(-a)
    s = data.sum(Z, data.weight * p)
    M = s.T @ s - Z.T @ ((data.weight * p * (1 - p))[:, None] * Z)
    values, vectors = torch.linalg.eigh(total(M, processes))
    K = min(K, len(values))
    values, vectors = values.flip(0)[:K], vectors.flip(1)[:, :K]
    information = data.sum((Z @ vectors).square(), data.weight * p * (1 - p)).square().sum(0)
    variance = values / total(information, processes).clamp(min=1e-12)
    least = 1e-3 * variance.max().clamp(min=1e-6)
    return Q @ (vectors * variance.clamp(min=least).sqrt()), values
