"""Community Alignment: unseen annotators against the number of their dialogues."""

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

# The paper's objective, with the steps of its few-shot curves.
LORE = Lore(ranks=(5,), iterations=500)


def main(
    data: Path = HERE / "data",
    shots: tuple[NonNegativeInt, ...] = (1, 2, 5, 10),
    trials: PositiveInt = 20,
    ask: tuple[experiments.Criterion, ...] = ("random",),
    lore: Lore = LORE,
    **settings: Any,
) -> None:
    """Learn from seen annotators, then judge every method on unseen ones with more dialogues.

    Args:
        data: folder that prepare.py wrote.
        shots: numbers of dialogues of an unseen annotator; 0 is none.
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
