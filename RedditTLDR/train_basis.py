"""Reddit TLDR: a reward basis from workers' comparisons of summaries, against the rank."""

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
    few_shot_pairs: int = 50,
    seen_fraction: float = 0.5,
    ranks: list[int] = [0, 1, 2, 3, 4, 5, 6],  # noqa: B006
    **fitting: Any,
) -> None:
    """Draw seen and unseen workers, learn bases and evaluate them with their controls.

    Args:
        data: folder that prepare.py wrote.
        pairs_per_user: random training comparisons of each seen worker; the paper has 100 and 150.
        few_shot_pairs: the same of each unseen worker.
        seen_fraction: share of the workers who are seen; drawn anew for every seed.
        ranks: ranks K; 0 is the reference model, 1 Bradley-Terry.
    """
    sample = {
        "pairs_per_user": pairs_per_user, "few_shot_pairs": few_shot_pairs,
        "seen_fraction": seen_fraction,
    }  # fmt: skip
    settings = experiments.Fitting(ranks=ranks, **fitting)
    prepared = experiments.load(data)
    draw = experiments.drawn_split(prepared, **sample)
    print(experiments.train_basis(prepared, draw, settings, sample))


if __name__ == "__main__":
    experiments.cli(main)
