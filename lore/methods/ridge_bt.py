"""Bradley-Terry for all users together, its ridge chosen on validation: the baseline to beat."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lore.common.devices import sum_over_processes
from lore.common.settings import PositiveFloat
from lore.learning.basis import Basis, save_fit
from lore.learning.comparisons import Comparisons, DenseFeatures
from lore.learning.method import Fitted, Task, View
from lore.methods.fitting.geometry import Geometry, measure
from lore.methods.fitting.lbfgs import Minimum, minimise
from lore.methods.fitting.validation import Chosen, Split, Validation, choose, choose_whitened
from utils import TEMPERATURE

log = logging.getLogger(__name__)

STRENGTHS = tuple(10 ** (x / 2) for x in range(5, -7, -1))  # 316 to .001, from the strongest on
ROUGH, FINE = 3e-5, 1e-8  # tolerances while choosing and at the end, shares of the objective
BEND = 0.2  # a comparison's mean curvature in its log odds, where choices are fairly sure


def precision(data: Comparisons) -> torch.dtype:
    """Of products with the features: double only where they are held so."""
    dense = isinstance(data.features, DenseFeatures) and data.features.x.dtype == torch.float64
    return torch.float64 if dense else torch.float32


def inverse_curvature(geometry: Geometry, strengths: Tensor) -> Callable[[Tensor], Tensor]:
    """Applies an estimate of a loss's inverse curvature, diagonal along the leading directions, to
    columns with priors of such strengths [C], as if choices were fairly sure."""
    return partial(geometry.apply, 1 / (geometry.curvature()[:, None] * BEND + strengths))


def fit_shared(
    data: Comparisons, geometry: Geometry, strength: float, start: Tensor | None = None,
    processes: int = 1, tolerance: float = FINE,
) -> Minimum:  # fmt: skip
    """The shared reward mu [F, 1], among stretched features, with the greatest posterior density.

    Minimises sum_i w_i log(1 + exp(-x_i . mu)) + strength / 2 |mu|^2 over all processes'
    comparisons, whose geometry it is, from the start, or zero, on.
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
    inverse = inverse_curvature(geometry, geometry.values.new_tensor([strength]))
    return minimise(loss, start, inverse, tolerance, 1000)


class SharedFit(Fitted):
    """A fitted shared reward, the same for all users: its direction among raw features [F]. The
    facts are the chosen strength, the others that were tried, and the training curve."""

    def __init__(self, direction: Tensor, num_users: int, facts: dict[str, Any]) -> None:
        self.label, self.settings, self.file = "Ridge BT", {}, "ridge_bt"
        self.direction, self.facts = direction, facts
        self.users = direction.new_zeros(num_users, 0)
        self.population_state = direction.new_zeros(0)

    def view(self, data: Comparisons) -> Tensor:
        """Reward differences [N, 1]."""
        return data.project(self.direction.to(precision(data))[:, None])

    def logits(self, view: View, state: Tensor, user: Tensor) -> Tensor:
        return view[:, 0]

    def save(self, path: Path, new: Tensor, facts: Mapping[str, Any]) -> None:
        """A basis file of rank 1, see ``basis.save_basis``, whose logits are x . V / 100."""
        V, ones = TEMPERATURE * self.direction.float()[:, None], torch.ones(len(self.users), 1)
        settings = {"rank": 1, "estimator": "ridge BT"}
        save_fit(path, Basis(V, ones, settings=settings), new, facts)


def choose_ridge(data: Validation) -> Chosen:
    """The best strength on validation, in five tries; kept are the shared rewards [F, 1]."""
    return choose(data, STRENGTHS, _rough_fit, lowest)


def _rough_fit(split: Split, candidate: Any, start: Tensor | None) -> tuple[SharedFit, Tensor]:
    """Fits a strength, or a strength and a floor, to a split, see ``choose``."""
    strength, floor = candidate if isinstance(candidate, tuple) else (candidate, None)
    geometry = replace(split.geometry, floor=floor)
    start = None if start is None else geometry.stretched(start)
    mu = fit_shared(split.fit, geometry, strength, start, split.processes, ROUGH).x
    fitted = SharedFit(geometry.raw(mu)[:, 0], split.fit.num_users, {})
    fitted.settings = {"floor": floor, "l_mu": strength, "tau2": 0.0}
    return fitted, geometry.raw(mu)


def lowest(loss: Callable[[int], Any]) -> int:
    """Where a sequence of ``len(STRENGTHS)``, 12, losses with a single valley, as they are taken to
    have along falling strengths, is lowest: by Fibonacci search (Kiefer 1953), in five tries. Two
    probes divide an interval by Fibonacci numbers; the higher one is its next end."""
    low, near, far = -1, 5, 8  # the lowest is within low + 1 .. low + near + far - 1
    while far > 1:
        if loss(low + near) > loss(low + far):
            low += near
        near, far = far - near, near
    return low + 1


@dataclass(frozen=True)
class RidgeBT:
    """Bradley-Terry with a Gaussian prior of precision ``strength`` on the shared reward.

    Features are divided by the root mean square norm of the training differences, and whitened
    where validation says so.

    Args:
        strength: Of the prior, on features as they are; chosen by log loss on validation if None.
    """

    strength: PositiveFloat | None = None

    def fit(self, task: Task) -> list[Fitted]:
        """Choose the strength, then fit all training comparisons."""
        (strength, floor), tried = (self.strength, None), []
        if strength is None and (validation := Validation(task)).possible:
            found = choose_whitened(validation, STRENGTHS, _rough_fit, lowest)
            (strength, floor), tried = found.candidate, found.tried
        elif strength is None:
            log.warning("no user has two dialogues: a ridge of 1, as nothing can be held out")
            strength = 1.0
        data = task.local_train
        geometry = replace(measure(data, task.processes), floor=floor)
        found = fit_shared(data, geometry, strength, processes=task.processes)
        note = f"strength {strength:.3g}" + (f", features whitened, floor {floor}" if floor else "")
        facts = {
            "chosen": {"l_mu": strength, "floor": floor}, "tried": tried, "scale": geometry.scale,
            "losses": [value / geometry.count for value in found.values],
            "parameters": data.num_features, "note": note + ", chosen on validation" * bool(tried),
        }  # fmt: skip
        log.info("ridge BT: %s", facts["note"])
        return [SharedFit(geometry.raw(found.x)[:, 0], task.train.num_users, facts)]
