"""Runs made up from random figures whose truth is known, as results.json holds them."""

from pathlib import Path
from typing import Any

import numpy as np

from lore.experiments.results import BASELINES, SETS, write_results

Made = dict[str, Any]


class Figures:
    """Accuracies and log losses of users around given means.

    A user's own ability is shared by all labels of a repeat, so that differences between labels
    have far less noise than the labels.
    """

    def __init__(self, users: int, noise: float, seed: int) -> None:
        self.users, self.noise = users, noise
        self.rng = np.random.default_rng(seed)
        self.ability = {side: self.rng.normal(0, 0.1, users) for side in ("seen", "unseen")}

    def record(
        self, label: str, control: str, name: str, accuracy: float, shots: int | None = None
    ) -> Made:
        """One record; the log loss is 1.2 less the accuracy."""
        noise = self.rng.normal(0, self.noise, self.users)
        users = np.clip(accuracy + self.ability[SETS[name]] + noise, 0, 1)
        return {
            "label": label, "control": control, "set": name, "shots": shots,
            "accuracy": users.tolist(), "log_loss": (1.2 - users).tolist(),
            "trials": None if shots is None else [accuracy - 0.01, accuracy + 0.01],
            "users_with_that_many": None if shots is None else max(0, self.users - shots),
        }  # fmt: skip


def fit(label: str, personal: bool, role: str = "method", **settings: Any) -> Made:
    """What is written of a fit."""
    return {
        "label": label, "personal": personal, "settings": settings, "role": role, "chosen": False,
        "family": "LoRe", "shots_chosen_by": "random", "random_label": None,
        "losses": [4.0, 2.0, 1.5, 1.4], "loss_step": 10, "note": f"a note on {label}",
        "spectrum": [3.0, 1.0, 0.5], "file": "", "parameters": 10,
        "weights": [[0.2, 0.8], [0.7, 0.3]] if personal else None,
    }  # fmt: skip


# Accuracy by set, then the losses of controls against the label's own states.
LABELS: dict[str, tuple[str, bool, dict[str, Any], dict[str, float]]] = {
    "reference": ("reference", False, {}, {"train": 0.6, "seen": 0.6, "unseen": 0.61}),
    "BT": ("bt", False, {}, {"train": 0.8, "seen": 0.7, "unseen": 0.71}),
    "Ridge BT": ("ridge_bt", False, {}, {"train": 0.78, "seen": 0.7, "unseen": 0.71}),
    "own model": ("own", True, {}, {"train": 0.99, "seen": 0.66, "unseen": 0.62}),
    "LoRe K=2": ("lore", True, {"rank": 2}, {"train": 0.83, "seen": 0.74, "unseen": 0.73}),
    "LoRe K=5": ("lore", True, {"rank": 5}, {"train": 0.88, "seen": 0.78, "unseen": 0.75}),
}
CONTROLS = {"population": 0.03, "another": 0.12, "shuffled": 0.15}
SHOTS = (0, 1, 5, 50)


def results(
    labels: dict[str, tuple[str, bool, dict[str, Any], dict[str, float]]] | None = None,
    seeds: int = 1, users: int = 40, sweep: bool = False, noise: float = 0.02,
) -> Made:  # fmt: skip
    """A whole results.json."""
    labels = LABELS if labels is None else labels
    settings = {
        "script": "vary_fewshot" if sweep else "train_basis", "dataset": "Toy", "warning": None,
        "prepared": {}, "embeddings": {"model": "someone/Tiny-Reward"}, "reference": "head",
        "seeds": list(range(seeds)), "unit": "dialogues" if sweep else "comparisons",
        **({"shots": list(SHOTS), "trials": 2} if sweep else {}),
    }  # fmt: skip
    parts = [_repeat(seed, labels, users, sweep, noise) for seed in range(seeds)]
    return {"settings": settings, "command": ["python"], "versions": {}, "seeds": parts}


def _repeat(seed: int, labels: Made, users: int, sweep: bool, noise: float) -> Made:
    figures, methods = Figures(users, noise, seed), {}
    for label, (method, personal, settings, means) in labels.items():
        new = {"settings": {}, "seconds": 1.5, "processor_seconds": 1.5, "fits": [], "records": []}
        part = methods.setdefault(method, new)
        role = "baseline" if method in BASELINES else "method"
        part["fits"].append(fit(label, personal, role, **settings))
        controls = CONTROLS if personal and label != "own model" else {}
        for name in ("unseen",) if sweep else ("train", "seen", "unseen"):
            for shots in SHOTS if sweep else (None,):
                gain = 0.02 * np.log1p(shots or 0) if personal else 0.0
                mean = means[name] + gain
                part["records"].append(figures.record(label, "", name, mean, shots))
                for control, loss in controls.items() if name != "train" else ():
                    record = figures.record(label, control, name, mean - loss, shots)
                    if (control, name) != ("shuffled", "seen"):  # of new users alone
                        part["records"].append(record)
    names = {side: [f"{side}-{i}" for i in range(users)] for side in ("seen", "unseen")}
    return {"seed": seed, "users": names, "comparisons": {}, "methods": methods}


def write(made: Made, folder: Path) -> Path:
    """Write results.json into a folder, which is returned."""
    write_results(folder, made)
    return folder
