"""LoRe on a shallow network: reward basis R = A2 g(A1 e) (eq. 9), weights on the simplex.

Bose et al., "LoRe: Personalizing LLMs via Low-Rank Reward Modeling" (arXiv 2504.14439), equation 9.
The paper names this form and reports nothing of it.

Shape letters: U users, N comparisons, F features, K rank, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from comparisons import Comparisons, Pairs, Seed, Users, as_generator
from methods.base import Fitted, Task
from methods.networks import (
    Held,
    Network,
    add_losses,
    batches,
    choose,
    descend,
    distinct,
    frozen,
    held_loss,
    linear,
    pair_weights,
    row_scale,
    rows_of,
    scaled_pairs,
    solve_weights,
    where_known,
)
from settings import NonNegativeInt, PositiveInt

RIDGES = (0.0, 0.3, 1.0, 3.0)  # pull of new users' logits towards the seen users' mean
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}


@dataclass(frozen=True)
class MLP:
    """LoRe with a shallow network on the embedding.

    Nobody has published constants for it. ``faithful`` therefore takes LoRe's: rows as they are,
    rewards divided by 100, full batch, 1000 Adam steps (weights at LoRe's rate of 0.5, layers at
    Adam's usual 1e-3, since 0.5 suits a linear basis only); new users from random weights, 500
    steps at 0.1. ``converged`` scales rows, trains on batches until the held-out log loss falls no
    more, and solves new users' weights, from the seen users' mean, to 1e-4.

    Args:
        setting: published constants and budget, or the same model fitted to a tolerance.
        ranks: ranks K to try; ``faithful`` takes the first.
        hidden: hidden units H.
        activation: g.
        epochs: passes over the data, at most; 0 for 1000 if faithful, else 60.
    """

    setting: Literal["faithful", "converged"] = "converged"
    ranks: tuple[PositiveInt, ...] = (5, 2, 10)
    hidden: PositiveInt = 128
    activation: Literal["gelu", "relu", "identity"] = "gelu"
    epochs: NonNegativeInt = 0

    def fit(self, task: Task) -> list[Fitted]:
        """Learn both layers and the weights from the task's training comparisons.

        Raises:
            InputError: only differences of embeddings are held.
        """
        rows_of(task.train)
        if task.process:  # the first process judges alone
            return []

        train = partial(self._train, seed=task.seed)
        if self.setting == "faithful":
            return [train(task.train, None, self.ranks[0], self.epochs or 1000)]
        models = "rank", self.ranks
        return [choose(task, models, ("ridge", RIDGES), self.epochs or 60, train)]

    def _train(
        self, data: Comparisons, held: Held, K: int, epochs: int, seed: int
    ) -> FittedMLP:
        faithful = self.setting == "faithful"
        generator = torch.Generator().manual_seed(seed)
        fit = FittedMLP(self, data, K, 1.0 if faithful else row_scale(data), generator)
        layers = {"params": fit.layers.parameters(), "lr": 1e-3 if faithful else 3e-3}
        layers["weight_decay"] = 0.0 if faithful else 0.01
        weights = {"params": [fit.free], "lr": 0.5 if faithful else 0.05, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([layers, weights])
        pairs, weight = scaled_pairs(data, fit.scale), pair_weights(data, True)

        def epoch() -> Iterator[Tensor]:
            for some in batches(len(data), len(data) if faithful else 64, generator):
                some = some.to(data.device)
                yield add_losses(fit.batch_logits(pairs[some], data.user[some]), weight[some])

        def held_now() -> float:
            return held_loss(fit, held, fit.free.softmax(1))

        fit.course = descend(optimizer, epoch, epochs, held and held_now)
        return fit.finish()


class FittedMLP(Network):
    """A fitted basis A2 g(A1 e). A user's state is the weights [K] of the rewards; nobody's is the
    mean of the seen users' weights.

    Args:
        method: its settings.
        data: training comparisons.
        K: rank.
        scale: what rows are divided by.
        generator: of initial values: torch's own for layers, N(0, 1) for the logits of weights.

    Attributes:
        layers: the network [*, F] -> [*, K].
        free: logits [U, K] of the seen users' weights.
        variant: ridge of new users' weights.
    """

    def __init__(
        self, method: MLP, data: Comparisons, K: int, scale: float, generator: torch.Generator
    ) -> None:
        self.faithful = method.setting == "faithful"
        self.label = "MLP faithful" if self.faithful else "MLP"
        self.settings = {"setting": method.setting}
        self.temperature = 100.0 if self.faithful else 1.0
        self.scale, self.variant = scale, 0.0
        first = linear(data.num_features, method.hidden, generator, bias=False)
        second = linear(method.hidden, K, generator, bias=False)
        self.layers = nn.Sequential(first, ACTIVATIONS[method.activation](), second)
        self.layers.to(data.device)
        W = torch.randn(data.num_users, K, generator=generator)
        self.free = W.to(data.device).requires_grad_()

    def finish(self) -> FittedMLP:
        """Nothing is trained any more."""
        frozen(self.layers)
        self.free = self.free.detach()
        self.users = self.free.softmax(1)
        self.nobody = self.users.mean(0)
        self.parameters = sum(p.numel() for p in [*self.layers.parameters(), self.free])
        return self

    def rewards(self, e: Tensor) -> Tensor:
        """The K rewards of rows e [n, F]: [n, K]."""
        return self.layers(e / self.scale) / self.temperature

    @torch.no_grad()
    def view(self, data: Comparisons) -> Tensor:
        """Differences of the K rewards [N, K]."""
        return rows_of(data).pairs(self.rewards).difference()

    def batch_logits(self, pairs: Pairs, user: Tensor) -> Tensor:
        """Logits [n] of training comparisons, from scaled rows, at the present parameters."""
        rows, (chosen, rejected) = distinct(pairs.chosen, pairs.rejected)
        values = self.layers(pairs.values[rows]) / self.temperature
        return self.logits(Pairs(values, chosen, rejected).difference(), self.free.softmax(1), user)

    def logits(self, view: Tensor, state: Tensor, user: Tensor) -> Tensor:
        """The user's mixture of the differences of rewards [N]."""
        return (view * state[user]).sum(1)

    def adapt(self, view: Tensor, users: Users, seed: Seed) -> Tensor:
        """Weights [U', K] that fit users' comparisons, the layers fixed (eq. 11)."""
        if len(users) == 0:
            return self.nobody.repeat(users.num_users, 1)

        def losses(rows: slice, weights: Tensor, user: Tensor) -> Tensor:
            return softplus(-self.logits(view[rows], weights, user))

        if self.faithful:
            generator = as_generator(seed)
            start = torch.randn(users.num_users, len(self.nobody), generator=generator)
            found = solve_weights(
                losses, users, start.to(users.device), steps=500, tolerance=-1.0
            )
        else:
            start = self.nobody.log().repeat(users.num_users, 1)
            found = solve_weights(losses, users, start, self.variant)
        return where_known(found, users, self.nobody)
