"""Seconds of the mixed logit, choice included, beside LoRe's 1,000 iterations.

    python benchmarks/mixed.py                                # 1,000 users x 47, F = 576 and 4096
    python benchmarks/mixed.py --users 100 --features 64      # smaller
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from lore.common.cli import cli
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown
from lore.learning.comparisons import Comparisons, DenseFeatures
from lore.learning.method import Fitted, Task
from lore.methods import METHODS
from measure import now

RANK = 3  # of the planted tastes
MEASURED = 50  # iterations of LoRe that are timed; a thousand take in proportion


def main(
    users: PositiveInt = 1000,
    pairs: PositiveInt = 47,
    features: tuple[PositiveInt, ...] = (576, 4096),
) -> None:
    """Print a table of seconds by the clock.

    Args:
        users: Seen users; the same users' first comparisons stand for new ones in the choice.
        pairs: Comparisons of each.
        features: Numbers of features F to time.
    """
    rows = {}
    for F in features:
        task = task_of(users, pairs, F)
        cells: dict[str, Any] = {}
        for name in ("ridge_bt", "mixed_logit"):
            cells[f"{name}, with its choice"], fit = fitted(task, name)
        cells["chosen"] = fit.describe()["note"]
        _, few, many = (
            fitted(task, "lore", ranks=(5,), iterations=steps)[0] for steps in (2, 2, 2 + MEASURED)
        )
        cells["lore, rank 5, 1,000 iterations"] = (many - few) * 1000 / MEASURED
        rows[f"F = {F}"] = cells
    print(markdown(pd.DataFrame.from_dict(rows, orient="index").round(1)))


def fitted(task: Task, name: str, **settings: Any) -> tuple[float, Fitted]:
    """Seconds of a method's fit, and the fit."""
    begin = now(task.train.device)
    fit = METHODS[name](**settings).fit(task)[-1]
    return now(task.train.device) - begin, fit


def task_of(users: int, pairs: int, features: int, device: str = "cpu") -> Task:
    """Comparisons of users who are seen, and stand for new ones as well."""
    data = made(users, pairs, features, device)
    return Task(data, data, data, None, shots=(0, 10))


def made(users: int, pairs: int, features: int, device: str = "cpu") -> Comparisons:
    """Noisy choices of users with Gaussian tastes of rank ``RANK``; eigenvalues fall as 1 / k."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(users * pairs, features, generator=generator)
    x *= torch.arange(1, features + 1).rsqrt()
    B = torch.randn(features, 1 + RANK, generator=generator)
    z = torch.cat([torch.ones(users, 1), torch.randn(users, RANK, generator=generator)], 1)
    logits = ((x @ B).view(users, pairs, -1) * z[:, None]).sum(2).flatten()
    logits /= logits.std() / 2
    wins = torch.rand(len(x), generator=generator) < logits.sigmoid()
    x[~wins] *= -1
    return Comparisons(DenseFeatures(x.to(device)), [pairs] * users)


if __name__ == "__main__":
    cli(main)
