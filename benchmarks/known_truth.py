"""The mixed logit where the truth is known: share of the possible gain, coverage, a sweep's time.

    python benchmarks/known_truth.py                          # some minutes on one core
    python benchmarks/known_truth.py --users 50 --worlds 1    # smaller
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lore.common.cli import cli
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown
from lore.experiments.runner import sweep
from lore.learning.comparisons import Comparisons, DenseFeatures, draw_shots
from lore.learning.method import Fitted, Task
from lore.methods import METHODS
from lore.methods.fitting.posterior import Prior, expectations, moments
from lore.methods.mixed_fit import MixedFit

RANK = 3  # of the planted tastes
HELD_OUT = 60  # comparisons of each user
SCALE = 30.0  # of the features, as LoRe's settings expect them
SPREAD = 1.5  # standard deviation of the shared part of the log odds, and of that of tastes
KINDS = ("nobody differs", "Gaussian tastes", "corners of a simplex")
ASKED = ("ridge_bt", "lore", "mixed_logit")
GRID = [(l_mu, l_B) for l_mu in (0.1, 0.3, 1.0, 3.0) for l_B in (0.3, 1.0, 3.0, 10.0)]
ORACLE = f"mixed logit of rank {RANK}, best of {len(GRID)} strengths on the new users"
WIDTHS = {"50 %": 0.674, "80 %": 1.282, "90 %": 1.645, "95 %": 1.960}  # of a normal's intervals
COVERED = (3, 10, 30)  # comparisons after which intervals are checked
SWEPT, TRIALS = (1, 2, 5, 10, 20), 3  # shots and draws of the sweep that is timed


class World(NamedTuple):
    """A task and what is true in it.

    Attributes:
        task: what methods see.
        truth: the model with the true mu, B and distribution of tastes.
        tastes: of the new users [U, K].
    """

    task: Task
    truth: MixedFit
    tastes: Tensor


def main(
    users: tuple[PositiveInt, ...] = (200, 1000),
    shots: PositiveInt = 40,
    features: PositiveInt = 64,
    worlds: PositiveInt = 3,
) -> None:
    """Print for each number of users: accuracy and log loss, coverage, seconds of a sweep.

    Args:
        users: seen ones, and as many new ones.
        shots: training comparisons of each.
        features: F.
        worlds: of each kind, drawn anew.
    """
    for count in users:
        print(f"\n{count} seen and {count} new users, {shots} comparisons each\n")
        compare(count, shots, features, worlds)


def compare(users: int, shots: int, F: int, worlds: int) -> None:
    """Print all of one number of users; the arguments are ``main``'s."""
    rows, covered, seconds = [], [], []
    for kind in KINDS:
        figures = []
        for seed in range(worlds):
            world = planted(kind, users, shots, F, seed)
            fits = {name: METHODS[name]().fit(world.task)[-1] for name in ASKED}
            if kind != KINDS[0]:
                fits[ORACLE] = oracle(world)
            fits["the truth"] = world.truth
            figures.append([judged(fit, world.task) for fit in fits.values()])
            if kind == "Gaussian tastes":
                covered += coverage(world, fits)
                seconds.append(swept(world.task, fits))
        rows += gains(kind, list(fits), np.array(figures))
    print(markdown(pd.DataFrame(rows).set_index("world and method")))
    print("\nTrue reward differences of new users within intervals, in percent:\n")
    table = pd.DataFrame(covered).groupby(["model", "comparisons"], sort=False).mean()
    table.index = [f"{model}, {count} comparisons" for model, count in table.index]
    print(markdown(table.map("{:.0f}".format)))
    print(f"\nProcessor seconds of new users' states, {TRIALS} draws of {SWEPT} shots:\n")
    print(markdown(pd.DataFrame(seconds).median().map("{:.2f}".format).to_frame("seconds")))


def planted(kind: str, users: int, shots: int, F: int, seed: int) -> World:
    """Choices by a logit, among differences whose variances fall as 1 / k.

    Args:
        kind: of tastes: none, Gaussian ones in ``RANK`` dimensions, or those of one of RANK + 1
            corners of a simplex in as many dimensions.
        users, shots, F: of the world, see ``main``.
        seed: of everything random.
    """
    g = torch.Generator().manual_seed(seed)
    size = SCALE * torch.arange(1, F + 1).double().rsqrt()
    directions = torch.randn(F, 1 + RANK, generator=g).double()
    directions *= SPREAD / (size[:, None] * directions).norm(dim=0)
    directions[:, 1:] *= RANK**-0.5
    sets, tastes, prior = {}, {}, distribution(kind)
    for who in ("seen", "new"):
        part = torch.randint(len(prior.weight), (users,), generator=g)
        noise = torch.randn(users, RANK, generator=g).double()
        tastes[who] = prior.mean[part] + noise * prior.cov[0].diagonal().sqrt()
        for use, count in (("shots", shots), ("held out", HELD_OUT)):
            x = torch.randn(users * count, F, generator=g).double() * size
            reward = directions[:, 0] + tastes[who] @ directions[:, 1:].T
            odds = (x * reward.repeat_interleave(count, 0)).sum(1)
            x[torch.rand(len(x), generator=g) > odds.sigmoid()] *= -1
            names = [f"{who} {u}" for u in range(users)]
            sets[who, use] = Comparisons(DenseFeatures(x.float()), [count] * users, names=names)
    task = Task(
        sets["seen", "shots"], sets["new", "shots"], sets["seen", "held out"],
        sets["new", "held out"], seed=seed, shots=(0, shots),
    )  # fmt: skip
    truth = MixedFit(directions, prior, directions.new_zeros(0, 0), {})
    truth.users = truth.adapt(truth.view(task.train), task.train)
    return World(task, truth, tastes["new"])


def distribution(kind: str) -> Prior:
    """The true distribution of tastes, of mean 0 and variance 1 where people differ."""
    one = torch.eye(RANK).double()[None]
    if kind != "corners of a simplex":
        variance = 1.0 if kind == "Gaussian tastes" else 1e-9
        return Prior(torch.ones(1).double(), torch.zeros(1, RANK).double(), variance * one)
    corners = torch.eye(RANK + 1).double() - 1 / (RANK + 1)
    corners = corners @ torch.linalg.svd(corners)[2][:RANK].T
    corners = corners / corners.square().mean().sqrt()
    even = torch.full((len(corners),), 1 / len(corners)).double()
    return Prior(even, corners, 1e-6 * one.repeat(len(corners), 1, 1))


def oracle(world: World) -> Fitted:
    """The mixed logit with the true rank and kind of prior, and with those strengths of ``GRID``
    by which the new users' held-out comparisons are best foretold: no choice could do better."""
    task, parts = world.task, (len(world.truth.prior.weight),)
    fits = [
        METHODS["mixed_logit"](rank=RANK, l_mu=l_mu, l_B=l_B, mixtures=parts).fit(task)[-1]
        for l_mu, l_B in GRID
    ]
    return max(fits, key=lambda fit: judged(fit, task)[2])


def judged(fit: Fitted, task: Task) -> list[float]:
    """Accuracy and log loss of seen users, then of new ones with all their shots."""
    own = fit.adapt(fit.view(task.few), task.few, task.seed)
    figures = []
    for data, state in ((task.seen, fit.users), (task.unseen, own)):
        logits = fit.logits(fit.view(data), state, data.user)
        figures += [float(data.accuracies(logits).mean()), float(data.log_losses(logits).mean())]
    return figures


def gains(kind: str, names: list[str], figures: np.ndarray) -> Iterator[dict[str, str]]:
    """A row for each method, from figures [worlds, methods, 4]: means, and shares of the gain.

    A share is of what the true model gains over ridge BT, all worlds together.
    """
    means = figures.mean(0)
    floor, ceiling = means[names.index("ridge_bt")], means[-1]
    for name, own in zip(names, means, strict=True):
        row = {"world and method": f"{kind}: {name}"}
        for place, what in enumerate(("seen", "log loss, seen", "new", "log loss, new")):
            row[what] = f"{100 * own[place]:.1f}" if place % 2 == 0 else f"{own[place]:.3f}"
        share = (own - floor) / (ceiling - floor) if kind != KINDS[0] else np.full(4, np.nan)
        for place, what in ((0, "gain, seen"), (2, "gain, new"), (3, "gain in log loss, new")):
            row[what] = "" if np.isnan(share[place]) else f"{100 * share[place]:.0f} %"
        yield row


def coverage(world: World, fits: dict[str, Fitted]) -> Iterator[dict[str, float | str | int]]:
    """How often new users' true reward differences lie in intervals, by number of comparisons.

    Nothing is said where no tastes were fitted. The truth's own intervals show what is due to the
    posterior's Gaussian form; those of the fit have, besides, mu and B that are estimated and taken
    as exact. Last, intervals to which that variance is added, as far as the curvature knows it.
    """
    data, few = world.task.unseen, world.task.few
    x, true = data.features.x.double(), world.truth.directions
    reward = (x * (true[:, 0] + world.tastes @ true[:, 1:].T)[data.user]).sum(1)
    for name, fit in (("the truth", world.truth), ("mixed logit", fits["mixed_logit"])):
        if not (isinstance(fit, MixedFit) and fit.personal):
            continue
        shots, view = fit.view(few), fit.view(data).double()
        plain = fit is not world.truth and not fit.facts["chosen"]["white"]
        of_mu, of_B = unknown(fit, world.task) if plain else (None, None)
        for count in COVERED:
            rows = draw_shots(few, (count,), 1, world.task.seed).rows
            some = few.pick(torch.cat(rows), [len(row) for row in rows])
            state = fit.adapt(shots[torch.cat(rows)], some)
            mean, cov = (part.double() for part in moments(state, fit.components))
            z, user = view[:, 1:], data.user
            off = (reward - view[:, 0] - (z * mean[user]).sum(1)).abs()
            variance = {name: torch.einsum("nk,nkl,nl->n", z, cov[user], z)}
            if of_mu is not None:
                square = mean.square().sum(1) + cov.diagonal(dim1=1, dim2=2).sum(1)  # E |z|^2
                added = of_mu + square[user] * of_B
                variance[f"{name}, with the variance of mu and B"] = variance[name] + added
            for model, v in variance.items():
                inside = {
                    level: 100 * float((off <= width * v.sqrt()).double().mean())
                    for level, width in WIDTHS.items()
                }
                yield {"model": model, "comparisons": count, **inside}


def unknown(fit: MixedFit, task: Task) -> tuple[Tensor, Tensor]:
    """Variances of x . mu and of x . b for a column b of B, held-out comparisons x [N] each.

    Laplace's: the inverse of the prior's strength plus the likelihood's expected curvature at the
    fit, in which a user's taste weighs as a standard normal one does. For features not stretched.
    """
    train, chosen, scale = task.train, fit.facts["chosen"], fit.facts["scale"]
    X, x = (data.features.x.double() / scale for data in (train, task.unseen))
    mean, cov = (part.double() for part in moments(fit.users, fit.components))
    view, user = fit.view(train).double(), train.user
    z = view[:, 1:]
    variance = torch.einsum("nk,nkl,nl->n", z, cov[user], z)
    curvature = expectations(view[:, 0] + (z * mean[user]).sum(1), variance)[2]
    H = X.T @ (curvature[:, None] * X)
    one = torch.eye(len(H)).to(H)
    parts = [torch.linalg.solve(H + chosen[name] * one, x.T) for name in ("l_mu", "l_B")]
    return tuple((x.T * part).sum(0) for part in parts)


def swept(task: Task, fits: dict[str, Fitted]) -> dict[str, float]:
    """Processor seconds of new users' states from shots alone, and of a sweep with its controls."""
    draws, seconds = draw_shots(task.few, SWEPT, TRIALS, task.seed), {}
    rows = torch.cat(draws.rows)
    some = task.few.pick(rows, [len(row) for row in draws.rows])
    for name in ("lore", "mixed_logit"):
        fit, view = fits[name], fits[name].view(task.few)
        begin = time.process_time()
        fit.adapt(view[rows], some, task.seed)
        adapted = time.process_time()
        list(sweep(fit, task, draws))
        seconds[name] = adapted - begin
        seconds[f"{name}, judged, with controls"] = time.process_time() - adapted
    return seconds


if __name__ == "__main__":
    cli(main)
