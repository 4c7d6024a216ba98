"""What threads change in results: the same command with one thread, twice, and with more.

    python benchmarks/threads.py --data ../PersonalLLM/data/demo     # which `make demo` prepares
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lore.common.cli import cli
from lore.common.files import InputError
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown

FIGURES = ("accuracy", "log_loss", "brier")
Records = dict[tuple[str, str], list[dict[str, Any]]]


def main(
    data: Path = ROOT / "PersonalLLM" / "data" / "demo",
    methods: tuple[str, ...] = ("lore", "ridge_bt", "mixed_logit", "rbd", "mlp"),
    threads: PositiveInt = 2,
    users: PositiveInt = 40,
    iterations: PositiveInt = 300,
) -> None:
    """Print a table of the largest differences between runs, of all records of each label.

    Args:
        data: A prepared folder of PersonalLLM.
        methods: To fit.
        threads: Of the last run; the first two have one.
        users: Seen users, and half as many new ones.
        iterations: Of LoRe.
    """
    command = [
        "--data", str(data.resolve()), "--users", str(users), "--unseen-users", str(users // 2),
        "--methods", *methods, "--iterations", str(iterations), "--name", "run",
        "--progress", "false",
    ]  # fmt: skip
    first, again, more = (_records(command, count) for count in (1, 1, threads))
    rows = []
    for label, control in first:
        key = (label, control)
        if not control:
            same = "the same" if again[key] == first[key] else "not the same"
            rows.append({"": label, "again": same, **_differences(first[key], more[key])})
    print(f"again: one thread, twice; the rest: one thread against {threads}, seen and new users\n")
    print(markdown(pd.DataFrame(rows).set_index("")))


def _records(command: list[str], threads: int) -> Records:
    """A run's records by label and control."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "train_basis.py", *command, "--results", folder],
            cwd=ROOT / "PersonalLLM", env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise InputError((done.stderr.strip().splitlines() or ["no run"])[-1])
        file = Path(folder) / "PersonalLLM/run/results.json"
        found = json.loads(file.read_text(encoding="utf-8"))
    records: Records = {}
    for method in found["seeds"][0]["methods"].values():
        for record in method["records"]:
            records.setdefault((record["label"], record["control"]), []).append(record)
    return records


def _differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, str]:
    """The largest difference of any user's figure, and of a mean accuracy over users."""
    found = {name: 0.0 for name in ("mean accuracy", *FIGURES)}
    for a, b in zip(one, other, strict=True):
        for name in FIGURES:
            apart = np.subtract(a[name], b[name])
            found[name] = max(found[name], float(np.abs(apart).max()))
            if name == "accuracy":
                found["mean accuracy"] = max(found["mean accuracy"], abs(float(apart.mean())))
    return {name: f"{value:.5f}" for name, value in found.items()}


if __name__ == "__main__":
    cli(main)
