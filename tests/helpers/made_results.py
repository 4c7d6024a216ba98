"""Runs made up from random figures whose truth is known, as results.json holds them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from lore.experiments.results import BASELINES, SETS, write_results

Made = dict[str, Any]


def fit(label: str, personal: bool, role: str = "method", **settings: Any) -> Made:
    """What is written of a fit."""
    return {
        "label": label, "personal": personal, "settings": settings, "role": role, "chosen": False,
        "family": "LoRe", "shots_chosen_by": "random", "random_label": None,
        "losses": [4.0, 2.0, 1.5, 1.4], "loss_step": 10, "note": f"a note on {label}",
        "spectrum": [3.0, 1.0, 0.5], "file": "", "parameters": 10,
        "weights": [[0.2, 0.8], [0.7, 0.3]] if personal else None,
    }  # fmt: skip


# Method, whether it is personal, settings and accuracy by set, then the losses of controls against
# the label's own states.
LABELS: dict[str, tuple[str, bool, Made, dict[str, float]]] = {
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
    labels: Made = LABELS, seeds: int = 1, users: int = 40, sweep: bool = False, noise: float = 0.02
) -> Made:
    """A whole results.json."""
    settings = {
        "script": "vary_fewshot" if sweep else "train_basis", "dataset": "Toy", "warning": None,
        "prepared": {}, "embeddings": {"model": "someone/Tiny-Reward"}, "reference": "head",
        "seeds": list(range(seeds)), "unit": "dialogues" if sweep else "comparisons",
        **({"shots": list(SHOTS), "trials": 2} if sweep else {}),
    }  # fmt: skip
    parts = [_repeat(seed, labels, users, sweep, noise) for seed in range(seeds)]
    return {"settings": settings, "command": ["python"], "versions": {}, "seeds": parts}


def _repeat(seed: int, labels: Made, users: int, sweep: bool, noise: float) -> Made:
    """A repeat. A user's own ability is shared by all labels, so that differences between labels
    have far less noise than the labels; the log loss is 1.2 less the accuracy."""
    rng, methods = np.random.default_rng(seed), {}
    ability = {side: rng.normal(0, 0.1, users) for side in ("seen", "unseen")}

    def record(label: str, control: str, name: str, shots: int | None, accuracy: float) -> Made:
        noisy = accuracy + ability[SETS[name]] + rng.normal(0, noise, users)
        values = np.clip(noisy, 0, 1)
        return {
            "label": label, "control": control, "set": name, "shots": shots,
            "accuracy": values.tolist(), "log_loss": (1.2 - values).tolist(),
            "trials": None if shots is None else [accuracy - 0.01, accuracy + 0.01],
            "users_with_that_many": None if shots is None else max(0, users - shots),
        }  # fmt: skip

    sets, sizes = (("unseen",), SHOTS) if sweep else (("train", "seen", "unseen"), (None,))
    for label, (method, personal, settings, means) in labels.items():
        new = {"settings": {}, "seconds": 1.5, "processor_seconds": 1.5, "fits": [], "records": []}
        part = methods.setdefault(method, new)
        role = "baseline" if method in BASELINES else "method"
        part["fits"].append(fit(label, personal, role, **settings))
        for name, shots in itertools.product(sets, sizes):
            mean = means[name] + (0.02 * np.log1p(shots or 0) if personal else 0.0)
            controlled = personal and label != "own model" and name != "train"
            for control, loss in {"": 0.0, **(CONTROLS if controlled else {})}.items():
                made = record(label, control, name, shots, mean - loss)
                if (control, name) != ("shuffled", "seen"):  # of new users alone
                    part["records"].append(made)
    names = {side: [f"{side}-{i}" for i in range(users)] for side in ("seen", "unseen")}
    return {"seed": seed, "users": names, "comparisons": {}, "methods": methods}


def write(made: Made, folder: Path) -> Path:
    """Write results.json into a folder, which is returned."""
    write_results(folder, made)
    return folder


def records(made: Made) -> list[Made]:
    """All records, to be read or changed."""
    parts = [part for repeat in made["seeds"] for part in repeat["methods"].values()]
    return [record for part in parts for record in part["records"]]
