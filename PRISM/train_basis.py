"""PRISM: a reward basis from people's own dialogues, against the rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments

HERE = Path(__file__).resolve().parent


def main(
    data: Path = HERE / "data",
    ranks: list[int] = [0, 1, 5, 10, 15, 20, 25, 50],  # noqa: B006
    alpha: list[float] = [1e4],  # noqa: B006
    estimator: Literal["lore", "lore_regularized"] = "lore_regularized",
    **fitting: Any,
) -> None:
    """Learn bases from the seen people's dialogues and evaluate them with their controls.

    Args:
        data: folder that prepare.py and generate-prism-embeddings.py wrote.
        ranks: ranks K; 0 is the reference model, 1 Bradley-Terry.
        alpha: strengths of the pull of the basis to the reference; 1e4 as published.
        estimator: "lore_regularized" as the published scripts, "lore" as the paper's equation 10.
    """
    settings = experiments.Fitting(ranks=ranks, alpha=alpha, estimator=estimator, **fitting)
    prepared = experiments.load(data)
    draw = experiments.given_split(prepared)
    print(experiments.train_basis(prepared, draw, settings))


if __name__ == "__main__":
    experiments.cli(main)
