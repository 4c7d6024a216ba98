"""Your own data: methods on the users' own choices, judged on held-out ones."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments.judging import judge
from lore.experiments.runner import MethodName, Settings, command, open_run
from lore.experiments.splits import given_split, seen_users
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(2, 5))  # as the paper has it, beside the mixed logit, which we would use


def main(
    data: Path = HERE / "data", methods: tuple[MethodName, ...] = ("lore", "mixed_logit"),
    lore: Lore = LORE, **settings: Any,
) -> None:  # fmt: skip
    """Learn from the seen users' choices and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        methods: methods to fit, by name; --help NAME shows one's settings.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(methods=methods, lore=lore, **settings)
    dataset = given_split(data, HERE.name, chosen.features)  # who is seen, and what is held out
    if lore.ranks == LORE.ranks:
        chosen = replace(chosen, lore=lore.within(seen_users(dataset)))
    with open_run("train_basis", dataset, chosen) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = method.fit(task)  # from task.train alone; for LoRe by utils.LoRe
            run.save(task, name, fits, judge(fits, task))  # accuracy, log loss, controls
    print(run.report())


if __name__ == "__main__":
    command(main)
