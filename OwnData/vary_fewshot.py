"""Your own data: new users against the number of their comparisons or dialogues."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments.judging import Sweep
from lore.experiments.runner import MethodName, Settings, command, open_run
from lore.experiments.splits import given_split, seen_users
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent
LORE = Lore(ranks=(5,), iterations=500)  # as the paper has it
SWEEP = Sweep((0, 1, 2, 5, 10, 20), trials=5)


def main(
    data: Path = HERE / "data", sweep: Sweep = SWEEP,
    methods: tuple[MethodName, ...] = ("lore", "mixed_logit"), lore: Lore = LORE, **settings: Any,
) -> None:  # fmt: skip
    """Learn from the seen users, then judge every method on unseen ones with ever more shots.

    Args:
        data: folder that prepare.py wrote.
        sweep: shots of an unseen user, which are dialogues, or comparisons where there are none:
            how many, and how they are drawn.
        methods: methods to fit, by name; --help NAME shows one's settings.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = Settings(methods=methods, lore=lore, **settings)
    dataset = given_split(data, HERE.name, chosen.features)  # who is seen, and what is held out
    if lore.ranks == LORE.ranks:
        chosen = replace(chosen, lore=lore.within(seen_users(dataset)))
    with open_run("vary_fewshot", dataset, chosen, sweep) as run:  # goes on where a killed one was
        for task, name, method in run.unfinished():  # every seed, every method
            fits = sweep.asking(method.fit(task))  # from task.train alone
            run.save(task, name, fits, sweep.judge(fits, task))  # at every number of shots
    print(run.report())


if __name__ == "__main__":
    command(main)
