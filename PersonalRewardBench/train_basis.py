"""PersonalRewardBench: methods on users of few comparisons, all seen: without vary_fewshot.py."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments.judging import judge
from lore.experiments.runner import MethodName, Settings, command, open_run
from lore.experiments.splits import given_split
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(0, 1, 2, 5, 10), select_rank=True)  # no published settings


def main(
    data: Path = HERE / "data", lore: Lore = LORE,
    methods: tuple[MethodName, ...] = ("ridge_bt", "lore", "mixed_logit"), **settings: Any,
) -> None:  # fmt: skip
    """Learn from every user's training comparisons and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        methods: methods to fit, by name; --help NAME shows one's settings.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(methods=methods, lore=lore, **settings)
    dataset = given_split(data, HERE.name, chosen.features)  # who is seen, and what is held out
    with open_run("train_basis", dataset, chosen) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = method.fit(task)  # from task.train alone; for LoRe by utils.LoRe
            run.save(task, name, fits, judge(fits, task))  # accuracy, log loss, controls
    print(run.report())


if __name__ == "__main__":
    command(main)
