"""PersonalLLM: accuracy of new simulated users against the number of their comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments

HERE = Path(__file__).resolve().parent


def main(
    data: Path = HERE / "data",
    dirichlet_alpha: float = 0.001,
    users: int = 1000,
    unseen_users: int = 1000,
    pairs_per_user: int = 45,
    shots: list[int] = [1, 3, 5, 7, 9, 15, 30, 45],  # noqa: B006
    trials: int = 5,
    ranks: list[int] = [5],  # noqa: B006
    iterations: int = 500,
    **fitting: Any,
) -> None:
    """Learn a basis from simulated users, then new users' weights from ever more comparisons.

    Args:
        data: folder that prepare.py wrote.
        dirichlet_alpha: how alike users are: their weights over the reward models are
            Dirichlet(alpha * 1); the paper has 0.001, 0.01 and 0.1.
        users: seen users.
        unseen_users: users whose weights alone are learned, with the basis frozen.
        pairs_per_user: training prompts of each seen user.
        shots: numbers of comparisons of a new user.
        trials: random draws of the shots, for each number.
        ranks: ranks K; the reference model and Bradley-Terry are always there.
        iterations: steps of the joint fit.
    """
    population = {
        "dirichlet_alpha": dirichlet_alpha, "users": users, "unseen_users": unseen_users,
        "pairs_per_user": pairs_per_user, "few_shot_pairs": max(shots),
    }  # fmt: skip
    settings = experiments.Fitting(ranks=ranks, iterations=iterations, **fitting)
    prepared = experiments.load(data)
    draw = experiments.simulated_users(prepared, **population)
    print(experiments.vary_fewshot(prepared, draw, settings, shots, trials, about=population))


if __name__ == "__main__":
    experiments.cli(main)
