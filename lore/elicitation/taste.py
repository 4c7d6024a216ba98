"""What a basis file says of people in general, and what answers say of one person.

Shape letters: F features, K directions of taste, n comparisons, S numbers of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lore.common.files import InputError, require
from lore.elicitation.ranking import fit_user
from lore.learning.basis import Basis
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import (
    Evidence,
    Prior,
    moments,
    posterior_states,
    predict,
    unpack,
)
from lore.methods.mixed_fit import Saved
from lore.methods.saved import load_learned
from utils import TEMPERATURE

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
    """

    method: str
    directions: Tensor
    prior: Prior
    settings: Mapping[str, Any]
    basis: Basis | None = None

    @property
    def components(self) -> int:
        """C, of the prior."""
        return len(self.prior.weight)

    def state(self, Z: Tensor) -> Tensor:
        """What is known of a person who chose the first of each pair: the posterior [S].

        Args:
            Z: differences in the directions, chosen minus rejected [n, 1 + K]; n may be 0.
        """
        return posterior_states(Evidence(Z, Users([len(Z)])), self.prior)[0]

    def moments(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [K] and covariance [K, K] of a state."""
        mean, cov = moments(state[None], self.components)
        return mean[0], cov[0]

    def chances(self, state: Tensor, Z: Tensor) -> Tensor:
        """Probability [n] that the first of each pair is preferred.

        Args:
            state: the posterior [S].
            Z: differences in the directions, first minus second [n, 1 + K].
        """
        whose = torch.zeros(len(Z), dtype=torch.long)
        return torch.sigmoid(predict(Z, state[None], whose, self.components))

    def weights(self, Z: Tensor, state: Tensor, seed: int = 0) -> Tensor:
        """The person's weights [K]: LoRe's estimate (eq. 11), or the mean of the posterior.

        Args:
            Z: as in ``state``.
            state: the posterior [S].
            seed: of the initial values of LoRe's estimate.
        """
        if self.basis is None:
            return self.moments(state)[0]
        if not len(Z):
            return self.basis.W.mean(0)
        rewards = (TEMPERATURE * Z[:, 1:]).to(self.basis.W)
        return fit_user(self.basis, rewards, seed, 500, 0.1)[0]

    def described(self, state: Tensor) -> dict[str, Any]:
        """The components of a posterior as JSON values."""
        weight, mean, cov = (x[0].tolist() for x in unpack(state[None], self.components))
        return {"weight": weight, "mean": mean, "covariance": cov}


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
    return Taste("mixed logit", saved.fit.directions.double(), prior, saved.facts)


def _of_lore(path: Path, basis: Basis) -> Taste:
    """LoRe has no prior: its seen users' weights, as if Gaussian, stand for one."""
    users, K = basis.W.shape
    require(K > 1, f"{path} has rank 1, where all users are alike: take a basis of a higher rank")
    require(users > 1, f"{path} has one user: how people differ cannot be told from it")
    W = basis.W.double()
    cov = torch.cov(W.T) + LEAST_VARIANCE * torch.eye(K, dtype=W.dtype)
    prior = Prior(W.new_ones(1), W.mean(0)[None], cov[None])
    directions = torch.cat([basis.V.new_zeros(len(basis.V), 1), basis.V], 1) / TEMPERATURE
    return Taste("LoRe", directions.double(), prior, basis.settings, basis)
