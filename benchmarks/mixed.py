"""Seconds of the mixed logit, choice included, beside LoRe's 1,000 iterations; and its memory.

    python benchmarks/mixed.py                                # 1,000 users x 47, F = 576 and 4096
    python benchmarks/mixed.py --users 100 --features 64      # smaller
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
sys.path.append(str(ROOT / "tests" / "helpers"))  # planted users
import planted
from lore.common.cli import cli
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown
from lore.learning.method import Fitted, Task
from lore.methods import METHODS
from measure import extra_memory, now

RANK = 3  # of the planted tastes
MEASURED = 50  # iterations of LoRe that are timed; a thousand take in proportion


def main(
    users: PositiveInt = 1000,
    pairs: PositiveInt = 47,
    features: tuple[PositiveInt, ...] = (576, 4096),
) -> None:
    """Print a table of seconds by the clock, and of memory beside the features as a share of them.

    Args:
        users: Seen users, and as many new ones, whose number of shots the choice knows.
        pairs: Comparisons of each.
        features: Numbers of features F to time.
    """
    rows = {}
    for F in features:
        task = task_of(users, pairs, F)
        cells: dict[str, Any] = {"ridge_bt, with its choice": fitted(task, "ridge_bt")[0]}
        size = 4 * len(task.train) * F  # bytes of the features
        found = both(task)
        for name, (seconds, _, extra) in found.items():
            cells |= {f"mixed_logit, {name}": seconds, f"its memory, {name}": f"{extra / size:.2f}"}
        cells["chosen"] = found["with its choice"][1].describe()["note"]
        _, few, many = (
            fitted(task, "lore", ranks=(5,), iterations=steps)[0] for steps in (2, 2, 2 + MEASURED)
        )
        cells["lore, rank 5, 1,000 iterations"] = (many - few) * 1000 / MEASURED
        rows[f"F = {F}"] = cells
    print(markdown(pd.DataFrame.from_dict(rows, orient="index").round(1)))


def both(task: Task) -> dict[str, tuple[float, Fitted, int]]:
    """Seconds, fit and bytes beside the features of a mixed logit with its choice, and of the last
    fit alone, with the settings that were chosen."""
    _ = task.local_train  # is read into memory here, so that what a fit takes is beside it
    whole = measured(task)
    chosen = whole[1].describe()["chosen"]
    given = {key: chosen[key] for key in ("l_mu", "tau2", "rank")}
    given |= {"floor": chosen["floor"] or 0.0, "pi": min(chosen["pi"], 1e9)}
    return {"with its choice": whole, "settings given": measured(task, **given)}


def measured(task: Task, **settings: Any) -> tuple[float, Fitted, int]:
    """Seconds, fit and bytes beside the features of a mixed logit with some settings."""
    found: list[tuple[float, Fitted]] = []

    def work() -> None:
        found.append(fitted(task, "mixed_logit", **settings))

    extra = extra_memory(work, task.train.device.type)
    return *found[0], extra


def fitted(task: Task, name: str, **settings: Any) -> tuple[float, Fitted]:
    """Seconds of a method's fit, and the fit."""
    begin = now(task.train.device)
    fit = METHODS[name](**settings).fit(task)[-1]
    return now(task.train.device) - begin, fit


def task_of(users: int, pairs: int, features: int, device: str = "cpu") -> Task:
    """Seen and new users with tastes of rank ``RANK`` among features of falling variance."""
    world = {"rank": RANK, "features": features, "rows": 8 * users, "falling": True}
    task = planted.task(users, pairs, 2, **world)
    return planted.moved(replace(task, shots=(0, 10)), device)


if __name__ == "__main__":
    cli(main)
