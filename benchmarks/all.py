"""Every benchmark, one table (make bench).

    python benchmarks/all.py                  # some three minutes on two cores
    python benchmarks/all.py --device cuda
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import core
import embedding
import mixed
from lore.common.cli import cli
from lore.common.settings import NonNegativeInt as Count
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown
from measure import copy_bandwidth

NOTE = (
    "The floor of embedding is the time of its tokens' products with the model's weights at the "
    "speed of one large product of this machine; its plain way is one conversation at a time. The "
    "mixed logit is timed whole; its floor is one read of the features, and its plain way a "
    "thousand plain iterations of LoRe on as many comparisons."
)


def main(
    device: str = "cpu",
    rounds: PositiveInt = 2,
    against: tuple[Path, ...] = (),
    model: str | None = None,
    texts: tuple[Count, Count, Count, Count] = (12, 6, 12, 24),
    **sizes: Any,
) -> None:
    """Print one table: the core, the embedding engine and the mixed logit, each beside the floor of
    this machine and the plain way of computing; and what each part took.

    Args:
        device: cpu or cuda.
        rounds: how often all sides of the core take their turn.
        against: folders of other commits' checkouts, whose core is timed in the same run.
        model: whose embeddings are timed, see embedding.py.
        texts: posts, dialogues, prompts and PRISM's dialogues that are embedded.
    """
    cases, laps = core.cases(device, **sizes), [time.monotonic()]
    engine = [embedding_row(row) for row in embedding.measure(model, device, texts, parts=3)]
    laps.append(time.monotonic())
    rows = core.measure(cases, rounds, against)
    laps.append(time.monotonic())
    rows = [*rows, *engine, *mixed_rows(cases[0], rows[0])]
    laps.append(time.monotonic())
    print(markdown(pd.DataFrame(rows).fillna("").set_index("case")))
    print(core.note())
    print(NOTE)
    took = zip(("embedding", "core", "mixed logit"), laps[1:], laps, strict=False)
    print("Seconds:", ", ".join(f"{name} {end - begin:.0f}" for name, end, begin in took))


def embedding_row(row: dict[str, Any]) -> dict[str, str]:
    """A row of embedding.py under this table's headings."""
    seconds = (row[name] for name in ("floor s", "ours s", "plain s"))
    found = timed_row(f"embedding, {row['case'][3:]}", *seconds)
    return {**found, "deviation": f"{row['deviation']:.0e}"}


def mixed_rows(case: core.Case, joint: dict[str, str]) -> Iterator[dict[str, str]]:
    """The mixed logit on as many comparisons as a case of LoRe, whose row is given."""
    users, pairs, features = (case.settings[name] for name in ("users", "pairs", "features"))
    device, size = case.settings["device"], case.floor_bytes()
    plain = 1000 * float(joint["plain ms"]) / 1000  # seconds of so many iterations
    task = mixed.task_of(users, pairs, features, device)
    for name, (ours, _, extra) in mixed.both(task).items():
        name = f"mixed logit, {users} users x {pairs}, {name}"
        row = timed_row(name, size / copy_bandwidth(size, device), ours, plain)
        yield {**row, "extra MB": f"{extra / 1e6:.0f}"}


def timed_row(case: str, floor: float, ours: float, plain: float) -> dict[str, str]:
    """A row of the table from seconds."""
    numbers = (1000 * floor, 1000 * ours, 1000 * plain)
    row = dict(zip(("floor ms", "ours ms", "plain ms"), (f"{x:.4g}" for x in numbers), strict=True))
    ratios = {"ours / floor": f"{ours / floor:.1f}", "plain / ours": f"{plain / ours:.1f}"}
    return {"case": case, **row, **ratios}


if __name__ == "__main__":
    cli(main)
