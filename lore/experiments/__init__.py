"""An experiment's parts, as the scripts use them from top to bottom."""

from lore.experiments.judging import Sweep, judge
from lore.experiments.runner import Settings, command, open_run
from lore.experiments.splits import drawn_split, given_split, simulated_users

__all__ = [
    "Settings", "Sweep", "command", "drawn_split", "given_split", "judge", "open_run",
    "simulated_users",
]  # fmt: skip
