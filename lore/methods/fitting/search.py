"""The choice of a mixed logit's settings on validation, along warm-started paths."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lore.methods.fitting.geometry import Geometry, measure
from lore.methods.fitting.journal import Kept, anew
from lore.methods.fitting.linear import TRIES
from lore.methods.fitting.mixture import fit_mixture
from lore.methods.fitting.population import ROUGH, Population, first_tastes, fit_population
from lore.methods.fitting.posterior import (
    FEW_NODES,
    Evidence,
    Posterior,
    Prior,
    pack,
    posterior_states,
)
from lore.methods.fitting.validation import Scores, Validation
from lore.methods.mixed_fit import MixedFit
from lore.methods.ridge_bt import precision, ridge_path

log = logging.getLogger(__name__)

FIRST = 0.16  # where the path of l_B begins, as a share of what keeps B at 0
STEP = 10**0.5  # between neighbouring strengths; the path takes two at a time
SMALL = 0.2  # directions of a smaller share of the largest one's size count as small alike
NEAR = 1e-4  # nats that a user's evidence bound may be below its maximum
SURE = 0.01  # the score test's p at which tastes are taken to be there
Steps = Sequence[tuple[int, int]]  # of l_mu and l_B
NEIGHBOURS: Steps = ((0, 1), (0, -1), (-1, -1), (1, 0), (-1, 0), (1, 1))


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
    """A candidate that was fitted to every split, and its log losses."""

    candidate: Candidate
    scores: Scores
    fits: list[Population]

    @property
    def starts(self) -> list[tuple[Tensor, Posterior | None]]:
        """Where fits with other strengths may begin."""
        return [(fit.theta, fit.posterior) for fit in self.fits]


def gaussian_states(fit: Population) -> Tensor:
    """Users' states [U, S] of a fit whose tastes are N(0, I)."""
    one = fit.posterior.mean.new_ones(len(fit.posterior.mean), 1)
    return pack(one, fit.posterior.mean[:, None], fit.posterior.cov[:, None])


class Search:
    """A search over strengths, kinds of features and distributions of tastes, in ``TRIES`` tries.

    First ridge BT, then with the best ridge l_B along a coarse path, down from about what keeps B
    at zero, then no more directions than stand out, then neighbours of the best, in l_B and in
    both, as long as one of them helps. Last, stretched features, and a mixture of tastes, which has
    to earn its place by two standard errors. Every fit begins where a neighbour ended. With few
    users the least of many losses is low by chance: tastes are kept where their loss is lower than
    ridge BT's and either the score test finds them or the difference exceeds two standard errors;
    where it is not even one after the coarse path, the search ends.

    Args:
        data: what the choice is made on.
        rank: K.
        tried: gets a record of every candidate and its log losses.
        kept: keeps minima, see journal.py.
    """

    def __init__(
        self, data: Validation, rank: int, tried: list[dict[str, Any]], kept: Kept = anew
    ) -> None:
        self.data, self.rank, self.tried, self.kept = data, rank, tried, kept
        self.geometries = [measure(split.fit, split.processes) for split in data.splits]
        self.best: _Tried | None = None

    def run(
        self, kinds: Sequence[bool], mixtures: Iterable[int], p: float
    ) -> tuple[Candidate, Tensor | None]:
        """The candidate chosen, and mu and B [F, 1 + K] among raw features of its first split.

        Args:
            kinds: of features, stretched or not: the first one to begin with, others to try last.
            mixtures: numbers of components of the tastes' distribution.
            p: of the score test.
        """
        first, *others = kinds
        mixtures = [components for components in mixtures if components > 1]
        l_mu, mus, scores = ridge_path(self.data, self._kinds(first), self.tried, self.kept)
        ridge, tries = Candidate(first, l_mu), TRIES - len(others) - len(mixtures)
        path = self._path(ridge, mus, tries)
        if self.best is None or (p > SURE and self._gain(scores) <= 1):
            return ridge, None
        self._refine(path, tries)
        for white in others:
            self._other_kind(white)
        self._mixtures(mixtures)
        if self._gain(scores) <= (2 if p > SURE else 0):
            return ridge, None
        best = self.best.candidate
        return best, self._kinds(best.white)[0].raw(self.best.fits[0].theta)

    def _gain(self, other: Scores) -> float:
        """How much lower the best's loss is, in standard errors of the difference."""
        assert self.best is not None
        gain, error = self.best.scores.gain(other)
        return gain / error if error > 0 else 0.0

    def _kinds(self, white: bool) -> list[Geometry]:
        return [replace(geometry, white=white) for geometry in self.geometries]

    def _path(self, ridge: Candidate, mus: Sequence[Tensor], tries: int) -> dict[int, float]:
        """Losses along falling l_B, by steps from the first, until they rise."""
        geometries, splits = self._kinds(ridge.white), self.data.splits
        tastes = [
            first_tastes(split.fit, geometry, mu, self.rank, split.processes)
            for split, geometry, mu in zip(splits, geometries, mus, strict=True)
        ]
        most, losses = max(float(rises[0]) for _, rises in tastes), {}
        starts = [(torch.cat([mu, B], 1), None) for mu, (B, _) in zip(mus, tastes, strict=True)]
        while most > 0 and len(self.tried) < tries:
            place = -2 * len(losses)
            c = replace(ridge, l_B=FIRST * most * STEP**place, components=1)
            now = self._try(c, starts)
            losses[place] = now.scores.loss
            if self.best is not now:
                break
            starts = now.starts
        return losses

    def _refine(self, path: dict[int, float], tries: int) -> None:
        """Fewer directions, and neighbours of the path's best."""
        at = min(path, key=path.__getitem__)
        # With fewer directions each may be freer; else the side on which the path is lower is first
        stronger, weaker = (path.get(at + by, math.inf) for by in (2, -2))
        fewer = len(self.tried) + 1 < tries and self._cut()
        side = 1 if stronger < weaker and not fewer else -1
        steps = [(mu, B if mu else side * B) for mu, B in NEIGHBOURS]
        self._climb((0, at), {(0, place) for place in path}, steps, tries)

    def _cut(self) -> bool:
        """Whether half of the directions or fewer do better: those before their sizes fall most."""
        best = self.best
        assert best is not None
        split = [torch.linalg.svd(fit.theta[:, 1:], full_matrices=False) for fit in best.fits]
        sizes = torch.stack([sizes / sizes[0] for _, sizes, _ in split])
        logs = sizes.clamp(min=SMALL).log().mean(0)
        falls = (logs[:-1] - logs[1:])[: len(logs) // 2]
        if not len(falls):
            return False
        kept = 1 + int(falls.argmax())
        directions = [left[:, :kept] * sizes[:kept] for left, sizes, _ in split]
        mus = [fit.theta[:, :1] for fit in best.fits]
        starts = [torch.cat(x, 1) for x in zip(mus, directions, strict=True)]
        return self._try(best.candidate, [(start, None) for start in starts]) is self.best

    def _climb(
        self, at: tuple[int, int], known: set[tuple[int, int]], steps: Steps, tries: int
    ) -> None:
        helped = True
        while helped:
            helped = False
            for by_mu, by_B in steps:
                place, best = (at[0] + by_mu, at[1] + by_B), self.best
                assert best is not None
                if place in known or len(self.tried) >= tries:
                    continue
                known.add(place)
                c = best.candidate
                l_mu, l_B = c.l_mu * STEP**by_mu, c.l_B * STEP**by_B
                if self._try(replace(c, l_mu=l_mu, l_B=l_B), best.starts) is self.best:
                    at, helped = place, True
                    break

    def _other_kind(self, white: bool) -> None:
        best = self.best
        assert best is not None
        old, new = self._kinds(best.candidate.white), self._kinds(white)
        starts: list[tuple[Tensor, Posterior | None]] = [
            (there.stretched(here.raw(fit.theta)), fit.posterior)
            for here, there, fit in zip(old, new, best.fits, strict=True)
        ]
        l_mu = best.candidate.l_mu * (STEP if white else 1 / STEP)
        self._try(replace(best.candidate, white=white, l_mu=l_mu), starts)

    def _try(self, c: Candidate, starts: Sequence[tuple[Tensor, Posterior | None]]) -> _Tried:
        fits = [
            fit_population(
                split.fit, geometry, (c.l_mu, c.l_B), theta, posterior, split.processes, ROUGH,
                nodes=FEW_NODES, kept=self.kept,
            )
            for split, geometry, (theta, posterior) in zip(
                self.data.splits, self._kinds(c.white), starts, strict=True
            )
        ]  # fmt: skip
        priors = [Prior.standard(fit.theta.shape[1] - 1, fit.theta) for fit in fits]
        return self._score(c, fits, priors, [gaussian_states(fit) for fit in fits])

    def _score(
        self, c: Candidate, fits: list[Population], priors: list[Prior], states: list[Tensor]
    ) -> _Tried:
        directions = [
            geometry.raw(fit.theta)
            for geometry, fit in zip(self._kinds(c.white), fits, strict=True)
        ]
        parts = zip(directions, priors, states, strict=True)
        fitted = [MixedFit(*part, {}, NEAR) for part in parts]
        now = _Tried(c, self.data.score(fitted), fits)
        record = {
            "whitened": c.white, "l_mu": c.l_mu, "l_B": c.l_B, "rank": fits[0].theta.shape[1] - 1,
            "components": c.components,
        }
        self.tried.append(record | now.scores.means())
        log.debug("%s", self.tried[-1])
        if self.best is None or now.scores.loss < self.best.scores.loss:
            self.best = now
        return now

    def _mixtures(self, numbers: Iterable[int]) -> None:
        best = self.best
        assert best is not None
        geometries, splits = self._kinds(best.candidate.white), self.data.splits
        evidence = [
            Evidence(split.fit.project(geometry.raw(fit.theta).to(precision(split.fit))), split.fit)
            for split, geometry, fit in zip(splits, geometries, best.fits, strict=True)
        ]
        for components in numbers:
            priors = [
                fit_mixture(fit.posterior, components, split.processes)
                for split, fit in zip(splits, best.fits, strict=True)
            ]
            kept = [prior for prior in priors if prior is not None]
            if len(kept) < len(splits):
                continue
            states = [
                posterior_states(data, prior, NEAR)
                for data, prior in zip(evidence, kept, strict=True)
            ]
            self._score(replace(best.candidate, components=components), best.fits, kept, states)
        if self.best is not best and self._gain(best.scores) <= 2:
            self.best = best
