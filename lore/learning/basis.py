"""A learned basis, its users' weights and their names in one file. U users, F features, K rank."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lore.common.files import InputError, require, write_whole
from lore.common.tensors import expect, read_tensors, require_finite

TEMPERATURE = 100.0  # the published code's scale of the logits; the paper has none
UNIT = "log odds times 100"  # of V in a file; files that do not state it are older and have it too
TENSORS = {"V", "W", "reference", "W_unseen", "center"}
REMEDY = "it is no basis file"


@dataclass
class Basis:
    """A learned basis and its users' weights, what a basis file holds; log odds are x V w / 100.

    V [F, K] was learned with the seen users' weights W [U, K]; W_unseen was fitted with V frozen.
    ``users`` name their rows, or are empty. ``center`` [F] is the conversations' mean embedding,
    whose reward counts as zero (None in older files); ``losses`` are not saved.
    """

    V: Tensor
    W: Tensor
    reference: Tensor | None = None  # [F]
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
        """The users whose weights are known by name, seen ones first."""
        return [*self.users, *self.users_unseen]

    def weights_of(self, user: str, flag: str = "user") -> Tensor:
        """A seen or unseen user's weights w [K]; InputError, beginning with ``flag``, for none."""
        unseen = () if self.W_unseen is None else self.W_unseen
        named = [*zip(self.users, self.W, strict=False)]  # there may be no names
        return look_up(dict([*named, *zip(self.users_unseen, unseen, strict=False)]), user, flag)

    def columns(self) -> dict[str, Tensor]:
        """The columns of V [F] in log odds, by name."""
        return {f"basis {k}": column / TEMPERATURE for k, column in enumerate(self.V.T, start=1)}

    def direction(self, user: str | None = None, flag: str = "user") -> Tensor:
        """A user's reward V w / 100 [F]; None gives that of the seen users' mean weights."""
        w = self.W.mean(0) if user is None else self.weights_of(user, flag)
        return self.V @ w / TEMPERATURE

    def deviations(self, rows: Tensor, user: str | None = None) -> None:
        """None: the weights are all that is known."""


def look_up(named: Mapping[str, Tensor], user: str, flag: str = "user") -> Tensor:
    """What is known of a user; InputError where nothing is."""
    if user not in named:
        some = f"{len(named)} users, such as {', '.join(list(named)[:3])}"
        some += " (--list-users true lists them)" if flag.startswith("--") else ""
        known = some if named else "no names of users"
        raise InputError(f"{flag} {user} is not in the basis, which has {known}")
    return named[user]


def save_fit(path: Path, basis: Basis, new: Tensor, facts: Mapping[str, Any]) -> None:
    """Write a method's basis file, with the new users' weights [U', K] (ones where K is 1) and the
    facts of ``Fitted.save``."""
    about, W = dict(facts), new if basis.V.shape[1] > 1 else torch.ones(len(new), 1)
    own = {"users": about.pop("users"), "W_unseen": W, "users_unseen": about.pop("users_unseen")}
    own |= {"center": about.pop("center", None), "settings": basis.settings | about}
    save_basis(path, replace(basis, **own))


def save_basis(path: str | Path, basis: Basis) -> None:
    """Write a basis file (safetensors), whole or not at all; InputError where the names do not
    match the rows of the weights."""
    for names, W in ((basis.users, basis.W), (basis.users_unseen, basis.W_unseen)):
        rows = 0 if W is None else len(W)
        require(len(names) in (0, rows), f"{len(names)} user ids for {rows} rows of weights")
    found = {name: x for name in TENSORS if (x := getattr(basis, name)) is not None}
    kept = {name: x.detach().float().cpu().contiguous().clone() for name, x in found.items()}
    notes = {"users": [*map(str, basis.users)], "users_unseen": [*map(str, basis.users_unseen)]}
    notes |= {"settings": basis.settings}
    metadata = {name: json.dumps(note, default=str) for name, note in notes.items()}
    content = save(kept, metadata | {"unit": UNIT})
    write_whole(Path(path), lambda draft: draft.write_bytes(content))


def load_basis(path: str | Path) -> Basis:
    """Read what ``save_basis`` wrote; InputError if it is missing, damaged or something else."""
    path = Path(path)

    def check(fine: bool, what: str) -> None:
        require(fine, f"{path}: {what}; {REMEDY}")

    require(path.is_file(), f"{path}: no such basis file")
    metadata, found = read_tensors(path, REMEDY)
    unit = metadata.get("unit", UNIT)
    check(unit == UNIT, f"its unit is {unit!r:.40}, not {UNIT}")
    V = expect(path, found, REMEDY, "V", torch.float32, None, None)
    F, K = V.shape
    shapes = {"V": (F, K), "W": (None, K), "W_unseen": (None, K), "reference": (F,), "center": (F,)}
    tensors = {
        name: expect(path, found, REMEDY, name, torch.float32, *shape)
        for name, shape in shapes.items()
        if name in found or name == "W"
    }
    require_finite(path, tensors, REMEDY)
    check(V.numel() > 0 and len(tensors["W"]) > 0, "V or W is empty")
    notes = {}
    for name, kind in {"users": list, "users_unseen": list, "settings": dict}.items():
        with suppress(ValueError, RecursionError):
            notes[name] = json.loads(metadata[name]) if name in metadata else kind()
        fits = isinstance(notes.get(name), kind) and all(isinstance(x, str) for x in notes[name])
        check(fits, f"{name} are not as expected")
    basis = Basis(**tensors, **notes)
    for name, names in (("W", basis.users), ("W_unseen", basis.users_unseen)):
        W = tensors.get(name, torch.empty(0, K))
        simplex = bool((W >= 0).all()) and torch.allclose(W.sum(1), torch.ones(()), 0, 1e-3)
        check(simplex, f"{name} holds weights that are below 0 or do not add up to one")
        check(len(names) in (0, len(W)), f"names {len(names)} users for {len(W)} rows of weights")
    check(len(set(basis.names)) == len(basis.names), "names a user twice")
    return basis
