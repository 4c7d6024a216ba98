"""Community Alignment: methods on annotators' own dialogues, LoRe against its rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments import runner as experiments
from lore.experiments import splits
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent

# No published settings: the paper's objective at ranks up to 20.
LORE = Lore(ranks=(0, 1, 2, 5, 10, 20))


def main(
    data: Path = HERE / "data",
    lore: Lore = LORE,
    **settings: Any,
) -> None:
    """Learn from the seen annotators' dialogues and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = experiments.Settings(lore=lore, **settings)
    tasks = splits.given_split(data, HERE.name)
    print(experiments.train_basis(tasks, chosen))


if __name__ == "__main__":
    experiments.command(main)
