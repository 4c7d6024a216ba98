"""Your own data: methods on the users' own choices, judged on held-out ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.experiments import runner as experiments
from lore.experiments import splits
from lore.methods.lore import Lore

HERE = Path(__file__).resolve().parent

# LoRe as the paper has it, and the mixed logit, which is what we would use.
LORE = Lore(ranks=(2, 5))


def main(
    data: Path = HERE / "data",
    methods: tuple[experiments.MethodName, ...] = ("lore", "mixed_logit"),
    lore: Lore = LORE,
    **settings: Any,
) -> None:
    """Learn from the seen users' choices and judge every method beside its controls.

    Args:
        data: folder that prepare.py wrote.
        methods: methods to fit, by name; --help lists each one's settings.
        lore: settings of LoRe; Bradley-Terry is fitted with the same.
    """
    chosen = experiments.Settings(methods=methods, lore=lore, **settings)
    tasks = splits.given_split(data, HERE.name)
    print(experiments.train_basis(tasks, chosen))


if __name__ == "__main__":
    experiments.command(main)
