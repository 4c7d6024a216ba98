"""A learned basis, its users' weights and their names in one file.

Shape letters: U users, F features, K rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from lore.common.files import InputError, require, write_whole
from lore.common.tensors import expect, read_tensors, require_finite

TEMPERATURE = 100.0  # the published code's scale of the logits; the paper has none
UNIT = "log odds times 100"  # of V in a file; files that do not state it are older and have it too
TENSORS = {"V", "W", "reference", "W_unseen", "center"}


class Learned(Protocol):
    """What a run's file says of users' rewards, whichever method wrote it.

    Attributes:
        settings: those of the fit and whatever else the run recorded, such as the model.
        method: what learned it, in words.
        use: how a user's reward is made of the columns, in words.
        center: mean embedding [F] of the conversations, whose reward counts as zero; None in a
            file of an earlier version.
    """

    settings: dict[str, Any]
    method: str
    use: str
    center: Tensor | None

    @property
    def names(self) -> list[str]:
        """Users who can be asked for."""
        ...

    def columns(self) -> dict[str, Tensor]:
        """Directions [F] that users' rewards are made of, by name; in log odds."""
        ...

    def direction(self, user: str | None = None, flag: str = "user") -> Tensor:
        """A user's reward [F], or that of the average user; in log odds."""
        ...


@dataclass
class Basis:
    """A learned basis and its users' weights; what a basis file holds.

    Attributes:
        V: basis [F, K]; log odds are x V w / 100.
        W: weights of the seen users [U, K].
        reference: the reference direction [F], if there is one.
        users: names of the seen users, in the order of W's rows; empty if they have none.
        W_unseen, users_unseen: the same of the users fitted with V frozen.
        settings: rank, alpha and whatever else the run recorded, such as the model.
        losses: the objective at every step; not saved.
        center: mean embedding [F] of the conversations, see ``Learned``.
    """

    V: Tensor
    W: Tensor
    reference: Tensor | None = None
    users: list[str] = field(default_factory=list)
    W_unseen: Tensor | None = None
    users_unseen: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    center: Tensor | None = None
    method = "LoRe (low-rank reward modelling, https://arxiv.org/abs/2504.14439)"
    use = "A user's reward is `rewards @ w` with the user's weights w >= 0, which add up to one."

    @property
    def names(self) -> list[str]:
        """The users whose weights can be asked for by name, seen ones first."""
        return [*self.users, *self.users_unseen]

    def weights_of(self, user: str, flag: str = "user") -> Tensor:
        """A user's weights w [K].

        Args:
            user: name of a seen or unseen user.
            flag: what the message about an unknown name begins with.

        Raises:
            InputError: nobody of that name is in the basis.
        """
        named = dict(zip(self.users, self.W, strict=True)) if self.users else {}
        if self.users_unseen:
            named |= zip(self.users_unseen, self.W_unseen, strict=True)
        return look_up(named, user, flag)

    def columns(self) -> dict[str, Tensor]:
        """The columns of V [F] in log odds, by name."""
        return {f"basis {k}": column / TEMPERATURE for k, column in enumerate(self.V.T, start=1)}

    def direction(self, user: str | None = None, flag: str = "user") -> Tensor:
        """A user's reward V w / 100 [F]; None gives that of the seen users' mean weights."""
        w = self.W.mean(0) if user is None else self.weights_of(user, flag)
        return self.V @ w / TEMPERATURE


def look_up(named: Mapping[str, Tensor], user: str, flag: str = "user") -> Tensor:
    """What is known of a user.

    Raises:
        InputError: nothing is.
    """
    if user not in named:
        some = f"{len(named)} users, such as {', '.join(list(named)[:3])}"
        known = f"{some} (--list-users true lists them)" if named else "no names of users"
        raise InputError(f"{flag} {user} is not in the basis, which has {known}")
    return named[user]


def save_basis(path: str | Path, basis: Basis) -> None:
    """Write a basis file (safetensors), whole or not at all.

    Raises:
        InputError: names that do not match the rows of the weights.
    """
    for names, W in ((basis.users, basis.W), (basis.users_unseen, basis.W_unseen)):
        rows = 0 if W is None else len(W)
        require(len(names) in (0, rows), f"{len(names)} user ids for {rows} rows of weights")
    tensors = {name: getattr(basis, name) for name in TENSORS}
    kept = {
        name: tensor.detach().float().cpu().contiguous().clone()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    metadata = {
        "unit": UNIT,
        "settings": json.dumps(basis.settings, default=str),
        "users": json.dumps([str(user) for user in basis.users]),
        "users_unseen": json.dumps([str(user) for user in basis.users_unseen]),
    }
    write_whole(Path(path), lambda draft: save_file(kept, draft, metadata=metadata))


def load_basis(path: str | Path) -> Basis:
    """Read a basis file written by ``save_basis``.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    path = Path(path)
    require(path.is_file(), f"{path}: no such basis file")
    remedy = "it is no basis file"
    try:
        metadata, found = read_tensors(path, remedy)
    except InputError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    require({"V", "W"} <= set(found), f"{path}: not a basis file: it lacks V or W")
    V = expect(path, found, remedy, "V", torch.float32, None, None)
    unit = metadata.get("unit", UNIT)
    require(unit == UNIT, f"{path}: its unit is {unit!r:.40}, not {UNIT}; {remedy}")
    shapes = {"W": (None, V.shape[1]), "W_unseen": (None, V.shape[1])}
    shapes |= {"reference": (len(V),), "center": (len(V),)}
    tensors = {"V": V} | {
        name: expect(path, found, remedy, name, torch.float32, *shape)
        for name, shape in shapes.items()
        if name in found
    }
    require_finite(path, tensors, remedy)
    require(V.numel() > 0 and len(tensors["W"]) > 0, f"{path}: V or W is empty; {remedy}")
    for name in {"W", "W_unseen"} & set(tensors):
        sums = tensors[name].sum(1)
        simplex = bool((tensors[name] >= 0).all()) and torch.allclose(sums, torch.ones(()), 0, 1e-3)
        told = f"{path}: {name} holds weights that are below 0 or do not add up to one; {remedy}"
        require(simplex, told)
    basis = Basis(**tensors, **_read_notes(path, metadata))
    for names, W in ((basis.users, basis.W), (basis.users_unseen, basis.W_unseen)):
        counted = len(names) in (0, 0 if W is None else len(W))
        require(counted, f"{path}: names {len(names)} users for other rows of weights; {remedy}")
    once = len(set(basis.names)) == len(basis.names)
    require(once, f"{path}: names a user twice; {remedy}")
    return basis


def _read_notes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The names of users and the settings in a basis file."""
    notes = {}
    for name, kind in {"users": list, "users_unseen": list, "settings": dict}.items():
        try:
            notes[name] = json.loads(metadata.get(name, "{}" if kind is dict else "[]"))
        except (ValueError, RecursionError):
            notes[name] = None
        fits = isinstance(notes[name], kind)
        fits = fits and (kind is dict or all(isinstance(user, str) for user in notes[name]))
        require(fits, f"{path}: {name} are not as expected; it is no basis file")
    return notes
