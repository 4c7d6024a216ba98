"""Reddit TLDR: methods on workers' comparisons of summaries, LoRe against its rank."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.settings import Fraction, PositiveInt
from lore.experiments.judging import judge
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import drawn_split
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(0, 1, 2, 3, 4, 5, 6))  # ranks, steps and rates as published


def main(
    data: Path = HERE / "data", pairs_per_user: PositiveInt = 150,
    few_shot_pairs: PositiveInt = 50, seen_fraction: Fraction = 0.5, lore: Lore = LORE,
    **settings: Any,
) -> None:  # fmt: skip
    """Draw seen and unseen workers, learn and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        pairs_per_user: random training comparisons of each seen worker; the paper has 100 and 150.
        few_shot_pairs: the same of each unseen worker.
        seen_fraction: share of the workers who are seen; drawn again for every seed.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(lore=lore, **settings)
    numbers = seen_fraction, pairs_per_user, few_shot_pairs
    dataset = drawn_split(data, *numbers, HERE.name, chosen.features)
    with open_run("train_basis", dataset, chosen) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = method.fit(task)  # from task.train alone; for LoRe by utils.LoRe
            run.save(task, name, fits, judge(fits, task))  # accuracy, log loss, controls
    print(run.report())


if __name__ == "__main__":
    command(main)
