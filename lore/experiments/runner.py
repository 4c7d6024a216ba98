"""Experiments: fit methods, judge them beside their controls, keep what is found.

Whatever the method, a control is another row in the place of a user's own state.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lore.common.cli import cli
from lore.common.devices import pick_device, processes, wait_for_all
from lore.common.files import InputError, alone, require
from lore.common.settings import Name, NonNegativeInt, SeedNumber
from lore.elicitation.criteria import CRITERIA, Criterion
from lore.elicitation.replay import choose_shots
from lore.experiments import metrics as panel
from lore.experiments.report.tables import report
from lore.experiments.results import ASKS
from lore.experiments.runs import Run, run_folder
from lore.experiments.splits import Tasks
from lore.learning.comparisons import Shots, Users, draw_shots
from lore.learning.method import Fitted, Method, Task, View, check
from lore.methods import METHODS
from lore.methods.baselines import BradleyTerry, Own, Reference
from lore.methods.fitting.score_test import score_test

ROOT = Path(__file__).resolve().parents[2]
MethodName = Literal[tuple(METHODS)]
PERMUTATIONS = 10  # over which other users' states are averaged
SHUFFLES = 3  # over which states from shuffled labels are averaged
LIKED, LIKED_DIRECTIONS, SHOWN = 3, 8, 300  # responses shown per direction; letters of each
BATCH = 1 << 24  # numbers of a view that few-shot fits take at once


@dataclass
class Common:
    """What is fitted, on which repeats, and where the results go.

    Args:
        methods: Methods to fit, by name; the reference, Bradley-Terry and every user's own model
            are always fitted beside them.
        reference: The reference reward: the model's score head; or "last_linear", the vector that
            the published code took for it; or none.
        seeds: One repeat of the experiment for each.
        device: Where to compute: auto, cpu, cuda.
        stream: Read features from disk in every step instead of holding them; by default where
            they take more than half of the free memory.
        results: Folder of all results; the run's own folder is made inside it.
        name: Name of the run's folder; by default made from the settings. Also --run.
        checkpoint_every: Steps between two saved states of the training; 0 for none.
        progress: Show progress bars.
        verify: Read all embeddings once more and compare them with their checksums, which
            otherwise is done when they are first used.
    """

    methods: tuple[MethodName, ...] = ("lore",)
    reference: Literal["head", "last_linear", "none"] = "head"
    seeds: tuple[SeedNumber, ...] = (0,)
    device: str = "auto"
    stream: bool | None = None
    results: Path = ROOT / "results"
    name: Name | None = None
    checkpoint_every: NonNegativeInt = 200
    progress: bool = True
    verify: bool = False

    def asked(self) -> dict[str, Method]:
        """The methods to fit, those first that are always there.

        Raises:
            InputError: no method of that name.
        """
        for name in self.methods:
            require(name in METHODS, f"--methods {name}: there are {', '.join(METHODS)}")
        always = {"reference": Reference(), "bt": BradleyTerry(self.lore), "own": Own(self.lore)}
        return always | {name: getattr(self, name) for name in self.methods}

    def all_methods(self) -> dict[str, Method]:
        """The settings of every method there is."""
        return {name: getattr(self, name) for name in METHODS}


Settings = dataclasses.make_dataclass(
    "Settings",
    [(name, method, field(default=method())) for name, method in METHODS.items()],
    bases=(Common,),
)
Settings.__doc__ = Common.__doc__


def command(main: Callable[..., Any]) -> None:
    """Run a script's ``main``; flags of LoRe may go without their group: --ranks, --alpha."""
    cli(main, "lore", "finished methods and repeats and the last state of the training are kept")


# ------------------------------------------------------------------ The two experiments


def train_basis(tasks: Tasks, settings: Settings) -> str:
    """Fit every method and judge it on held-out comparisons; save results, table and plots.

    Finished methods of finished repeats are kept: the same command goes on where a killed run was.

    Returns:
        The table, the verdict and where the files lie; empty on all processes but the first.
    """

    def judge(fit: Fitted, task: Task) -> list[dict[str, Any]]:
        own = fit.users[:0]
        if task.few is not None:
            own = fit.adapt(fit.view(task.few), task.few, task.seed)
        _save(run, tasks, settings, fit, task, own)
        return list(evaluate(fit, task, own))

    with _at_work("train_basis", tasks, settings, {}) as run:
        return _carry_out(run, tasks, settings, (), judge)


def vary_fewshot(
    tasks: Tasks,
    settings: Settings,
    shots: Sequence[int],
    trials: int,
    ask: Sequence[Criterion] = ("random",),
) -> str:
    """Judge every method on new users against their number of shots; save results as above.

    Args:
        tasks, settings: what is fitted, and to what.
        shots: numbers of shots; 0 is none.
        trials: random draws per number of shots.
        ask: how shots are chosen, of ``criteria.CRITERIA``; at random is always there. Others are
            for the methods that know how tastes vary, and have a label each.
    """
    require(processes()[1] == 1, "vary_fewshot.py runs in one process: start it without torchrun")
    for name in ask:
        require(name in CRITERIA, f"--ask {name}: there are {', '.join(CRITERIA)}")
    chosen = tuple(name for name in dict.fromkeys(ask) if name != "random")
    drawn: dict[int, Shots] = {}

    def judge(fit: Fitted, task: Task) -> list[dict[str, Any]]:
        if fit.asks != "random":
            g = torch.Generator().manual_seed(task.seed)
            draws = choose_shots(fit, task.few, shots, fit.asks, g)
            return list(sweep(fit, task, draws))
        if task.seed not in drawn:
            drawn[task.seed] = draw_shots(task.few, shots, trials, task.seed)
        return list(sweep(fit, task, drawn[task.seed]))

    about = {"shots": list(shots), "trials": trials} | ({"ask": list(chosen)} if chosen else {})
    with _at_work("vary_fewshot", tasks, settings, about) as run:
        return _carry_out(run, tasks, settings, tuple(shots), judge, chosen)


def _asking(fit: Fitted, criterion: str) -> Fitted:
    """The same fit with new users' shots chosen by a criterion; without a file and controls."""
    asking = copy.copy(fit)
    asking.asks, asking.label = criterion, f"{fit.label}{ASKS}{criterion}"
    asking.settings = {**fit.settings, "asks": criterion}
    asking.file, asking.controlled = "", False
    return asking


def both(tasks: Tasks, settings: Settings, shots: Sequence[int], trials: int) -> str:
    """Fit every method once and judge it as both experiments do; the run is a ``train_basis``.

    Args:
        tasks, settings, shots, trials: as above.
    """
    require(processes()[1] == 1, "shots are varied in one process: start it without torchrun")
    drawn: dict[int, Shots] = {}

    def judge(fit: Fitted, task: Task) -> list[dict[str, Any]]:
        if task.seed not in drawn:
            drawn[task.seed] = draw_shots(task.few, shots, trials, task.seed)
        own = fit.adapt(fit.view(task.few), task.few, task.seed)
        return [*evaluate(fit, task, own), *sweep(fit, task, drawn[task.seed])]

    about = {"shots": list(shots), "trials": trials}
    with _at_work("train_basis", tasks, settings, about) as run:
        return _carry_out(run, tasks, settings, tuple(shots), judge)


@contextmanager
def _at_work(
    script: str, tasks: Tasks, settings: Settings, about: dict[str, Any]
) -> Iterator[Run]:
    """A run, whose folder no other process writes into meanwhile."""
    settings.asked()  # refuses what there is not before anything is made, as the next line does
    pick_device(settings.device)
    shared = {"script": script, "reference": settings.reference, **tasks.facts(), **about}
    if settings.verify:
        tasks.store.verify()
    first = processes()[0] == 0
    where = (settings.results, settings.name, shared, settings.all_methods())
    with alone(run_folder(*where)) if first else nullcontext():
        run = Run.start(*where)
        wait_for_all()  # the first one writes only when all have read what is there
        yield run


def _carry_out(
    run: Run,
    tasks: Tasks,
    settings: Settings,
    shots: tuple[int, ...],
    judge: Callable[[Fitted, Task], list[dict[str, Any]]],
    ask: tuple[str, ...] = (),
) -> str:
    """Fit and judge what is missing; the report."""
    methods, here = settings.asked(), processes()
    device, direction = pick_device(settings.device), tasks.reference(settings.reference)
    for seed, names in run.missing(settings.seeds, methods).items():
        task = tasks.task(seed, device, direction, settings.stream, here)
        task.shots, task.progress = shots, settings.progress and here[0] == 0
        task.checkpoint_every = settings.checkpoint_every
        if shots and task.few is None:
            raise InputError(
                f"no user of {tasks.dataset} is unseen, so that nobody's shots could be varied: "
                "run train_basis.py"
            )
        for name in names:  # mistakes are told before the work starts
            check(name, methods[name], task)
        about = {}
        if here[0] == 0:
            run.begin()
            about = _about(tasks, task)
        for name in names:
            task.state = run.state(seed, name)
            start, busy = time.perf_counter(), time.process_time()
            fits = methods[name].fit(task)
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            able = [fit for fit in fits if ask and fit.population() is not None]
            fits = [*fits, *(_asking(fit, criterion) for fit in able for criterion in ask)]
            if here[0] == 0:
                records = [record for fit in fits for record in judge(fit, task)]
                done = {
                    "settings": methods[name], "seconds": round(seconds, 3),
                    "processor_seconds": round(busy, 3),
                    "fits": [_describe(fit, task, tasks) for fit in fits], "records": records,
                }  # fmt: skip
                run.add(seed, about, name, done, list(methods))
            wait_for_all()
            if here[0] == 0:
                run.forget(seed, name)
    if here[0]:
        return ""
    run.begin()
    run.tidy(settings.seeds, methods)
    return report(run.folder)


def _about(tasks: Tasks, task: Task) -> dict[str, Any]:
    """Whose comparisons a repeat has, how many, and what a reader must know of them."""
    personal = score_test(task.train)
    overlap = tasks.info.get("overlap", {}).get("sentence")
    sets = {"train": task.train, "seen": task.seen, "few": task.few, "unseen": task.unseen}
    sets |= {"validation": task.validation} if task.validation is not None else {}
    return {
        "users": {"seen": task.train.names, "unseen": _new_names(task)},
        "comparisons": {name: 0 if data is None else len(data) for name, data in sets.items()},
        "facts": {"personal": personal.sentence, **({"overlap": overlap} if overlap else {})},
    }


def _new_names(task: Task) -> list[str]:
    return [] if task.few is None else task.few.names


def _describe(fit: Fitted, task: Task, tasks: Tasks) -> dict[str, Any]:
    """What results.json says of a fit, beside its records."""
    about = {"label": fit.label, "personal": fit.personal, "settings": fit.settings}
    if fit.asks != "random":  # all else is said of the fit itself
        return {**about, "file": ""}
    portrait = fit.portrait()
    if portrait is not None:
        about["states"] = [[round(x, 3) for x in row] for row in portrait.tolist()]
    directions = fit.tastes()
    if directions is not None:
        about["likes"] = _likes(directions[:, :LIKED_DIRECTIONS], task, tasks)
    return {**about, "file": fit.file, **fit.describe()}


def _likes(directions: Tensor, task: Task, tasks: Tasks) -> list[dict[str, Any]]:
    """For each direction of V [F, C], the seen users' held-out responses with the most extreme
    rewards, compared with the mean of the responses to the same prompt."""
    rows, talks = task.seen.features.index, tasks.conversations
    rewards = task.seen.features.pairs(lambda e: e @ directions.to(e)).values.cpu()  # [R, C]
    prompts = [str(talks[row][:-1]) for row in rows.tolist()]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    prompt = torch.tensor([number[p] for p in prompts])
    counts = torch.bincount(prompt)[:, None]
    mean = torch.zeros(len(counts), rewards.shape[1]).index_add_(0, prompt, rewards) / counts
    apart = rewards - mean[prompt]

    def text(row: int) -> dict[str, str]:
        *_, asked, answer = talks[row]
        return {"prompt": asked["content"][:SHOWN], "response": answer["content"][:SHOWN]}

    likes = []
    for c, column in enumerate(apart.T, start=1):
        order = rows[column.argsort()].tolist()
        most, least = order[::-1][:LIKED], order[:LIKED]
        likes.append({"direction": str(c), "most": list(map(text, most)),
                      "least": list(map(text, least))})  # fmt: skip
    return likes


def _save(
    run: Run, tasks: Tasks, settings: Settings, fit: Fitted, task: Task, own: Tensor
) -> None:
    if not fit.file:
        return
    suffix = f"-seed{task.seed}" if len(settings.seeds) > 1 else ""
    manifest = tasks.store.manifest
    kept = ("model", "tokenizer", "revision", "weights_sha256", "template_sha256")
    facts = {
        **{key: manifest[key] for key in kept if key in manifest},
        "dataset": tasks.dataset, "seed": task.seed,
        "users": task.train.names, "users_unseen": _new_names(task),
    }  # fmt: skip
    fit.file += f"{suffix}.safetensors"
    fit.save(run.folder / fit.file, own, facts)


# --------------------------------------------------------------------- Judging a fit


def evaluate(fit: Fitted, task: Task, own: Tensor) -> Iterator[dict[str, Any]]:
    """Records of a fit and its controls on all sets there are, new users having all their shots.

    Args:
        fit: the fit.
        task: the comparisons.
        own: the new users' own states [U', S].
    """
    states = {"train": fit.users, "seen": fit.users, "few_shot": own, "unseen": own}
    sets = {"train": task.train, "seen": task.seen, "few_shot": task.few, "unseen": task.unseen}
    sets = {name: data for name, data in sets.items() if data is not None}
    views = {name: fit.view(data) for name, data in sets.items()}
    for name, data in sets.items():
        state, whole = states[name][None], name in ("seen", "unseen")
        measured = _measure(fit, views[name], data, state, whole)
        if name == "unseen" and fit.personal and fit.controlled:
            swapped = fit.adapt(_swapped(fit, task), task.few, task.seed)
            measured["flips"] = _flips(fit, views[name], data, state, swapped[None])
        yield _record(fit, "", name, measured)
    if not (fit.personal and fit.controlled):
        return
    g = torch.Generator().manual_seed(task.seed)
    held_out = [name for name in ("seen", "unseen") if name in sets]
    swaps = [[swap(len(states[name]), g) for name in held_out] for _ in range(PERMUTATIONS)]
    for name, *orders in zip(held_out, *swaps, strict=True):
        state, view, data = states[name], views[name], sets[name]
        population = fit.population_state.expand(1, len(state), -1)
        others = torch.stack([state[order] for order in orders])
        yield _record(fit, "nobody's", name, _measure(fit, view, data, population))
        yield _record(fit, "another's", name, _measure(fit, view, data, others))
    if task.few is None:
        return
    shuffled = []
    for _ in range(SHUFFLES):
        flipped = task.few.flipped(torch.randint(2, (len(task.few),), generator=g).bool())
        shuffled.append(fit.adapt(fit.view(flipped), task.few, g))
    measured = _measure(fit, views["unseen"], task.unseen, torch.stack(shuffled))
    yield _record(fit, "shuffled", "unseen", measured)


def _swapped(fit: Fitted, task: Task) -> View:
    """The new users' shots with chosen and rejected exchanged."""
    return fit.view(task.few.flipped(torch.ones(len(task.few), dtype=torch.bool)))


def swap(users: int, generator: torch.Generator) -> Tensor:
    """A random permutation that gives every user another one's place (where there are two)."""
    order = torch.randperm(users, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


def _measure(
    fit: Fitted, view: View, data: Users, states: Tensor, whole: bool = False
) -> dict[str, Tensor]:
    """Figures of every user with each of the states [T, U, S]: [T, U].

    Args:
        whole: with figures of all comparisons together too [T].
    """
    logits = [fit.logits(view, state, data.user) for state in states]
    found = {
        "accuracy": torch.stack([data.accuracies(z) for z in logits]),
        "log_loss": torch.stack([data.log_losses(z) for z in logits]),
        "brier": torch.stack([panel.brier(data, z) for z in logits]),
    }
    if whole:
        parts = [panel.pooled(data, z) for z in logits]
        found |= {key: torch.tensor([part[key] for part in parts]) for key in parts[0]}
    return found


def _flips(fit: Fitted, view: View, data: Users, states: Tensor, swapped: Tensor) -> Tensor:
    """Flip rates [T, U] between states [T, U, S] and those from the same shots swapped."""
    return torch.stack([
        panel.flip_rate(data, *(fit.logits(view, state, data.user) for state in pair))
        for pair in zip(states, swapped, strict=True)
    ])  # fmt: skip


def sweep(fit: Fitted, task: Task, draws: Shots) -> Iterator[dict[str, Any]]:
    """Records of a fit and its controls on new users at every number of shots."""
    g, U = torch.Generator().manual_seed(task.seed), task.few.num_users
    trials = min(draws.trials, fit.max_trials or draws.trials)
    few, unseen = fit.view(task.few), fit.view(task.unseen)
    W, fitted = _sweep_states(fit, few, task.few, draws, trials, g, True)  # [trials, S, U, ...]
    for s, size in enumerate(draws.sizes):
        if size and fitted is not None:
            judged = {key: x[:, s] for key, x in fitted.items()}
            yield _record(fit, "", "few_shot", judged, size, draws.enough[s])
    states = {"": W}
    if fit.personal and fit.controlled:
        states["nobody's"] = fit.population_state.expand(1, len(draws.sizes), U, -1)
        states["another's"] = W[:, :, swap(U, g)]
        flipped = task.few.flipped(torch.randint(2, (len(task.few),), generator=g).bool())
        shuffled = fit.view(flipped)
        states["shuffled"] = _sweep_states(fit, shuffled, task.few, draws, trials, g, False)[0]
    swapped = None
    if fit.personal and fit.controlled:  # the first draw of shots alone, as the sweep has a price
        again, view = torch.Generator().manual_seed(task.seed), _swapped(fit, task)
        swapped = _sweep_states(fit, view, task.few, draws, 1, again, False)[0]
    for control, some in states.items():
        known = None
        for s, size in enumerate(draws.sizes):
            if not size and fit.personal and not fit.controlled and fit.asks == "random":
                continue  # each user's own model says nothing yet
            if known is None or (fit.personal and control != "nobody's"):
                known = _measure(fit, unseen, task.unseen, some[:, s], not control)
            if not control and swapped is not None:
                known["flips"] = _flips(fit, unseen, task.unseen, some[:1, s], swapped[:, s])
            yield _record(fit, control, "unseen", known, size, draws.enough[s])


def _sweep_states(
    fit: Fitted, view: View, few: Users, draws: Shots, trials: int, g: torch.Generator, judge: bool
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """States [trials, S, U, state] from the shots; accuracy and log loss on the shots themselves.

    Every trial, number of shots and user is a user of its own; as many are fitted in one batch as
    memory holds.
    """
    S, U = len(draws.sizes), few.num_users
    width = view.numel() // max(1, len(view)) if isinstance(view, Tensor) else view.width
    at_once = max(1, BATCH // (len(few) * S * max(width, 1))) * U * S
    states, accuracies, losses = [], [], []
    rows = draws.rows[: trials * S * U]
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        picked = torch.cat(some).to(few.device)
        users = few.pick(picked, [len(row) for row in some])
        states.append(fit.adapt(view[picked], users, g))
        if judge:
            logits = fit.logits(view[picked], states[-1], users.user)
            accuracies.append(users.accuracies(logits))
            losses.append(users.log_losses(logits))
    shape = (trials, S, U)
    fitted = {"accuracy": accuracies, "log_loss": losses} if judge else {}
    judged = {key: torch.cat(values).view(shape) for key, values in fitted.items()}
    return torch.cat(states).view(*shape, -1), judged or None


def _record(
    fit: Fitted,
    control: str,
    name: str,
    measured: dict[str, Tensor],
    shots: int | None = None,
    enough: int | None = None,
) -> dict[str, Any]:
    """One line of the results: means over trials of every user's figures [T, U], or of [T]."""
    trials = None if shots is None else _rounded(measured["accuracy"].mean(1))
    figures = {key: _rounded(values.mean(0)) for key, values in measured.items()}
    return {
        "label": fit.label, "control": control, "set": name, "shots": shots, **figures,
        "trials": trials, "enough": enough,
    }  # fmt: skip


def _rounded(values: Tensor) -> Any:
    """Numbers, one or a list, to the fifth digit."""
    rounded = (values.double() * 1e5).round() / 1e5
    return rounded.tolist()
