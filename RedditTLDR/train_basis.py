"""Reddit TLDR: methods on workers' comparisons of summaries, LoRe against its rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.settings import Fraction, PositiveInt
from lore.experiments import runner as experiments
from lore.experiments import splits
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent

# Ranks, steps and rates as published.
LORE = Lore(ranks=(0, 1, 2, 3, 4, 5, 6))


def main(
    data: Path = HERE / "data",
    pairs_per_user: PositiveInt = 150,
    few_shot_pairs: PositiveInt = 50,
    seen_fraction: Fraction = 0.5,
    lore: Lore = LORE,
    **settings: Any,
) -> None:
    """Draw seen and unseen workers, learn and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        pairs_per_user: random training comparisons of each seen worker; the paper has 100 and 150.
        few_shot_pairs: the same of each unseen worker.
        seen_fraction: share of the workers who are seen; drawn anew for every seed.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = experiments.Settings(lore=lore, **settings)
    tasks = splits.drawn_split(
        data, seen_fraction, pairs_per_user, few_shot_pairs, dataset=HERE.name
    )
    print(experiments.train_basis(tasks, chosen))


if __name__ == "__main__":
    experiments.command(main)
