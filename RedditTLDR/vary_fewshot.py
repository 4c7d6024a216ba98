"""Reddit TLDR: unseen workers against the number of their comparisons."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.settings import Fraction, PositiveInt
from lore.experiments.judging import Sweep
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import drawn_split
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(5,), iterations=500)  # rank and steps of the paper's few-shot curve
SWEEP = Sweep((5, 10, 15, 20, 25, 30, 35, 40, 45, 50), trials=20)


def main(
    data: Path = HERE / "data", pairs_per_user: PositiveInt = 150, seen_fraction: Fraction = 0.5,
    sweep: Sweep = SWEEP, pool: PositiveInt | None = None, lore: Lore = LORE, **settings: Any,
) -> None:  # fmt: skip
    """Learn from seen workers, then judge every method on unseen ones with ever more comparisons.

    Args:
        data: folder that prepare.py wrote.
        pairs_per_user: random training comparisons of each seen worker.
        seen_fraction: share of the workers who are seen.
        sweep: comparisons of an unseen worker: how many, and how they are drawn.
        pool: comparisons of a new user that shots are drawn from; by default the largest of shots.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(lore=lore, **settings)
    numbers = seen_fraction, pairs_per_user, pool or max(1, *sweep.shots)
    dataset = drawn_split(data, *numbers, HERE.name, chosen.features)
    with open_run("vary_fewshot", dataset, chosen, sweep) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = sweep.asking(method.fit(task))  # from task.train alone
            run.save(task, name, fits, sweep.judge(fits, task))  # at every number of shots
    print(run.report())


if __name__ == "__main__":
    command(main)
