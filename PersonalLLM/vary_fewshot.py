"""PersonalLLM: new simulated users against the number of their comparisons."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.settings import Concentration, PositiveInt
from lore.experiments.judging import Sweep
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import simulated_users
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(5,), iterations=500)  # rank and steps of the paper's few-shot curves
SWEEP = Sweep((1, 3, 5, 7, 9, 15, 30, 45), trials=5)


def main(
    data: Path = HERE / "data", dirichlet_alpha: Concentration = 0.001,
    users: PositiveInt = 1000, unseen_users: PositiveInt = 1000, pairs_per_user: PositiveInt = 45,
    sweep: Sweep = SWEEP, pool: PositiveInt | None = None, lore: Lore = LORE, **settings: Any,
) -> None:  # fmt: skip
    """Learn from simulated users, then judge every method on new ones with ever more comparisons.

    Args:
        data: folder that prepare.py wrote.
        dirichlet_alpha: of users' weights over reward models; 0.001, 0.01 and 0.1 in the paper.
        users: seen users.
        unseen_users: users who are known by a few comparisons alone.
        pairs_per_user: training prompts of each seen user.
        sweep: comparisons of a new user: how many, and how they are drawn.
        pool: comparisons of a new user that shots are drawn from; by default the largest of shots.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(lore=lore, **settings)
    numbers = users, unseen_users, pairs_per_user, pool or max(1, *sweep.shots)
    dataset = simulated_users(data, dirichlet_alpha, *numbers, HERE.name, chosen.features)
    with open_run("vary_fewshot", dataset, chosen, sweep) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = sweep.asking(method.fit(task))  # from task.train alone
            run.save(task, name, fits, sweep.judge(fits, task))  # at every number of shots
    print(run.report())


if __name__ == "__main__":
    command(main)
