"""Planted worlds: users whose tastes are known, as a task that methods learn from."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lore.learning.comparisons import Comparisons, RowFeatures
from lore.learning.method import Fitted, Task

F, ROWS = 12, 400
# Settings of every method but LoRe with few steps, where it need not learn much.
QUICK: dict[str, dict[str, Any]] = {
    "ridge_bt": {"strength": 1.0}, "pebs": {"strengths": (1.0,)}, "mrm": {"strengths": (1.0,)},
    "mixed_logit": {"floor": 0.1, "l_mu": 0.3, "tau2": 1.0, "pi": 10.0},
    "pal": {"prototypes": (2,), "width": 8, "layers": 1, "epochs": 2},
    "vpl": {"betas": (1e-4,), "hidden": 8, "latent": 4, "epochs": 2},
    "mlp": {"ranks": (2,), "hidden": 8, "epochs": 2}, "pref": {"rank": 2, "strengths": (1.0,)},
    "rbd": {"rank": 2, "strengths": ((1.0, 1.0),)},
}  # fmt: skip


def task(
    users: int = 40, shots: int = 40, held_out: int = 60, rank: int = 2, spread: float = 1.0,
    strength: float = 3.0, seed: int = 0, features: int = F, rows: int = ROWS,
    falling: bool = False,
) -> Task:  # fmt: skip
    """So many seen and new users with logistic choices between rows of one table.

    Args:
        shots, held_out: comparisons of each user.
        rank, spread: dimensions in which tastes differ, and their standard deviation in each.
        strength: length of the shared direction; rewards are on the scale of logits times 100.
        falling: features' variances fall as 1 / k, much as those of language models do.
    """
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, features, generator=g)
    if falling:
        table *= torch.arange(1, features + 1).rsqrt()
        table /= table.square().mean().sqrt()
    basis = torch.linalg.qr(torch.randn(features, rank + 1, generator=g))[0]
    shared = strength * basis[:, 0]
    sets = {}
    for kind in ("seen", "new"):
        tastes = shared + spread * strength * torch.randn(users, rank, generator=g) @ basis[:, 1:].T
        for part, count in (("few", shots), ("test", held_out)):
            sets[kind, part] = choices(table, tastes @ table.T, count, g, kind)
    reference = (shared + 0.5 * torch.randn(features, generator=g)) * 100
    return Task(
        train=sets["seen", "few"], few=sets["new", "few"], seen=sets["seen", "test"],
        unseen=sets["new", "test"], reference=reference, seed=seed,
    )  # fmt: skip


def moved(task: Task, device: torch.device | str) -> Task:
    """The same task, computed on another device."""
    sets = {}
    for name in ("train", "few", "seen", "unseen"):
        data = getattr(task, name)
        f = data.features
        rows = f.index[f.chosen], f.index[f.rejected]
        features = RowFeatures(f.rows, f.num_features, *rows, device)
        sets[name] = Comparisons(features, data.counts, data.weight, data.names, data.dialogs)
    return replace(task, **sets)


def adapted(fit: Fitted, data: Comparisons, seed: int = 0) -> Tensor:
    """The states of users who are new to a fit."""
    return fit.adapt(fit.view(data), data, seed)


def accuracy(fit: Fitted, data: Comparisons, state: Tensor) -> float:
    """Mean over users, given their states."""
    return float(data.accuracies(fit.logits(fit.view(data), state, data.user)).mean())


def prefer(
    logits: Tensor, first: Tensor, second: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Chosen and rejected of two alternatives each, the first chosen by these log odds."""
    wins = torch.rand(logits.shape, generator=g) < logits.sigmoid()
    wins = wins.view(*wins.shape, *[1] * (first.dim() - wins.dim()))
    return torch.where(wins, first, second), torch.where(wins, second, first)


def choices(
    table: Tensor, values: Tensor, count: int, g: torch.Generator, kind: str = "user"
) -> Comparisons:
    """So many logistic choices of each user between rows [R, F], which they value so [U, R]."""
    n = count * len(values)
    first = torch.randint(len(table), (n,), generator=g)
    second = (first + 1 + torch.randint(len(table) - 1, (n,), generator=g)) % len(table)
    user = torch.arange(len(values)).repeat_interleave(count)
    logits = values[user, first] - values[user, second]
    chosen, rejected = prefer(logits, first, second, g)
    features = RowFeatures(lambda rows: table[rows], table.shape[1], chosen, rejected)
    names = [f"{kind} {u}" for u in range(len(values))]
    return Comparisons(features, [count] * len(values), names=names)
