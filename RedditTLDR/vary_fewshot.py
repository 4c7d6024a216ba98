"""Reddit TLDR: accuracy of unseen workers against the number of their comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments

HERE = Path(__file__).resolve().parent


def main(
    data: Path = HERE / "data",
    pairs_per_user: int = 150,
    seen_fraction: float = 0.5,
    shots: list[int] = [5, 10, 15, 20, 25, 30, 35, 40, 45, 50],  # noqa: B006
    trials: int = 20,
    ranks: list[int] = [5],  # noqa: B006
    iterations: int = 500,
    **fitting: Any,
) -> None:
    """Learn a basis from seen workers, then unseen workers' weights from ever more comparisons.

    Args:
        data: folder that prepare.py wrote.
        pairs_per_user: random training comparisons of each seen worker.
        seen_fraction: share of the workers who are seen.
        shots: numbers of comparisons of an unseen worker.
        trials: random draws of the shots, for each number.
        ranks: ranks K; the reference model and Bradley-Terry are always there.
        iterations: steps of the joint fit.
    """
    sample = {
        "pairs_per_user": pairs_per_user, "few_shot_pairs": max(shots),
        "seen_fraction": seen_fraction,
    }  # fmt: skip
    settings = experiments.Fitting(ranks=ranks, iterations=iterations, **fitting)
    prepared = experiments.load(data)
    draw = experiments.drawn_split(prepared, **sample)
    print(experiments.vary_fewshot(prepared, draw, settings, shots, trials, about=sample))


if __name__ == "__main__":
    experiments.cli(main)
