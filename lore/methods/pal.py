"""PAL-A (Chen, Chen, Rege, Vinayak, ICLR 2025): a user's ideal point is a mixture of K prototypes;
the nearer response is preferred. One network f, of width D, is for responses and prototypes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lore.common.files import require
from lore.common.settings import Epochs, Layers, Rank, Width
from lore.learning.comparisons import Comparisons, Pairs, Seed, Users
from lore.learning.method import Task
from lore.methods.fitting import networks
from lore.methods.fitting.networks import Grid, Mixing, Networked, linear
from lore.methods.fitting.validation import hold_out

NEW_USER_RATE, NEW_USER_EPOCHS = 5e-3, 20  # published, as are:
WIDTH, BATCH, EPOCHS = 512, 4, 20
RATE, DECAY, WEIGHT_RATE = 1e-4, 0.01, 5e-3  # of f; of prototypes and users' weights


class FittedPAL(Mixing):
    """A fitted PAL: the network f [*, F] -> [*, D], prototypes [K, F], at first unit vectors, and
    as a user's state their weights [K] in that user's ideal point."""

    def __init__(self, method: "PAL", data: Comparisons, K: int, task: Task) -> None:
        super().__init__("PAL", method, data, task)
        self.squared, self.batch = method.squared, BATCH if self.faithful else 64
        width, F = method.width or (WIDTH if self.faithful else 128), data.num_features
        layers: list[nn.Module] = []
        for number in range(method.layers):
            layers += [linear(width if number else F, width, self.generator), nn.GELU()]
        self.f = self.outputs = nn.Sequential(*layers[:-1]).to(data.device)
        P = torch.randn(K, F, generator=self.generator)
        self.prototypes = (P / P.norm(dim=1, keepdim=True)).to(data.device).requires_grad_()
        self.draw(data, K)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, f at a rate of its own."""
        faster = 1 if self.faithful else 10
        f = {"params": self.f.parameters(), "lr": RATE * faster, "weight_decay": DECAY}
        others = {"params": [self.prototypes, self.free], "lr": WEIGHT_RATE * faster}
        return torch.optim.Adam([f, others])

    def loss(self, logits: Tensor) -> Tensor:
        """The hinge loss of margin 1 of each logit [n]."""
        return (1 - logits).clamp(min=0)

    def logits(self, view: Pairs, state: Tensor, user: Tensor) -> Tensor:
        """How much farther the rejected response lies from the user's ideal point f(w P) [N]."""
        ideal = self.f(state @ self.prototypes)
        parts = []
        for some in torch.arange(len(view), device=user.device).split(1 << 16):
            part, point = view[some], ideal[user[some]]
            far, near = (view.values[side] - point for side in (part.rejected, part.chosen))
            far, near = far.norm(dim=1), near.norm(dim=1)
            parts.append(far.square() - near.square() if self.squared else far - near)
        return torch.cat(parts)

    def published(self, view: Pairs, users: Users, start: Tensor, generator: Seed) -> Tensor:
        """Weights [U', K] by the published fit: a step at each comparison, 20 times. A published
        batch holds 4 comparisons, mostly of different users, and Adam is blind to the size of
        gradients: so every user is given steps of its own, all users at a time."""
        found = start.clone()
        for who, rows in users.user_blocks(networks.BLOCK, padded=True):
            order = _orders(users.counts[who], generator) + rows.start
            free = found[who].clone().requires_grad_()
            optimizer = torch.optim.Adam([free], lr=NEW_USER_RATE)
            for step in range(order.shape[1]):
                active = (step < NEW_USER_EPOCHS * users.counts[who]).nonzero()[:, 0]
                own = torch.arange(len(active), device=users.device)
                with torch.enable_grad():
                    pairs = view[order[active, step]]
                    logits = self.logits(pairs, free[active].softmax(1), own)
                    optimizer.zero_grad()
                    self.loss(logits).sum().backward()
                optimizer.step()
                found[who][active] = free.detach()[active]
        return found.softmax(1)


def _orders(counts: Tensor, generator: torch.Generator | None) -> Tensor:
    """Every user's comparisons in random order, pass after pass [U, steps]: numbers of rows."""
    most = int(counts.max())
    place = torch.arange(most, device=counts.device).expand(len(counts), -1)
    real, first = place < counts[:, None], (counts.cumsum(0) - counts)[:, None]
    passes = []
    for _ in range(NEW_USER_EPOCHS):
        keys = torch.rand(len(counts), most, generator=generator).to(counts.device)
        passes.append(first + keys.masked_fill(~real, 2).argsort(1))
    both = zip(torch.stack(passes, 1), counts.tolist(), strict=True)
    return pad_sequence([orders[:, :count].flatten() for orders, count in both], batch_first=True)


@dataclass(frozen=True)
class PAL(Networked):
    """PAL-A.

    ``faithful`` keeps the published constants, as above: rows as they are, 20 passes, the best by
    held-out log loss kept; new users from random weights with 20 passes, the last one of which
    counts, not the best on their test comparisons. ``converged`` scales rows, trains at ten times
    the rates until the held-out log loss falls no more, and solves new users' weights, from the
    seen users' mean, to 1e-4.

    Args:
        prototypes: numbers of prototypes K to try; ``faithful`` takes the first.
        width: outputs D of every layer of f; 0 for 512 if faithful, else 128.
        layers: linear layers of f, with GELU between them.
        squared: compare squared distances.
        epochs: passes over the data, at most; 0 for 20 if faithful, else 60.
    """

    prototypes: tuple[Rank, ...] = (2, 5, 10)
    width: Width = 0
    layers: Layers = 2
    squared: bool = False
    epochs: Epochs = 0
    network, passes = FittedPAL, EPOCHS

    @property
    def grid(self) -> Grid:
        """Prototypes, and ridges of new users' weights."""
        return ("prototypes", self.prototypes), ("ridge", networks.RIDGES)

    def published(self, task: Task, model: int) -> networks.Network:
        """Stopped, as published, on held-out comparisons."""
        held = hold_out(task.train, task.seed, task.kinds, task.validation)
        require(held.held is not None, "no user has two dialogues: nothing can be held out")
        return self.train(held.fit, held, model, task)
