"""What methods with a network share, which sees both embeddings of a comparison, each row once:
rows at one scale, early stopping, choosing, users' weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lore.common.files import require
from lore.learning.comparisons import Comparisons, Pairs, RowFeatures, Seed, Users, as_generator
from lore.learning.method import Fitted, Task, View
from lore.methods.fitting.validation import HeldOut, Peer, Split, Validation, choose

CURVE = 400  # points of a training curve that are kept
TOLERANCE = 1e-4  # an improvement of the held-out log loss, or of a user's objective, that counts
PATIENCE = 10  # epochs without one before training stops
PASSES = 60  # over the data, at most
PLATEAU = 1500  # steps before which it never stops: tastes are often found late, all at once
PATIENT_STEPS = 20  # the same of a user's weights, in steps
BLOCK = 1 << 15  # comparisons of users who are fitted together, padded to the longest
RIDGES = (0.0, 0.3, 1.0, 3.0)  # pulls of new users' logits towards the seen users' mean


def rows_of(data: Comparisons) -> RowFeatures:
    """The features, if they are rows of a table; InputError if only differences are held."""
    require(isinstance(data.features, RowFeatures),
            "this method needs both embeddings of a comparison, but only differences are held: "
            "give RowFeatures (a prepared folder with embeddings has them)")  # fmt: skip
    return data.features


def row_scale(data: Comparisons) -> float:
    """Mean norm of the distinct rows over sqrt(F): rows divided by it have elements of about 1."""
    norms = rows_of(data).pairs(lambda e: e.norm(dim=1)).values
    return float(norms.mean()) / math.sqrt(data.num_features)


def outputs(network: Callable[[Tensor], Tensor], pairs: Pairs) -> Pairs:
    """What a network makes of the rows that the pairs are of, each evaluated once."""
    rows, places = torch.unique(torch.stack([pairs.chosen, pairs.rejected]), return_inverse=True)
    return Pairs(network(pairs.values[rows]), *places)


def linear(
    inputs: int, outputs: int, generator: torch.Generator, bias: bool = True, fan: int = 0
) -> nn.Linear:
    """A linear layer with torch's own initial distribution, drawn on the CPU, so that every device
    starts alike; ``fan`` is how many inputs it is for, where it is a part of a wider layer."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = 1 / math.sqrt(max(1, fan or inputs))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def batches(total: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The numbers below ``total`` in random order, some at a time."""
    return torch.randperm(total, generator=generator).split(size)


def cosine(step: int, warm: float, total: int) -> float:
    """Share of the largest rate: a linear warm-up, then half a cosine down to 0."""
    if step < warm:
        return step / max(1, warm)
    return (1 + math.cos(math.pi * min(1, (step - warm) / max(1, total - warm)))) / 2


Grid = tuple[tuple[str, Sequence[Any]], tuple[str, Sequence[float]]]


@dataclass(frozen=True)
class Networked(Peer):
    """A method with a network.

    ``grid`` is what is tried: a setting that needs a training for each value, and one that does
    not. ``network(method, data, model, task)`` is what a training of such a value begins with, and
    ``passes`` are the published ones, else there are at most ``PASSES``.
    """

    grid: ClassVar[Grid]

    def train(
        self, data: Comparisons, held: HeldOut | None, model: Any, task: Task, epochs: int = 0
    ) -> "Network":
        """A fit of a model to try, stopped by held-out comparisons if there are any; the task gives
        seed and shots, and the method the most passes if ``epochs`` is 0."""
        fit = self.network(self, data, model, task)
        most = self.epochs or (self.passes if self.faithful else PASSES)
        fit.train(data, held, epochs or most)
        return fit

    def published(self, task: Task, model: Any) -> "Network":
        """The fit with the published constants and budget."""
        return self.train(task.train, None, model, task)

    def fit(self, task: Task) -> list[Fitted]:
        """Fit all, as chosen; InputError if only differences are held, or nothing is held out."""
        rows_of(task.train)
        if task.process:
            return []  # the first process judges alone
        return [self.published(task, self.grid[0][1][0]) if self.faithful else self._chosen(task)]

    def _chosen(self, task: Task) -> "Network":
        """The best on validation, fitted to everything with as many passes as were best there."""
        (kind, models), (name, variants) = self.grid

        def fit(split: Split, candidate: Any, last: Network | None) -> tuple[Network, Network]:
            model, variant = candidate
            if last is None or last.settings[kind] != model:
                require(split.held is not None, "no user has two dialogues: nothing to stop by")
                last = self.train(split.fit, split, model, task)
            last.variant = variant
            last.settings = {kind: model, name: variant, "epochs": last.epochs}
            return last, last

        apart = Validation(replace(task, stream=True))  # networks read the two responses apart
        found = choose(apart, [(m, v) for m in models for v in variants], fit)
        (model, variant), passes = found.candidate, [fit.epochs for fit in found.kept]
        chosen = self.train(task.train, None, model, task, round(sum(passes) / len(passes)))
        chosen.variant, chosen.tried = variant, found.tried
        return chosen


class Network(Fitted):
    """A fitted method with a network. Rows are divided by ``scale``, which is 1 if faithful;
    ``outputs(rows)`` is what ``view`` keeps of scaled rows [n, F]: [n, *]. ``optimizer()`` has all
    that is trained, ``losses_of_pass(data, pairs, weight)`` yields the loss of every batch of a
    pass, for a step each, and ``states(data)`` are the users' present ones."""

    batch: int  # comparisons of a step
    losses: list[float]  # of training, and passes over the data
    epochs: int
    parameters: int  # trained numbers, the seen users' own included
    variant: float = 0.0  # of the setting that needs no other training
    tried: Sequence[dict[str, Any]] = ()

    def __init__(self, name: str, method: Networked, data: Comparisons, task: Task) -> None:
        self.faithful, self.by_user = method.faithful, not method.faithful  # see ``pair_weights``
        self.generator = torch.Generator().manual_seed(task.seed)
        self.label, self.settings = method.named(name), {"setting": method.setting}
        self.scale = 1.0 if self.faithful else row_scale(data)

    def train(self, data: Comparisons, held: HeldOut | None, epochs: int) -> None:
        """Train, and keep the best parameters, the loss of every step, and passes until these.

        Unless faithful, training ends after ``PATIENCE`` epochs in which the held-out log loss did
        not improve by ``TOLERANCE``, though not within ``PLATEAU`` steps; without held-out
        comparisons, at the last epoch.
        """
        optimizer, total = self.optimizer(), epochs * math.ceil(len(data) / self.batch)
        share = partial(self.share, total=total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        pairs = rows_of(data).pairs(lambda e: e / self.scale)
        weight = pair_weights(data, self.by_user)
        losses, best, self.epochs, kept = [], math.inf, 0, []
        for number in range(1, epochs + 1):
            for loss in self.losses_of_pass(data, pairs, weight):
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            if held is None:
                self.epochs = number
                continue
            with torch.no_grad():
                logits = held.logits_of_held(self, self.states(data))
                now = float(held.held.log_losses(logits).mean())
            if now < best - TOLERANCE:
                best, self.epochs = now, number
                kept = [p.detach().clone() for p in parameters]
            elif not self.faithful and number - self.epochs >= PATIENCE and len(losses) >= PLATEAU:
                break
        for parameter, value in zip(parameters, kept, strict=bool(kept)):
            parameter.data.copy_(value)
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.losses = torch.stack(losses).tolist()
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.users = self.states(data)

    def share(self, step: int, total: int) -> float:
        """Of the rates, at a step of so many."""
        return 1.0

    def describe(self) -> dict[str, Any]:
        """Parameters, configurations tried, at most ``CURVE`` means of successive losses."""
        step = max(1, math.ceil(len(self.losses) / CURVE))
        parts = [self.losses[i : i + step] for i in range(0, len(self.losses), step)]
        return {
            "parameters": self.parameters, "tried": list(self.tried), "epochs": self.epochs,
            "losses": [sum(part) / len(part) for part in parts], "loss_step": step,
            "note": self.note(),
        }  # fmt: skip

    def note(self) -> str:
        """A line for the report."""
        return f"{self.label}: {self.parameters:,} parameters, {self.epochs} epochs"

    @torch.no_grad()
    def view(self, data: Comparisons) -> Pairs:
        """The network's outputs for the distinct rows."""
        return rows_of(data).pairs(lambda e: self.outputs(e / self.scale))


class Mixing(Network):
    """A network whose users mix K outputs: weights [K] are on the simplex, and the population's are
    the mean of the seen users'; ``variant`` is the ridge of new users', whose published fit is
    ``published(view, users, start, generator)`` from logits that are drawn from N(0, 1)."""

    def draw(self, data: Comparisons, K: int) -> None:
        """Begin with N(0, 1) logits [U, K] of the seen users' weights."""
        free = torch.randn(data.num_users, K, generator=self.generator)
        self.free = free.to(data.device).requires_grad_()

    def states(self, data: Comparisons) -> Tensor:
        return self.free.softmax(1)

    @property
    def population_state(self) -> Tensor:
        return self.users.mean(0)

    def loss(self, logits: Tensor) -> Tensor:
        """The log loss of each logit [n]."""
        return softplus(-logits)

    def losses_of_pass(self, data: Comparisons, pairs: Pairs, weight: Tensor) -> Iterator[Tensor]:
        for some in batches(len(data), self.batch, self.generator):
            some = some.to(data.device)
            who, own = data.user[some].unique(return_inverse=True)
            view = outputs(self.outputs, pairs[some])
            logits = self.logits(view, self.free[who].softmax(1), own)
            yield weight[some] @ self.loss(logits) / len(some)

    def adapt(self, view: View, users: Users, seed: Seed) -> Tensor:
        """Weights [U', K] that fit users' comparisons, all else fixed (eq. 11)."""
        if len(users) == 0:
            return self.population_state.repeat(users.num_users, 1)
        start = self.population_state.log().repeat(users.num_users, 1)
        if self.faithful:
            generator = as_generator(seed)
            start = torch.randn(start.shape, generator=generator).to(start)
            found = self.published(view, users, start, generator)
        else:
            found = solve_weights(partial(self.losses_of, view), users, start, self.variant)
        return torch.where(users.counts[:, None] > 0, found, self.population_state)

    def losses_of(self, view: View, rows: slice, weights: Tensor, user: Tensor) -> Tensor:
        """Losses [n] of some comparisons, given weights [U', K] and whose they are [n]."""
        return self.loss(self.logits(view[rows], weights, user))


def pair_weights(users: Users, by_user: bool) -> Tensor:
    """Weights of comparisons [N], 1 on average: users count alike (eq. 10), or comparisons do."""
    weight = users.weight / users.user_weight()[users.user] if by_user else users.weight
    return (weight / weight.mean()).float()


def solve_weights(
    losses: Callable[[slice, Tensor, Tensor], Tensor], users: Users, start: Tensor,
    ridge: float = 0.0, steps: int = 300, tolerance: float = TOLERANCE,
) -> Tensor:  # fmt: skip
    """Simplex weights of users [U, K] that minimise the mean of their losses, by full-batch Adam.

    ``losses`` gives those of some comparisons [n] from their slice, weights [U', K] and whose they
    are [n]; ``start`` are initial logits [U, K], to which a ridge, in comparisons, pulls. Each user
    stops by itself, after 20 steps that gained less than the tolerance, and keeps the best weights:
    no result depends on who else is fitted. If it is negative, all steps are made, the last kept.
    """
    found = torch.empty_like(start)
    for who, rows in users.user_blocks(BLOCK, padded=True):
        part = Users(users.counts[who], users.weight[rows], users.device)
        mass, centre = part.user_weight(), start[who]
        share, pull = (part.weight / mass[part.user]).float(), ridge / mass.clamp(min=1).float() / 2
        logits = centre.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        best = torch.full((len(logits),), math.inf, device=logits.device)
        kept, waited = logits.detach().clone(), torch.zeros_like(best)
        for _ in range(steps):
            with torch.enable_grad():
                each = share * losses(rows, logits.softmax(1), part.user)
                values = each.new_zeros(part.num_users).index_add(0, part.user, each)
                values = values + pull * (logits - centre).square().sum(1)
                optimizer.zero_grad()
                values.sum().backward()
            if tolerance >= 0:
                better = (values.detach() < best - tolerance) & (waited < PATIENT_STEPS)
                best = torch.where(better, values.detach(), best)
                kept = torch.where(better[:, None], logits.detach(), kept)
                waited = torch.where(better, 0, waited + 1)
                if bool((waited >= PATIENT_STEPS).all()):
                    break
            optimizer.step()
        found[who] = kept if tolerance >= 0 else logits.detach()
    return found.softmax(1)
