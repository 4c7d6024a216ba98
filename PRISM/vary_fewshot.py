"""PRISM: unseen people against the number of their dialogues."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments.judging import Sweep
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import given_split
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(5,), alpha=(1e4,), estimator="lore_regularized")  # as in train_basis.py
SWEEP = Sweep((1, 2, 3), trials=20)


def main(
    data: Path = HERE / "data", sweep: Sweep = SWEEP, lore: Lore = LORE, **settings: Any
) -> None:
    """Learn from the seen people, then judge every method on unseen ones with ever more dialogues.

    Args:
        data: folder that prepare.py and generate-prism-embeddings.py wrote.
        sweep: dialogues of an unseen person: how many, and how they are drawn.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(lore=lore, **settings)
    dataset = given_split(data, HERE.name, chosen.features)  # who is seen, and what is held out
    with open_run("vary_fewshot", dataset, chosen, sweep) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = sweep.asking(method.fit(task))  # from task.train alone
            run.save(task, name, fits, sweep.judge(fits, task))  # at every number of shots
    print(run.report())


if __name__ == "__main__":
    command(main)
