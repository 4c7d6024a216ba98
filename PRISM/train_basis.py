"""PRISM: methods on people's own dialogues, LoRe against its rank."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments.judging import judge
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import given_split
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
# The published scripts' estimator and pull, for both experiments alike; the paper's equation 10 is
# --estimator lore --alpha 0.
LORE = Lore(ranks=(0, 1, 5, 10, 15, 20, 25, 50), alpha=(1e4,), estimator="lore_regularized")


def main(data: Path = HERE / "data", lore: Lore = LORE, **settings: Any) -> None:
    """Learn from the seen people's dialogues and judge every method beside its controls.

    Args:
        data: folder that prepare.py and generate-prism-embeddings.py wrote.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(lore=lore, **settings)
    dataset = given_split(data, HERE.name, chosen.features)  # who is seen, and what is held out
    with open_run("train_basis", dataset, chosen) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = method.fit(task)  # from task.train alone; for LoRe by utils.LoRe
            run.save(task, name, fits, judge(fits, task))  # accuracy, log loss, controls
    print(run.report())


if __name__ == "__main__":
    command(main)
