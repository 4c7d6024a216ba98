"""LoRe: a shared basis and simplex weights of every user, over ranks, pulls and shrinkages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lore.common import settings
from lore.common.devices import rows_before
from lore.common.files import require
from lore.learning.basis import Basis, save_fit
from lore.learning.comparisons import Comparisons, Seed, Users
from lore.learning.grid import fit_bases, grid
from lore.learning.method import Fitted, Task
from lore.learning.training import Checkpoint
from lore.methods.fitting.posterior import Prior
from lore.methods.fitting.validation import Split, Validation, choose
from utils import TEMPERATURE, LoRe, LoRe_regularized, personalize

ESTIMATORS = {"lore": LoRe, "lore_regularized": LoRe_regularized}
CURVE = 400  # points of the training curve that are kept
Points = list[dict[str, Any]]  # settings of ranks, pulls and shrinkages, see ``grid``


@dataclass(frozen=True)
class Lore:
    """LoRe, and in the same way its rank 1, Bradley-Terry, which is always fitted.

    Args:
        ranks: Ranks K; the reference (rank 0) and Bradley-Terry (rank 1) are always there.
        alpha: Strengths of the pull of the basis to the reference.
        shrinkage: Strengths of the pull of each user's weights to the users' mean, counted in
            comparisons; 0 is plain LoRe.
        estimator: "lore" is the paper's joint objective (equation 10), "lore_regularized" the
            published scripts' alternating one.
        iterations: Steps of the joint fit; by default the estimator's (1,000 or 20,000).
        learning_rate: Of the joint fit's Adam.
        few_shot_iterations: Steps of the new users' fit.
        few_shot_learning_rate: Of the new users' Adam; by default the estimator's (0.1 or 0.5).
        optimizer: Another optimiser for both fits, such as torch.optim.AdamW with
            --lore.optimizer.lr 0.05; it then brings its own learning rate. Only a subclass of
            torch.optim.Optimizer in torch.optim or in a module that the script imports, with
            numbers as arguments; nothing is imported for it.
        select_rank: Choose rank, alpha and shrinkage by log loss on the dataset's validation
            comparisons, or else on training comparisons held out for that, and on seen users set
            apart as if they were new; test comparisons never choose anything.
    """

    ranks: tuple[settings.NonNegativeInt, ...] = (5,)
    alpha: tuple[settings.NonNegativeFloat, ...] = (0.0,)
    shrinkage: tuple[settings.NonNegativeFloat, ...] = (0.0,)
    estimator: Literal["lore", "lore_regularized"] = "lore"
    iterations: settings.PositiveInt | None = None
    learning_rate: settings.Rate = 0.5
    few_shot_iterations: settings.PositiveInt = 500
    few_shot_learning_rate: settings.Rate | None = None
    optimizer: settings.OptimizerChoice | None = None
    select_rank: bool = False
    bounded = ("ranks",)  # ranks that users or features limit

    def check_reference(self, task: Task) -> None:
        """Refuse a pull to a reference where there is none."""
        require(task.reference is not None or not any(self.alpha),
                "--alpha pulls to a reference, and there is none: the model has no score head (or "
                "--reference none); give --alpha 0")  # fmt: skip

    def check(self, task: Task) -> None:
        """Refuse a pull to nothing, and a choice where nothing can be held out for it."""
        self.check_reference(task)
        none = "--select-rank: no user has two dialogues to hold one out for choosing"
        require(not self.select_rank or Validation(task).possible, none)

    def fit_shared(self, task: Task) -> "list[LoreFit]":
        """Bradley-Terry: rank 1, one shared direction, for every alpha."""
        return self._fit(task, grid([1], self.alpha), "shared")

    def within(self, users: int) -> "Lore":
        """The same without ranks above what so many users support."""
        return replace(self, ranks=tuple(rank for rank in self.ranks if rank <= users))

    def fit(self, task: Task) -> list[Fitted]:
        """A fit for every alpha, rank and shrinkage; last the chosen one, where one is chosen."""
        ranks = [rank for rank in self.ranks if rank > 1]
        fits = self._fit(task, grid(ranks, self.alpha, self.shrinkage), "ranks")
        points = grid([1, *ranks], self.alpha, self.shrinkage)
        return [*fits, self._chosen(task, points, fits)] if self.select_rank else fits

    def _fit(
        self, task: Task, points: Points, state: str, data: Comparisons | None = None,
        users: int = 0,
    ) -> "list[LoreFit]":  # fmt: skip
        """Fits to this process's comparisons, or to some, which have so many users in all."""
        checkpoint = None
        if state and task.state is not None and task.checkpoint_every:
            path = task.state.with_name(f"{task.state.name}-{state}")
            checkpoint = Checkpoint(path, task.checkpoint_every)
        steps = {} if self.iterations is None else {"num_iterations": self.iterations}
        bases = fit_bases(
            ESTIMATORS[self.estimator], points, task.reference, data or task.local_train,
            users or task.train.num_users, checkpoint,
            generator=task.seed, distributed=task.processes > 1, progress=task.progress,
            learning_rate=self.learning_rate, optimizer=self.optimizer, **steps,
        )  # fmt: skip
        return [LoreFit(self, basis) for basis in bases]

    def _chosen(self, task: Task, points: Points, fits: "list[LoreFit]") -> "LoreFit":
        """The fit whose settings have the lowest log loss on validation."""

        def fit(split: Split, number: int, all_fits: list[LoreFit] | None) -> Any:
            if all_fits is None:  # the settings share passes over the features
                first, users = rows_before(split.fit.num_users, task.processes)
                all_fits = self._fit(task, points, "", split.fit, users)
                for each in all_fits:  # this process's users
                    each.users = each.users[first : first + split.fit.num_users]
            return all_fits[number], all_fits

        found = choose(Validation(task), range(len(points)), fit)
        label = found.kept[0][found.candidate].label
        if label not in [fit.label for fit in fits]:  # rank 1, which is not fitted here otherwise
            fits = self.fit_shared(task)
        basis = next(fit.basis for fit in fits if fit.label == label)
        chosen = LoreFit(self, basis, "LoRe, chosen")
        chosen.tried, chosen.chosen = found.tried, True
        return chosen

    def few_shot(self) -> dict[str, Any]:
        """Settings of the new users' fit."""
        rate = self.few_shot_learning_rate or (0.1 if self.estimator == "lore" else 0.5)
        steps = self.few_shot_iterations
        return {"num_iterations": steps, "learning_rate": rate, "optimizer": self.optimizer}


class LoreFit(Fitted):
    """A basis V; a user's state is the weights w [K] on the simplex, nothing where K is 1. Tastes
    are V's columns, the portrait the seen users' weights, the population a Gaussian like these."""

    family = "LoRe"

    def __init__(self, method: Lore, basis: Basis, label: str | None = None) -> None:
        self.method, self.basis, self.tried = method, basis, []
        about = basis.settings
        self.settings = {k: about[k] for k in ("rank", "alpha", "shrinkage") if k in about}
        rank = about.get("rank", basis.V.shape[1])
        name = "BT" if rank == 1 else f"LoRe K={rank}"
        keys = ("alpha", "shrinkage") if rank > 1 else ("alpha",)
        several = [f"{key}={about[key]:g}" for key in keys if len(getattr(method, key)) > 1]
        self.setting_label = " ".join([name, *several])
        self.label = label or self.setting_label
        self.file = "" if label else "-".join([f"basis-K{rank:02d}", *several]).replace("=", "")
        self.users = basis.W if basis.V.shape[1] > 1 else basis.W[:, :0]
        self.population_state = self.users.mean(0)

    def view(self, data: Comparisons) -> Tensor:
        """The comparisons projected, X V [N, K]."""
        return data.project(self.basis.V)

    def adapt(self, view: Tensor, users: Users, seed: Seed) -> Tensor:
        """Weights [U', K] that minimise each user's loss (eq. 11), or the mean weights."""
        if not self.personal:
            return view.new_zeros(users.num_users, 0)
        there, states = users.counts > 0, self.population_state.to(view).repeat(users.num_users, 1)
        if there.any():
            some = Users(users.counts[there], users.weight)
            states[there] = personalize(self.basis, some, view, seed, **self.method.few_shot())
        return states

    def logits(self, view: Tensor, state: Tensor, user: Tensor) -> Tensor:
        """x^T V w / 100 [N]."""
        mixed = (view * state.to(view)[user]).sum(1) if self.personal else view[:, 0]
        return mixed / TEMPERATURE

    def population(self) -> Prior | None:  # LoRe itself has none
        return Prior.of_users(self.users) if self.personal and len(self.users) > 1 else None

    def questions(self, view: Tensor) -> Tensor:
        """0 and X V / 100 [N, 1 + K]."""
        return torch.nn.functional.pad(view.double() / TEMPERATURE, (1, 0))

    def tastes(self) -> Tensor | None:
        return self.basis.V if self.personal else None

    def portrait(self) -> Tensor | None:
        return self.users if self.personal else None

    def describe(self) -> dict[str, Any]:
        """Columns kept, effective rank (exp of the entropy of the squared singular values of V),
        cosines to the reference, spread of the weights, losses."""
        V, W, losses = self.basis.V.float(), self.basis.W.float(), self.basis.losses
        singular = torch.linalg.svdvals(V).cpu()
        share, columns = singular.square() / singular.square().sum(), V.shape[1]
        effective = float(torch.special.entr(share).sum().exp())
        entropy = float(torch.special.entr(W).sum(1).mean() / math.log(max(columns, 2)))
        note = f"{columns} column{'s' * (columns > 1)} of V kept, effective rank {effective:.2f}"
        if self.basis.reference is not None:
            direction = self.basis.reference.to(V)[:, None]
            cosines = torch.nn.functional.cosine_similarity(V, direction, dim=0)
            note += f", cosines to the reference {cosines.min():.2f} to {cosines.max():.2f}"
        if columns > 1:
            note += f"; a user's weights have {entropy:.0%} of the largest possible entropy"
        if self.tried:
            note = f"chosen on validation: {self.setting_label}; {note}"
        step = max(1, len(losses) // CURVE)
        return {
            "columns": columns, "effective_rank": effective, "weight_entropy": entropy,
            "spectrum": singular.tolist(), "losses": losses[::step].tolist(), "loss_step": step,
            "note": note, "tried": self.tried, "parameters": V.numel() + self.users.numel(),
        }  # fmt: skip

    def save(self, path: Path, new: Tensor, facts: Mapping[str, Any]) -> None:
        about = self.basis.settings | {"estimator": self.method.estimator}
        save_fit(path, replace(self.basis, settings=about), new, facts)
