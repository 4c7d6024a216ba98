"""MRM (SIGIR 2026) on fixed embeddings: two rewards, and a meta-learned start of their mixture."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lore.common.settings import PositiveFloat, Rate, Steps
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Task
from lore.methods.fitting import linear
from lore.methods.fitting.geometry import Geometry
from lore.methods.fitting.linear import LinearFitted, LinearPeer, backproject, project
from lore.methods.fitting.networks import cosine
from lore.methods.ridge_bt import ROUGH, fit_shared, inverse_curvature

K = 2
SCALE = 0.01  # of embeddings
QUERY = 0.9  # share of a user's dialogues that an episode is judged on
TAIL, SHARPNESS, USERS = 0.5, 0.5, 2  # rho, gamma and users of a step
EPOCHS, WARM_UP, CLIP = 200, 0.05, 1.0
EPSILON = 1e-8  # of Adam
INNER_RATE = 1.0  # converged; rewards further apart do what a larger rate does
MIX = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # a mean and a contrast make two rewards


def tail_loss(losses: Tensor) -> Tensor:
    """Sum of sigmoid((L - tau) / sharpness) L, tau being the losses' quantile 1 - tail: users with
    larger losses count more. Weights and tau are differentiated through, as published."""
    tau = torch.quantile(losses, 1 - TAIL)
    return (torch.sigmoid((losses - tau) / SHARPNESS) * losses).sum()


def tail_loss_of_pairs(losses: Tensor) -> Tensor:
    """Mean of ``tail_loss`` over all pairs of users, which is what published steps descend on
    average; smooth, unlike the quantile of many losses. One alone is a step, as there."""
    if len(losses) == 1:
        return tail_loss(losses)
    above = torch.sigmoid((losses[:, None] - losses[None, :]) / (2 * SHARPNESS))
    others = above.sum(1) - 0.5  # less the user's own
    return 2 / (len(losses) * (len(losses) - 1)) * (others * losses).sum()


def mean_losses(Z: Tensor, users: Users, s: Tensor) -> Tensor:
    """Each user's mean loss [U] with mixture softmax(s_u), for logits s [U, 2]."""
    return users.log_losses((Z * s.softmax(1)[users.user]).sum(1))


def inner_gradient(Z: Tensor, users: Users, s: Tensor) -> Tensor:
    """Gradient of each user's mean loss by the user's logits s [U, 2]; 0 without comparisons."""
    p = s.softmax(1)
    by_p = users.sum(Z * linear.slopes(users, (Z * p[users.user]).sum(1))[:, None])
    by_p = by_p / users.user_weight().clamp(min=1e-300)[:, None]
    return p * (by_p - (p * by_p).sum(1, keepdim=True))


def inner_steps(
    Z: Tensor, users: Users, s: Tensor, rate: float, steps: int, adam: bool = False
) -> Tensor:
    """Logits s [U, 2] after steps down every user's mean loss, each user alone: plain ones, or such
    as Adam's first."""
    for _ in range(steps):
        g = inner_gradient(Z, users, s)
        s = s - rate * (g / (g.abs() + EPSILON) if adam else g)
    return s


@dataclass(frozen=True)
class MRM(LinearPeer):
    """Rewards .01 x' A softmax(s_u); s_u is a few inner steps away from a shared, learned s.

    No weights of users are kept: seen users are adapted as new ones are, from the population's
    state, softmax(s). ``faithful`` follows the published training: 200 epochs of Adam on two users
    at a time, nine tenths of a user's dialogues as query, one inner Adam step, through which
    nothing of the outer gradient passes; the last epoch is kept, not the best on test users.
    ``converged``: the same episodes, one a user and fixed, and the tail loss's mean over all pairs
    of users; inner steps of plain gradient descent, differentiated through; and a ridge, among
    features of mean square length 1, on mean and half difference of A's columns; by L-BFGS.

    Args:
        rate: of the outer Adam; published 1e-3 (PRISM) and 5e-3 (TL;DR). Faithful only.
        inner_rate: of the inner Adam; published 1e-3 (PRISM) and 5e-3 (TL;DR). Faithful only.
        inner_steps: of plain gradient descent. Converged only.
        strengths: of the ridge, from the strongest on; chosen on validation if several.
    """

    rate: Rate = 1e-3
    inner_rate: Rate = 1e-3
    inner_steps: Steps = 5
    strengths: tuple[PositiveFloat, ...] = linear.HALVINGS

    def converged(
        self, data: Comparisons, geometry: Geometry, strength: float, warm: Any, tolerance: float
    ) -> tuple[LinearFitted, list[Tensor]]:
        """The minimum over mean and half difference of A's columns, and s; see ``LinearPeer``."""
        episode = _episode(data.units)
        (query, users), (support, known) = [(rows, data.pick(rows, n)) for rows, n in episode]

        def objective(B: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
            given = project(data, geometry.raw(B)).requires_grad_(), s.requires_grad_()
            Z = given[0] @ MIX.to(B)
            there = s.expand(data.num_users, K)
            there = inner_steps(Z[support], known, there, INNER_RATE, self.inner_steps)
            loss = tail_loss_of_pairs(mean_losses(Z[query], users, there)) * len(data) / 2
            by_Z, by_s = torch.autograd.grad(loss, given)  # the loss is as large as a sum over all
            by_B = geometry.raw(backproject(data, by_Z)) + strength * B
            return loss.detach() + strength / 2 * B.square().sum(), [by_B, by_s]

        if warm is None:
            shared = fit_shared(data, geometry, 2 * strength, tolerance=ROUGH).x.double()
            own = geometry.stretched(linear.ridge_directions(data).T).T
            _, size, right = torch.linalg.svd(own - own.mean(0), full_matrices=False)
            away = right[:1].T * size[0] / math.sqrt(data.num_users)
            start = [torch.cat([shared, away], 1), shared.new_zeros(K)]
        else:
            start = [geometry.stretched(warm[0]), warm[1]]
        share = start[1].new_tensor([0.5, 0.05])  # of the curvature by the two columns
        curve = inverse_curvature(geometry, strength / share)
        inverses = [lambda G: curve(G) / share, lambda g: 10 * g / len(data)]
        (B, s), losses = linear.fit_together(objective, start, inverses, tolerance, len(data))
        B, s = geometry.raw(B.detach()), s.detach()
        steps = self.inner_steps
        fitted = self._fitted(data, B @ MIX.to(B) / SCALE, s, INNER_RATE, steps, losses)
        fitted.settings["ridge"] = strength
        return fitted, [B, s]

    def _fitted(
        self, data: Comparisons, A: Tensor, s: Tensor, rate: float, steps: int, losses: list[float]
    ) -> LinearFitted:
        def solve(view: Tensor, users: Users, generator: Any) -> Tensor:
            start = s.expand(users.num_users, K)
            return inner_steps(view, users, start, rate, steps, self.faithful).softmax(1)

        settings = {"inner_rate": rate, "inner_steps": steps}
        note = f"{steps} inner step(s) at {rate:g}; {len(losses)} outer steps."
        users = s.new_zeros(0, K)  # none is kept: they adapt as new ones do
        given = settings, SCALE * A, users, s.softmax(0), solve, losses, note
        fitted = LinearFitted(self, "MRM", *given)
        fitted.users = fitted.adapt(fitted.view(data), data, 0)
        fitted.facts["parameters"] += K  # the start
        return fitted

    def published(self, task: Task) -> LinearFitted:
        """The published epochs of Adam."""
        data, generator = task.local_train, torch.Generator().manual_seed(task.seed)
        A = 2 * torch.rand(data.num_features, K, generator=generator) - 1
        A, s = data.num_features**-0.5 * A, torch.randn(K, generator=generator)
        given = [A.double().to(data.device), s.double().to(data.device)]
        adam, losses = torch.optim.Adam(given, lr=self.rate), []
        planned = max(1, data.num_users * EPOCHS // USERS)
        for _ in range(EPOCHS):
            for some in torch.randperm(data.num_users, generator=generator).split(USERS):
                batch = data.select(torch.isin(data.user, some.to(data.device)))
                episode = _episode(batch.units, generator)
                loss, gradients = _outer_gradients(batch, *given, self.inner_rate, episode)
                given[0].grad, given[1].grad = gradients
                torch.nn.utils.clip_grad_norm_(given, CLIP)
                share = cosine(len(losses), WARM_UP * planned, planned)
                adam.param_groups[0]["lr"] = self.rate * share
                adam.step()
                losses.append(loss)
        return self._fitted(data, *given, self.inner_rate, 1, losses)


Episode = list[tuple[Tensor, list[int]]]


def _episode(units: list[list[Tensor]], generator: torch.Generator | None = None) -> Episode:
    """Rows and counts by user of the query, nine tenths of the dialogues, and of the support, from
    each user's dialogues, shuffled where there is a generator; a single one is on both sides."""
    sides: list[list[Tensor]] = [[], []]
    for dialogues in units:
        count = len(dialogues)
        order, last = range(count), max(1, int(QUERY * count))
        if generator is not None:
            order = torch.randperm(count, generator=generator).tolist()
        query = [rows for rows, place in zip(dialogues, order, strict=True) if place < last]
        support = [rows for rows, place in zip(dialogues, order, strict=True) if place >= last]
        for side, parts in zip(sides, (query, support or query), strict=True):
            side.append(torch.cat(parts).sort().values)
    return [(torch.cat(side), [len(rows) for rows in side]) for side in sides]


def _outer_gradients(
    batch: Comparisons, A: Tensor, s: Tensor, inner_rate: float, episode: Episode
) -> tuple[float, list[Tensor]]:
    """Tail loss of an episode after one inner Adam step, and its gradients by A and s. The inner
    step passes s through and nothing else: it is the rate times the sign of a gradient."""
    (query, counts), (support, few) = episode
    Z, s = (SCALE * project(batch, A)).requires_grad_(), s.clone().requires_grad_()
    start = s.expand(batch.num_users, K)
    known, fixed = batch.pick(support, few), start.detach()
    step = inner_steps(Z.detach()[support], known, fixed, inner_rate, 1, adam=True) - fixed
    loss = tail_loss(mean_losses(Z[query], batch.pick(query, counts), start + step))
    by_Z, by_s = torch.autograd.grad(loss, [Z, s])
    return float(loss.detach()), [SCALE * backproject(batch, by_Z), by_s]
