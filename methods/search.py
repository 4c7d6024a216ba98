"""The choice of a mixed logit's settings on validation, along warm-started paths."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from methods.geometry import Geometry, measure
from methods.mixed_fit import MixedFit
from methods.mixture import fit_mixture
from methods.population import Population, first_tastes, fit_population
from methods.posterior import Evidence, Prior, pack, posterior_states
from methods.ridge_bt import ROUGH, ridge_path
from methods.validation import Validation

log = logging.getLogger(__name__)

FIRST = 0.5  # where the path of l_B begins, as a share of what keeps B at 0
STEP = 10**0.5  # between neighbouring strengths
LONGEST = 8  # path of l_B
MOVES = 8  # fits after both paths


@dataclass
class Candidate:
    """Settings of a mixed logit.

    Attributes:
        white: whether features are stretched.
        l_mu, l_B: strengths of the priors of mu and of B's columns.
        components: of the mixture of tastes; 0 for no tastes at all: ridge BT.
    """

    white: bool
    l_mu: float
    l_B: float = math.inf
    components: int = 0


@dataclass
class _Tried:
    """A candidate that was fitted, and its log loss on validation."""

    candidate: Candidate
    loss: float
    fit: Population | None


def gaussian_states(fit: Population) -> Tensor:
    """Users' states [U, S] of a fit whose tastes are N(0, I)."""
    one = fit.posterior.mean.new_ones(len(fit.posterior.mean), 1)
    return pack(one, fit.posterior.mean[:, None], fit.posterior.cov[:, None])


class Search:
    """A search over strengths, kinds of features and distributions of tastes.

    For either kind of features: ridge BT along its path; then, with the best ridge, l_B along a
    path that begins at half of what keeps B at zero. From the best of all, steps in l_mu and l_B
    as long as one of them helps. Last, mixtures of tastes. Every fit begins where a neighbour
    ended.

    Args:
        data: what the choice is made on.
        rank: K.
        tried: gets a record of every candidate and its log losses.
    """

    def __init__(self, data: Validation, rank: int, tried: list[dict[str, Any]]) -> None:
        self.data, self.rank, self.tried = data, rank, tried
        self.geometry = measure(data.fit, data.processes)
        self.best: _Tried | None = None

    def run(self, kinds: Iterable[bool], mixtures: Iterable[int]) -> Candidate:
        """The candidate with the least log loss.

        Args:
            kinds: of features: stretched or not.
            mixtures: numbers of components of the tastes' distribution.
        """
        for white in kinds:
            self._paths(white)
        assert self.best is not None
        if self.best.fit is not None:
            self._moves()
            self._mixtures([c for c in mixtures if c > 1])
        return self.best.candidate

    def _kind(self, white: bool) -> Geometry:
        return replace(self.geometry, white=white)

    def _paths(self, white: bool) -> None:
        geometry, data = self._kind(white), self.data
        l_mu, mu = ridge_path(data, geometry, self.tried)
        least = min(record["loss"] for record in self.tried)
        if self.best is None or least < self.best.loss:
            self.best = _Tried(Candidate(white, l_mu), least, None)
        B, rises = first_tastes(data.fit, geometry, mu, self.rank, data.processes)
        if float(rises[0]) <= 0:
            return
        start, posterior, losses = torch.cat([mu, B], 1), None, []
        for step in range(LONGEST):
            l_B = FIRST * float(rises[0]) / STEP**step
            now = self._try(Candidate(white, l_mu, l_B, 1), start, posterior)
            assert now.fit is not None
            start, posterior = now.fit.theta, now.fit.posterior
            losses.append(now.loss)
            if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
                break

    def _try(self, candidate: Candidate, start: Tensor, posterior: Any) -> _Tried:
        geometry, data = self._kind(candidate.white), self.data
        strengths = candidate.l_mu, candidate.l_B
        fit = fit_population(
            data.fit, geometry, strengths, start, posterior, data.processes, ROUGH
        )
        prior = Prior.standard(self.rank_of(fit), fit.theta)
        return self._score(candidate, fit, prior, gaussian_states(fit))

    @staticmethod
    def rank_of(fit: Population) -> int:
        """K of a fit."""
        return fit.theta.shape[1] - 1

    def _score(self, candidate: Candidate, fit: Population, prior: Prior, states: Tensor) -> _Tried:
        directions = self._kind(candidate.white).raw(fit.theta)
        scores = self.data.score(MixedFit(directions, prior, states, {}))
        record = {
            "whitened": candidate.white, "l_mu": candidate.l_mu, "l_B": candidate.l_B,
            "rank": self.rank_of(fit), "components": candidate.components,
        }
        self.tried.append(record | scores)
        log.debug("%s", self.tried[-1])
        now = _Tried(candidate, scores["loss"], fit)
        if self.best is None or now.loss < self.best.loss:
            self.best = now
        return now

    def _moves(self) -> None:
        steps = ((STEP, STEP), (1 / STEP, 1 / STEP), (STEP, 1), (1 / STEP, 1), (1, STEP))
        known, moves = {(0, 0)}, 0
        at, helped = (0, 0), True
        while helped and moves < MOVES:
            helped = False
            for by_mu, by_B in ((1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
                place = at[0] + by_mu, at[1] + by_B
                best = self.best
                assert best is not None and best.fit is not None
                if place in known or moves == MOVES:
                    continue
                known.add(place)
                moves += 1
                c = best.candidate
                l_mu, l_B = c.l_mu * STEP**by_mu, c.l_B * STEP**by_B
                self._try(replace(c, l_mu=l_mu, l_B=l_B), best.fit.theta, best.fit.posterior)
                if self.best is not best:
                    at, helped = place, True
                    break

    def _mixtures(self, numbers: Iterable[int]) -> None:
        best = self.best
        assert best is not None and best.fit is not None
        fit, data = best.fit, self.data
        theta = self._kind(best.candidate.white).raw(fit.theta)
        evidence = Evidence(MixedFit(theta, None, fit.posterior.mean, {}).view(data.fit), data.fit)
        for components in numbers:
            prior = fit_mixture(fit.posterior, components, data.processes)
            if prior is None:
                continue
            states = posterior_states(evidence, prior, 1e-4)
            self._score(replace(best.candidate, components=components), fit, prior, states)
