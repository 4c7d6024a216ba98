"""What a method is: settings that can be fitted, and what a fit knows of users. That is one row of
a tensor, the user's *state*: controls, sweeps, choices, reports and plots only move such rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lore.common.files import require
from lore.learning.comparisons import Comparisons, Pairs, Seed, Users

View = Tensor | Pairs


@dataclass
class Task:
    """One repeat of an experiment: what methods learn from, and what they are judged on."""

    train: Comparisons  # of the seen users
    few: Comparisons | None  # the new users' training comparisons, their shots
    seen: Comparisons  # held out; no method may look at them
    unseen: Comparisons | None
    validation: Comparisons | None = None  # seen users' others, for choices; else part of train
    reference: Tensor | None = None  # the reward model's own direction [F]
    seed: int = 0  # of everything random
    stream: bool = False  # features are read from disk at every pass instead of being held
    process: int = 0  # whose share of the seen users, of ``processes``, this is
    processes: int = 1
    state: Path | None = None  # where the state of a training is kept, with a suffix
    checkpoint_every: int = 0  # steps
    progress: bool = False
    shots: tuple[int, ...] = ()  # that new users will have, for choices made on pseudo-new users
    kinds: dict[str, dict[str, float]] | None = None  # shares in the test (kinds.py), for choices

    @cached_property
    def local_train(self) -> Comparisons:
        """This process's share of the training comparisons, held in memory unless streamed."""
        share = self.train.share(self.process, self.processes)
        return share if self.stream else share.in_memory()


class Fitted:
    """A fitted method: what is shared by all users, and every seen user's state."""

    label: str  # in tables, such as "LoRe K=5"
    settings: dict[str, Any]  # what was fitted, such as the rank; plain JSON values
    facts: Mapping[str, Any] = {}  # what ``describe`` says
    users: Tensor  # seen users' states [U, S]; S is 0 where nothing is personal
    population_state: Tensor  # [S] of a user of whom nothing is known, such as the mean weights
    file: str = ""  # that ``save`` writes, without seed and suffix; "" for none
    written: str = ""  # the whole name, once it is written
    new_users: Tensor | None = None  # their states [U', S], once they have adapted
    controlled: bool = True  # judged with the population's, another's and shuffled labels' states
    max_trials: int | None = None  # of a sweep over shots; None for all
    chosen: bool = False  # by validation among the method's fits
    family: str = ""  # what the method's labels have in common, where it has several
    shots_chosen_by: str = "random"  # in a sweep, see elicitation/criteria.py
    random_label: str | None = None  # of the same fit with random shots, where a criterion chooses

    @property
    def personal(self) -> bool:
        """Whether users have a state at all."""
        return self.users.shape[1] > 0

    def view(self, data: Comparisons) -> View:
        """All that is needed of comparisons, read once: a tensor [N, ...] or pairs of rows."""
        raise NotImplementedError

    def adapt(self, view: View, users: Users, seed: Seed) -> Tensor:
        """States [U', S] of users from a view of their comparisons, or of some of them;
        ``population_state`` without any. The seed is of initial values."""
        return self.population_state.expand(users.num_users, -1)

    def logits(self, view: View, state: Tensor, user: Tensor) -> Tensor:
        """Log odds [N] that the chosen response is preferred, for states [U', S] of the users and
        the user of each comparison of the view [N]."""
        raise NotImplementedError

    def population(self) -> Any:
        """How users' tastes b [K] vary, where log odds are a + z . b, as a ``posterior.Prior``;
        None where they are not. With it the next question to a user can be chosen."""
        return None

    def questions(self, view: View) -> Tensor:
        """a and z of comparisons [N, 1 + K], in float64; only where there is a ``population``."""
        raise NotImplementedError

    def spread(self, data: Comparisons) -> Any:
        """What users' comparisons add to the precision of their states, as a
        ``posterior.Evidence``; None where that is not known."""
        return None

    def tastes(self) -> Tensor | None:
        """Directions of reward [F, C] along which users differ, where the method has such."""
        return None

    def portrait(self) -> Tensor | None:
        """What a picture of the seen users shows of each [U, few numbers]; None for none."""
        return None

    def describe(self) -> dict[str, Any]:
        """What the fit looks like, as JSON values: ``losses`` for the training curve, ``note`` a
        line for the report, ``spectrum`` for a plot; and whatever else is worth keeping."""
        return dict(self.facts)

    def save(self, path: Path, new: Tensor, facts: Mapping[str, Any]) -> None:
        """Keep what tools need in one file, with the new users' states [U', S]. The facts are
        dataset, model, seed and more, the users' names, ``users`` and ``users_unseen``, and the
        ``spread`` of both, ``known`` and ``known_unseen``, where it is known."""


class Method(Protocol):
    """A method with its settings: a dataclass, whose fields are its flags. It may also have
    ``bounded``, its fields that are ranks which users or features limit; ``alone``, if one process
    has to fit it; and ``check``, which refuses a task."""

    def fit(self, task: Task) -> list[Fitted]:
        """Learn from the task's training comparisons alone."""


def check(name: str, method: Method, task: Task) -> None:
    """InputError, which names the flags, for a method that cannot be fitted to this task."""
    one = task.processes == 1 or not getattr(method, "alone", False)
    require(one, f"--methods {name}: one process fits this method, start it without torchrun")
    users, features = task.train.num_users, task.train.num_features
    most = min(users, features)
    support = f"{users} seen users and {features} features support ranks up to {most}"
    for field in getattr(method, "bounded", ()):
        ranks = getattr(method, field)
        for rank in [ranks] if isinstance(ranks, int) else ranks:
            require(rank <= most, f"--{name}.{field} {rank}: {support}")
    if hasattr(method, "check"):
        method.check(task)
