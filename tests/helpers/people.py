"""People of two opposite tastes, as a prepared and embedded dataset; and what a run saved of them.

Every third comparison or so weighs half or double, and every dialogue has three.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lore.experiments import splits
from lore.experiments.judging import Sweep, judge
from lore.experiments.results import read_written as saved
from lore.experiments.runner import Settings, open_run
from lore.learning.comparisons import Comparisons
from lore.learning.method import Task
from lore.methods.lore import Lore
from lore.methods.ridge_bt import RidgeBT

QUICK = {"iterations": 20, "few_shot_iterations": 20}


class Rows:
    """Embeddings in memory, with what a Store has."""

    def __init__(self, x: Tensor, head: Tensor | None) -> None:
        self.x, self.head, self.last_linear, self.num_features = x, head, None, x.shape[1]
        self.manifest = {"model": "planted", "conversations_sha256": "0" * 64}

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor) -> Tensor:
        return self.x[index]

    def same(self, some: Tensor, others: Tensor) -> Tensor:
        return some == others


class Tasks(splits.Tasks):
    """Tasks whose conversations are not on disk: neighbouring rows answer the same prompt."""

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """One conversation for each row of the embeddings."""
        return [[{"role": "user", "content": f"what of {row // 2}?"},
                 {"role": "assistant", "content": f"answer {row}"}]
                for row in range(len(self.store))]  # fmt: skip


class People(NamedTuple):
    """What prepare.json says, the embeddings and the table of comparisons."""

    info: dict[str, Any]
    store: Rows
    table: pd.DataFrame

    def tasks(self, unit: splits.Unit = "dialogues") -> splits.Tasks:
        """The split that is given in the table."""

        def draw(seed: int, device: torch.device) -> Task:
            return splits.four_sets(self.table, self.store, device, unit)

        return Tasks(self.info, self.store, draw, unit, {}, Path())


def planted(users: int = 12, dialogues: int = 16, F: int = 8) -> People:
    """Half of the users are seen, and half of each user's dialogues are for training."""
    rng = np.random.default_rng(3)
    taste, rows = rng.standard_normal(F), []
    x = 20 * rng.standard_normal((users * dialogues * 6, F))
    for user, dialog, turn in product(range(users), range(dialogues), range(3)):
        first = 2 * len(rows)
        liked = (x[first] - x[first + 1]) @ taste * (-1) ** user
        chosen, rejected = (first, first + 1) if liked > 0 else (first + 1, first)
        rows.append({
            "user_id": f"p{user:02d}", "split": "train" if dialog % 2 else "test",
            "seen": user % 4 < 2, "dialog_id": f"d{user}.{dialog}", "turn": turn,
            "chosen": chosen, "rejected": rejected, "weight": rng.choice([0.5, 1, 2]),
        })  # fmt: skip
    head = torch.from_numpy(taste + rng.standard_normal(F)).float()
    info = {"dataset": "planted", "data_sha256": "1" * 64}
    return People(info, Rows(torch.from_numpy(x).float(), head), pd.DataFrame(rows))


def settings(results: Path, **changes: Any) -> Settings:
    """Settings of a quick run of rank 2, in which ridge BT chooses nothing; changes of LoRe's go to
    LoRe."""
    lore = {"ranks": (2,), **QUICK}
    lore |= {k: changes.pop(k) for k in Lore.__dataclass_fields__ if k in changes}
    given = {"results": results, "name": "here", "progress": False, "device": "cpu"}
    given |= {"lore": Lore(**lore), "ridge_bt": RidgeBT(strength=1.0)}
    return Settings(**given | changes)


def train_basis(dataset: splits.Tasks, chosen: Settings, sweep: Sweep | None = None) -> str:
    """What the scripts of that name do; with a sweep, what those named vary_fewshot do."""
    script = "vary_fewshot" if sweep else "train_basis"
    with open_run(script, dataset, chosen, sweep) as run:
        for task, name, method in run.unfinished():
            fits = sweep.asking(method.fit(task)) if sweep else method.fit(task)
            run.save(task, name, fits, (sweep.judge if sweep else judge)(fits, task))
    return run.report()


def vary_fewshot(
    dataset: splits.Tasks, chosen: Settings, shots: Sequence[int], trials: int,
    ask: Sequence[str] = ("random",),
) -> str:  # fmt: skip
    """What the scripts of that name do."""
    return train_basis(dataset, chosen, Sweep(tuple(shots), trials, tuple(ask)))


def fit(people: People, results: Path, **changes: Any) -> tuple[str, Path]:
    """A run of train_basis on the split that is given; what it prints, and its folder."""
    chosen = settings(results, **changes)
    return train_basis(people.tasks(), chosen), results / people.info["dataset"] / chosen.name


def repeats(folder: Path) -> list[dict[str, Any]]:
    """The repeats in results.json, without the seconds that they took."""
    seeds = saved(folder)["seeds"]
    for part in seeds:
        for method in part["methods"].values():
            del method["seconds"], method["processor_seconds"]
    return seeds


def records(folder: Path, seed: int = 0) -> dict[tuple, dict[str, Any]]:
    """(label, control, set, shots) -> a repeat's record."""
    part = next(part for part in saved(folder)["seeds"] if part["seed"] == seed)
    every = [r for method in part["methods"].values() for r in method["records"]]
    found = {(r["label"], r["control"], r["set"], r["shots"]): r for r in every}
    assert len(found) == len(every)
    return found


def ends(data: Comparisons) -> tuple[list[int], list[int]]:
    """The rows of the embeddings that comparisons are about: chosen, rejected."""
    x = data.features
    return x.index[x.chosen].tolist(), x.index[x.rejected].tolist()


def listed(data: Comparisons) -> list[tuple]:
    """Every comparison as (user, chosen, rejected, weight)."""
    users = [data.names[u] for u in data.user.tolist()]
    return list(zip(users, *ends(data), data.weight.tolist(), strict=True))


def plain(store: Rows, data: Comparisons, V: Tensor, W: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Every user's accuracy and log loss for V [F, K] and W [U, K], comparison by comparison."""
    right, loss, total = np.zeros((3, data.num_users))
    rows = zip(data.user.tolist(), *ends(data), data.weight.tolist(), strict=True)
    for user, chosen, rejected, weight in rows:
        x = store.x[chosen].double() - store.x[rejected].double()
        logit = float(x @ V.double() @ W[user].double()) / 100
        right[user] += weight * (logit > 0)
        loss[user] += weight * np.log1p(np.exp(-logit))
        total[user] += weight
    return right / total, loss / total
