"""Seconds of the mixed logit, choice included, beside LoRe's 1,000 iterations.

    python benchmarks/mixed.py                                # 1,000 users x 47, F = 576 and 4096
    python benchmarks/mixed.py --users 100 --features 64      # smaller
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lore.common.cli import cli
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown
from lore.learning.comparisons import Comparisons, DenseFeatures
from lore.learning.method import Task
from lore.methods import METHODS

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
        data = made(users, pairs, F)
        task = Task(data, data, data, None, shots=(0, 10))
        cells = {}
        for name in ("ridge_bt", "mixed_logit"):
            begin = time.perf_counter()
            (fit,) = METHODS[name]().fit(task)
            cells[f"{name}, with its choice"] = f"{time.perf_counter() - begin:.1f}"
        cells["chosen"] = fit.describe()["note"]
        _, few, many = (lore_seconds(task, count) for count in (2, 2, 2 + MEASURED))
        cells["lore, rank 5, 1,000 iterations"] = f"{(many - few) * 1000 / MEASURED:.1f}"
        rows[f"F = {F}"] = cells
    print(markdown(pd.DataFrame.from_dict(rows, orient="index")))


def lore_seconds(task: Task, iterations: int) -> float:
    """Of a fit of LoRe with so many iterations."""
    begin = time.perf_counter()
    METHODS["lore"](ranks=(5,), iterations=iterations).fit(task)
    return time.perf_counter() - begin


def made(users: int, pairs: int, features: int) -> Comparisons:
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
    return Comparisons(DenseFeatures(x), [pairs] * users)


if __name__ == "__main__":
    cli(main)
