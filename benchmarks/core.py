"""The learning core against plain per-user loops, against its floor and against other checkouts.

    python benchmarks/core.py                           # the data sets' shapes, some minutes
    python benchmarks/core.py --against ../old ../older # other commits' checkouts in the same run
    python benchmarks/core.py --device cuda

The plain loops are those of tests/helpers/reference.py. Every side is a process of its own; they
take turns, so that what else the machine does falls on all.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from lore.common.cli import cli
from lore.common.files import require
from lore.common.settings import PositiveInt, SeedNumber
from lore.experiments.report.tables import markdown
from measure import copy_bandwidth

log = logging.getLogger(__name__)

ALPHA = 1e4  # as published with the alternating estimator


class Case(NamedTuple):
    """What is timed.

    Attributes:
        name: of the row.
        settings: what ``side.py`` needs.
        aim: most times the floor that we want to take; 0 for none.
        alone: the case of the largest rank alone, which the ranks together are compared with.
        plain: plain loops are timed too.
    """

    name: str
    settings: dict[str, Any]
    aim: float = 0
    alone: str = ""
    plain: bool = True

    def floor_bytes(self) -> int:
        """What must be read: the features once, and a sweep's projected shots at every step."""
        s = self.settings
        read = 4 * s["users"] * s["pairs"] * s["features"]
        if "shots" in s:
            read += 4 * s["ranks"][0] * sum(s["shots"]) * s["users"] * s["trials"] * s["steps"]
        return read


class Side:
    """A process that runs cases: the checkout in a folder, or plain loops."""

    def __init__(self, checkout: str | Path) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "side.py"), str(checkout)]
        self.name, pipe = str(checkout), subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a case took."""
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        require(bool(line), f"{self.name}: failed; its messages are above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def cases(
    device: str = "cpu",
    features: PositiveInt = 4096,
    joint: tuple[PositiveInt, PositiveInt] = (1000, 47),
    ranks: tuple[PositiveInt, ...] = (1, 2, 3, 4, 5),
    alternating: tuple[PositiveInt, PositiveInt, PositiveInt] = (640, 15, 10),
    sweep: tuple[PositiveInt, ...] = (1, 5, 10, 15, 20, 25, 50),
    few_shot: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (20, 10, 20, 5),
    steps: PositiveInt = 6,
    few_shot_iterations: PositiveInt = 500,
    seed: SeedNumber = 0,
) -> list[Case]:
    """What is timed.

    Args:
        device: cpu or cuda.
        features: F.
        joint: users and pairs of each for the joint estimator (PersonalLLM).
        ranks: trained together by the joint estimator, and the last one alone.
        alternating: users, pairs and rank of the alternating estimator (PRISM).
        sweep: ranks trained together by the alternating estimator (PRISM's scripts), and the last
            one alone.
        few_shot: trials, numbers of shots (5, 10, ...), new users and rank (Reddit TLDR).
        steps: iterations in a row; the first one is not counted.
        few_shot_iterations: of the new users' weights.
        seed: of everything random.
    """
    shared = {"device": device, "features": features, "steps": steps, "seed": seed}
    one = shared | {"estimator": "LoRe", "alpha": 0.0, "users": joint[0], "pairs": joint[1]}
    other = shared | {"estimator": "LoRe_regularized", "alpha": ALPHA}
    other |= {"users": alternating[0], "pairs": alternating[1]}
    trials, sizes, users, rank = few_shot
    shots = [5 * (i + 1) for i in range(sizes)]
    few = shared | {"users": users, "pairs": shots[-1], "steps": few_shot_iterations}
    few |= {"ranks": [rank], "shots": shots, "trials": trials}
    shape, shape2 = f"{joint[0]} users x {joint[1]}", f"{alternating[0]} users x {alternating[1]}"
    alone = f"joint, {shape}, rank {ranks[-1]}", f"alternating, {shape2}, rank {sweep[-1]}"
    together = [f"ranks {', '.join(map(str, some))}" for some in (ranks, sweep)]
    return [
        Case(alone[0], one | {"ranks": ranks[-1:]}, 2),
        Case(f"joint, {together[0]} together", one | {"ranks": ranks}, 0, alone[0], False),
        Case(f"alternating, {shape2}, rank {alternating[2]}",
             other | {"ranks": alternating[2:]}, 4),
        Case(alone[1], other | {"ranks": sweep[-1:]}),
        Case(f"alternating, {together[1]} together", other | {"ranks": sweep}, 0, alone[1], False),
        Case(f"few-shot, {trials} trials x {sizes} sizes x {users} users, rank {rank}", few),
    ]  # fmt: skip


def measure(todo: Sequence[Case], rounds: int, against: Sequence[Path]) -> list[dict[str, str]]:
    """A row of the table for each case.

    Args:
        todo: the cases.
        rounds: how often all sides take their turn at all cases.
        against: folders of other checkouts.
    """
    for folder in against:
        require((folder / "utils.py").exists(), f"--against {folder}: no utils.py there")
    sides = [Side(where) for where in (ROOT, "plain", *against)]
    turns = [
        (case, side)
        for _ in range(rounds)
        for case in todo
        for side in sides
        if case.plain or side.name != "plain"
    ]
    took: dict[str, dict[str, list[dict[str, Any]]]] = {case.name: {} for case in todo}
    for case, side in tqdm(turns, "turns", disable=None):
        took[case.name].setdefault(side.name, []).append(side.ask(case.settings))
    for side in sides:
        side.close()
    medians = {name: {k: _median(v) for k, v in by.items()} for name, by in took.items()}
    return [_row(case, took[case.name], medians, against) for case in todo]


def _median(turns: list[dict[str, Any]]) -> float:
    return float(np.median(np.concatenate([turn["seconds"] for turn in turns])))


def _row(
    case: Case,
    took: dict[str, list[dict[str, Any]]],
    medians: dict[str, dict[str, float]],
    against: Sequence[Path],
) -> dict[str, str]:
    seconds, size = medians[case.name], case.floor_bytes()
    ours, device = seconds[str(ROOT)], case.settings["device"]
    floor = size / copy_bandwidth(size, device)
    row = {"case": case.name, "floor ms": _ms(floor), "ours ms": _ms(ours)}
    row |= {"ours / floor": f"{ours / floor:.1f}", "aim": f"{case.aim:g}" if case.aim else ""}
    row["ours / alone"] = f"{ours / medians[case.alone][str(ROOT)]:.2f}" if case.alone else ""
    row["plain ms"] = _ms(seconds["plain"]) if case.plain else ""
    row["plain / ours"] = f"{seconds['plain'] / ours:.1f}" if case.plain else ""
    for folder in against:
        row[f"{folder.name} ms"] = _ms(seconds[str(folder)])
    if "sample" in took[str(ROOT)][0]:
        row["deviation"] = f"{_deviation(took):.0e}"
        fresh = Side(ROOT)
        row["extra MB"] = f"{fresh.ask(case.settings | {'memory': True})['extra'] / 1e6:.0f}"
        fresh.close()
    log.info("%s", ", ".join(f"{k}: {v}" for k, v in row.items() if v))
    return row


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def _deviation(took: dict[str, list[dict[str, Any]]]) -> float:
    """The largest relative difference between the bases of two sides; 0 where there is one side."""
    first, *others = (np.array(turns[0]["sample"]) for turns in took.values())
    sizes = [np.linalg.norm(other - first) / np.linalg.norm(first) for other in others]
    return float(max(sizes, default=0.0))


def note() -> str:
    """What a reader of the table must know."""
    return (
        "Milliseconds are of one iteration (medians), for few-shot of the whole sweep. Floor is "
        "the time to read what must be read, at the bandwidth measured by copying as many bytes: "
        "the features once, for few-shot also every fit's projected comparisons at every step. "
        "Alone is the largest rank alone. The plain few-shot loop is timed on one trial and a few "
        "iterations and scaled to all. Deviation is the relative difference of the sides' bases, "
        "extra how far peak memory rises above the features."
    )


def main(rounds: PositiveInt = 3, against: tuple[Path, ...] = (), **sizes: Any) -> None:
    """Print a table: milliseconds of ours, of plain loops and of other checkouts, and the floor.

    Args:
        rounds: how often all sides take their turn.
        against: folders of other commits' checkouts, timed in the same run.
    """
    print(markdown(pd.DataFrame(measure(cases(**sizes), rounds, against)).set_index("case")))
    print(note())


if __name__ == "__main__":
    cli(main)
