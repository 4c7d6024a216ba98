"""What a basis file says of people in general, and what answers say of one person.

Shape letters: F features, K directions of taste, n comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lore.common.files import InputError, require
from lore.elicitation.criteria import Belief
from lore.elicitation.ranking import fit_user
from lore.learning.basis import Basis
from lore.methods.fitting.posterior import Prior
from lore.methods.mixed_logit import Saved
from lore.methods.saved import load_learned

LEAST_VARIANCE = 1e-4  # of a LoRe weight among users: weights on the simplex vary in K - 1 ways


@dataclass
class Taste:
    """How people differ: log odds are a + z . b with a person's b drawn from the prior.

    Attributes:
        method: that learned it, as the profile names it.
        directions: the shared reward, then those of taste [F, 1 + K], in log odds.
        prior: of b.
        settings: of the file, such as the model that it belongs to.
        basis: LoRe's, whose users' weights the point estimate may be shrunk to; else None.
        scale: of all log odds.
    """

    method: str
    directions: Tensor
    prior: Prior
    settings: Mapping[str, Any]
    basis: Basis | None = None
    scale: float = 1.0

    def belief(self, Z: Tensor) -> Belief:
        """What is known of a person who chose the first of each pair.

        Args:
            Z: differences in the directions, chosen minus rejected [n, 1 + K]; n may be 0.
        """
        return Belief.after(self.prior, Z)

    def logits(self, weights: Tensor, Z: Tensor) -> Tensor:
        """Log odds [n] that the first of each pair is preferred, given weights [K]."""
        return self.scale * (Z[:, 0] + Z[:, 1:] @ weights.to(Z))

    def weights(self, Z: Tensor, belief: Belief, seed: int = 0) -> Tensor:
        """The person's weights [K]: LoRe's estimate (eq. 11), or the posterior's mode.

        Args:
            Z: as in ``belief``.
            belief: what that gave.
            seed: of the initial values of LoRe's estimate.
        """
        if self.basis is None:
            return belief.mean
        if not len(Z):
            return self.basis.W.mean(0)
        return fit_user(self.basis, Z[:, 1:], seed, 500, 0.1)[0]


def load_taste(path: Path) -> Taste:
    """What a run's basis file or mixed logit says.

    Raises:
        InputError: another file, or one that knows of no differences between people.
    """
    learned = load_learned(path)
    return _of_lore(path, learned) if isinstance(learned, Basis) else _of_mixed_logit(path, learned)


def _of_mixed_logit(path: Path, saved: Saved) -> Taste:
    prior = saved.fit.prior
    if prior is None:
        raise InputError(f"{path}: this mixed logit found no differences between users to ask for")
    directions = saved.fit.all_directions().double()
    return Taste("mixed logit", directions, prior, saved.facts, scale=saved.fit.scale)


def _of_lore(path: Path, basis: Basis) -> Taste:
    """LoRe has no prior: its seen users' weights, as if Gaussian, stand for one."""
    users, K = basis.W.shape
    require(K > 1, f"{path} has rank 1, where all users are alike: take a basis of a higher rank")
    require(users > 1, f"{path} has one user: how people differ cannot be told from it")
    W = basis.W.double()
    cov = torch.cov(W.T) + LEAST_VARIANCE * torch.eye(K, dtype=W.dtype)
    prior = Prior(W.mean(0), cov)
    directions = torch.stack([torch.zeros(len(basis.V)), *basis.columns().values()], 1)
    return Taste("LoRe", directions.double(), prior, basis.settings, basis)
