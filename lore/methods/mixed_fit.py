"""A fitted mixed logit: users' posteriors, predictive probabilities, and its file.

Shape letters: U users, N comparisons, F features, K directions of taste, C components of the prior.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lore.common.files import require, write_whole
from lore.common.tensors import expect, read_tensors, require_finite
from lore.learning.basis import look_up
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Fitted, View
from lore.methods.fitting.posterior import Evidence, Prior, moments, posterior_states, predict
from lore.methods.ridge_bt import precision
from utils import TEMPERATURE

FORMAT = "mixed-logit 1"


class MixedFit(Fitted):
    """A fitted mixed logit.

    A user's state holds weight, mean and covariance of each component of the posterior; without
    tastes (K = 0) it is empty.

    Args:
        directions: mu and B among raw features [F, 1 + K].
        prior: of the tastes; None where K is 0.
        users: seen users' states [U, S].
        facts: what ``describe`` says.
        tolerance: how far below its maximum a new user's evidence bound may be, in nats.
    """

    def __init__(
        self, directions: Tensor, prior: Prior | None, users: Tensor, facts: dict[str, Any],
        tolerance: float = 1e-10,
    ) -> None:  # fmt: skip
        self.label, self.settings, self.file = "Mixed logit", {}, "mixed_logit"
        self.directions, self.prior, self.facts = directions, prior, facts
        self.users, self.tolerance = users, tolerance
        self.population_state = users.new_zeros(0) if prior is None else prior.state

    @property
    def components(self) -> int:
        """C, of the prior."""
        return 0 if self.prior is None else len(self.prior.weight)

    def view(self, data: Comparisons) -> Tensor:
        """Shared reward difference, then what the comparison asks of tastes [N, 1 + K]."""
        return data.project(self.directions.to(precision(data)))

    def adapt(self, view: View, users: Users, seed: int = 0) -> Tensor:
        """Posteriors [U', S] given the users' comparisons; nothing is random."""
        if self.prior is None:
            return self.users.new_zeros(users.num_users, 0)
        assert isinstance(view, Tensor)
        return posterior_states(Evidence(view, users), self.prior, self.tolerance)

    def logits(self, view: View, state: Tensor, user: Tensor) -> Tensor:
        """Log odds [N] of the predictive probability that the chosen response is preferred."""
        assert isinstance(view, Tensor)
        if self.prior is None:
            return view[:, 0]
        return predict(view, state, user, self.components)

    def population(self) -> Prior | None:
        """The prior."""
        return self.prior

    def questions(self, view: View) -> Tensor:
        """The view [N, 1 + K] itself."""
        assert isinstance(view, Tensor)
        return view.double()

    def point(self, state: Tensor) -> Tensor:
        """Means of the posteriors [U, K]."""
        return moments(state, self.components)[0]

    def reward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """A user's reward: its mean direction [F], and a factor [F, K] of its covariance.

        A reward difference x . r has mean x . direction and standard deviation |x . factor|.

        Args:
            state: of the user [S].
        """
        mu, B = self.directions[:, 0], self.directions[:, 1:]
        if self.prior is None:
            return mu, B
        m, S = moments(state[None], self.components)
        values, vectors = torch.linalg.eigh(S[0])
        return mu + B @ m[0], B @ (vectors * values.clamp(min=0).sqrt())

    def tastes(self) -> Tensor | None:
        """The columns of B [F, K]."""
        return None if self.prior is None else self.directions[:, 1:]

    def portrait(self) -> Tensor | None:
        """Means of the seen users' tastes [U, K]."""
        return None if self.prior is None else moments(self.users, self.components)[0]

    def describe(self) -> dict[str, Any]:
        """The choice and what else was tried, the training curve, and the tastes' variances."""
        return self.facts

    def save(self, path: Path, new: Tensor, facts: Mapping[str, Any]) -> None:
        """Keep directions (of raw features), prior and states by name in one safetensors file."""
        tensors = {"directions": self.directions, "users": self.users, "users_unseen": new}
        if self.prior is not None:
            tensors |= {f"prior.{key}": value for key, value in vars(self.prior).items()}
        text = {"format": FORMAT, "facts": json.dumps(dict(facts)), "fit": json.dumps(self.facts)}
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        write_whole(path, lambda draft: save_file(tensors, draft, text))


class Saved:
    """A mixed logit read from its file.

    Attributes:
        fit: as it was fitted.
        new: states of the new users [U', S].
        facts: dataset, model, seed and more.
        settings: of the fit, and the facts but for users' names.
    """

    method = "a low-rank mixed logit"
    use = "A user's reward is `rewards[0] + rewards[1:] @ z` with the user's tastes z."

    def __init__(self, fit: MixedFit, new: Tensor, facts: dict[str, Any]) -> None:
        self.fit, self.new, self.facts = fit, new, facts
        names = [*facts.get("users", ()), *facts.get("users_unseen", ())]
        parts = [fit.users] * ("users" in facts) + [new] * ("users_unseen" in facts)
        states = torch.cat([*parts, fit.users[:0]])
        self.states = dict(zip(names, states, strict=True))
        about = {key: facts[key] for key in facts if key not in ("users", "users_unseen")}
        self.settings = {"estimator": "mixed logit", **fit.facts.get("chosen", {}), **about}

    @property
    def names(self) -> list[str]:
        """The users whose rewards can be asked for, seen ones first."""
        return list(self.states)

    def columns(self) -> dict[str, Tensor]:
        """mu and the columns of B [F], by name, on the scale of a basis file."""
        first, *rest = (TEMPERATURE * self.fit.directions).float().T
        return {"shared reward": first} | {f"taste {k}": x for k, x in enumerate(rest, start=1)}

    def direction(self, user: str | None = None, flag: str = "user") -> Tensor:
        """Mean direction [F] of a user's reward, or of the population's, as in a basis file."""
        return (TEMPERATURE * self.user_reward(user, flag)[0]).float()

    def user_reward(self, name: str | None = None, flag: str = "user") -> tuple[Tensor, Tensor]:
        """A user's reward: mean direction [F] and covariance factor [F, K]; of nobody if None.

        Rewards are log odds here.

        Raises:
            InputError: the file knows no such user.
        """
        known = self.fit.population_state if name is None else look_up(self.states, name, flag)
        return self.fit.reward(known)


def load(path: Path) -> Saved:
    """Read what ``MixedFit.save`` wrote.

    Raises:
        InputError: no such file, or a damaged one, or of another kind.
    """
    remedy = "it is no mixed logit's file"
    text, found = read_tensors(Path(path), remedy)
    require(text.get("format") == FORMAT, f"{path}: not a mixed logit's file")
    require_finite(path, found, remedy)

    def tensor(name: str, *shape: int | None) -> Tensor:
        kind = torch.float32 if name not in found else found[name].dtype
        return expect(path, found, remedy, name, kind, *shape)

    directions = tensor("directions", None, None)
    K, prior, size = directions.shape[1] - 1, None, 0
    if "prior.weight" in found:
        C = len(tensor("prior.weight", None))
        shapes = {"weight": (C,), "mean": (C, K), "cov": (C, K, K)}
        prior = Prior(**{key: tensor(f"prior.{key}", *shape) for key, shape in shapes.items()})
        size = len(prior.state)
    users, new = (tensor(name, None, size) for name in ("users", "users_unseen"))
    fit, facts = (_read_note(path, text, name) for name in ("fit", "facts"))
    for name, states in (("users", users), ("users_unseen", new)):
        fits = name not in facts or _are_names(facts[name], len(states))
        require(fits, f"{path}: its {name} are not as expected; {remedy}")
    return Saved(MixedFit(directions, prior, users, fit), new, facts)


def _read_note(path: Path, text: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        note = json.loads(text.get(name, ""))
    except (ValueError, RecursionError):
        note = None
    require(isinstance(note, dict), f"{path}: its {name} are not readable; remove the file")
    return note


def _are_names(names: Any, count: int) -> bool:
    is_list = isinstance(names, list) and len(names) == count
    return is_list and all(isinstance(name, str) for name in names)
