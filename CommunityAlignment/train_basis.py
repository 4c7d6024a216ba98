"""Community Alignment: a reward basis from annotators' own dialogues, against the rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments

HERE = Path(__file__).resolve().parent


def main(
    data: Path = HERE / "data",
    ranks: list[int] = [0, 1, 2, 5, 10, 20],  # noqa: B006
    **fitting: Any,
) -> None:
    """Learn bases from the seen annotators' dialogues and evaluate them with their controls.

    Args:
        data: folder that prepare.py wrote.
        ranks: ranks K; 0 is the reference model, 1 Bradley-Terry.
    """
    settings = experiments.Fitting(ranks=ranks, **fitting)
    prepared = experiments.load(data)
    draw = experiments.given_split(prepared)
    print(experiments.train_basis(prepared, draw, settings))


if __name__ == "__main__":
    experiments.cli(main)
