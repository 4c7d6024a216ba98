"""Losses and figures of finished fits for TensorBoard or Weights & Biases."""

import importlib.util
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lore.common.files import require
from lore.experiments.results import ALWAYS

Tracker = Literal["none", "tensorboard", "wandb"]


def check_tracker(tracker: Tracker) -> None:
    """Refuse one that is not installed, before any work."""
    found = tracker == "none" or importlib.util.find_spec(tracker) is not None
    require(found, f"--log {tracker}: it is not installed; pip install {tracker}, or leave it out")


def track(tracker: Tracker, folder: Path, seed: int, method: Mapping[str, Any]) -> None:
    """Write a finished method, as results.json has it, into a run's folder: each fit's ``scalars``
    as a run of its own."""
    for fit in method["fits"] if tracker != "none" else ():
        name = f"{fit['label']}, seed {seed}".replace("/", " ")
        steps = scalars(fit, method["records"])
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(folder / tracker / name) as writer:
                for step, values in steps.items():
                    for key, value in values.items():
                        writer.add_scalar(key, value, step)
        else:
            import wandb

            about = {"project": "LoRe", "group": folder.name, "config": fit["settings"]}
            with wandb.init(dir=folder, name=name, **about) as run:
                for step, values in steps.items():  # each may be logged once, in order
                    run.log(values, step=step)


def scalars(
    fit: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, float]]:
    """Step -> a fit's figures by name: the loss of every training step kept, the validation log
    loss of every setting tried, and the means over users of accuracy and log loss on every set, at
    each number of shots or else 0."""
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for number, loss in enumerate(fit.get("losses", ())):
        steps[number * fit.get("loss_step", 1)]["loss"] = loss
    for number, one in enumerate(fit.get("tried") or ()):
        if one.get("loss") is not None:
            steps[number]["validation/log_loss"] = one["loss"]
    for record in records:
        if record["label"] == fit["label"] and not record["control"]:
            for key in ALWAYS:
                steps[record["shots"] or 0][f"{record['set']}/{key}"] = float(np.mean(record[key]))
    return dict(sorted(steps.items()))
