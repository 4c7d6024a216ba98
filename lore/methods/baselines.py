"""What is always fitted beside a method: the reference, Bradley-Terry, each user's own model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lore.learning import comparisons
from lore.learning.basis import Basis
from lore.learning.comparisons import Comparisons, DenseFeatures, Pairs, RowFeatures, Seed, Users
from lore.learning.method import Fitted, Task
from lore.learning.training import own_directions
from lore.methods.lore import Lore, LoreFit
from utils import TEMPERATURE, preference_loss

USERS_AT_A_TIME = 256


@dataclass(frozen=True)
class Reference:
    """The reward model itself: its score head, if it has one, with nothing learned."""

    def fit(self, task: Task) -> list[Fitted]:
        if task.reference is None:
            return []
        V = task.reference.float()[:, None].to(task.train.device)
        W = V.new_ones(task.train.num_users, 1)
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
        return self.lore.fit_shared(task)


@dataclass(frozen=True)
class Own:
    """A model of each user alone, with nothing shared, fitted as LoRe fits new users."""

    lore: Lore

    def fit(self, task: Task) -> list[Fitted]:
        return [] if task.process else [OwnFit(self.lore, task)]  # the first process judges alone


class OwnFit(Fitted):
    """A user's state is the user's own reward direction [F]; the population's is zero.

    Where features are streamed, some users' are read at a time, and the same is computed.
    """

    label = "own model"
    controlled = False
    max_trials = 1  # of a sweep: a fit has F numbers a user

    def __init__(self, lore: Lore, task: Task) -> None:
        self.lore, self.progress, self.stream, self.settings = lore, task.progress, task.stream, {}
        self.at_once = max(1, comparisons.PART_BYTES // (4 * task.train.num_features))
        self.population_state = torch.zeros(task.train.num_features, device=task.train.device)
        self.users = self.adapt(self.view(task.train), task.train, None)

    def view(self, data: Comparisons) -> Pairs | RowFeatures:
        """The embeddings of the two responses, or where they are read when they are needed."""
        return data.features if self.stream else data.features.pairs()

    def adapt(self, view: Pairs | RowFeatures, users: Users, seed: Seed) -> Tensor:
        """Each user's own direction [U', F]; zero for those without comparisons."""
        lore, there = self.lore, (users.counts > 0).nonzero()[:, 0]
        states = self.population_state.repeat(users.num_users, 1)
        some = Users(users.counts[there], users.weight)
        how = lore.few_shot_iterations, lore.learning_rate, lore.optimizer, self.progress
        for who, rows in some.user_blocks(self.at_once):
            numbers = torch.arange(rows.start, rows.stop, device=users.device)
            features = DenseFeatures(_pairs(view, numbers).difference())
            own = Comparisons(features, some.counts[who], some.weight[rows])
            states[there[who]] = own_directions(own, preference_loss, *how)
        return states

    def logits(self, view: Pairs | RowFeatures, state: Tensor, user: Tensor) -> Tensor:
        """x^T v / 100 [N], a block of users at a time, from the distinct rows."""
        logits = torch.empty(len(view), device=state.device)
        at_once = len(view) if isinstance(view, Pairs) else self.at_once
        for first in range(0, len(state), USERS_AT_A_TIME):
            block = state[first : first + USERS_AT_A_TIME].T
            theirs = ((user >= first) & (user < first + USERS_AT_A_TIME)).nonzero()[:, 0]
            for rows in theirs.split(at_once):
                pair = _pairs(view, rows)
                rewards, column = pair.values @ block, user[rows] - first  # [R, users]
                logits[rows] = rewards[pair.chosen, column] - rewards[pair.rejected, column]
        return logits / TEMPERATURE


def _pairs(view: Pairs | RowFeatures, some: Tensor) -> Pairs:
    return view[some] if isinstance(view, Pairs) else view[some].pairs()
