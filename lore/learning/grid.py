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
    bases: list[Basis] = []
    untrained: dict[int, Model] = {}  # by the place of the basis

    def train() -> None:
        models = list(untrained.values())
        trained = train_together(models, data, checkpoint) if models else []
        for place, model, (W, V) in zip(untrained, models, trained, strict=True):
            bases[place].W, bases[place].V, bases[place].losses = W, V, model.losses
        untrained.clear()

    for point in points:
        rank, W = point["rank"], torch.ones(num_users, 1, device=data.device)
        if rank:
            given = direction, point["alpha"], num_users, data.num_features, rank
            untrained[len(bases)] = estimator(*given, shrinkage=point["shrinkage"], **settings)
        require(rank or direction is not None, "rank 0 is the reference model: there is none")
        V = torch.empty(0) if rank else direction.float()[:, None].to(data.device)
        bases.append(Basis(V, W, direction, settings=dict(point)))
        if then is not None:
            columns = rank
            if estimator.drops_columns:
                train()
                columns = bases[-1].V.shape[1]
            then(columns if rank > 1 else 0)
    train()
    return bases
