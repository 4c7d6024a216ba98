"""What methods with a network share: rows at one scale, early stopping, choosing, users' weights.

A network sees the two embeddings of a comparison apart. It is evaluated on the distinct rows of a
batch or pass; comparisons only gather from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lore.common.files import InputError, require
from lore.learning.comparisons import Comparisons, Pairs, RowFeatures, Seed, Users, as_generator
from lore.learning.method import Fitted, Task, View
from lore.methods.fitting.validation import HeldOut, Peer, Split, Validation, choose

CURVE = 400  # points of a training curve that are kept
TOLERANCE = 1e-4  # an improvement of the held-out log loss, or of a user's objective, that counts
PATIENCE = 10  # epochs without one before training stops
PLATEAU = 1500  # steps before which it never stops: tastes are often found late, all at once
PATIENT_STEPS = 20  # the same of a user's weights, in steps
BLOCK = 1 << 15  # comparisons of users who are fitted together, padded to the longest
RIDGES = (0.0, 0.3, 1.0, 3.0)  # pulls of new users' logits towards the seen users' mean


# ------------------------------------------------------------------------- Rows


def rows_of(data: Comparisons) -> RowFeatures:
    """The features, if they are rows of a table.

    Raises:
        InputError: only differences are known.
    """
    if isinstance(data.features, RowFeatures):
        return data.features
    raise InputError(
        "this method needs both embeddings of a comparison, but only differences are held: "
        "give RowFeatures (a prepared folder with embeddings has them)"
    )


def row_scale(data: Comparisons) -> float:
    """Mean norm of the distinct rows over sqrt(F): rows divided by it have elements of about 1."""
    norms = rows_of(data).pairs(lambda e: e.norm(dim=1)).values
    return float(norms.mean()) / math.sqrt(data.num_features)


def scaled_pairs(data: Comparisons, scale: float) -> Pairs:
    """The distinct rows divided by the scale, in memory, and the comparisons' places in them."""
    return rows_of(data).pairs(lambda e: e / scale)


def distinct(*numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The distinct ones among numbers of rows, and the place of each number among them."""
    found, places = torch.unique(torch.cat(numbers), return_inverse=True)
    return found, list(places.split([len(part) for part in numbers]))


# --------------------------------------------------------------------- Networks


def linear(
    inputs: int, outputs: int, generator: torch.Generator, bias: bool = True, fan: int = 0
) -> nn.Linear:
    """A linear layer with torch's own initial distribution, drawn from a generator.

    Args:
        inputs, outputs: widths.
        generator: of the draws, on the CPU, so that every device starts alike.
        bias: whether it has one.
        fan: number of inputs that the initial size is for, where this is a part of a wider layer.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = 1 / math.sqrt(max(1, fan or inputs))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def frozen(module: nn.Module) -> nn.Module:
    """The module, never to be trained again."""
    return module.eval().requires_grad_(False)


def batches(total: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One pass over the numbers below ``total`` in random order, some at a time."""
    return iter(torch.randperm(total, generator=generator).split(size))


# --------------------------------------------------------------------- Training


@dataclass
class Course:
    """How a training went.

    Attributes:
        losses: of every step.
        held: log loss of the held-out comparisons after every epoch.
        epochs: passes over the data that the kept parameters have seen.
    """

    losses: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    epochs: int = 0

    def curve(self) -> dict[str, Any]:
        """At most ``CURVE`` means of successive losses, and the steps each stands for."""
        step = max(1, math.ceil(len(self.losses) / CURVE))
        parts = (self.losses[i : i + step] for i in range(0, len(self.losses), step))
        return {"losses": [sum(part) / len(part) for part in parts], "loss_step": step}


def descend(
    optimizer: torch.optim.Optimizer,
    epoch: Callable[[], Iterable[Tensor]],
    epochs: int,
    held: Callable[[], float] | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    patience: int = PATIENCE,
) -> Course:
    """Train until the held-out log loss stops falling, and keep the best parameters.

    Args:
        optimizer: of the parameters.
        epoch: yields the loss of one batch after the other; a step is made at each.
        epochs: passes over the data, at most.
        held: held-out log loss of the present parameters; None to make all passes.
        schedule: of the learning rate, by step.
        patience: epochs without an improvement of ``TOLERANCE`` after which to stop, though not
            within the first ``PLATEAU`` steps.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    course, losses, best, kept = Course(), [], math.inf, None
    for number in range(1, epochs + 1):
        for loss in epoch():
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.detach())
        if held is None:
            course.epochs = number
            continue
        course.held.append(held())
        if course.held[-1] < best - TOLERANCE:
            best, course.epochs = course.held[-1], number
            kept = [p.detach().clone() for p in parameters]
        elif number - course.epochs >= patience and len(losses) >= PLATEAU:
            break
    for parameter, value in zip(parameters, kept or [], strict=bool(kept)):
        parameter.data.copy_(value)
    course.losses = torch.stack(losses).tolist()
    return course


# ---------------------------------------------------------------------- Methods


@dataclass(frozen=True)
class Networked(Peer):
    """A method with a network.

    Class attributes say which models are tried (the name in tables, and the field with their
    values), and which settings that need no other training (name and values).
    """

    model: ClassVar[tuple[str, str]]
    variants: ClassVar[tuple[str, Sequence[float]]] = ("ridge", RIDGES)

    def train(
        self, data: Comparisons, held: HeldOut | None, model: Any, task: Task, epochs: int = 0
    ) -> Network:
        """A fit.

        Args:
            data: training comparisons.
            held: of the same users, to stop by; None to make all passes.
            model: one of those that are tried; the first if faithful.
            task: gives the seed, and for how many shots.
            epochs: passes over the data, at most; the method's own if 0.
        """
        raise NotImplementedError

    def published(self, task: Task, model: Any) -> Network:
        """The fit with the published constants and budget."""
        return self.train(task.train, None, model, task)

    def fit(self, task: Task) -> list[Fitted]:
        """Learn from the task's training comparisons.

        Raises:
            InputError: only differences of embeddings are held, or nothing can be held out.
        """
        rows_of(task.train)
        if task.process:
            return []  # the first process judges alone
        models = getattr(self, self.model[1])
        return [self.published(task, models[0]) if self.faithful else self._chosen(task, models)]

    def _chosen(self, task: Task, models: Sequence[Any]) -> Network:
        """The best on validation, fitted to everything with as many passes as were best there."""
        (kind, _), (name, variants) = self.model, self.variants

        def fit(split: Split, candidate: Any, last: Network | None) -> tuple[Network, Network]:
            model, variant = candidate
            if last is None or last.settings[kind] != model:
                require(split.held is not None, "no user has two dialogues: nothing to stop by")
                last = self.train(split.fit, split, model, task)
            last.variant = variant
            last.settings = {kind: model, name: variant, "epochs": last.course.epochs}
            return last, last

        apart = Validation(replace(task, stream=True))  # networks read the two responses apart
        found = choose(apart, [(m, v) for m in models for v in variants], fit)
        (model, variant), passes = found.candidate, [fit.course.epochs for fit in found.kept]
        chosen = self.train(task.train, None, model, task, round(sum(passes) / len(passes)))
        chosen.variant, chosen.tried = variant, found.tried
        return chosen


class Network(Fitted):
    """A fitted method with a network.

    Args:
        name: of the method in tables.
        method: its settings.
        data: training comparisons.

    Attributes:
        faithful: whether the published constants are kept.
        scale: what rows are divided by; 1 if faithful.
        course: of its training.
        variant: a setting of new users' fits or of scoring that needs no other training.
        tried: configurations that were tried, with held-out log losses.
        parameters: number of trained numbers, the seen users' own included.
    """

    course: Course
    variant: float = 0.0
    tried: Sequence[dict[str, Any]] = ()
    parameters: int = 0

    def __init__(self, name: str, method: Networked, data: Comparisons) -> None:
        self.faithful = method.faithful
        self.label, self.settings = method.named(name), {"setting": method.setting}
        self.scale = 1.0 if self.faithful else row_scale(data)

    def describe(self) -> dict[str, Any]:
        """Parameters, configurations tried, training curve and a line for the report."""
        return {
            "parameters": self.parameters,
            "tried": list(self.tried),
            "epochs": self.course.epochs,
            **self.course.curve(),
            "note": self.note(),
        }

    def note(self) -> str:
        """A line for the report."""
        return f"{self.label}: {self.parameters:,} parameters, {self.course.epochs} epochs"

    def held_out(
        self, held: HeldOut | None, users: Callable[[], Tensor]
    ) -> Callable[[], float] | None:
        """Gives the present mean log loss of held-out comparisons, from the users' states."""

        @torch.no_grad()
        def loss() -> float:
            return float(held.losses(self, users()).mean())

        return None if held is None else loss


class Mixing(Network):
    """A network whose users mix K outputs: a state is weights [K] on the simplex, and nobody's is
    the mean of the seen users'.

    Attributes:
        free: logits [U, K] of the seen users' weights.
        variant: ridge of new users' weights.
        hinge: the loss is the hinge loss of margin 1, not the log loss.
    """

    free: Tensor
    hinge: bool = False

    def train(
        self,
        data: Comparisons,
        weight: Tensor,
        optimizer: torch.optim.Optimizer,
        size: int,
        generator: torch.Generator,
        held: HeldOut | None,
        epochs: int,
        **settings: Any,
    ) -> None:
        """Descend, a batch of comparisons after the other.

        Args:
            data: training comparisons.
            weight: what each of them weighs [N].
            optimizer: of network and weights.
            size: comparisons in a batch.
            generator: of the batches.
            held: comparisons to stop by, if there are any.
            epochs: passes over the data, at most.
            settings: further ones of ``descend``.
        """
        pairs = scaled_pairs(data, self.scale)

        def epoch() -> Iterator[Tensor]:
            for some in batches(len(data), size, generator):
                some = some.to(data.device)
                logits = self.batch_logits(pairs[some], data.user[some])
                yield add_losses(logits, weight[some], self.hinge)

        self.course = descend(
            optimizer, epoch, epochs, self.held_out(held, lambda: self.free.softmax(1)), **settings
        )

    def batch_logits(self, pairs: Pairs, user: Tensor) -> Tensor:
        """Logits [n] of training comparisons, from scaled rows, at the present parameters."""
        raise NotImplementedError

    def finish(self, network: nn.Module, *own: Tensor) -> None:
        """Nothing is trained any more: read the states, and count the parameters.

        Args:
            network: frozen from now on.
            own: other parameters of the method.
        """
        frozen(network)
        self.free = self.free.detach()
        self.users = self.free.softmax(1)
        self.population_state = self.users.mean(0)
        self.parameters = sum(p.numel() for p in [*network.parameters(), *own, self.free])

    def adapt(self, view: View, users: Users, seed: Seed) -> Tensor:
        """Weights [U', K] that fit users' comparisons, all else fixed (eq. 11)."""
        if len(users) == 0:
            return self.population_state.repeat(users.num_users, 1)
        if self.faithful:
            found = self.published(view, users, as_generator(seed))
        else:
            start = self.population_state.log().repeat(users.num_users, 1)
            found = solve_weights(partial(self.losses, view), users, start, self.variant)
        return where_known(found, users, self.population_state)

    def losses(self, view: View, rows: slice, weights: Tensor, user: Tensor) -> Tensor:
        """Losses [n] of some comparisons, given weights [U', K] and whose they are [n]."""
        return losses_of(self.logits(view[rows], weights, user), self.hinge)

    def published(self, view: View, users: Users, generator: torch.Generator) -> Tensor:
        """Weights [U', K] of users by the published fit."""
        raise NotImplementedError


# ----------------------------------------------------------------------- Losses


def pair_weights(users: Users, by_user: bool) -> Tensor:
    """What each comparison weighs [N], 1 on average.

    Args:
        users: whose the comparisons are.
        by_user: users count the same (eq. 10); otherwise comparisons do.
    """
    weight = users.weight
    if by_user:
        weight = weight / users.user_weight()[users.user]
    return (weight / weight.mean()).float()


def losses_of(logits: Tensor, hinge: bool = False) -> Tensor:
    """The log loss, or the hinge loss of margin 1, of each of the logits [n]."""
    return (1 - logits).clamp(min=0) if hinge else softplus(-logits)


def add_losses(logits: Tensor, weight: Tensor, hinge: bool = False) -> Tensor:
    """Weighted mean of the losses of logits [n]."""
    return weight @ losses_of(logits, hinge) / len(logits)


# --------------------------------------------------------------- Users' weights

Losses = Callable[[slice, Tensor, Tensor], Tensor]


def blocks(users: Users) -> Iterator[tuple[slice, slice]]:
    """Users, and their comparisons, that are at most ``BLOCK`` when padded to the longest."""
    return users.user_blocks(BLOCK, padded=True)


def solve_weights(
    losses: Losses,
    users: Users,
    start: Tensor,
    ridge: float = 0.0,
    steps: int = 300,
    tolerance: float = TOLERANCE,
    rate: float = 0.1,
) -> Tensor:
    """Simplex weights of users [U, K] that minimise the mean of their losses, by full-batch Adam.

    Every user stops by itself, after 20 steps that gained less than the tolerance, and keeps the
    best weights: nobody's result depends on who else is fitted.

    Args:
        losses: of some comparisons, given their slice, the weights [U', K] of the users
            they belong to and whose they are [n]: [n].
        users: whose the comparisons are.
        start: initial logits [U, K] of the weights.
        ridge: pull of the logits towards the start, as a share of one comparison each.
        steps: of Adam, at most.
        tolerance: of the objective; negative to make all steps and keep the last.
        rate: of Adam.
    """
    found = torch.empty_like(start)
    for who, rows in blocks(users):
        part = Users(users.counts[who], users.weight[rows], users.device)
        centre, total = start[who], part.user_weight().clamp(min=1).float()
        share = (part.weight / part.user_weight()[part.user]).float()

        objective = partial(_mean_losses, losses, part, rows, share, centre, ridge / total)
        found[who] = _least(objective, centre, steps, tolerance, rate)
    return found.softmax(1)


def _mean_losses(
    losses: Losses,
    users: Users,
    rows: slice,
    share: Tensor,
    centre: Tensor,
    ridge: Tensor,
    logits: Tensor,
) -> Tensor:
    """Each user's weighted mean loss [U], with a ridge [U] about the centre [U, K]."""
    each = share * losses(rows, logits.softmax(1), users.user)
    mean = each.new_zeros(users.num_users).index_add(0, users.user, each)
    return mean + ridge / 2 * (logits - centre).square().sum(1)


def _least(
    objective: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float, rate: float
) -> Tensor:
    """Where each row's own objective is least [U, K], by Adam on all rows at a time."""
    logits = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    best = torch.full((len(start),), math.inf, device=start.device)
    kept, waited = logits.detach().clone(), torch.zeros_like(best)
    for _ in range(steps):
        with torch.enable_grad():
            values = objective(logits)
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
    return kept if tolerance >= 0 else logits.detach()


def where_known(states: Tensor, users: Users, population_state: Tensor) -> Tensor:
    """States [U, S] of users with comparisons; population average [S] of the others."""
    return torch.where(users.counts[:, None] > 0, states, population_state)
