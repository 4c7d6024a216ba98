"""A run's records, read from results.json and checked once.

A record holds every user's accuracy and log loss of one fitted label on one set of comparisons.
What is said of a method comes from these alone, so that no method is named here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lore.common.files import InputError, read_json

SETS = {"train": "seen", "seen": "seen", "few_shot": "unseen", "unseen": "unseen"}  # whose they are
# Labels of what is fitted in every run
REFERENCE, BT, OWN, RIDGE = "reference", "BT", "own model", "Ridge BT"
CONTROLS = {
    "population": "population average",
    "another": "another user's weights",
    "shuffled": "shuffled labels",
}
ASKS = ", asks "  # between a label and the criterion by which new users' shots were chosen
CHOSEN = ", chosen"  # ends the label of the fit that validation picked among a method's


class Measure(NamedTuple):
    """How a figure is told: name, unit, what one is in that unit, decimals, best possible range."""

    name: str
    unit: str
    scale: float
    decimals: int
    most: float = math.inf

    def text(self, value: float, signed: bool = False) -> str:
        """The value in its unit; never "-0.0"."""
        rounded = round(self.scale * value, self.decimals) + 0.0
        return f"{rounded:{'+' if signed else ''}.{self.decimals}f}"

    def between(self, low: float, high: float) -> str:
        """An interval in the measure's unit."""
        return f"[{self.text(low)}, {self.text(high)}]"


MEASURES = {
    "accuracy": Measure("accuracy", "percent", 100, 1, 1.0),
    "log_loss": Measure("log loss", "nats", 1, 3),
    "brier": Measure("Brier score", "0 to 1", 1, 3, 1.0),
    "ece": Measure("expected calibration error", "0 to 1", 1, 3, 1.0),
    "ece_tempered": Measure("calibration error after one temperature", "0 to 1", 1, 3, 1.0),
    "sure": Measure("accuracy on the quarter that is surest", "percent", 100, 1, 1.0),
    "flips": Measure("predictions that change with the shots swapped", "percent", 100, 1, 1.0),
}
ALWAYS = ("accuracy", "log_loss")  # of every record; the others where it has them


@dataclass(frozen=True)
class Record:
    """One label's figures on one set in one repeat.

    Attributes:
        method: that the label belongs to.
        control: what the users' states were exchanged for; "" for their own.
        shots: of every user; None where there is no such number.
        users: whose the figures are, U names.
        values: measure -> figure of every user [U], or one for all of them.
        trials: mean accuracy of each draw of shots.
        enough: how many users have as many shots.
    """

    seed: int
    method: str
    label: str
    control: str
    set: str
    shots: int | None
    users: tuple[str, ...]
    values: dict[str, np.ndarray | float]
    trials: tuple[float, ...] | None
    enough: int | None


@dataclass(frozen=True)
class Results:
    """A run as reports see it.

    Attributes:
        settings: of the run.
        repeats: the seeds' facts, methods and fits as they were written.
        records: of all repeats, in the order written.
        methods: label -> method, in the order written.
    """

    settings: dict[str, Any]
    repeats: list[dict[str, Any]]
    records: list[Record]
    methods: dict[str, str]

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

    def fits(self, label: str) -> list[dict[str, Any]]:
        """What is written of a label's fit, one a repeat."""
        return [
            fit
            for repeat in self.repeats
            for fit in repeat["methods"].get(self.methods[label], {"fits": []})["fits"]
            if fit["label"] == label
        ]

    def personal(self, label: str) -> bool:
        """Whether users have a state of their own, in any repeat."""
        return any(fit["personal"] for fit in self.fits(label))

    def controls(self, label: str) -> list[str]:
        """The controls recorded for a label, in the order written."""
        found = (r.control for r in self._by_label.get(label, []) if r.control)
        return list(dict.fromkeys(found))

    def find(self, label: str, control: str, set: str, shots: int | None = None) -> list[Record]:
        """The records of a label, one a repeat; those for any number of shots if none fits."""
        found = [r for r in self._by_label.get(label, []) if (r.control, r.set) == (control, set)]
        exact = [r for r in found if r.shots == shots]
        return exact or [r for r in found if r.shots is None]

    @functools.cached_property
    def _by_label(self) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault(record.label, []).append(record)
        return found

    def shots(self) -> list[int]:
        """The numbers of shots for which there are held-out comparisons, in order."""
        return sorted({r.shots for r in self.records if r.set == "unseen" and r.shots is not None})

    def only(self, labels: Iterable[str]) -> Results:
        """The same run with these labels alone."""
        kept = set(labels)
        records = [r for r in self.records if r.label in kept]
        methods = {label: m for label, m in self.methods.items() if label in kept}
        return Results(self.settings, self.repeats, records, methods)


def control_name(control: str) -> str:
    """A control, or a label, as tables and plots call it."""
    return CONTROLS.get(control, control)


def row_name(label: str, control: str) -> str:
    """What tables and plots call a label under a control."""
    return f"{label}: {control_name(control)}" if control else label


def shots_name(shots: int) -> str:
    """1 shot, 5 shots."""
    return f"{shots} shot" if shots == 1 else f"{shots} shots"


def title(results: Results) -> str:
    """Dataset, reward model and methods of a run."""
    model = (results.settings.get("embeddings") or {}).get("model")
    of_model = f", {Path(str(model)).name}" if model else ""
    return f"{results.settings['dataset']}{of_model}: {', '.join(families(results))}"


def families(results: Results) -> list[str]:
    """What to call the methods asked for; those of every run only where there are no others."""
    named = [family(results, method) for method in dict.fromkeys(results.methods.values())]
    return [name for name in named if name not in (REFERENCE, BT, OWN, RIDGE)] or named


def family(results: Results, method: str) -> str:
    """What a method's labels have in common: LoRe, of LoRe K=5 and LoRe K=10."""
    words = [label.replace(",", " ,").split() for label in results.of_method(method)]
    same = itertools.takewhile(lambda word: len(set(word)) == 1, zip(*words, strict=False))
    return " ".join(word[0] for word in same if word[0] != ",") or method


# ---------------------------------------------------------------------- Reading


def read_results(folder: Path) -> Results:
    """A run's results.json, checked.

    Raises:
        InputError: it is missing, has no finished repeat, or is not what a run writes.
    """
    path = folder / "results.json"
    written = read_json(path)
    if written is None:
        raise InputError(f"{folder}: no finished repeat in results.json; run the script first")
    try:
        return _read(written)
    except _Damage as damage:
        remedy = "remove the file and run the script again"
        raise InputError(f"{path}: {damage}; {remedy}") from None
    except _Unfinished:
        raise InputError(
            f"{folder}: no finished repeat in results.json; run the script first"
        ) from None


class _Damage(ValueError):
    """Something in results.json is not as a run writes it."""


class _Unfinished(ValueError):
    """No repeat has been finished yet."""


def _need(condition: Any, message: str) -> None:
    if not condition:
        raise _Damage(message)


def _get(where: str, holder: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """A key's value, of some type."""
    _need(isinstance(holder, Mapping), f"{where} is no object")
    _need(key in holder, f"{where} has no {key!r}")
    value = holder[key]
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    _need(right, f"{key!r} of {where} is {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 30 else text[:27] + "..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(written: Any) -> Results:
    settings = _get("the file", written, "settings", dict)
    script = _get("settings", settings, "script", str)
    _need(script in ("train_basis", "vary_fewshot"), f"script {script!r} is unknown")
    _get("settings", settings, "dataset", str)
    repeats = _get("the file", written, "seeds", list)
    if not repeats:
        raise _Unfinished
    records: list[Record] = []
    methods: dict[str, str] = {}
    for repeat in repeats:
        records += _read_repeat(repeat, methods)
    seeds = [repeat["seed"] for repeat in repeats]
    _need(len(set(seeds)) == len(seeds), "a seed stands twice")
    return Results(settings, repeats, records + _empty_controls(repeats, records), methods)


def _empty_controls(repeats: Sequence[dict], records: Sequence[Record]) -> list[Record]:
    """Controls of the repeats in which a label had nothing personal: its own figures.

    Whether a chosen fit is personal may differ between repeats; where users have no state,
    another's is the same, and the label is compared with its controls on all repeats.
    """
    fits = [
        (repeat["seed"], fit["label"])
        for repeat in repeats
        for part in repeat["methods"].values()
        for fit in part["fits"]
        if not fit["personal"]
    ]
    controls: dict[str, set[tuple]] = {}
    for r in records:
        if r.control:
            controls.setdefault(r.label, set()).add((r.control, r.set, r.shots))
    same = {(r.seed, r.label, r.set, r.shots): r for r in records if not r.control}
    return [
        replace(same[seed, label, name, shots], control=control)
        for seed, label in fits
        for control, name, shots in sorted(controls.get(label, ()), key=str)
        if (seed, label, name, shots) in same
    ]


def _read_repeat(repeat: Any, methods: dict[str, str]) -> list[Record]:
    """The records of a repeat; its labels are added to the methods."""
    seed = _get("a seed", repeat, "seed", int)
    _need(seed >= 0, f"a seed is {seed}")
    where = f"seed {seed}"
    facts = repeat.get("facts") or {}
    told = isinstance(facts, Mapping) and all(isinstance(fact, str) for fact in facts.values())
    _need(told, f"'facts' of {where} are no texts")
    users = _get(where, repeat, "users", dict)
    names = {side: _names(where, users, side) for side in ("seen", "unseen")}
    records: dict[tuple, Record] = {}
    for method, part in _get(where, repeat, "methods", dict).items():
        place = f"{where}, {method}"
        _get(place, part, "settings", (dict, str))
        for key in ("seconds", "parameters", "tried"):
            _need(part.get(key) is None or _number(part[key]), f"{key!r} of {place} is no number")
        personal = {}
        for fit in _get(place, part, "fits", list):
            label = _check_fit(place, fit)
            _need(
                methods.setdefault(label, method) == method and label not in personal,
                f"{place}: the label {label!r} stands twice",
            )
            personal[label] = fit["personal"]
        for i, entry in enumerate(_get(place, part, "records", list)):
            record = _read_record(f"{place}, record {i + 1}", entry, names, seed, method)
            _need(record.label in personal, f"{place}: {record.label!r} has records but no fit")
            key = (record.label, record.control, record.set, record.shots)
            _need(key not in records, f"{place}: two records of {key}")
            records[key] = record
        shown = {record.label for record in records.values()}
        _need(shown >= personal.keys(), f"{place}: a fit has no records")
    return list(records.values())


def _names(where: str, users: Any, side: str) -> tuple[str, ...]:
    names = _get(f"{where}, users", users, side, list)
    _need(all(isinstance(name, str) for name in names), f"{where}: a {side} user is no text")
    _need(len(set(names)) == len(names), f"{where}: a {side} user stands twice")
    return tuple(names)


def _check_fit(where: str, fit: Any) -> str:
    """The label of a fit; what is drawn of it must be numbers."""
    label = _get(f"{where}, a fit", fit, "label", str)
    where = f"{where}, {label}"
    _get(where, fit, "personal", bool)
    _get(where, fit, "settings", dict)
    _need(isinstance(fit.get("note") or "", str), f"'note' of {where} is no text")
    for key in ("losses", "spectrum"):
        values = fit.get(key) or []
        good = isinstance(values, list) and all(map(_number, values))
        _need(good, f"{key!r} of {where} are not numbers")
    _need(_are_likes(fit.get("likes") or []), f"'likes' of {where} are no list of directions")
    states = fit.get("states") or []
    good = isinstance(states, list) and all(isinstance(row, list) for row in states)
    good = good and all(map(_number, (value for row in states for value in row)))
    _need(good and len({len(row) for row in states}) < 2, f"'states' of {where} are no table")
    return label


def _are_likes(likes: Any) -> bool:
    """Whether they are directions, each with prompts and responses that it likes most and least."""
    return isinstance(likes, list) and all(
        isinstance(one, Mapping)
        and isinstance(one.get("direction"), str)
        and isinstance(one.get(side, []), list)
        and all(isinstance(text, Mapping) for text in one.get(side, []))
        and all(
            isinstance(t.get(k), str) for t in one.get(side, []) for k in ("prompt", "response")
        )
        for one in likes
        for side in ("most", "least")
    )


def _read_record(
    where: str, entry: Any, names: Mapping[str, tuple[str, ...]], seed: int, method: str
) -> Record:
    label = _get(where, entry, "label", str)
    where = f"{where} ({label})"
    name = _get(where, entry, "set", str)
    _need(name in SETS, f"the set {name!r} of {where} is none of {', '.join(SETS)}")
    users = names[SETS[name]]
    values = {}
    for key, measure in MEASURES.items():
        if key in ALWAYS or entry.get(key) is not None:
            values[key] = _figures(where, entry, key, measure, len(users))
    shots = _count(where, entry, "shots")
    trials = entry.get("trials")
    _need(
        trials is None or (isinstance(trials, list) and all(map(_number, trials))),
        f"'trials' of {where} are not numbers",
    )
    return Record(
        seed,
        method,
        label,
        _get(where, entry, "control", str),
        name,
        shots,
        users,
        values,
        None if trials is None else tuple(trials),
        _count(where, entry, "enough"),
    )


def _count(where: str, entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    _need(value is None or good, f"{key!r} of {where} is {_shown(value)}, no whole number")
    return value


def _figures(where: str, entry: Any, key: str, measure: Measure, users: int) -> np.ndarray | float:
    """Every user's figure, or one for all of them of a measure that not every record has."""
    if key not in ALWAYS and _number(entry[key]):
        return float(entry[key])
    given = _get(where, entry, key, list)
    _need(len(given) == users, f"{key!r} of {where} has {len(given)} values for {users} users")
    _need(users, f"{where} has no user")
    bad = next((v for v in given if not _number(v) or not -1e-6 <= v <= measure.most + 1e-6), None)
    _need(bad is None, f"{key!r} of {where} holds {_shown(bad)}, no {measure.name}")
    return np.array(given, float)
