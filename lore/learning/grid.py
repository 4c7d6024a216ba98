"""Bases of every (alpha, rank, shrinkage), trained together; rank 0 is the reference itself."""

from collections.abc import Callable, Sequence
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
    found, expected = tuple(V_sft.shape), f"({num_features},) or ({num_features}, 1)"
    fits = found in {(num_features,), (num_features, 1)}
    require(fits, f"the reference has shape {found}; {expected} is expected")
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


def fit_bases(
    estimator: type[Model], points: Sequence[dict[str, Any]], reference: Tensor | None,
    data: Comparisons, num_users: int, checkpoint: Checkpoint | None = None,
    then: Callable[[int], object] | None = None, **settings: Any,
) -> list[Basis]:  # fmt: skip
    """A basis for all settings of a ``grid``; rank 0 is the reference itself, [F] or [F, 1]. The
    data are the comparisons of all users, or this process's share; settings are the estimator's.

    ``then`` draws new users' initial values after those of each point, given the logits that each
    needs (0 up to rank 1). Where columns may be dropped, that is known after training: then one
    model is trained after the other.
    """
    direction = check_reference(reference, data.num_features)
    in_turn = then is not None and estimator.drops_columns
    models, bases = [], []
    for point in points:
        rank, about = point["rank"], {"shrinkage": point["shrinkage"], **settings}
        require(rank != 0 or direction is not None, "rank 0 is the reference model: there is none")
        given = direction, point["alpha"], num_users, data.num_features, rank
        models.append((point, estimator(*given, **about) if rank else None))
        if in_turn:
            bases += _train(models[-1:], direction, data, num_users)
            rank = bases[-1].V.shape[1]
        if then is not None:
            then(rank if point["rank"] > 1 else 0)
    return bases if in_turn else _train(models, direction, data, num_users, checkpoint)


def _train(
    models: Sequence[tuple[dict[str, Any], Model | None]], reference: Tensor | None,
    data: Comparisons, num_users: int, checkpoint: Checkpoint | None = None,
) -> list[Basis]:  # fmt: skip
    some = [model for _, model in models if model is not None]
    trained, bases = iter(train_together(some, data, checkpoint) if some else []), []
    for point, model in models:
        if model is None:
            V, losses = reference.float()[:, None].to(data.device), torch.empty(0)
            W = torch.ones(num_users, 1, device=data.device)
        else:
            (W, V), losses = next(trained), model.losses
        bases.append(Basis(V, W, reference, settings=dict(point), losses=losses))
    return bases
