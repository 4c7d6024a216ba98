"""What a user's comparisons say of tastes that have a Gaussian prior: the mode, and how sure it is.

A comparison's log odds are a + z . b_u, where a is the shared reward difference, z [K] what the
comparison asks of tastes, and b_u ~ N(mean, cov). Laplace's method takes the posterior's mode and
the curvature there; Newton's finds modes of many users side by side: in the K tastes or, where a
user has fewer comparisons n, in the dual (Rasmussen and Williams 2006, algorithm 3.1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lore.learning.comparisons import Comparisons, Users

ITERATIONS = 60  # of Newton's method; few users need ten
HALVINGS = 30
KEEP = 0.1  # a step that changes no log odds by more leaves the curvature nearly as it was
TOLERANCE = 1e-8  # of the log odds, in the last step; the error is smaller
ROUGH = 1e-2  # the same in single precision, where settings are compared
WIDE = 1e5  # a prior variance of log odds that single precision can just do with
LEAST = 1e-10  # added to the prior's variances, as a share of their mean
CELLS = 4096  # padded comparisons of the users that are worked on together
FEW_CELLS = 384  # the same where even the view is too much to hold


@dataclass
class Prior:
    """A Gaussian over tastes, with a mean [K] and a covariance [K, K]."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of_users(cls, tastes: Tensor) -> "Prior":
        """The Gaussian with the mean and covariance of at least two users' tastes [U, K]; a
        thousandth of the mean variance is added to all."""
        tastes = tastes.double()
        cov = torch.cov(tastes.T).reshape(tastes.shape[1], -1)
        floor = 1e-3 * cov.diagonal().mean() + 1e-8
        return cls(tastes.mean(0), cov + floor * torch.eye(len(cov)).to(cov))

    @cached_property
    def factor(self) -> Tensor:
        """L [K, K] with cov = L L^T."""
        least = LEAST * self.cov.diagonal().mean() + 1e-300
        return torch.linalg.cholesky(self.cov + least * torch.eye(len(self.cov)).to(self.cov))

    def given(self, rows: Tensor) -> Tensor:
        """The covariance [K, K] of a user's posterior, given rows of ``Evidence`` [n, K]."""
        L = self.factor.to(rows.device)
        return L @ _inverses((rows.to(L) @ L)[None])[0] @ L.T


@dataclass
class Posterior:
    """Gaussian posteriors of U users under one prior, by Laplace's method.
    The moment, where wanted, is the sum over users of (mode - mean)(mode - mean)^T + covariance."""

    mode: Tensor  # the most probable tastes [U, K]
    push: Tensor  # slope of a comparison's log likelihood at it, its weight times 1 - p [N]
    slope: Tensor  # curvature at it, its weight times p (1 - p) [N]
    moment: Tensor | None = None  # [K, K]


class Lazy:
    """A view [N, 1 + K], features along directions [F, 1 + K], computed where it is read."""

    def __init__(self, data: Comparisons, directions: Tensor) -> None:
        self.features, self.directions = data.features, directions
        self.shape, self.device = (len(data), directions.shape[1]), data.device

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Of comparisons, by their numbers [...]: [..., 1 + K]."""
        found = self.features.select(rows.flatten()).project(self.directions)
        return found.view(*rows.shape, -1)


def posteriors(
    view: Tensor | Lazy, users: Users, prior: Prior, start: Tensor | None = None,
    moment: bool = False, rough: bool = False,
) -> Posterior:  # fmt: skip
    """Every user's posterior given all the user's comparisons; the prior where there are none.

    The view [N, 1 + K] has the shared reward difference, then what a comparison asks of tastes.
    Newton's method begins with the push [N] of a posterior under a prior nearby, if ``start`` is
    given, and ends at steps that change no log odds by more than a tolerance. ``rough`` asks for
    single precision, where the prior is not too wide for it.
    """
    dtype, tolerance = (torch.float32, ROUGH) if rough else (torch.float64, TOLERANCE)
    L, mean = (part.to(view.device, dtype) for part in (prior.factor, prior.mean))
    latent = L.new_zeros(users.num_users, len(mean))
    push, slope = L.new_zeros(2, len(users))
    alike = torch.equal(L, L[0, 0] * torch.eye(len(L)).to(L))  # in all directions
    inverses = (users.counts == 0).sum() * torch.eye(len(L)).to(L)
    for who, rows, there in blocks(users, FEW_CELLS if isinstance(view, Lazy) else CELLS):
        Z = view[rows].to(L)
        a, Z = Z[..., 0] + Z[..., 1:] @ mean, Z[..., 1:] * L[0, 0] if alike else Z[..., 1:] @ L
        if rough and float(Z.square().sum(2).max()) > WIDE:
            return posteriors(view, users, prior, start, moment)
        w = users.weight.to(L)[rows] * there  # 0 where padded
        first = None if start is None else start.to(L)[rows] * there
        latent[who], p = _modes(a, Z, w, tolerance, first)
        push[rows[there]], slope[rows[there]] = (w * (1 - p))[there], (w * p * (1 - p))[there]
        if moment:
            _add_inverses(inverses, Z.mul_((w * p * (1 - p)).sqrt()[..., None]))
    found = Posterior(mean + latent @ L.T, push, slope)
    if moment:
        found.moment = L @ (latent.T @ latent + inverses) @ L.T
    return found


def blocks(users: Users, cells: int = CELLS) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Users with about as many comparisons each: their numbers [B], those of their comparisons
    [B, n], padded with the first, and which of these are theirs; at most so many cells, if not of a
    single user. Users without any are in no block."""
    order = users.counts.argsort()
    order = order[users.counts[order] > 0]
    starts = users.counts.cumsum(0) - users.counts
    first = 0
    while first < len(order):
        counts = users.counts[order[first:]].tolist()
        most, end = 2 * counts[0] + 8, 1
        while end < len(counts) and counts[end] <= most and (end + 1) * counts[end] <= cells:
            end += 1
        who = order[first : first + end]
        place = torch.arange(counts[end - 1], device=users.device)
        there = place < users.counts[who, None]
        yield who, starts[who, None] + place * there, there
        first += end


def _modes(
    a: Tensor, Z: Tensor, w: Tensor, tolerance: float, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Modes [B, K] and probabilities [B, n] of tastes N(0, I), log odds a + Z b. At the mode
    b = Z^T push, which also tells where to begin."""
    B, n, K = Z.shape
    dual = n <= K
    G = Z @ Z.mT if dual else None  # prior covariance of the log odds
    x = Z.new_zeros(B, n if dual else K)  # b, or c with b = Z^T c
    t = torch.zeros_like(a)  # Z b

    def height(t: Tensor, x: Tensor) -> Tensor:
        return (w * logsigmoid(a + t)).sum(1) - (x * (t if dual else x)).sum(1) / 2

    if start is not None:
        x = start if dual else _times(Z.mT, start)
        t = _times(G if dual else Z, x)
        far = (height(t, x) < (w * logsigmoid(a)).sum(1))[:, None]
        x, t = x.masked_fill(far, 0), t.masked_fill(far, 0)
    best, slack, moved = height(t, x), torch.finfo(Z.dtype).eps ** 0.6, math.inf
    for _ in range(ITERATIONS):
        p = torch.sigmoid(a + t)
        if moved > KEEP:
            root = (w * p * (1 - p)).sqrt()[..., None]
            H = (root * G).mul_(root.mT) if dual else (Y := root * Z).mT @ Y
            C = torch.linalg.cholesky(_plus_one(H))
        rise = w * (1 - p)
        if dual:  # (I + W G)^-1 (rise - x), where algorithm 3.1 has B = C C^T
            step = rise - x
            right = root * _times(G, step)[..., None]
            step = step - (root * torch.cholesky_solve(right, C))[..., 0]
            change = _times(G, step)
        else:
            step = torch.cholesky_solve((_times(Z.mT, rise) - x)[..., None], C)[..., 0]
            change = _times(Z, step)
        size = torch.ones_like(best)[:, None]
        for _ in range(HALVINGS):
            new = height(t + size * change, x + size * step)
            worse = new < best - slack
            if not worse.any():
                break
            size[worse] /= 2
        x, t, best = x + size * step, t + size * change, new
        moved = float((size * change).abs().max())
        if moved <= tolerance:
            break
    return (_times(Z.mT, x) if dual else x), torch.sigmoid(a + t)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (vector[:, None] @ matrix.mT)[:, 0]  # several times faster than a matrix by columns


def _plus_one(matrix: Tensor) -> Tensor:
    """I + the matrix [..., K, K], in its place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    return matrix


def covariances(view: Tensor, users: Users, prior: Prior, found: Posterior) -> Tensor:
    """Covariances [U, K, K] of ``posteriors``: (cov^-1 + sum of slope z z^T)^-1."""
    L = prior.factor.to(found.mode)
    cov = prior.cov.to(found.mode).repeat(users.num_users, 1, 1)
    for who, rows, there in blocks(users):
        root = (found.slope[rows] * there).sqrt()[..., None]
        cov[who] = L @ _inverses(root * (view[rows][..., 1:].to(L) @ L)) @ L.T
    return cov


class Evidence(NamedTuple):
    """What users' comparisons add to the precision of their tastes: R^T R of a user's rows R, of
    which there are [N, K] in all and so many of each user [U]."""

    rows: Tensor
    counts: Tensor

    @classmethod
    def of(cls, view: Tensor, users: Users, found: Posterior) -> "Evidence":
        """At the modes, from what ``posteriors`` had; written into the view, which may be large."""
        return cls(view[:, 1:].mul_(found.slope.sqrt().to(view)[:, None]), users.counts)


def deviations(z: Tensor, cov: Tensor) -> Tensor:
    """Standard deviations [N] of z . b, for z [N, K] and tastes b with a covariance [K, K]."""
    return ((z @ cov) * z).sum(1).clamp(min=0).sqrt()


def _inverses(Z: Tensor) -> Tensor:
    """(I + Z^T Z)^-1 [B, K, K] for Z [B, n, K]."""
    if Z.shape[1] > Z.shape[2]:
        return torch.cholesky_inverse(torch.linalg.cholesky(_plus_one(Z.mT @ Z)))
    T = _lowered(Z)
    return _plus_one(-T @ T.mT)


def _add_inverses(total: Tensor, Z: Tensor) -> None:
    """Adds the sum over users of (I + Z^T Z)^-1 to a total [K, K]."""
    if Z.shape[1] > Z.shape[2]:
        total += _inverses(Z).sum(0)
    else:
        T = _lowered(Z)
        total.addbmm_(T, T.mT, alpha=-1).diagonal().add_(len(Z))


def _lowered(Z: Tensor) -> Tensor:
    """T = Z^T C^-T with C C^T = I + Z Z^T, so that (I + Z^T Z)^-1 = I - T T^T (Woodbury)."""
    factor = torch.linalg.cholesky(_plus_one(Z @ Z.mT))
    return torch.linalg.solve_triangular(factor.mT, Z.mT, upper=True, left=False)
