"""A run's figures, read from results.json, as reports see them; a label is free text."""

import collections
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lore.common.files import InputError, digest, read_json, require, write_text
from lore.common.kinds import KINDS

FORMAT = 2  # of results.json
SETS = {"train": "seen", "seen": "seen", "few_shot": "unseen", "unseen": "unseen"}  # whose they are
REFERENCE, BT, OWN, RIDGE = "reference", "bt", "own", "ridge_bt"  # methods of every run
BASELINES = (REFERENCE, BT, OWN, RIDGE)
CONTROLS = {"population": "population average", "another": "another user's weights",
            "shuffled": "shuffled labels"}  # fmt: skip


class Measure(NamedTuple):
    """How a figure is shown: name, unit, what 1 is in that unit, decimals; one figure a user?"""

    name: str
    unit: str
    scale: float
    decimals: int
    by_user: bool = True

    def text(self, value: float, signed: bool = False) -> str:
        """The value in its unit; never "-0.0"."""
        rounded = round(self.scale * value, self.decimals) + 0.0
        return f"{rounded:{'+' if signed else ''}.{self.decimals}f}"

    def between(self, low: float, high: float) -> str:
        """An interval in the measure's unit."""
        return f"[{self.text(low)}, {self.text(high)}]"


MEASURES = {
    "accuracy": Measure("accuracy", "percent", 100, 1),
    "log_loss": Measure("log loss", "nats", 1, 3),
    "brier": Measure("Brier score", "0 to 1", 1, 3),
    "ece": Measure("expected calibration error", "0 to 1", 1, 3, False),
    "ece_tempered": Measure("calibration error after one temperature", "0 to 1", 1, 3, False),
    "most_confident": Measure("accuracy of the 25 % most confident", "percent", 100, 1, False),
    "label_sensitivity": Measure(
        "label sensitivity", "percent of predictions that change with the shots' labels", 100, 1
    ),
}
ALWAYS = ("accuracy", "log_loss")  # of every record; the others where it has them

Sample = tuple[np.ndarray, np.ndarray]  # users, and a figure of each


class Record(NamedTuple):
    """One label's figures on one set in one repeat."""

    seed: int
    method: str
    label: str
    control: str  # what users' weights were exchanged for; "" for their own
    set: str
    shots: int | None  # of every user; None where there is no such number
    users: np.ndarray  # whose the figures are, U names
    values: dict[str, np.ndarray]  # measure -> figure of every user [U], or one for all of them
    kinds: dict[str, dict[str, np.ndarray]]  # known, met, new -> values, NaN for users without any
    trials: list[float] | None  # mean accuracy of each draw of shots
    users_with_that_many: int | None  # how many users have that many shots


@dataclass(frozen=True)
class Results:
    """A run as it was written."""

    settings: dict[str, Any]
    repeats: list[dict[str, Any]]
    records: list[Record]
    methods: dict[str, str]  # of every label

    @property
    def sweep(self) -> bool:
        """Whether new users' numbers of shots vary."""
        return self.settings["script"] == "vary_fewshot"

    @property
    def labels(self) -> list[str]:
        """In the order written."""
        return list(self.methods)

    def of_method(self, method: str) -> list[str]:
        """A method's labels in the order written."""
        return [label for label, of in self.methods.items() if of == method]

    def label_of(self, method: str) -> str | None:
        """The label that stands for a method: the chosen one, else the last; None for none."""
        found = [la for la in self.of_method(method) if not self.says(la, "random_label")]
        chosen = [la for la in found if self.says(la, "chosen")]
        return (chosen or found or [None])[-1]

    @property
    def judged(self) -> list[str]:
        """The label that stands for each method that is no baseline."""
        found = map(self.label_of, dict.fromkeys(self.methods.values()))
        return [label for label in found if label and not self.is_baseline(label)]

    def fits(self, label: str) -> list[dict[str, Any]]:
        """What is written of a label's fit, one a repeat."""
        method = self.methods.get(label)
        parts = [repeat["methods"].get(method, {"fits": []}) for repeat in self.repeats]
        return [fit for part in parts for fit in part["fits"] if fit["label"] == label]

    def says(self, label: str, key: str) -> Any:
        """A field of a label's first fit, see ``Fitted``; None where it has none."""
        return next((fit.get(key) for fit in self.fits(label)), None)

    def is_baseline(self, label: str) -> bool:
        """Whether it is fitted in every run, for others to be held against."""
        return self.says(label, "role") == "baseline"

    def personal(self, label: str) -> bool:
        """Whether users have weights of their own, in any repeat."""
        return any(fit["personal"] for fit in self.fits(label))

    def family(self, method: str) -> str:
        """What to call a method: its label, or what its labels have in common."""
        labels = [la for la in self.of_method(method) if not self.says(la, "random_label")]
        return labels[0] if len(labels) == 1 else self.says(labels[0], "family") or method

    def controls(self, label: str) -> list[str]:
        """The controls recorded for a label, in the order written."""
        return list(dict.fromkeys(c for la, c, *_ in self._found if la == label and c))

    @functools.cached_property
    def _found(self) -> dict[tuple[str, str, str], list[Record]]:
        found = collections.defaultdict(list)
        for r in self.records:
            found[r.label, r.control, r.set].append(r)
        return dict(found)

    def find(self, label: str, control: str, name: str, shots: int | None = None) -> list[Record]:
        """The records of a label, one a repeat; those for any number of shots if none fits. A
        control is the label itself in repeats in which users have no weights of their own."""
        found = self._found.get((label, control, name), [])
        found = [r for r in found if r.shots == shots] or [r for r in found if r.shots is None]
        if control and found and not all(fit["personal"] for fit in self.fits(label)):
            there = {r.seed for r in found}
            found = found + [r for r in self.find(label, "", name, shots) if r.seed not in there]
        return found

    def figures(
        self, label: str, control: str, name: str, measure: str, shots: int | None = None,
        kind: str = "",
    ) -> dict[int, Sample] | None:  # fmt: skip
        """Repeat -> users and a measure of each, of one kind of comparisons or of all; None where
        it was not recorded."""
        found, samples = self.find(label, control, name, shots), {}
        for r in found:
            values = (r.kinds.get(kind, {}) if kind else r.values).get(measure)
            if values is not None:
                values = np.broadcast_to(values, len(r.users))
                known = ~np.isnan(values)
                samples[r.seed] = r.users[known], values[known]
        return samples if samples and (kind or len(samples) == len(found)) else None

    def shots(self) -> list[int]:
        """The numbers of shots for which there are held-out comparisons, in order."""
        return sorted({r.shots for r in self.records if r.set == "unseen" and r.shots is not None})

    def kinds(self) -> list[str]:
        """The kinds of held-out comparisons that were recorded apart."""
        there = {kind for r in self.records for kind in r.kinds}
        return [kind for kind in KINDS if kind in there]

    def only(self, labels: Iterable[str]) -> "Results":
        """The same run with these labels alone."""
        kept = set(labels)
        records = [r for r in self.records if r.label in kept]
        methods = {label: m for label, m in self.methods.items() if label in kept}
        return Results(self.settings, self.repeats, records, methods)

    @property
    def title(self) -> str:
        """Dataset, reward model and methods; baselines only where there is nothing else."""
        model = (self.settings.get("embeddings") or {}).get("model")
        of_model = f", {Path(str(model)).name}" if model else ""
        methods = list(dict.fromkeys(self.methods.values()))
        named = [m for m in methods if not self.is_baseline(self.of_method(m)[0])] or methods
        return f"{self.settings['dataset']}{of_model}: {', '.join(map(self.family, named))}"


def row_name(label: str, control: str) -> str:
    """What tables and plots call a label under a control."""
    return f"{label}: {CONTROLS.get(control, control)}" if control else label


def shots_name(shots: int) -> str:
    """1 shot, 5 shots."""
    return f"{shots} shot" if shots == 1 else f"{shots} shots"


def write_results(folder: Path, content: Mapping[str, Any]) -> None:
    """Write results.json whole or not at all, with its format and a checksum of the content."""
    sealed = {"format": FORMAT, "sha256": digest(content), **content}
    write_text(folder / "results.json", json.dumps(sealed))


def read_written(folder: Path) -> dict[str, Any] | None:
    """What ``write_results`` has written into a folder; None where there is no such file, and
    InputError where another version has written it, or it was changed since."""
    path = folder / "results.json"
    found = read_json(path)
    if found is None:
        return None
    remedy = "restore it, or move it away and run the script again"
    require(isinstance(found, dict), f"{path}: is no object, so no run has written it; {remedy}")
    version, checksum = found.pop("format", 1), found.pop("sha256", None)
    require(version == FORMAT, f"{path}: has format {version!r}, this version of the project reads "
            f"format {FORMAT}; run the script again under another --name, or use the version that "
            "wrote it")  # fmt: skip
    intact = checksum == digest(found)
    require(intact, f"{path}: its checksum does not match, it is damaged or was edited; {remedy}")
    return found


def read_results(folder: Path) -> Results:
    """A run's results.json; InputError if it is missing or damaged, another version's, or has no
    finished repeat."""
    written = read_written(folder)
    if written is None or not written["seeds"]:
        raise InputError(f"{folder}: no seed of this run has finished; start the script again")
    records, methods = [], {}
    for repeat in written["seeds"]:
        users = {side: np.array(names, object) for side, names in repeat["users"].items()}
        for method, part in repeat["methods"].items():
            methods |= {fit["label"]: method for fit in part["fits"]}
            for entry in part["records"]:
                figures = {"users": users[SETS[entry["set"]]], "values": _figures(entry)}
                figures["kinds"] = {k: _figures(x) for k, x in (entry.get("kinds") or {}).items()}
                rest = {f: entry.get(f) for f in Record._fields[2:] if f not in figures}
                records.append(Record(repeat["seed"], method, **rest, **figures))
    return Results(written["settings"], written["seeds"], records, methods)


def _figures(entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.array(entry[key], float) for key in MEASURES if entry.get(key) is not None}
