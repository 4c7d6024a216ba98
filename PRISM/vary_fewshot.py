"""PRISM: unseen people against the number of their dialogues."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.experiments import runner as experiments
from lore.experiments import splits
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent

# The published scripts' estimator and pull, for both experiments alike; the paper's equation 10 is
# --estimator lore --alpha 0.
LORE = Lore(ranks=(5,), alpha=(1e4,), estimator="lore_regularized")


def main(
    data: Path = HERE / "data",
    shots: tuple[NonNegativeInt, ...] = (1, 2, 3),
    trials: PositiveInt = 20,
    ask: tuple[experiments.Criterion, ...] = ("random",),
    lore: Lore = LORE,
    **settings: Any,
) -> None:
    """Learn from the seen people, then judge every method on unseen ones with ever more dialogues.

    Args:
        data: folder that prepare.py and generate-prism-embeddings.py wrote.
        shots: numbers of dialogues of an unseen person; 0 is none.
        trials: random draws of the dialogues, for each number.
        ask: how shots are chosen: random, d_optimal, information; random is always
            there.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = experiments.Settings(lore=lore, **settings)
    tasks = splits.given_split(data, HERE.name)
    print(experiments.vary_fewshot(tasks, chosen, shots, trials, ask))


if __name__ == "__main__":
    experiments.command(main)
