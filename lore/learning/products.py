"""The rewards x^T V w that users give their comparisons, and their gradients in V and w.

Several models stand side by side, as C columns of one basis; model m has ``ranks[m]`` of them.
Shape letters: U users, N comparisons, F features, C columns, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lore.learning.comparisons import Comparisons, DenseFeatures, Users


def user_products(
    data: Comparisons, V: Tensor, W: Tensor, ranks: Sequence[int], Z: Tensor | None = None
) -> Tensor:
    """x^T V w [N, M] of every comparison for its own user in each model; differentiable.

    Args:
        data: the comparisons.
        V: bases side by side [F, C].
        W: the users' weights [U, C].
        ranks: columns of each model [M].
        Z: the comparisons projected, X V [N, C], where that is known.
    """
    if data.device.type == "cpu" and isinstance(data.features, DenseFeatures):
        return _ByDirection.apply(data, V, W, ranks)
    return _ByProjection.apply(data, V, W, ranks, data.project(V.detach()) if Z is None else Z)


def projected_products(users: Users, Z: Tensor, W: Tensor) -> Tensor:
    """z^T w [N] of projected comparisons Z [N, K] for W [U, K]; differentiable in W."""
    return _Projected.apply(users, Z, W)


class _ByDirection(Function):
    """A comparison meets its own user's directions V w: one product each, whatever the rank.

    With H [U, M, F] each user's sums of slope times x, the gradients are H V and H^T W.
    """

    @staticmethod
    def forward(
        ctx: Any, data: Comparisons, V: Tensor, W: Tensor, ranks: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(V, W)
        ctx.data, ctx.ranks = data, ranks
        directions = V.new_empty(len(W), len(ranks), len(V))  # [U, M, F]
        for m, (v, w) in enumerate(zip(V.split(ranks, 1), W.split(ranks, 1), strict=True)):
            torch.mm(w, v.T, out=directions[:, m])
        return data.dots(data.features.x.to(V.dtype), directions)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        V, W = ctx.saved_tensors
        H = ctx.data.sums(ctx.data.features.x.to(V.dtype), slope).unbind(1)
        dV = dW = None
        if ctx.needs_input_grad[1]:
            dV = torch.cat([w.T @ h for h, w in zip(H, W.split(ctx.ranks, 1), strict=True)]).T
        if ctx.needs_input_grad[2]:
            dW = torch.cat([h @ v for h, v in zip(H, V.split(ctx.ranks, 1), strict=True)], 1)
        return None, dV, dW, None


class _ByProjection(Function):
    """The same from Z = X V [N, C], for features that are streamed or on a GPU."""

    @staticmethod
    def forward(
        ctx: Any, data: Comparisons, V: Tensor, W: Tensor, ranks: Sequence[int], Z: Tensor
    ) -> Tensor:
        ctx.save_for_backward(W, Z)
        ctx.data, ctx.ranks = data, ranks
        products = (Z * W.index_select(0, data.user)).split(ranks, 1)
        return torch.stack([p.sum(1) for p in products], 1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        W, Z = ctx.saved_tensors
        columns = zip(slope.split(1, 1), ctx.ranks, strict=True)
        G = torch.cat([s.expand(-1, rank) for s, rank in columns], 1)  # [N, C]: no wait on a GPU
        dV = dW = None
        if ctx.needs_input_grad[1]:
            dV = ctx.data.backproject(G * W.index_select(0, ctx.data.user))
        if ctx.needs_input_grad[2]:
            dW = ctx.data.sum(G * Z)
        return None, dV, dW, None, None


class _Projected(Function):
    @staticmethod
    def forward(ctx: Any, users: Users, Z: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(Z)
        ctx.users = users
        products = W.index_select(0, users.user).mul_(Z)  # new memory costs more than the product
        return products @ products.new_ones(Z.shape[1])  # faster than sums over so few columns

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (Z,) = ctx.saved_tensors
        return None, None, ctx.users.sum(Z, slope)
