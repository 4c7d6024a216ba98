"""What is always fitted beside a method: the reference, Bradley-Terry, each user's own model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from basis import Basis
from comparisons import Comparisons, Pairs, Seed, Users
from methods.base import Fitted, Task
from methods.lore import Lore, LoreFit
from utils import TEMPERATURE, own_directions

USERS_AT_A_TIME = 256


@dataclass(frozen=True)
class Reference:
    """The reward model itself: its score head, with nothing learned."""

    def fit(self, task: Task) -> list[Fitted]:
        """The reference direction, where there is one."""
        if task.reference is None:
            return []
        V = task.reference.float()[:, None].to(task.train.device)
        W = torch.ones(task.train.num_users, 1, device=task.train.device)
        fit = LoreFit(Lore(), Basis(V, W, task.reference, settings={"rank": 0}), "reference")
        fit.file = "basis-K00"
        return [fit]


@dataclass(frozen=True)
class BradleyTerry:
    """One shared learned direction: LoRe of rank 1, fitted with LoRe's settings."""

    lore: Lore

    def check(self, task: Task) -> None:
        """Refuse a pull to nothing."""
        self.lore.check_reference(task)

    def fit(self, task: Task) -> list[Fitted]:
        """One direction for each alpha."""
        return self.lore.fit_shared(task)


@dataclass(frozen=True)
class Own:
    """A model of each user alone, with nothing shared, fitted as LoRe fits new users."""

    lore: Lore

    def fit(self, task: Task) -> list[Fitted]:
        """Every seen user's own direction; nothing where the features do not fit in memory."""
        if task.stream or task.process:  # the first process judges alone
            return []
        return [OwnFit(self.lore, task)]


class OwnFit(Fitted):
    """A user's state is the user's own reward direction [F]; nobody's is zero."""

    label = "own model"
    controlled = False
    max_trials = 1  # of a sweep: a fit has F numbers a user

    def __init__(self, lore: Lore, task: Task) -> None:
        self.lore, self.progress, self.settings = lore, task.progress, {}
        self.users = self._directions(task.train.in_memory())
        self.nobody = torch.zeros(task.train.num_features, device=self.users.device)

    def _directions(self, data: Comparisons) -> Tensor:
        fitted = self.lore.few_shot_iterations, self.lore.learning_rate, self.lore.optimizer
        return own_directions(data, *fitted, progress=self.progress)

    def view(self, data: Comparisons) -> Pairs:
        """The embeddings of the two responses."""
        return data.features.pairs()

    def adapt(self, view: Pairs, users: Users, seed: Seed) -> Tensor:
        """Each user's own direction [U', F]; zero for those without comparisons."""
        there = users.counts > 0
        states = self.nobody.repeat(users.num_users, 1)
        if there.any():
            x = view.difference()
            some = Comparisons.from_list(x.split(users.counts[there].tolist()))
            some.weight = users.weight
            states[there] = self._directions(some)
        return states

    def logits(self, view: Pairs, state: Tensor, user: Tensor) -> Tensor:
        """x^T v / 100 [N], a block of users at a time, from the distinct rows."""
        logits = torch.empty(len(view), device=view.values.device)
        for first in range(0, len(state), USERS_AT_A_TIME):
            rows = ((user >= first) & (user < first + USERS_AT_A_TIME)).nonzero()[:, 0]
            rewards = view.values @ state[first : first + USERS_AT_A_TIME].T  # [R, users]
            column, pair = user[rows] - first, view[rows]
            logits[rows] = rewards[pair.chosen, column] - rewards[pair.rejected, column]
        return logits / TEMPERATURE
