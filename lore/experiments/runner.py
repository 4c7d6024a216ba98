"""A run of an experiment: what is missing is fitted, method by method, and kept at once."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lore.common.cli import cli
from lore.common.devices import pick_device, processes, wait_for_all
from lore.common.files import digest, lock_folder, require
from lore.common.settings import Name, NonNegativeInt, SeedNumber
from lore.experiments.judging import Sweep
from lore.experiments.report.tables import report
from lore.experiments.results import BASELINES
from lore.experiments.runs import Run, plain
from lore.experiments.splits import Feature, Tasks
from lore.experiments.trackers import Tracker, check_tracker, track
from lore.learning.method import Fitted, Method, Task, check
from lore.methods import METHODS
from lore.methods.baselines import BradleyTerry, Own, Reference
from lore.methods.fitting.score_test import score_test

ROOT = Path(__file__).resolve().parents[2]
DIVERGED = 1e6  # nats a comparison
CENTERED = 1000  # conversations, evenly spread, whose mean reward is called zero
MethodName = Literal[tuple(METHODS)]
LIKED, LIKED_DIRECTIONS, SHOWN = 3, 8, 300  # responses shown per direction; letters of each


@dataclass
class _Shared:
    """What is fitted, on which repeats, and where the results go.

    Args:
        methods: Methods to fit, by name; the reference, Bradley-Terry and every user's own model
            are always fitted beside them.
        reference: The reference reward: the model's score head; or "last_linear", the vector that
            the published code took for it; or none.
        features: Numbers beside the embedding: length, the logarithm of a response's characters.
        seeds: One repeat of the experiment for each.
        device: Where to compute: auto, cpu, cuda.
        stream: Read features from disk in every step instead of holding them; by default where
            they take more than half of the free memory.
        results: Folder of all results; the run's own folder is made inside it.
        name: Name of the run's folder; by default made from the settings. Also --run.
        checkpoint_every: Steps between two saved states of the training; 0 for none.
        progress: Show progress bars, where stderr is a terminal.
        log: Where else the losses and figures of finished fits go: tensorboard or wandb, where
            that is installed; its files lie in the run's folder.
        verify: Read all embeddings once more and compare them with their checksums, which
            otherwise is done when they are first used.
    """

    methods: tuple[MethodName, ...] = ("lore",)
    reference: Literal["head", "last_linear", "none"] = "head"
    features: tuple[Feature, ...] = ()
    seeds: tuple[SeedNumber, ...] = (0,)
    device: str = "auto"
    stream: bool | None = None
    results: Path = ROOT / "results"
    name: Name | None = None
    checkpoint_every: NonNegativeInt = 200
    progress: bool = True
    log: Tracker = "none"
    verify: bool = False

    def chosen(self) -> dict[str, Method]:
        """The methods to fit, those first that are always there; InputError for an unknown name."""
        for name in self.methods:
            require(name in METHODS, f"--methods {name}: there are {', '.join(METHODS)}")
        every = Reference(), BradleyTerry(self.lore), Own(self.lore), self.ridge_bt
        always = dict(zip(BASELINES, every, strict=True))
        return always | {name: getattr(self, name) for name in self.methods}


# With the settings of every method that there is, under its name
FIELDS = [(name, method, field(default_factory=method)) for name, method in METHODS.items()]
NAMES = {"__doc__": _Shared.__doc__, "__module__": __name__}
Settings = make_dataclass("Settings", FIELDS, bases=(_Shared,), namespace=NAMES)


def command(main: Callable[..., Any]) -> None:
    """Run a script's ``main``; flags of LoRe and a sweep go without their group: --ranks."""
    kept = "finished methods and repeats and the last state of the training are kept"
    cli(main, "lore sweep", kept)


@contextmanager
def open_run(
    script: str, dataset: Tasks, settings: Settings, sweep: Sweep | None = None
) -> "Iterator[Experiment]":
    """A run of a script, train_basis or vary_fewshot, in whose folder no other process writes
    meanwhile; the same command goes on where a killed run was. InputError for settings that the
    data do not support, and where the folder holds another run."""
    settings.chosen()  # refuses what there is not before anything is made, as the next lines do
    pick_device(settings.device)
    check_tracker(settings.log)
    first, alone = processes()[0] == 0, processes()[1] == 1
    shared = {"script": script, "reference": settings.reference, **dataset.facts()}
    shared |= sweep.about() if sweep else {}
    why = "numbers of shots vary in one process: start it without torchrun"
    require(sweep is None or alone, why)
    if settings.verify:
        dataset.store.verify()
    every = {name: getattr(settings, name) for name in METHODS}  # what a run is named after
    name = settings.name or f"{script}-{digest(plain([shared, every]))[:8]}"
    folder = settings.results / dataset.dataset / name
    with lock_folder(folder) if first else nullcontext():
        run = Run.start(folder, shared)
        wait_for_all()  # the first one writes only when all have read what is there
        yield Experiment(run, dataset, settings, sweep)
        if first:
            run.begin()
            states = [run.state(s, name) for s in settings.seeds for name in settings.chosen()]
            run.forget("*.part", *(f"{state.name}-*" for state in states))  # of killed runs too


@dataclass
class Timed:
    """A method, and the time its last fit took."""

    method: Method
    seconds: dict[str, float] = field(default_factory=dict)

    def fit(self, task: Task) -> list[Fitted]:
        """What the method fits."""
        wall, processor = time.perf_counter(), time.process_time()
        fits = self.method.fit(task)
        self.seconds = {"seconds": round(time.perf_counter() - wall, 3),
                        "processor_seconds": round(time.process_time() - processor, 3)}  # fmt: skip
        return fits


@dataclass
class Experiment:
    """A run at work: what is finished, what is learned from and fitted, and how shots vary."""

    run: Run
    dataset: Tasks
    settings: Settings
    sweep: Sweep | None
    about: dict[str, Any] = field(default_factory=dict, init=False)
    timed: Timed = field(init=False)

    def unfinished(self) -> Iterator[tuple[Task, str, Timed]]:
        """What is not finished yet: task, name and method, seed by seed. A mistake in the settings
        of any of a seed's methods is an InputError before the first fit."""
        settings, sweep, dataset = self.settings, self.sweep, self.dataset
        methods, here, first = settings.chosen(), processes(), processes()[0] == 0
        every, shots = settings.checkpoint_every, sweep.shots if sweep else ()
        about = {"checkpoint_every": every, "progress": settings.progress and first, "shots": shots}
        for seed, names in self.run.missing(settings.seeds, methods).items():
            device, reference = pick_device(settings.device), dataset.reference(settings.reference)
            task = dataset.task(seed, device, reference, settings.stream, here, **about)
            why = f"no user of {dataset.dataset} is unseen, so that no new user's shots could vary"
            require(not sweep or task.few is not None, f"{why}: run train_basis.py")
            for name in names:
                check(name, methods[name], task)
            if first:
                self.run.begin()
                self.about = _about(dataset, task)
            for name in names:
                task.state = self.run.state(seed, name)
                self.timed = Timed(methods[name])
                yield task, name, self.timed
                wait_for_all()
                if first:
                    self.run.forget(f"{task.state.name}-*")

    def save(
        self, task: Task, name: str, fits: Sequence[Fitted], records: Sequence[dict[str, Any]]
    ) -> None:
        """Keep what a method fitted in a repeat, and its figures from ``judge``; InputError if the
        training has diverged."""
        if processes()[0]:
            return
        for record in records if name != "reference" else ():
            loss, who = max(record["log_loss"]), f"{record['label']}, seed {task.seed}"
            why = f"{who}: its training diverged (log loss {loss:.1e})"
            require(loss < DIVERGED, f"{why}; lower its learning rate, or choose another optimizer")
        for fit in fits:
            if fit.file and self.sweep is None:
                self._save_basis(fit, task)
        role = "baseline" if name in BASELINES else "method"
        done = {"settings": self.timed.method, **self.timed.seconds,
                "fits": [_describe(fit, role, task, self.dataset) for fit in fits],
                "records": list(records)}  # fmt: skip
        self.run.add(task.seed, self.about, name, done, list(self.settings.chosen()))
        track(self.settings.log, self.run.folder, task.seed, done)

    def _save_basis(self, fit: Fitted, task: Task) -> None:
        seed = f"-seed{task.seed}" if len(self.settings.seeds) > 1 else ""
        fit.written = f"{fit.file}{seed}.safetensors"
        store, manifest = self.dataset.store, self.dataset.store.manifest
        spread = torch.linspace(0, len(store) - 1, min(len(store), CENTERED), dtype=torch.float64)
        kept = ("model", "tokenizer", "revision", "weights_sha256", "template_sha256", "pool")
        facts = {key: manifest[key] for key in kept if key in manifest} | {
            "dataset": self.dataset.dataset, "seed": task.seed,
            "users": task.train.names, "users_unseen": getattr(task.few, "names", []),
            "center": store.rows(spread.long()).double().mean(0).float(),
            "extra": self.dataset.about.get("extra", []),
        }  # fmt: skip
        for key, data in {"known": task.train, "known_unseen": task.few}.items():
            if data is not None and (known := fit.spread(data)) is not None:
                facts[key] = known
        new = fit.users[:0] if fit.new_users is None else fit.new_users
        fit.save(self.run.folder / fit.written, new, facts)

    def report(self) -> str:
        """The table, the verdict and where the files lie; empty on all processes but the first."""
        return report(self.run.folder) if processes()[0] == 0 else ""


def _about(dataset: Tasks, task: Task) -> dict[str, Any]:
    """Whose comparisons a repeat has, how many, and what a reader must know of them."""
    said = {"personal": score_test(task.train).sentence}
    starts = {"split": "", "overlap": "", "retest": "The ceiling of any method: "}
    for key, start in starts.items():
        fact = dataset.info.get(key) or {}
        if fact.get("sentence") and (key != "retest" or fact.get("judged_again")):
            said[key] = start + fact["sentence"]
    counts = {key: len(getattr(task, key) or ()) for key in ("train", "seen", "few", "unseen")}
    if task.validation is not None:
        counts["validation"] = len(task.validation)
    users = {"seen": task.train.names, "unseen": getattr(task.few, "names", [])}
    return {"users": users, "kinds": task.kinds, "comparisons": counts, "facts": said}


def _describe(fit: Fitted, role: str, task: Task, dataset: Tasks) -> dict[str, Any]:
    """What results.json says of a fit, beside its records."""
    kept = ("label", "personal", "settings", "chosen", "family", "shots_chosen_by", "random_label")
    about = {"role": role, **{key: getattr(fit, key) for key in kept}}
    if fit.random_label:  # all else is said of the fit itself
        return {**about, "file": ""}
    if (portrait := fit.portrait()) is not None:
        about["weights"] = [[round(x, 3) for x in row] for row in portrait.tolist()]
    if (directions := fit.tastes()) is not None:
        about["likes"] = _likes(directions[:, :LIKED_DIRECTIONS], task, dataset)
    return {**about, "file": fit.written, **fit.describe()}


def _likes(directions: Tensor, task: Task, dataset: Tasks) -> list[dict[str, Any]]:
    """Held-out responses of most extreme reward, less the prompt's mean, for directions [F, C]."""
    rows, talks = task.seen.features.index, dataset.conversations
    rewards = task.seen.features.pairs(lambda e: e @ directions.to(e)).values.cpu()  # [R, C]
    prompts = [str(talks[row][:-1]) for row in rows.tolist()]
    rewards = pd.DataFrame(rewards.numpy(), rows.tolist())
    apart = rewards - rewards.groupby(np.array(prompts)).transform("mean")

    def texts(some: Sequence[int]) -> list[dict[str, str]]:
        ends = [[turn["content"][:SHOWN] for turn in talks[row][-2:]] for row in some]
        return [{"prompt": prompt, "response": response} for prompt, response in ends]

    orders = {str(c + 1): apart[c].sort_values(kind="stable").index for c in apart}
    return [
        {"direction": c, "most": texts(order[::-1][:LIKED]), "least": texts(order[:LIKED])}
        for c, order in orders.items()
    ]
