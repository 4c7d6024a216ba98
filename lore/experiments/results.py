"""A run's figures, read from results.json, as reports see them; a label is free text."""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lore.common.files import InputError, digest, read_json, require, write_text

FORMAT = 2  # of results.json
SETS = {"train": "seen", "seen": "seen", "few_shot": "unseen", "unseen": "unseen"}  # whose they are
REFERENCE, BT, OWN, RIDGE = "reference", "bt", "own", "ridge_bt"  # methods of every run
BASELINES = (REFERENCE, BT, OWN, RIDGE)
CONTROLS = {"population": "population average", "another": "another user's weights",
            "shuffled": "shuffled labels"}  # fmt: skip


class Measure(NamedTuple):
    """How a figure is shown: name, unit, what 1 is in that unit, decimals."""

    name: str
    unit: str
    scale: float
    decimals: int

    def text(self, value: float, signed: bool = False) -> str:
        """The value in its unit; never "-0.0"."""
        rounded = round(self.scale * value, self.decimals) + 0.0
        return f"{rounded:{'+' if signed else ''}.{self.decimals}f}"

    def between(self, low: float, high: float) -> str:
        """[low, high] in the measure's unit, nothing where there is none."""
        return f"[{self.text(low)}, {self.text(high)}]" if math.isfinite(low) else ""


MEASURES = {
    "accuracy": Measure("accuracy", "percent", 100, 1),
    "log_loss": Measure("log loss", "nats", 1, 3),
    "brier": Measure("Brier score", "0 to 1", 1, 3),
    "ece": Measure("expected calibration error", "0 to 1", 1, 3),
    "ece_tempered": Measure("calibration error after one temperature", "0 to 1", 1, 3),
    "most_confident": Measure("accuracy of the 25 % most confident", "percent", 100, 1),
    "label_sensitivity": Measure(
        "label sensitivity", "percent of predictions that change with the shots' labels", 100, 1
    ),
}
ALWAYS = ("accuracy", "log_loss")  # of every record; the others where it has them

Samples = dict[int, pd.Series]  # repeat -> a figure of every user


@dataclasses.dataclass(frozen=True)
class Results:
    """A run as it was written.

    A record has one label's figures on one set in one repeat: seed, method, label, control ("" for
    users' own weights), set, shots of every user (or None), whose figures they are (``users``), of
    each measure a list of theirs or one number for all, the same of each kind ("accuracy_known"),
    the mean accuracy of each draw of shots (``trials``), and ``users_with_that_many`` shots.
    """

    settings: dict[str, Any]
    repeats: list[dict[str, Any]]
    records: list[dict[str, Any]]
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
        return ([la for la in found if self.says(la, "chosen")] or found or [None])[-1]

    @property
    def judged(self) -> list[str]:
        """The label that stands for each method that is no baseline."""
        found = map(self.label_of, dict.fromkeys(self.methods.values()))
        return [label for label in found if label and not self.is_baseline(label)]

    def fits(self, label: str) -> list[dict[str, Any]]:
        """What is written of a label's fit, one a repeat."""
        method = self.methods.get(label)
        parts = [r["methods"][method] for r in self.repeats if method in r["methods"]]
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
        return list(dict.fromkeys(c for la, c, _ in self._found if la == label and c))

    @functools.cached_property
    def _found(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        found = collections.defaultdict(list)
        for r in self.records:
            found[r["label"], r["control"], r["set"]].append(r)
        return dict(found)

    def figures(
        self, label: str, control: str, name: str, measure: str, shots: int | None = None,
        kind: str = "",
    ) -> Samples:  # fmt: skip
        """A measure of every user, or one for all, in every repeat, of one kind of comparisons or
        of all; for any number of shots where none was recorded. Empty where a repeat lacks it (of
        a kind, where all do). A control is the label itself in repeats in which users have no
        weights of their own."""
        every = self._found.get((label, control, name), [])
        exactly = [r for r in every if r["shots"] == shots]
        found = exactly or [r for r in every if r["shots"] is None]
        column = f"{measure}_{kind}" if kind else measure
        known = {r["seed"]: r for r in found if r.get(column) is not None}
        if len(known) < len(found) and not kind:
            return {}
        samples = {
            seed: pd.Series(of, r["users"] if isinstance(of, list) else ["all"], float).dropna()
            for seed, r in known.items() for of in [r[column]]
        }  # fmt: skip
        if control and samples and not all(fit["personal"] for fit in self.fits(label)):
            own = self.figures(label, "", name, measure, shots, kind)
            samples |= {seed: of for seed, of in own.items() if seed not in samples}
        return samples

    def shots(self) -> list[int]:
        """The numbers of shots for which there are held-out comparisons, in order."""
        return sorted({r["shots"] for r in self.unseen if r["shots"] is not None})

    @property
    def unseen(self) -> list[dict[str, Any]]:
        """The records of new users' held-out comparisons."""
        return [r for r in self.records if r["set"] == "unseen"]

    def only(self, labels: Iterable[str]) -> "Results":
        """The same run with these labels alone."""
        return dataclasses.replace(self, methods={label: self.methods[label] for label in labels})

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
        users = {side: pd.Index(names, dtype=object) for side, names in repeat["users"].items()}
        for method, part in repeat["methods"].items():
            methods |= {fit["label"]: method for fit in part["fits"]}
            for entry in part["records"]:
                kinds = (entry.get("kinds") or {}).items()
                apart = {f"{m}_{kind}": of for kind, one in kinds for m, of in one.items()}
                about = {"seed": repeat["seed"], "method": method}
                records.append(about | entry | apart | {"users": users[SETS[entry["set"]]]})
    return Results(written["settings"], written["seeds"], records, methods)
