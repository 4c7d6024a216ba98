"""The worlds of the benchmark of questions: who is asked, from which pool, by which models."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
sys.path.append(str(ROOT / "tests" / "helpers"))  # planted choices

from comparison_data import held_out_anew, redrawn
from lore.experiments import splits
from lore.experiments.splits import Tasks
from lore.learning.comparisons import Comparisons, DenseFeatures
from lore.learning.method import Fitted, Method, Task
from lore.methods.fitting.posterior import Prior
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedFit, MixedLogit
from lore.methods.pref import PReF
from planted import prefer

CPU = torch.device("cpu")
LEAST = 100  # judgments of a worker who is asked
ALL = 1_000_000  # comparisons of a new user, more than anybody has
# Of the mixed logit that has a personal part whatever is chosen
STRENGTHS = {"floor": 0.1, "l_mu": 1.0, "tau2": 3.0, "pi": 30.0}
FEATURES, SEEN, TRAINING = 20, 200, 60  # of planted worlds: features, seen users, their comparisons


class World(NamedTuple):
    """One kind of people to ask.

    Attributes:
        name: on the command line and in the figure.
        title: what it is, in one line.
        folder: the flag that names the prepared folder; "" for a planted world.
        seeds: of the full number of repeats.
        shots: numbers of questions.
        draw: the task of a folder and a seed, and a fit that is true in it if there is one.
        methods: fitted to it, by name.
    """

    name: str
    title: str
    folder: str
    seeds: tuple[int, ...]
    shots: tuple[int, ...]
    draw: Callable[[Path, int], tuple[Task, MixedFit | None]]
    methods: dict[str, Method]


class Planted(NamedTuple):
    """A planted world: tastes are Gaussian of some rank, responses standard normal.

    Attributes:
        rank: K, the directions in which tastes differ.
        spread: standard deviation of the tastes in each.
        users: new users, who are asked.
        pool: comparisons that each may be asked about.
        held_out: comparisons that each is judged on.
    """

    rank: int
    spread: float
    users: int = 100
    pool: int = 400
    held_out: int = 100

    def draw(self, _: Path, seed: int) -> tuple[Task, MixedFit]:
        """The world of a seed, and the mixed logit that is true in it.

        The shared reward lies among the tastes' directions, from -1 to 1 in equal steps.
        """
        g = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(FEATURES, self.rank, generator=g).double())[0]
        mu = torch.linspace(-1, 1, self.rank).double()
        sets = []
        for kind, users, sizes in (("seen", SEEN, (TRAINING, 1)),
                                   ("new", self.users, (self.pool, self.held_out))):  # fmt: skip
            tastes = mu + self.spread * torch.randn(users, self.rank, generator=g).double()
            rewards = tastes @ basis.T
            names = [f"{kind} {seed}.{u}" for u in range(users)]
            sets += [_choices(rewards, size, names, g) for size in sizes]
        train, seen, few, unseen = sets
        task = Task(train=train, few=few, seen=seen, unseen=unseen, seed=seed)
        prior = Prior(torch.zeros(self.rank).double(), torch.eye(self.rank).double())
        truth = MixedFit(basis @ mu, self.spread * basis, prior, {})
        truth.label = "the truth"
        return task, truth


def _choices(rewards: Tensor, size: int, names: list[str], g: torch.Generator) -> Comparisons:
    """Logistic choices by users with rewards [U, F] between random pairs, so many of each."""
    x = torch.randn(len(rewards), size, rewards.shape[1], generator=g)
    x, _ = prefer((x.double() @ rewards[:, :, None])[..., 0], x, -x, g)
    features = DenseFeatures(x.flatten(0, 1))
    return Comparisons(features, [size] * len(rewards), names=names)


def _prepared(tasks: Callable[[Path], Tasks], folder: Path, seed: int) -> tuple[Task, None]:
    return tasks(folder).task(seed, CPU, None, False, (0, 1)), None


def _workers(folder: Path, seed: int) -> tuple[Task, None]:
    """Half of the workers seen; of the others those with enough judgments, and all of these."""
    task, _ = _prepared(lambda data: splits.drawn_split(data, 0.5, 150, ALL), folder, seed)
    return with_enough(task, LEAST), None


def with_enough(task: Task, least: int) -> Task:
    """The task with those new users alone who have as many comparisons, shots and held-out ones."""
    few, unseen = task.few, task.unseen
    assert few is not None and unseen is not None
    enough = few.counts + unseen.counts >= least
    few, unseen = few.select(enough[few.user]), unseen.select(enough[unseen.user])
    return replace(task, few=few, unseen=unseen)


def _demo(folder: Path) -> Tasks:
    """The demo's users; new ones may be asked about every training prompt."""
    prompts = splits.load(folder)[0]["counts"]["train prompts"]
    return splits.simulated_users(folder, 0.001, 100, 60, 45, prompts)


TO_20 = (0, 2, 5, 7, 10, 12, 15, 20)
CHOSEN: dict[str, Method] = {"Mixed logit": MixedLogit(), "PReF": PReF()}
ALL_THREE = {**CHOSEN, "LoRe": Lore(ranks=(5,))}
WORLDS = (
    World("jokes", "People who rate jokes, known and met responses", "jokes", (0, 1, 2),
          (0, 2, 5, 10, 20), partial(_prepared, partial(held_out_anew, by="pairs")), ALL_THREE),
    World("jokes-new", "People who rate jokes, new responses", "jokes", (0, 1, 2),
          (0, 2, 5, 10, 20), partial(_prepared, partial(held_out_anew, by="responses")),
          ALL_THREE),
    World("ukp", f"Workers of UKPConvArg with {LEAST} and more judgments", "ukp", tuple(range(4)),
          (0, 5, 10, 13, 20, 32, 50), _workers, CHOSEN),
    World("prism", "PRISM, a slice of it; a question is a dialogue", "prism", tuple(range(10)),
          (0, 1, 2), partial(_prepared, redrawn),
          {"Mixed logit, given": MixedLogit(**STRENGTHS), "PReF": PReF()}),
    World("demo", "The demo's users, Dirichlet alpha .001, without noise", "demo", (0, 1, 2),
          TO_20, partial(_prepared, _demo), ALL_THREE),
    World("planted-5", "Planted: Gaussian tastes of rank 5, standard deviation 1.5", "", (0, 1, 2),
          TO_20, Planted(5, 1.5).draw, {"Mixed logit": MixedLogit(), "LoRe": Lore(ranks=(5,))}),
    World("planted-10", "Planted: Gaussian tastes of rank 10, standard deviation 1", "", (0, 1, 2),
          TO_20, Planted(10, 1.0).draw, {"Mixed logit": MixedLogit()}),
)  # fmt: skip
POOL_WORLD = Planted(5, 1.5)  # in which the size of the pool varies
POOLS = (25, 50, 100, 200, 400, 800)  # of a user in a planted world of rank 5


def able(world: World, task: Task, truth: MixedFit | None) -> list[tuple[str, Fitted]]:
    """The fits that can ask in a world, by name: the truth first, then those fitted to it."""
    found: list[tuple[str, Fitted]] = [] if truth is None else [(truth.label, truth)]
    for name, method in world.methods.items():
        fit = method.fit(task)[-1]
        if fit.population() is not None:
            found.append((name, fit))
    return found
