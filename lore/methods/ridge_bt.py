"""Bradley-Terry for all users together, its ridge chosen on validation: the baseline to beat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lore.common.devices import sum_over_processes
from lore.common.settings import PositiveFloat
from lore.learning.basis import Basis, save_basis
from lore.learning.comparisons import Comparisons, DenseFeatures
from lore.learning.method import Fitted, Task, View
from lore.methods.fitting.geometry import Geometry, measure
from lore.methods.fitting.lbfgs import Minimum, minimise
from lore.methods.fitting.validation import Scores, Validation
from utils import TEMPERATURE

log = logging.getLogger(__name__)

STRENGTHS = tuple(10 ** (x / 2) for x in range(5, -7, -1))  # 316 to .001, from the strongest on
ROUGH, FINE = 3e-5, 1e-8  # tolerances while choosing and at the end, shares of the objective


def precision(data: Comparisons) -> torch.dtype:
    """Of products with the features: double only where they are held so."""
    dense = isinstance(data.features, DenseFeatures) and data.features.x.dtype == torch.float64
    return torch.float64 if dense else torch.float32


def inverse_curvature(
    geometry: Geometry, strengths: Tensor, bend: Tensor | float = 0.2
) -> Callable[[Tensor], Tensor]:
    """An estimate of a loss's inverse curvature, diagonal along the leading directions.

    Args:
        geometry: of the features.
        strengths: of the prior of each column [C].
        bend: curvature of a comparison's loss in its log odds, a mean, of each column [C]; as it
            is of choices that are fairly sure if not given.
    """
    added = geometry.curvature()[:, None] * bend
    factors = 1 / (added + strengths[None, :])
    Q = geometry.directions

    def apply(G: Tensor) -> Tensor:
        return factors[-1] * G + Q @ ((factors[:-1] - factors[-1]) * (Q.T @ G))

    return apply


def fit_shared(
    data: Comparisons,
    geometry: Geometry,
    strength: float,
    start: Tensor | None = None,
    processes: int = 1,
    tolerance: float = FINE,
    iterations: int = 1000,
) -> Minimum:
    """The shared reward [F, 1] (among stretched features) with the greatest posterior density.

    Minimises sum_i w_i log(1 + exp(-x_i . mu)) + strength / 2 |mu|^2.

    Args:
        data: this process's comparisons.
        geometry: of all comparisons.
        strength: precision of the prior.
        start: where to begin; zero if None.
        processes: over which users are spread.
        tolerance, iterations: of the minimisation.
    """
    dtype = precision(data)

    def loss(mu: Tensor) -> tuple[float, Tensor]:
        a = data.project(geometry.raw(mu).to(dtype))[:, 0].double()
        lost = -(data.weight @ logsigmoid(a))
        residual = data.weight * torch.sigmoid(-a)
        g = -data.backproject(residual.to(dtype)[:, None]).double()
        flat = sum_over_processes(torch.cat([lost[None], g[:, 0]]), processes)
        gradient = geometry.raw(flat[1:, None]) + strength * mu
        return float(flat[0] + strength / 2 * (mu * mu).sum()), gradient

    if start is None:
        start = geometry.directions.new_zeros(data.num_features, 1)
    strengths = geometry.values.new_tensor([strength])
    inverse = inverse_curvature(geometry, strengths)
    return minimise(loss, start, inverse, tolerance, iterations)


class SharedFit(Fitted):
    """A fitted shared reward, the same for all users.

    Args:
        direction: the reward's direction among raw features [F].
        num_users: of the seen users.
        facts: what ``describe`` says.
    """

    def __init__(self, direction: Tensor, num_users: int, facts: dict[str, Any]) -> None:
        self.label, self.settings, self.file = "Ridge BT", {}, "ridge_bt"
        self.direction, self.facts = direction, facts
        self.users = direction.new_zeros(num_users, 0)
        self.population_state = direction.new_zeros(0)

    def view(self, data: Comparisons) -> Tensor:
        """Reward differences [N, 1]."""
        return data.project(self.direction.to(precision(data))[:, None])

    def logits(self, view: View, state: Tensor, user: Tensor) -> Tensor:
        """Log odds [N]: the reward differences."""
        return view[:, 0]

    def describe(self) -> dict[str, Any]:
        """The strength that was chosen, the others that were tried, and the training curve."""
        return self.facts

    def save(self, path: Path, new: Tensor, facts: Mapping[str, Any]) -> None:
        """A basis file of rank 1, see ``basis.save_basis``, whose logits are x . V / 100."""
        about = dict(facts)
        users, unseen = about.pop("users"), about.pop("users_unseen")
        center = about.pop("center", None)
        ones = [torch.ones(count, 1) for count in (len(self.users), len(new))]
        V = TEMPERATURE * self.direction.float()[:, None]
        settings = {"rank": 1, "estimator": "ridge BT", **about}
        basis = Basis(V, ones[0], None, users, ones[1], unseen, settings, center=center)
        save_basis(path, basis)


def ridge_path(
    data: Validation,
    geometries: Sequence[Geometry],
    tried: list[dict[str, Any]],
) -> tuple[float, list[Tensor], Scores]:
    """The best of the ridges on validation, in five tries.

    Along falling strengths the score is taken to have a single valley, which a Fibonacci search
    (Kiefer 1953) finds in five of the twelve. Every fit begins where its nearest neighbour ended.

    Args:
        data: what the choice is made on.
        geometries: of each split's features.
        tried: gets a record of every strength and its log losses.

    Returns:
        The strength, each split's shared reward among stretched features [F, 1], and the scores.
    """
    found: dict[int, tuple[list[Tensor], Scores]] = {}

    def loss(place: int) -> float:
        if place not in found:
            near = min(found, key=lambda other: abs(other - place), default=None)
            starts = [None] * len(data.splits) if near is None else found[near][0]
            found[place] = _try_ridge(data, geometries, STRENGTHS[place], starts, tried)
        return found[place][1].loss

    best = lowest(loss)
    return STRENGTHS[best], *found[best]


def lowest(loss: Callable[[int], float]) -> int:
    """Where a sequence of ``len(STRENGTHS)``, 12, numbers with a single valley is lowest.

    Two probes divide an interval by Fibonacci numbers; the higher one is its next end.
    """
    low, near, far = -1, 5, 8  # the lowest is within low + 1 .. low + near + far - 1
    while far > 1:
        if loss(low + near) > loss(low + far):
            low += near
        near, far = far - near, near
    return low + 1


def _try_ridge(
    data: Validation,
    geometries: Sequence[Geometry],
    strength: float,
    starts: Sequence[Tensor | None],
    tried: list[dict[str, Any]],
) -> tuple[list[Tensor], Scores]:
    found = [
        fit_shared(split.fit, geometry, strength, mu, split.processes, ROUGH).x
        for split, geometry, mu in zip(data.splits, geometries, starts, strict=True)
    ]
    fits = [
        SharedFit(geometry.raw(mu)[:, 0], split.fit.num_users, {})
        for split, geometry, mu in zip(data.splits, geometries, found, strict=True)
    ]
    scores = data.score(fits)
    record = {"floor": geometries[0].floor, "l_mu": strength, "tau2": 0.0}
    tried.append(record | scores.means())
    return found, scores


@dataclass(frozen=True)
class RidgeBT:
    """Bradley-Terry with a Gaussian prior of precision ``strength`` on the shared reward.

    Features are divided by the root mean square norm of the training differences.

    Args:
        strength: Of the prior; chosen by log loss on validation if None.
    """

    strength: PositiveFloat | None = None

    def fit(self, task: Task) -> list[Fitted]:
        """Choose the strength, then fit all training comparisons."""
        tried: list[dict[str, Any]] = []
        strength = self.strength
        if strength is None:
            strength = self._choose(task, tried)
        data = task.local_train
        geometry = measure(data, task.processes)
        found = fit_shared(data, geometry, strength, processes=task.processes)
        facts = {
            "chosen": {"l_mu": strength}, "tried": tried, "scale": geometry.scale,
            "losses": [value / geometry.count for value in found.values],
            "parameters": data.num_features,
            "note": f"strength {strength:.3g}" + (", chosen on validation" if tried else ""),
        }
        log.info("ridge BT: %s", facts["note"])
        return [SharedFit(geometry.raw(found.x)[:, 0], task.train.num_users, facts)]

    def _choose(self, task: Task, tried: list[dict[str, Any]]) -> float:
        data = Validation(task)
        if not data.possible:
            log.warning("no user has two dialogues: a ridge of 1, as nothing can be held out")
            return 1.0
        geometries = [measure(split.fit, task.processes) for split in data.splits]
        return ridge_path(data, geometries, tried)[0]
