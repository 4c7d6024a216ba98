"""Community Alignment: accuracy of unseen annotators against the number of their dialogues."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments

HERE = Path(__file__).resolve().parent


def main(
    data: Path = HERE / "data",
    shots: list[int] = [1, 2, 5, 10],  # noqa: B006
    trials: int = 20,
    ranks: list[int] = [5],  # noqa: B006
    iterations: int = 500,
    **fitting: Any,
) -> None:
    """Learn a basis from seen annotators, then unseen ones' weights from ever more dialogues.

    Args:
        data: folder that prepare.py wrote.
        shots: numbers of dialogues of an unseen annotator.
        trials: random draws of the dialogues, for each number.
        ranks: ranks K; the reference model and Bradley-Terry are always there.
        iterations: steps of the joint fit.
    """
    settings = experiments.Fitting(ranks=ranks, iterations=iterations, **fitting)
    prepared = experiments.load(data)
    draw = experiments.given_split(prepared)
    print(experiments.vary_fewshot(prepared, draw, settings, shots, trials, "dialogues"))


if __name__ == "__main__":
    experiments.cli(main)
