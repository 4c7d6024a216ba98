"""PersonalLLM: a reward basis from simulated users, against the rank (Table 1 of the paper)."""

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
    few_shot_pairs: int = 9,
    ranks: list[int] = [0, 1, 2, 3, 4, 5],  # noqa: B006
    **fitting: Any,
) -> None:
    """Simulate users, learn bases from their choices and evaluate them with their controls.

    Args:
        data: folder that prepare.py wrote.
        dirichlet_alpha: how alike users are: their weights over the reward models are
            Dirichlet(alpha * 1); the paper has 0.001, 0.01 and 0.1.
        users: seen users.
        unseen_users: users whose weights alone are learned, with the basis frozen.
        pairs_per_user: training prompts of each seen user.
        few_shot_pairs: training prompts of each unseen user.
        ranks: ranks K; 0 is the reference model, 1 Bradley-Terry.
    """
    population = {
        "dirichlet_alpha": dirichlet_alpha, "users": users, "unseen_users": unseen_users,
        "pairs_per_user": pairs_per_user, "few_shot_pairs": few_shot_pairs,
    }  # fmt: skip
    settings = experiments.Fitting(ranks=ranks, **fitting)
    prepared = experiments.load(data)
    draw = experiments.simulated_users(prepared, **population)
    print(experiments.train_basis(prepared, draw, settings, population))


if __name__ == "__main__":
    experiments.cli(main)
