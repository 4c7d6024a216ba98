"""LoRe on a shallow network: a reward basis R = A2 g(A1 e), weights on the simplex (equation 9 of
arXiv 2504.14439, which names this form and reports nothing of it). F features, K rank."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lore.common.settings import Epochs, PositiveWidth, Rank
from lore.learning.comparisons import Comparisons, Pairs, Seed, Users
from lore.learning.method import Task
from lore.methods.fitting import networks
from lore.methods.fitting.networks import Grid, Mixing, Networked, linear

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}


class FittedMLP(Mixing):
    """A fitted basis A2 g(A1 e), the layers [*, F] -> [*, K]. A user's state is the weights [K] of
    the rewards, whose logits begin at N(0, 1)."""

    def __init__(self, method: "MLP", data: Comparisons, K: int, task: Task) -> None:
        super().__init__("MLP", method, data, task)
        self.by_user, self.batch = True, len(data) if self.faithful else 64
        self.temperature = 100.0 if self.faithful else 1.0
        first = linear(data.num_features, method.hidden, self.generator, bias=False)
        second = linear(method.hidden, K, self.generator, bias=False)
        self.layers = nn.Sequential(first, ACTIVATIONS[method.activation](), second)
        self.layers.to(data.device)
        self.draw(data, K)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, layers and weights at rates of their own."""
        layers = {"params": self.layers.parameters(), "lr": 1e-3 if self.faithful else 3e-3}
        layers["weight_decay"] = 0.0 if self.faithful else 0.01
        weights = {"params": [self.free], "lr": 0.5 if self.faithful else 0.05, "weight_decay": 0.0}
        return torch.optim.AdamW([layers, weights])

    def outputs(self, rows: Tensor) -> Tensor:
        """The K rewards of scaled rows: [n, K]."""
        return self.layers(rows) / self.temperature

    def logits(self, view: Pairs, state: Tensor, user: Tensor) -> Tensor:
        """The user's mixture of the differences of rewards [N]."""
        return (view.difference() * state[user]).sum(1)

    def published(self, view: Pairs, users: Users, start: Tensor, generator: Seed) -> Tensor:
        """LoRe's fit: 500 steps of Adam."""
        losses = partial(self.losses_of, view)
        return networks.solve_weights(losses, users, start, steps=500, tolerance=-1.0)


@dataclass(frozen=True)
class MLP(Networked):
    """LoRe with a shallow network on the embedding.

    No constants of it are published. ``faithful`` therefore takes LoRe's: rows as they are,
    rewards divided by 100, full batch, 1000 Adam steps (weights at LoRe's rate of 0.5, layers at
    Adam's usual 1e-3, since 0.5 suits a linear basis only); new users from random weights, 500
    steps at 0.1. ``converged`` scales rows, trains on batches until the held-out log loss falls no
    more, and solves new users' weights, from the seen users' mean, to 1e-4.

    Args:
        ranks: ranks K to try; ``faithful`` takes the first.
        hidden: hidden units H.
        activation: g.
        epochs: passes over the data, at most; 0 for 1000 if faithful, else 60.
    """

    ranks: tuple[Rank, ...] = (5, 2, 10)
    hidden: PositiveWidth = 128
    activation: Literal["gelu", "relu", "identity"] = "gelu"
    epochs: Epochs = 0
    network, passes = FittedMLP, 1000

    @property
    def grid(self) -> Grid:
        """Ranks, and ridges of new users' weights."""
        return ("rank", self.ranks), ("ridge", networks.RIDGES)
