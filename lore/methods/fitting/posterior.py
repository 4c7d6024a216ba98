"""What a user's comparisons say of a low-dimensional taste with a Gaussian prior.

A comparison's log odds are a + z . b_u, where a is the shared reward difference, z [K] what the
comparison asks of tastes, and b_u ~ N(prior). The posterior of b_u is approached by the Gaussian
q = N(m, S) with the greatest evidence lower bound (ELBO). Log odds are Gaussian under q, so the
likelihood's expectation is one-dimensional and formed by Gauss-Hermite quadrature; the bounds of
Laplace and of Jaakkola and Jordan understate the variance where a user has few comparisons.

Shape letters: U users, N comparisons, K directions of taste, C components of the prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lore.learning.comparisons import Users

NODES = 16  # of the quadrature in fits: relative error below 1e-6 for standard deviations up to 2
FEW_NODES = 8  # while settings are chosen, and on the way to a posterior
ROUGH = 1e-2  # the decrement at which more nodes are used
NODES_OF_PROBABILITIES = 32
LEAST_VARIANCE = 1e-8
ENOUGH = 0.25  # of the rise that a step's slope promises; with less, steps oscillate
MOST = 0.75  # of the users of a block must still move for the others to be carried along
SPARE = 1 << 12  # comparisons of weight 0 that a block may have: dearer than that is another block
CELLS = {"cpu": 1 << 13, "cuda": 1 << 22}  # comparisons at a time: what a core's cache holds


@lru_cache
def _hermite(nodes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    points, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(nodes))
    return points.to(device, dtype), (weights / weights.sum()).to(device, dtype)


def quadrature(nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights [nodes] that integrate over a standard normal variable."""
    return _hermite(nodes, like.dtype, like.device)


def expectations(a: Tensor, v: Tensor, nodes: int = NODES) -> tuple[Tensor, Tensor, Tensor]:
    """E[log sigmoid(t)], t ~ N(a, v), its slope in a, and -2 times that in v: three tensors [N].

    The slopes are those of the quadrature itself, so that maxima are where they vanish.

    Args:
        a: means of the log odds [...].
        v: their variances [...].
        nodes: of the quadrature.
    """
    points, weights = quadrature(nodes, a)
    sd = v.clamp(min=LEAST_VARIANCE).sqrt()
    t = (sd[..., None] * points).add_(a[..., None]).clamp_(min=-700)  # the sigmoid stays above 0
    yes = torch.sigmoid_(t)
    first = 1 - yes @ weights
    second = (yes @ (weights * points)) / sd
    return yes.log_() @ weights, first, second


def predictive_logit(a: Tensor, v: Tensor) -> Tensor:
    """Log odds [N] of the probability E[sigmoid(t)], t ~ N(a, v); the sign is a's."""
    points, weights = quadrature(NODES_OF_PROBABILITIES, a)
    t = torch.outer(v.sqrt(), points).sub_(a.abs()[:, None])
    far = t[:, 0] < -600  # where the sigmoid may be 0 at every node but few
    less = torch.sigmoid(t) @ weights  # the smaller probability is the exact one
    logit = torch.log1p(-less) - less.log()
    if far.any():
        t, logs = t[far], weights.log()
        no, yes = (torch.logsumexp(logsigmoid(s * t) + logs, 1) for s in (1, -1))
        logit[far] = yes - no
    return torch.copysign(logit.clamp(min=0), a)


@dataclass
class Prior:
    """A mixture of Gaussians over tastes; usually one component, N(0, I).

    Attributes:
        weight: of the components [C]; they sum to 1.
        mean: [C, K].
        cov: [C, K, K].
    """

    weight: Tensor
    mean: Tensor
    cov: Tensor

    @classmethod
    def standard(cls, K: int, like: Tensor) -> Prior:
        """N(0, I) in K dimensions."""
        return cls(like.new_ones(1), like.new_zeros(1, K), torch.eye(K).to(like)[None])

    @classmethod
    def of_users(cls, tastes: Tensor, least: float = 1e-3) -> Prior:
        """The Gaussian with the mean and covariance of users' tastes [U, K].

        Args:
            tastes: point estimates of at least two users.
            least: added to all variances, as a share of their mean.
        """
        tastes = tastes.double()
        cov = torch.cov(tastes.T).reshape(tastes.shape[1], -1)
        floor = least * cov.diagonal().mean() + LEAST_VARIANCE
        cov = cov + floor * torch.eye(len(cov)).to(cov)
        return cls(tastes.new_ones(1), tastes.mean(0)[None], cov[None])

    @property
    def state(self) -> Tensor:
        """What is known of one of whom nothing is known: [C (1 + K + K K)]."""
        return pack(self.weight[None], self.mean[None], self.cov[None])[0]


def pack(weight: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Weights [U, C], means [U, C, K] and covariances [U, C, K, K] as states [U, S]."""
    return torch.cat([weight[:, :, None], mean, cov.flatten(2)], 2).flatten(1)


def unpack(state: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [U, C], means [U, C, K] and covariances [U, C, K, K] of states [U, S]."""
    parts = state.unflatten(1, (components, -1))
    K = (math.isqrt(4 * parts.shape[2] - 3) - 1) // 2  # 1 + K + K K numbers each
    return parts[:, :, 0], parts[:, :, 1 : 1 + K], parts[:, :, 1 + K :].unflatten(2, (K, K))


def moments(state: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Mean [U, K] and covariance [U, K, K] of tastes, whatever the number of components."""
    weight, mean, cov = unpack(state, components)
    m = (weight[:, :, None] * mean).sum(1)
    off = mean - m[:, None]
    spread = cov + off[..., :, None] * off[..., None, :]
    return m, (weight[:, :, None, None] * spread).sum(1)


def predict(Z: Tensor, state: Tensor, user: Tensor, components: int) -> Tensor:
    """Log odds [N] of the predictive probability that the chosen response is preferred.

    Args:
        Z: shared reward difference, then what the comparison asks of tastes [N, 1 + K].
        state: of the users [U, S].
        user: whose each comparison is [N], a row of the state.
        components: C, of the prior.
    """
    a, Z = Z[:, 0].to(state), Z[:, 1:].to(state)
    weight, mean, cov = unpack(state, components)
    yes, no = [], []
    for c in range(components):
        mine = a + (Z * mean[user, c]).sum(1)
        variance = torch.einsum("nk,nkl,nl->n", Z, cov[user, c], Z).clamp(min=0)
        logit, log_weight = predictive_logit(mine, variance), weight[user, c].log()
        if components == 1:
            return logit
        yes.append(log_weight + logsigmoid(logit))
        no.append(log_weight + logsigmoid(-logit))
    return torch.logsumexp(torch.stack(yes), 0) - torch.logsumexp(torch.stack(no), 0)


@dataclass
class Posterior:
    """Gaussian posteriors of U users under one Gaussian prior.

    Attributes:
        mean: [U, K].
        precision: inverse covariances [U, K, K].
        bound: evidence lower bound [U].
        decrement: how far below its maximum each bound may still be [U].
        sweeps: how many were made.
    """

    mean: Tensor
    precision: Tensor
    bound: Tensor
    decrement: Tensor
    sweeps: int

    @property
    def cov(self) -> Tensor:
        """Covariances [U, K, K]."""
        return invert(self.precision)


def invert(P: Tensor) -> Tensor:
    """Inverses of positive definite matrices [U, K, K]."""
    return torch.cholesky_inverse(torch.linalg.cholesky(P))


@dataclass
class _Block:
    """Comparisons of users who have about as many of them, filled up to n each with weight 0.

    Attributes:
        users: which users [u].
        rows: which comparisons [u, n]; any where the weight is 0.
        a: shared reward differences [u, n].
        Z: what the comparisons ask of tastes [u, n, K].
        weight: how much each counts [u, n].
        nodes: of the quadrature.
    """

    users: Tensor
    rows: Tensor
    a: Tensor
    Z: Tensor
    weight: Tensor
    nodes: int

    def some(self, which: Tensor) -> _Block:
        """Of those users alone for whom ``which`` [u] is true."""
        parts = (self.users, self.rows, self.a, self.Z, self.weight)
        return _Block(*(part[which] for part in parts), self.nodes)

    def moments(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and variances of the log odds [u, n], and Z cov [u, n, K]."""
        a = self.a + (self.Z @ mean[:, :, None])[:, :, 0]
        spread = self.Z @ cov
        return a, (spread * self.Z).sum(2).clamp(min=0), spread

    def likelihood(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expected log likelihood [u], its slope [u, K], and the precision it adds [u, K, K]."""
        a, v, _ = self.moments(mean, cov)
        value, e1, e2 = expectations(a, v, self.nodes)
        slope = ((self.weight * e1)[:, None, :] @ self.Z)[:, 0]
        added = self.Z.mT @ ((self.weight * e2)[:, :, None] * self.Z)
        return (self.weight * value).sum(1), slope, added


class Evidence:
    """The likelihood of users' tastes: all that their posteriors need of the comparisons.

    Args:
        Z: shared reward difference, then what the comparison asks of tastes [N, 1 + K].
        users: whose they are, and what each weighs.
        nodes: of the quadrature.
    """

    def __init__(self, Z: Tensor, users: Users, nodes: int = NODES) -> None:
        self.num_users, self.rank = users.num_users, Z.shape[1] - 1
        Z = torch.cat([Z.double(), Z.new_zeros(1, Z.shape[1]).double()])  # for users without any
        weight = torch.cat([users.weight, users.weight.new_zeros(1)]).to(Z.device)
        counts, starts = users.counts.to(Z.device), (users.counts.cumsum(0) - users.counts)
        self.shape, self.blocks = (len(Z) - 1, Z.shape[1]), []
        for some in _alike(users.counts.cpu(), CELLS.get(Z.device.type, CELLS["cpu"])):
            some = some.to(Z.device)
            place = torch.arange(max(1, int(counts[some].max())), device=Z.device)
            there = place < counts[some][:, None]
            rows = torch.where(there, starts.to(Z.device)[some][:, None] + place, len(Z) - 1)
            own = Z[rows]
            self.blocks.append(_Block(some, rows, own[..., 0], own[..., 1:], weight[rows], nodes))

    def slopes(self, mean: Tensor, cov: Tensor) -> Tensor:
        """Slopes [N, 1 + K] of the expected log likelihood along x . mu and x . B.

        Args:
            mean, cov: of users' tastes [U, K], [U, K, K].
        """
        G = mean.new_zeros(self.shape[0] + 1, self.shape[1])
        for block in self.blocks:
            m = mean[block.users]
            a, v, spread = block.moments(m, cov[block.users])
            _, e1, e2 = expectations(a, v, block.nodes)
            B = e1[:, :, None] * m[:, None] - e2[:, :, None] * spread
            own = block.weight[:, :, None] * torch.cat([e1[:, :, None], B], 2)
            G[block.rows.flatten()] = own.flatten(0, 1)
        return G[:-1]

    def curvature(self, mean: Tensor, cov: Tensor) -> Tensor:
        """The likelihood's curvature along x . mu and x . B, summed over all comparisons [1 + K]:
        the expected p (1 - p), for a column of B times the expected square of the user's taste.

        Args:
            mean, cov: of users' tastes [U, K], [U, K, K].
        """
        found = mean.new_zeros(1 + mean.shape[1])
        for block in self.blocks:
            m, S = mean[block.users], cov[block.users]
            a, v, _ = block.moments(m, S)
            bend = (block.weight * expectations(a, v, block.nodes)[2]).sum(1)
            squares = m.square() + S.diagonal(dim1=1, dim2=2)
            found += torch.cat([bend.sum()[None], bend @ squares])
        return found


def _alike(counts: Tensor, cells: int) -> list[Tensor]:
    """Users [u] in groups with about as many comparisons each, and not too many in all.

    A group costs about as much as ``SPARE`` comparisons do, so that much may be filled up.
    """
    groups, first, total, order = [], 0, 0, torch.argsort(counts, stable=True)
    for i, count in enumerate(counts[order].tolist()):
        size = (i - first + 1) * count
        if i > first and (size > cells or size - total - count > SPARE):
            groups.append(order[first:i])
            first, total = i, 0
        total += count
    return [*groups, order[first:]]


class _Given(NamedTuple):
    """A Gaussian prior: mean [K], precision [K, K], and half the logarithm of its determinant."""

    mean: Tensor
    precision: Tensor
    log_root: Tensor

    def divergence(self, mean: Tensor, L: Tensor, S: Tensor) -> Tensor:
        """KL divergence [U] of N(mean, S = (L L^T)^-1) from the prior."""
        off, trace = mean - self.mean, (S * self.precision).sum((1, 2))
        square = ((off @ self.precision) * off).sum(1)
        logs = L.diagonal(dim1=1, dim2=2).log().sum(1)
        return (trace + square - mean.shape[1]) / 2 + logs - self.log_root


def solve(
    data: Evidence,
    mean: Tensor,
    cov: Tensor,
    start: Posterior | None = None,
    tolerance: float = 1e-10,
    sweeps: int = 100,
) -> Posterior:
    """Posteriors by damped Newton steps: no user's bound ever falls.

    A step of size r takes the precision r of the way to what the expected curvature asks for, and
    the mean along the slope times r of the new covariance. A user whose bound rises less than the
    slope promises stays, and halves r. Users who are done stay where they are, so that nobody's
    posterior depends on who else is there.

    Args:
        data: the users' comparisons.
        mean, cov: of the Gaussian prior [K], [K, K].
        start: where to begin; at the prior if None.
        tolerance: stop once every decrement is below it.
        sweeps: or after as many.
    """
    U, K, P = data.num_users, data.rank, torch.linalg.inv(cov)
    prior = _Given(mean, P, torch.logdet(P) / 2)
    found = Posterior(mean.new_empty(U, K), cov.new_empty(U, K, K), *mean.new_empty(2, U), 0)
    for block in data.blocks:
        some = block.users
        if start is None:
            m, P = mean.expand(len(some), K), prior.precision.expand(len(some), K, K)
        else:
            m, P = start.mean[some], start.precision[some]
        if start is None and block.nodes > FEW_NODES:  # the way there need not be exact
            near = _solve(replace(block, nodes=FEW_NODES), prior, m, P, ROUGH, sweeps)
            m, P = near.mean, near.precision
        part = _solve(block, prior, m, P, tolerance, sweeps)
        found.mean[some], found.precision[some] = part.mean, part.precision
        found.bound[some], found.decrement[some] = part.bound, part.decrement
        found.sweeps = max(found.sweeps, part.sweeps)
    return found


def _solve(
    data: _Block, prior: _Given, m: Tensor, P: Tensor, tolerance: float, sweeps: int
) -> Posterior:
    found = Posterior(torch.empty_like(m), torch.empty_like(P), *m.new_empty(2, len(m)), 0)
    live, size, kept = torch.arange(len(m), device=m.device), m.new_ones(len(m)), ()
    best = least = m.new_full((len(m),), -math.inf)

    def keep() -> None:
        found.mean[live], found.precision[live] = kept[0], kept[1]
        found.bound[live], found.decrement[live] = kept[5], kept[6]

    L = torch.linalg.cholesky(P)
    for found.sweeps in range(1, sweeps + 1):
        S = torch.cholesky_inverse(L)
        value, slope, added = data.likelihood(m, S)
        bound = value - prior.divergence(m, L, S)
        worse = bound < least - 1e-13 * (1 + best.abs())
        aim, g = prior.precision + added, slope - (m - prior.mean) @ prior.precision
        now = (m, P, S, g, aim, bound, _decrement(S, g, aim - P))
        if bool(worse.any()):
            now = tuple(_where(worse, *x) for x in zip(kept, now, strict=True))
        kept, slow = now, now[6] > tolerance
        moving = int(slow.sum())
        if not moving:
            break
        size = torch.where(worse, size / 2, (1.5 * size).clamp(max=1))
        if moving < MOST * len(slow):
            keep()
            data, kept = data.some(slow), tuple(x[slow] for x in kept)
            live, size, slow = live[slow], size[slow], slow[slow]
        m, P, S, g, aim, best, decrement = kept
        move = torch.where(slow, size, 0)  # who is done stays, whoever else is in the block
        P = torch.lerp(P, aim, move[:, None, None])
        L = torch.linalg.cholesky(P)
        step = torch.cholesky_solve(g[:, :, None], L)[:, :, 0]
        m = m + move[:, None] * step
        least = best + ENOUGH * move * decrement
    keep()
    return found


def _decrement(S: Tensor, g: Tensor, change: Tensor) -> Tensor:
    """Twice what a full step promises [U], to second order, in mean and in precision."""
    move = S @ change
    return ((S @ g[:, :, None])[:, :, 0] * g).sum(1) + (move * move.mT).sum((1, 2)) / 2


def _where(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def posterior_states(data: Evidence, prior: Prior, tolerance: float = 1e-10) -> Tensor:
    """Users' states [U, S]; a mixture's components are weighted by their evidence bounds.

    Args:
        data: the users' comparisons; a user may have none.
        prior: of their tastes.
        tolerance: of the decrements.
    """
    fits = [
        solve(data, m, S, tolerance=tolerance)
        for m, S in zip(prior.mean, prior.cov, strict=True)
    ]
    evidence = torch.stack([fit.bound for fit in fits], 1) + prior.weight.log()
    mean, cov = (torch.stack(x, 1) for x in zip(*((f.mean, f.cov) for f in fits), strict=True))
    return pack(evidence.softmax(1), mean, cov)
