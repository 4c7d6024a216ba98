"""PAL-A: a user's ideal point is a mixture of prototypes; the nearer response is preferred.

Chen, Chen, Rege, Vinayak, "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous
Preferences" (ICLR 2025): one network f for responses and prototypes alike.

Shape letters: U users, N comparisons, F features, K prototypes, D width of f, R distinct rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from comparisons import Comparisons, Pairs, Seed, Users, as_generator
from files import require
from methods.base import Fitted, Task
from methods.networks import (
    Held,
    Network,
    add_losses,
    batches,
    blocks,
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
from methods.validation import hold_out, shared_prompts
from settings import NonNegativeInt, PositiveInt

RIDGES = (0.0, 0.3, 1.0, 3.0)  # pull of new users' logits towards the seen users' mean
NEW_USER_RATE, NEW_USER_EPOCHS = 5e-3, 20  # published


@dataclass(frozen=True)
class PAL:
    """PAL-A.

    ``faithful`` keeps the published constants: rows as they are, f of width 512, batches of 4,
    Adam (f: 1e-4, weight decay .01; prototypes and weights: 5e-3), 20 passes, the best by held-out
    log loss kept; new users from random weights with 20 passes at 5e-3. The published code picks
    new users' best pass on their test comparisons; here the last one counts. ``converged`` scales
    rows, trains at ten times the rates until the held-out log loss falls no more, and solves new
    users' weights, from the seen users' mean, to 1e-4.

    Args:
        setting: published constants and budget, or the same model fitted to a tolerance.
        prototypes: numbers of prototypes K to try; ``faithful`` takes the first.
        width: outputs D of every layer of f; 0 for 512 if faithful, else 128.
        layers: linear layers of f, with GELU between them.
        squared: compare squared distances.
        epochs: passes over the data, at most; 0 for 20 if faithful, else 60.
    """

    setting: Literal["faithful", "converged"] = "converged"
    prototypes: tuple[PositiveInt, ...] = (2, 5, 10)
    width: NonNegativeInt = 0
    layers: PositiveInt = 2
    squared: bool = False
    epochs: NonNegativeInt = 0

    def fit(self, task: Task) -> list[Fitted]:
        """Learn f, prototypes and weights from the task's training comparisons.

        Raises:
            InputError: only differences of embeddings are held.
        """
        rows_of(task.train)
        if task.process:  # the first process judges alone
            return []

        train = partial(self._train, seed=task.seed)
        if self.setting == "faithful":
            shared = shared_prompts(task.train, task.seed)
            held = hold_out(task.train, task.seed, shared, task.validation)
            require(held.held is not None, "no user has two dialogues: nothing can be held out")
            return [train(held.fit, held, self.prototypes[0], self.epochs or 20)]
        models = "prototypes", self.prototypes
        return [choose(task, models, ("ridge", RIDGES), self.epochs or 60, train)]

    def _train(
        self, data: Comparisons, held: Held, K: int, epochs: int, seed: int
    ) -> FittedPAL:
        faithful = self.setting == "faithful"
        generator = torch.Generator().manual_seed(seed)
        fit = FittedPAL(self, data, K, 1.0 if faithful else row_scale(data), generator)
        faster = 1 if faithful else 10
        optimizer = torch.optim.Adam(
            [
                {"params": fit.f.parameters(), "lr": 1e-4 * faster, "weight_decay": 0.01},
                {"params": [fit.prototypes, fit.free], "lr": 5e-3 * faster},
            ]
        )
        pairs, weight = scaled_pairs(data, fit.scale), pair_weights(data, not faithful)

        def epoch() -> Iterator[Tensor]:
            for some in batches(len(data), 4 if faithful else 64, generator):
                some = some.to(data.device)
                yield add_losses(fit.batch_logits(pairs[some], data.user[some]), weight[some], True)

        def held_now() -> float:
            return held_loss(fit, held, fit.free.softmax(1))

        patience = {"patience": epochs} if faithful else {}
        fit.course = descend(optimizer, epoch, epochs, held and held_now, **patience)
        return fit.finish()


class FittedPAL(Network):
    """A fitted PAL. A user's state is the weights [K] of the prototypes in that user's ideal point;
    nobody's is the mean of the seen users' weights.

    Args:
        method: its settings.
        data: training comparisons.
        K: number of prototypes.
        scale: what rows are divided by.
        generator: of initial values: torch's own for f, unit vectors for prototypes, N(0, 1) for
            the logits of weights.

    Attributes:
        f: the network [*, F] -> [*, D].
        prototypes: [K, F].
        free: logits [U, K] of the seen users' weights.
        variant: ridge of new users' weights.
    """

    def __init__(
        self, method: PAL, data: Comparisons, K: int, scale: float, generator: torch.Generator
    ) -> None:
        self.faithful = method.setting == "faithful"
        self.label = "PAL faithful" if self.faithful else "PAL"
        self.settings = {"setting": method.setting}
        self.squared, self.scale, self.variant = method.squared, scale, 0.0
        width, F = method.width or (512 if self.faithful else 128), data.num_features
        layers: list[nn.Module] = []
        for number in range(method.layers):
            layers += [linear(width if number else F, width, generator), nn.GELU()]
        self.f = nn.Sequential(*layers[:-1]).to(data.device)
        P = torch.randn(K, F, generator=generator)
        W = torch.randn(data.num_users, K, generator=generator)
        self.prototypes = (P / P.norm(dim=1, keepdim=True)).to(data.device).requires_grad_()
        self.free = W.to(data.device).requires_grad_()

    def finish(self) -> FittedPAL:
        """Nothing is trained any more."""
        frozen(self.f)
        self.prototypes, self.free = self.prototypes.detach(), self.free.detach()
        self.users = self.free.softmax(1)
        self.nobody = self.users.mean(0)
        shared = [*self.f.parameters(), self.prototypes, self.free]
        self.parameters = sum(p.numel() for p in shared)
        return self

    @torch.no_grad()
    def view(self, data: Comparisons) -> Pairs:
        """f of the distinct rows [R, D]."""
        return rows_of(data).pairs(lambda e: self.f(e / self.scale))

    def batch_logits(self, pairs: Pairs, user: Tensor) -> Tensor:
        """Logits [n] of training comparisons, from scaled rows, at the present parameters."""
        rows, (chosen, rejected) = distinct(pairs.chosen, pairs.rejected)
        who, (own,) = distinct(user)
        view = Pairs(self.f(pairs.values[rows]), chosen, rejected)
        return self.logits(view, self.free[who].softmax(1), own)

    def logits(self, view: Pairs, state: Tensor, user: Tensor) -> Tensor:
        """How much farther the rejected response lies from the user's ideal point f(w P): [N]."""
        ideal = self.f(state @ self.prototypes)
        parts = []
        for some in torch.arange(len(view), device=user.device).split(1 << 16):
            part, point = view[some], ideal[user[some]]
            far, near = (
                (view.values[side] - point).norm(dim=1) for side in (part.rejected, part.chosen)
            )
            parts.append(far.square() - near.square() if self.squared else far - near)
        return torch.cat(parts)

    def adapt(self, view: Pairs, users: Users, seed: Seed) -> Tensor:
        """Weights [U', K] that fit users' comparisons, f and prototypes fixed."""
        if len(users) == 0:
            return self.nobody.repeat(users.num_users, 1)
        if self.faithful:
            found = self._published(view, users, as_generator(seed))
        else:
            start = self.nobody.log().repeat(users.num_users, 1)

            def losses(rows: slice, weights: Tensor, user: Tensor) -> Tensor:
                part = Pairs(view.values, view.chosen[rows], view.rejected[rows])
                return (1 - self.logits(part, weights, user)).clamp(min=0)

            found = solve_weights(losses, users, start, self.variant)
        return where_known(found, users, self.nobody)

    def _published(self, view: Pairs, users: Users, generator: torch.Generator) -> Tensor:
        """The published fit: from N(0, 1), an Adam step at each comparison, 20 times over.

        A published batch holds 4 comparisons, mostly of different users, and Adam is blind to the
        size of gradients: so every user is given steps of its own, all users at a time.
        """
        start = torch.randn(users.num_users, len(self.nobody), generator=generator)
        found = start.to(users.device)
        for who, rows in blocks(users):
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
                    (1 - logits).clamp(min=0).sum().backward()
                optimizer.step()
                found[who][active] = free.detach()[active]
        return found.softmax(1)


def _orders(counts: Tensor, generator: torch.Generator | None) -> Tensor:
    """Every user's comparisons in random order, pass after pass [U, steps]: numbers of rows."""
    most = int(counts.max())
    place = torch.arange(most, device=counts.device).expand(len(counts), -1)
    real, first = place < counts[:, None], (counts.cumsum(0) - counts)[:, None]
    orders = torch.zeros(len(counts), (NEW_USER_EPOCHS + 1) * most, dtype=torch.long)
    orders = orders.to(counts.device)
    for number in range(NEW_USER_EPOCHS):
        keys = torch.rand(len(counts), most, generator=generator).to(counts.device)
        shuffled = first + keys.masked_fill(~real, 2).argsort(1)
        orders.scatter_(1, place + number * counts[:, None], shuffled)
    return orders[:, : NEW_USER_EPOCHS * most]
