"""MRM (SIGIR 2026) on fixed embeddings: two rewards, and a meta-learned start of their mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lore.common.settings import PositiveFloat, Rate, Steps
from lore.learning.comparisons import Comparisons, Seed, Users
from lore.learning.method import Task
from lore.methods.fitting.geometry import Geometry
from lore.methods.fitting.linear import (
    HALVINGS,
    LinearFitted,
    LinearPeer,
    backproject,
    fit_together,
    project,
    ridge_directions,
    slopes,
)
from lore.methods.ridge_bt import ROUGH, fit_shared, inverse_curvature

K = 2
SCALE = 0.01  # of embeddings
QUERY = 0.9  # share of a user's dialogues that an episode is judged on
TAIL, SHARPNESS, USERS = 0.5, 0.5, 2  # rho, gamma and users of a step
EPOCHS, WARM_UP, CLIP = 200, 0.05, 1.0
EPSILON = 1e-8  # of Adam
INNER_RATE = 1.0  # converged; rewards further apart do what a larger rate does
MIX = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # a mean and a contrast make two rewards


def tail_loss(losses: Tensor, tail: float = TAIL, sharpness: float = SHARPNESS) -> Tensor:
    """Sum of sigmoid((L - tau) / sharpness) L: users with losses above tau count more.

    Tau is the losses' quantile 1 - tail. Weights and tau are differentiated through, as published.
    At sharpness 0 only losses above tau count.
    """
    tau = torch.quantile(losses, 1 - tail)
    if sharpness <= 0:
        return ((losses > tau).to(losses) * losses).sum()
    return (torch.sigmoid((losses - tau) / sharpness) * losses).sum()


def tail_loss_of_pairs(losses: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """Mean of ``tail_loss`` over all pairs of users, whose tau is the mean of the two losses.

    What the published steps, on two users at a time, descend on average; smooth, which the
    quantile of many losses is not. One user alone is a step of its own, as there.
    """
    if len(losses) == 1:
        return tail_loss(losses, sharpness=sharpness)
    above = torch.sigmoid((losses[:, None] - losses[None, :]) / (2 * sharpness))
    others = above.sum(1) - 0.5  # less the user's own
    return 2 / (len(losses) * (len(losses) - 1)) * (others * losses).sum()


def mean_losses(Z: Tensor, users: Users, s: Tensor) -> Tensor:
    """Each user's mean loss [U] with mixture softmax(s_u), for logits s [U, 2]."""
    logits = (Z * s.softmax(1)[users.user]).sum(1)
    lost = users.sum((users.weight * softplus(-logits))[:, None])[:, 0]
    return lost / users.user_weight().clamp(min=1e-300)


def inner_gradient(Z: Tensor, users: Users, s: Tensor) -> Tensor:
    """Gradient of each user's mean loss by the user's logits s [U, 2]; 0 without comparisons."""
    p = s.softmax(1)
    by_p = users.sum(Z * slopes(users, (Z * p[users.user]).sum(1))[:, None])
    by_p = by_p / users.user_weight().clamp(min=1e-300)[:, None]
    return p * (by_p - (p * by_p).sum(1, keepdim=True))


def adam_steps(Z: Tensor, users: Users, s: Tensor, rate: float, steps: int) -> Tensor:
    """Logits s [U, 2] after steps of Adam on every user's mean loss, each user alone."""
    first, second = torch.zeros_like(s), torch.zeros_like(s)
    for t in range(1, steps + 1):
        g = inner_gradient(Z, users, s)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        size = (second / (1 - 0.999**t)).sqrt() + EPSILON
        s = s - rate * (first / (1 - 0.9**t)) / size
    return s


def gradient_steps(Z: Tensor, users: Users, s: Tensor, rate: float, steps: int) -> Tensor:
    """Logits s [U, 2] after steps of plain gradient descent on every user's mean loss."""
    for _ in range(steps):
        s = s - rate * inner_gradient(Z, users, s)
    return s


class MRMFitted(LinearFitted):
    """A fit of MRM: state [2], the weights of the two rewards."""

    start: Tensor  # logits of the weights that everyone begins with [2]
    inner: tuple[float, int]  # rate and number of the steps from there
    adam: bool  # whether they are Adam's or plain

    def adapt(self, view: Tensor, users: Users, seed: Seed) -> Tensor:
        """Weights [U', 2] after the inner steps from the common start."""
        s = self.start.expand(users.num_users, K)
        steps = adam_steps if self.adam else gradient_steps
        return steps(view, users, s, *self.inner).softmax(1)


@dataclass(frozen=True)
class MRM(LinearPeer):
    """Rewards .01 x' A softmax(s_u); s_u is a few inner steps away from a shared, learned s.

    No weights of users are kept: seen users are adapted as new ones are. The population's state is
    the start, softmax(s).

    ``faithful`` follows the published training: 200 epochs of Adam on two users at a time, nine
    tenths of a user's dialogues as query, one inner Adam step. Such a step is the rate times the
    gradient's sign, so a weight moves by at most half the rate, and nothing of the outer gradient
    passes through it. The published choice of the best epoch on test users is left out: the last
    one is kept.

    ``converged``: the same episodes, one a user and fixed, and the tail loss's mean over all pairs
    of users; inner steps of plain gradient descent, differentiated through; and a ridge, among
    features of mean square length 1, on mean and half difference of A's columns. L-BFGS finds the
    minimum.

    Args:
        rate: of the outer Adam; published 1e-3 (PRISM) and 5e-3 (TL;DR). Faithful only.
        inner_rate: of the inner Adam; published 1e-3 (PRISM) and 5e-3 (TL;DR). Faithful only.
        inner_steps: of plain gradient descent. Converged only.
        strengths: of the ridge, from the strongest on; chosen on validation if several.
    """

    rate: Rate = 1e-3
    inner_rate: Rate = 1e-3
    inner_steps: Steps = 5
    strengths: tuple[PositiveFloat, ...] = HALVINGS

    def converged(
        self, data: Comparisons, geometry: Geometry, strength: float, warm: Any, tolerance: float
    ) -> tuple[MRMFitted, list[Tensor]]:
        """The minimum over mean and half difference of A's columns, and s; see ``LinearPeer``."""
        episode = _episode(data.units())
        (query, users), (support, known) = [(rows, data.pick(rows, n)) for rows, n in episode]

        def objective(B: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
            given = project(data, geometry.raw(B)).requires_grad_(), s.requires_grad_()
            Z = given[0] @ MIX.to(B)
            there = s.expand(data.num_users, K)
            there = gradient_steps(Z[support], known, there, INNER_RATE, self.inner_steps)
            loss = tail_loss_of_pairs(mean_losses(Z[query], users, there)) * len(data) / 2
            by_Z, by_s = torch.autograd.grad(loss, given)  # the loss is as large as a sum over all
            by_B = geometry.raw(backproject(data, by_Z)) + strength * B
            return loss.detach() + strength / 2 * B.square().sum(), [by_B, by_s]

        if warm is None:
            shared = fit_shared(data, geometry, 2 * strength, tolerance=ROUGH).x.double()
            own = geometry.stretched(ridge_directions(data).T).T
            _, size, right = torch.linalg.svd(own - own.mean(0), full_matrices=False)
            away = right[:1].T * size[0] / math.sqrt(data.num_users)
            start = [torch.cat([shared, away], 1), shared.new_zeros(K)]
        else:
            start = [geometry.stretched(warm[0]), warm[1]]
        share = start[1].new_tensor([0.5, 0.05])  # of the curvature by the two columns
        curve = inverse_curvature(geometry, strength / share)
        inverses = [lambda G: curve(G) / share, lambda g: 10 * g / len(data)]
        (B, s), losses = fit_together(objective, start, inverses, tolerance)
        B, s = geometry.raw(B.detach()), s.detach()
        losses, inner = [loss / len(data) for loss in losses], (INNER_RATE, self.inner_steps)
        fitted = self._fitted(data, B @ MIX.to(B) / SCALE, s, inner, losses)
        fitted.settings["ridge"] = strength
        return fitted, [B, s]

    def _fitted(
        self, data: Comparisons, A: Tensor, s: Tensor, inner: tuple[float, int], losses: list[float]
    ) -> MRMFitted:
        rate, steps = inner
        settings, s = {"inner_rate": rate, "inner_steps": steps}, s.detach()
        mean, size = s.softmax(0), A.numel() + K
        fitted = MRMFitted(self, "MRM", settings, SCALE * A, mean.expand(1, K), mean, size)
        fitted.start, fitted.inner, fitted.adam = s, inner, self.faithful
        fitted.users = fitted.adapt(fitted.view(data), data, 0)
        note = f"{steps} inner step(s) at {rate:g}; {len(losses)} outer steps."
        return fitted.with_curve(losses, note)

    def published(self, task: Task) -> MRMFitted:
        """The published epochs of Adam."""
        data, generator = task.local_train, torch.Generator().manual_seed(task.seed)
        bound = data.num_features**-0.5
        A = bound * (2 * torch.rand(data.num_features, K, generator=generator) - 1)
        A, s = A.double().to(data.device), torch.randn(K, generator=generator).double()
        given = [A, s.to(data.device)]
        adam, losses = torch.optim.Adam(given, lr=self.rate), []
        planned = max(1, data.num_users * EPOCHS // USERS)
        for _ in range(EPOCHS):
            for some in torch.randperm(data.num_users, generator=generator).split(USERS):
                few = some.sort().values
                batch = data.select(torch.isin(data.user, few.to(data.device)))
                episode = _episode(batch.units(), generator)
                loss, gradients = _outer_gradients(batch, *given, self.inner_rate, episode)
                for parameter, gradient in zip(given, gradients, strict=True):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(given, CLIP)
                adam.param_groups[0]["lr"] = self.rate * _schedule(len(losses), planned)
                adam.step()
                losses.append(loss)
        return self._fitted(data, *given, (self.inner_rate, 1), losses)


Episode = tuple[tuple[Tensor, list[int]], tuple[Tensor, list[int]]]


def _episode(units: list[list[Tensor]], generator: torch.Generator | None = None) -> Episode:
    """Rows and counts by user of the query, nine tenths of the dialogues, and of the support, from
    each user's dialogues, shuffled where there is a generator; a single one is on both sides."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for dialogues in units:
        count = len(dialogues)
        order = list(range(count))
        if generator is not None:
            order = torch.randperm(count, generator=generator).tolist()
        last = max(1, int(QUERY * count))
        query = [rows for rows, place in zip(dialogues, order, strict=True) if place < last]
        support = [rows for rows, place in zip(dialogues, order, strict=True) if place >= last]
        for side, parts in zip(sides, (query, support or query), strict=True):
            side.append(torch.cat(parts).sort().values)
    query, support = ((torch.cat(side), [len(rows) for rows in side]) for side in sides)
    return query, support


def _outer_gradients(
    batch: Comparisons, A: Tensor, s: Tensor, inner_rate: float, episode: Episode
) -> tuple[float, list[Tensor]]:
    """Tail loss of an episode after one inner Adam step, and its gradients by A and s.

    The inner step passes s through and nothing else: it is the rate times the sign of a gradient.
    """
    (query, counts), (support, few) = episode
    Z, s = (SCALE * project(batch, A)).requires_grad_(), s.clone().requires_grad_()
    start = s.expand(batch.num_users, K)
    step = adam_steps(
        Z.detach()[support], batch.pick(support, few), start.detach(), inner_rate, 1
    ) - start.detach()  # fmt: skip
    loss = tail_loss(mean_losses(Z[query], batch.pick(query, counts), start + step))
    by_Z, by_s = torch.autograd.grad(loss, [Z, s])
    return float(loss.detach()), [SCALE * backproject(batch, by_Z), by_s]


def _schedule(step: int, planned: int) -> float:
    """Share of the rate: linear for a twentieth of the steps, then half a cosine down to 0."""
    warm = WARM_UP * planned
    if step < warm:
        return step / max(1.0, warm)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, planned - warm))))
