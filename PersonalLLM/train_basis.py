"""PersonalLLM: methods on simulated users, LoRe against its rank (Table 1 of the paper)."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.settings import Concentration, PositiveInt
from lore.experiments.judging import judge
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import simulated_users
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(0, 1, 2, 3, 4, 5))  # ranks, steps and rates of the paper's Table 1


def main(
    data: Path = HERE / "data", dirichlet_alpha: Concentration = 0.001,
    users: PositiveInt = 1000, unseen_users: PositiveInt = 1000, pairs_per_user: PositiveInt = 45,
    few_shot_pairs: PositiveInt = 9, lore: Lore = LORE, **settings: Any,
) -> None:  # fmt: skip
    """Simulate users, learn from their choices and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        dirichlet_alpha: of users' weights over reward models; 0.001, 0.01 and 0.1 in the paper.
        users: seen users.
        unseen_users: users who are known by a few comparisons alone.
        pairs_per_user: training prompts of each seen user.
        few_shot_pairs: training prompts of each unseen user.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(lore=lore, **settings)
    numbers = users, unseen_users, pairs_per_user, few_shot_pairs
    dataset = simulated_users(data, dirichlet_alpha, *numbers, HERE.name, chosen.features)
    with open_run("train_basis", dataset, chosen) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = method.fit(task)  # from task.train alone; for LoRe by utils.LoRe
            run.save(task, name, fits, judge(fits, task))  # accuracy, log loss, controls
    print(run.report())


if __name__ == "__main__":
    command(main)
