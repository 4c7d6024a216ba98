"""Every benchmark, one table (make bench).

    python benchmarks/all.py                  # about ten minutes on two cores
    python benchmarks/all.py --device cuda
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import core
from lore.common.cli import cli
from lore.common.files import InputError
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown

log = logging.getLogger(__name__)

SHARE = 0.85  # of the ratio of tokens that the ratio of seconds should reach


def main(
    device: str = "cpu",
    rounds: PositiveInt = 3,
    against: tuple[Path, ...] = (),
    scaling: bool = False,
    embedding: tuple[str, ...] = (),
    **sizes: Any,
) -> None:
    """Print one table of the learning core's and the embedding engine's times and ratios.

    Args:
        device: cpu or cuda.
        rounds: how often all sides of the core take their turn.
        against: folders of other commits' checkouts, whose core is timed in the same run.
        scaling: also show how an iteration grows with users, pairs, rank and features.
        embedding: flags of embedding.py, without their hyphens, such as posts=5.
    """
    engine = _embedding_rows(device, embedding)
    rows = core.measure(core.cases(device, **sizes), rounds, against)
    print(markdown(pd.DataFrame(rows + engine).set_index("case")))
    print(core.note())
    print(
        "The floor of embedding is what the tokens computed would take at the plain speed; its "
        f"aim is {SHARE:.0%} of the tokens' ratio."
    )
    if scaling:
        print(_output("scaling", device))


def _output(script: str, device: str, flags: Sequence[str] = ()) -> str:
    """What a benchmark prints, run by itself."""
    path = ROOT / "benchmarks" / f"{script}.py"
    command = [sys.executable, str(path), f"--device={device}", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{path} failed: its messages are above")
    return done.stdout


def _embedding_rows(device: str, flags: Sequence[str]) -> list[dict[str, str]]:
    """The cases of embedding.py, a to d, under this table's headings."""
    lines = _output("embedding", device, [f"--{flag}" for flag in flags]).splitlines()[1:]
    log.info("\n".join(lines))
    return [_embedding_row(line) for line in lines if "skipped" not in line]


def _embedding_row(line: str) -> dict[str, str]:
    _, _, tokens, alone, ours, ratio, _, deviation = line[32:].split()
    floor = float(alone) / float(tokens)
    return {
        "case": "embedding, " + line[3:32].strip(),
        "floor ms": f"{1000 * floor:.4g}",
        "ours ms": f"{1000 * float(ours):.4g}",
        "ours / floor": f"{float(ours) / max(floor, 1e-9):.2f}",
        "aim": f"{1 / SHARE:.2f}",
        "plain ms": f"{1000 * float(alone):.4g}",
        "plain / ours": ratio,
        "deviation": deviation,
    }


if __name__ == "__main__":
    cli(main)
