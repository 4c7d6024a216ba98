"""Bases of every (alpha, rank, shrinkage), trained together; rank 0 is the reference itself.

Shape letters: U users, F features, K rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lore.common.files import require
from lore.learning.basis import Basis
from lore.learning.comparisons import Comparisons
from lore.learning.training import Checkpoint, Model, train_together


def check_reference(V_sft: Tensor | None, num_features: int) -> Tensor | None:
    """The reference as [F], from [F] or [F, 1]; InputError for another shape, NaN or infinity."""
    if V_sft is None:
        return None
    shapes = {(num_features,), (num_features, 1)}
    require(
        tuple(V_sft.shape) in shapes,
        f"the reference has shape {tuple(V_sft.shape)}; ({num_features},) or ({num_features}, 1) "
        "is expected",
    )
    require(bool(torch.isfinite(V_sft).all()), "the reference holds NaN or infinity")
    return V_sft.detach().reshape(-1)


def grid(
    ranks: Sequence[int], alphas: Sequence[float], shrinkages: Sequence[float] = (0.0,)
) -> list[dict[str, Any]]:
    """Settings of every (alpha, rank, shrinkage), alphas outermost; ranks to 1 shrink nothing."""
    return [
        {"rank": int(rank), "alpha": float(alpha), "shrinkage": float(shrinkage)}
        for alpha in alphas
        for rank in ranks
        for shrinkage in (shrinkages if rank > 1 else (0.0,))
    ]


def make_model(
    about: Mapping[str, Any],
    estimator: type[Model],
    reference: Tensor | None,
    num_users: int,
    num_features: int,
    **settings: Any,
) -> Model | None:
    """The untrained model of some settings of the grid, its initial values drawn; None at rank 0.

    Raises:
        InputError: rank 0 without a reference, or a negative rank.
    """
    rank = about["rank"]
    if rank == 0:
        require(reference is not None, "rank 0 is the reference model: there is none")
        return None
    return estimator(
        reference, about["alpha"], num_users, num_features, rank,
        shrinkage=about["shrinkage"], **settings,
    )  # fmt: skip


def train_bases(
    points: Sequence[dict[str, Any]],
    models: Sequence[Model | None],
    reference: Tensor | None,
    data: Comparisons,
    num_users: int,
    checkpoint: Checkpoint | None = None,
) -> list[Basis]:
    """Train models together; a basis for each point of the grid."""
    some = [model for model in models if model is not None]
    trained = iter(train_together(some, data, checkpoint) if some else [])
    bases = []
    for about, model in zip(points, models, strict=True):
        if model is None:
            V, W = reference.float()[:, None].to(data.device), torch.ones(num_users, 1)
            basis = Basis(V, W.to(data.device), reference, settings=dict(about))
        else:
            W, V = next(trained)
            basis = Basis(V, W, reference, settings=dict(about), losses=model.losses)
        bases.append(basis)
    return bases


def fit_bases(
    estimator: type[Model],
    points: Sequence[dict[str, Any]],
    reference: Tensor | None,
    data: Comparisons,
    num_users: int,
    checkpoint: Checkpoint | None = None,
    **settings: Any,
) -> list[Basis]:
    """A basis for all settings of the grid; rank 0 is the reference itself.

    Args:
        estimator: ``utils.LoRe`` or ``utils.LoRe_regularized``.
        points: see ``grid``.
        reference: [F] or [F, 1]; None if there is none.
        data: comparisons of the users, or this process's share.
        num_users: users in all.
        checkpoint: where to keep the state of the training.
        settings: of the estimator: num_iterations, learning_rate, generator, optimizer, ...

    Raises:
        InputError: rank 0 without a reference, or a negative rank.
    """
    direction = check_reference(reference, data.num_features)
    models = [
        make_model(about, estimator, direction, num_users, data.num_features, **settings)
        for about in points
    ]
    return train_bases(points, models, direction, data, num_users, checkpoint)
