"""A low-rank mixed logit: everyone shares a reward and departs from it as far as choices warrant.

The log odds of user u's choice are x . (mu + B z_u) with z_u ~ N(0, I): a binary logit with random
coefficients of low rank. mu and B maximise a variational bound on the evidence, users' tastes have
posteriors, and whatever is free is chosen on validation, ridge BT being always a candidate.

Shape letters: U users, N comparisons, F features, K rank, C components of the prior.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lore.common.files import require
from lore.common.settings import PositiveFloat, PositiveInt
from lore.learning.comparisons import Comparisons
from lore.learning.method import Fitted, Task
from lore.methods.fitting.geometry import Geometry, everyones, measure
from lore.methods.fitting.journal import Journal
from lore.methods.fitting.mixture import fit_mixture
from lore.methods.fitting.population import first_tastes, fit_population
from lore.methods.fitting.posterior import Prior
from lore.methods.fitting.score_test import score_test
from lore.methods.fitting.search import Candidate, Search
from lore.methods.fitting.validation import Validation
from lore.methods.mixed_fit import MixedFit
from lore.methods.ridge_bt import fit_shared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixedLogit:
    """The mixed logit with its settings; those that are None are chosen on validation.

    Args:
        rank: K, the most directions of taste; fewer are tried, where fewer stand out.
        l_mu: strength of the prior of mu, given with that of B's columns or not at all; features
            are divided by the root mean square norm of the training differences.
        l_B: strength of the prior of B's columns.
        whitened: whether features are partly whitened; chosen if None and the strengths are.
        mixtures: numbers of components of the tastes' distribution to choose from.
    """

    rank: PositiveInt = 8
    l_mu: PositiveFloat | None = None
    l_B: PositiveFloat | None = None
    whitened: bool | None = None
    mixtures: tuple[PositiveInt, ...] = (1, 4)

    def check(self, task: Task) -> None:
        """Refuse one strength without the other."""
        both = (self.l_mu is None) == (self.l_B is None)
        require(both, "--mixed_logit.l_mu and --mixed_logit.l_B: give both, or neither")

    def fit(self, task: Task) -> list[Fitted]:
        """Choose what is free, then fit all training comparisons."""
        tried: list[dict[str, Any]] = []
        journal = Journal(task, self)
        given = self.l_mu is not None
        chosen, start = (self._given(), None) if given else self._choose(task, tried, journal)
        data = task.mine
        geometry = replace(measure(data, task.processes), white=chosen.white)
        return [self._final(task, data, geometry, chosen, tried, start, journal)]

    def _given(self) -> Candidate:
        assert self.l_mu is not None and self.l_B is not None
        return Candidate(bool(self.whitened), self.l_mu, self.l_B, self.mixtures[0])

    def _choose(
        self, task: Task, tried: list[dict[str, Any]], journal: Journal
    ) -> tuple[Candidate, Tensor | None]:
        data = Validation(task)
        if not data.possible:
            log.warning("no user has two dialogues: strengths of 1, as nothing can be held out")
            return Candidate(bool(self.whitened), 1.0, 1.0, 1), None
        kinds = (False, True) if self.whitened is None else (self.whitened,)
        found = score_test(task.mine, processes=task.processes)
        log.info(found.sentence)
        return Search(data, self.rank, tried, journal).run(kinds, self.mixtures, found.p)

    def _final(
        self,
        task: Task,
        data: Comparisons,
        geometry: Geometry,
        chosen: Candidate,
        tried: list[dict[str, Any]],
        start: Tensor | None,
        journal: Journal,
    ) -> MixedFit:
        K = min(self.rank, data.num_features) if start is None else start.shape[1] - 1
        facts = {
            "chosen": vars(chosen) | {"rank": K if chosen.components else 0}, "tried": tried,
            "scale": geometry.scale, "note": _note(chosen, K, bool(tried)),
            "parameters": data.num_features,
        }
        log.info("mixed logit: %s", facts["note"])
        if chosen.components == 0:
            shared = fit_shared(data, geometry, chosen.l_mu, processes=task.processes, kept=journal)
            facts["losses"] = [value / geometry.count for value in shared.values]
            none = shared.x.new_zeros(task.train.num_users, 0)
            return MixedFit(geometry.raw(shared.x), None, none, facts)
        if start is None:
            mu = fit_shared(data, geometry, chosen.l_mu, processes=task.processes, kept=journal).x
            start = torch.cat([mu, first_tastes(data, geometry, mu, K, task.processes)[0]], 1)
        else:
            start = geometry.stretched(start)
        strengths = chosen.l_mu, chosen.l_B
        fit = fit_population(
            data, geometry, strengths, start, processes=task.processes, kept=journal
        )
        directions, turn, spectrum = principal(geometry.raw(fit.theta))
        prior = Prior.standard(K, fit.theta)
        if chosen.components > 1:
            prior = fit_mixture(fit.posterior, chosen.components, task.processes) or prior
            prior = turned(prior, turn)
        facts |= {
            "losses": [value / geometry.count for value in fit.values],
            "parameters": directions.numel() + task.train.num_users * K,
            "spectrum": spectrum.tolist(), "passes": fit.evaluations,
            "decrement": float(fit.posterior.decrement.max()),
        }
        log.info("mixed logit: bounds are within %.0e nats of their maxima", facts["decrement"])
        fitted = MixedFit(directions, prior, fit.theta.new_zeros(0, 0), facts)
        fitted.users = everyones(fitted.adapt(fitted.view(data), data), task.processes)
        return fitted


def principal(directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same distribution of rewards with orthogonal tastes, the widest first.

    Args:
        directions: mu and B [F, 1 + K].

    Returns:
        mu and the new B [F, 1 + K], the rotation [K, K] from old tastes to new, and the squared
        norms of the columns.
    """
    left, sizes, right = torch.linalg.svd(directions[:, 1:], full_matrices=False)
    place = left.abs().argmax(0)
    signs = left[place, torch.arange(len(place), device=place.device)].sign()
    B = left * (sizes * signs)
    return torch.cat([directions[:, :1], B], 1), signs[:, None] * right, sizes.square()


def turned(prior: Prior, turn: Tensor) -> Prior:
    """The prior of rotated tastes ``turn z``."""
    return Prior(prior.weight, prior.mean @ turn.T, turn @ prior.cov @ turn.T)


def _note(chosen: Candidate, rank: int, free: bool) -> str:
    kind = "partly whitened" if chosen.white else "plain"
    how = ", chosen on validation" if free else ""
    if chosen.components == 0:
        return f"no tastes (ridge BT), l_mu {chosen.l_mu:.3g}, {kind} features{how}"
    mixture = f", a mixture of {chosen.components}" if chosen.components > 1 else ""
    return (
        f"rank {rank}{mixture}, l_mu {chosen.l_mu:.3g}, l_B {chosen.l_B:.3g}, "
        f"{kind} features{how}"
    )
