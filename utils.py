"""The learning core of LoRe: low-rank reward models for many users (arXiv 2504.14439).

Shape letters: U users, N comparisons, F features, K rank, C columns of several models side by
side, M models. A comparison is the difference of two embeddings, chosen minus rejected; its logit
for a user with weights w on the simplex is x^T V w / 100. Nothing here reads a dataset or a
language model; tensors come in, tensors go out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cosine_similarity, embedding_bag, logsigmoid
from torch.optim import Optimizer
from tqdm import tqdm

from basis import Basis, load_basis, save_basis  # noqa: F401
from files import InputError, write_whole  # noqa: F401

log = logging.getLogger(__name__)

TEMPERATURE = 100.0  # the published code's scale of the logits; the paper has none
MIN_WEIGHT = 1e-2  # a column that no user gives more weight is dropped (LoRe_regularized)
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # features read at a time
BLOCK_BYTES = 8 << 20  # features of a few users that a CPU's cache holds while they are worked on

Seed = int | torch.Generator | None
OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
# Their update of an entry depends on that entry alone, so that models trained side by side in one
# tensor, or split over processes, follow the trajectories they follow alone.
ELEMENTWISE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
)  # fmt: skip


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def as_generator(seed: Seed) -> torch.Generator | None:
    """A generator for a seed; a generator and None (torch's global one) stay what they are."""
    return torch.Generator().manual_seed(int(seed)) if isinstance(seed, int | np.integer) else seed


def make_optimizer(
    optimizer: type[Optimizer] | OptimizerFactory | None,
    parameters: Iterable[Tensor],
    learning_rate: float,
) -> Optimizer:
    """The optimiser of some tensors: the paper's Adam unless another one is asked for.

    Args:
        optimizer: a class, made with lr=learning_rate, or a function of the tensors that brings
            its own settings, such as ``functools.partial(torch.optim.SGD, lr=1.0)``.
        parameters: what to optimise.
        learning_rate: of Adam, or of the class given.
    """
    if isinstance(optimizer, type) or optimizer is None:
        return (optimizer or torch.optim.Adam)(parameters, lr=learning_rate)
    return optimizer(parameters)


# ------------------------------------------------------------------ Comparisons


class Features(Protocol):
    """Feature differences x [N, F] of N comparisons, touched by two products only."""

    num_features: int
    device: torch.device

    def __len__(self) -> int: ...

    def project(self, V: Tensor) -> Tensor:
        """X V [N, C] for V [F, C]."""

    def backproject(self, G: Tensor) -> Tensor:
        """X^T G [F, C] for G [N, C]."""


def _chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * columns))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class DenseFeatures:
    """Differences held as one tensor [N, F], in memory or memory-mapped, of any float type.

    Args:
        x: the differences; may lie on another device than the one that computes.
        device: where the products are formed; None for where x lies.
    """

    def __init__(self, x: Tensor, device: torch.device | str | None = None) -> None:
        self.x = x
        self.device = torch.device(device) if device is not None else x.device
        self.num_features = x.shape[1]

    def __len__(self) -> int:
        return len(self.x)

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for part in _chunks(len(self), self.num_features, self.device):
            yield part, self.x[part].to(self.device, dtype)

    def project(self, V: Tensor) -> Tensor:
        """X V [N, C] for V [F, C]."""
        out, VT = V.new_empty(len(self), V.shape[1]), V.T.contiguous()
        for part, x in self._parts(V.dtype):
            torch.mm(x, VT.T, out=out[part])  # twice as fast as x @ V with rows of a few columns
        return out

    def backproject(self, G: Tensor) -> Tensor:
        """X^T G [F, C] for G [N, C]."""
        total = G.new_zeros(G.shape[1], self.num_features)
        for part, x in self._parts(G.dtype):
            total.addmm_(G[part].T, x)  # (G^T X)^T: X^T G of a tall X is several times slower
        return total.T


class RowFeatures:
    """Differences of rows of an embedding table that stays on disk (streamed in chunks).

    The products are formed from the table's distinct rows, so the differences are never held:
    X V = (E V)[chosen] - (E V)[rejected].

    Args:
        rows: reads rows of the table: index [n] -> embeddings [n, F].
        num_features: F.
        chosen, rejected: row numbers [N] in the table.
        device: where the products are formed.
    """

    def __init__(
        self,
        rows: Callable[[Tensor], Tensor],
        num_features: int,
        chosen: Tensor,
        rejected: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.num_features = rows, num_features
        self.device = torch.device(device)
        both = torch.cat([torch.as_tensor(chosen).long(), torch.as_tensor(rejected).long()])
        self.index, places = torch.unique(both, return_inverse=True)
        self.chosen, self.rejected = places.to(self.device).chunk(2)

    def __len__(self) -> int:
        return len(self.chosen)

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for part in _chunks(len(self.index), self.num_features, self.device):
            yield part, self.rows(self.index[part]).to(self.device, dtype)

    def rewards(self, V: Tensor) -> Tensor:
        """E V [rows, C] of the distinct rows, in the order of ``index``, for V [F, C]."""
        rewards, VT = V.new_empty(len(self.index), V.shape[1]), V.T.contiguous()
        for part, e in self._parts(V.dtype):
            torch.mm(e, VT.T, out=rewards[part])
        return rewards

    def project(self, V: Tensor) -> Tensor:
        """X V [N, C] for V [F, C]."""
        rewards = self.rewards(V)
        return rewards[self.chosen] - rewards[self.rejected]

    def backproject(self, G: Tensor) -> Tensor:
        """X^T G [F, C] for G [N, C]."""
        per_row = G.new_zeros(len(self.index), G.shape[1])
        per_row.index_add_(0, self.chosen, G).index_add_(0, self.rejected, G, alpha=-1)
        total = G.new_zeros(G.shape[1], self.num_features)
        for part, e in self._parts(G.dtype):
            total.addmm_(per_row[part].T, e)
        return total.T

    def dense(self, dtype: torch.dtype = torch.float32) -> DenseFeatures:
        """The same differences, held in memory: [N, F]."""
        x = torch.empty(len(self), self.num_features, dtype=dtype, device=self.device)
        for part in _chunks(len(self), self.num_features, self.device):
            chosen, rejected = (self.index[i[part].cpu()] for i in (self.chosen, self.rejected))
            x[part] = (self.rows(chosen) - self.rows(rejected)).to(self.device, dtype)
        return DenseFeatures(x)


class Owners:
    """Rows that belong to B owners, a run of them to each, who own them in each of M models.

    Args:
        counts: rows of each owner [B], n in all.
        models: M.
    """

    def __init__(self, counts: Tensor, models: int = 1) -> None:
        self.counts, self.models = counts, models
        self.owner = torch.repeat_interleave(counts)  # of each row [n]
        n, model = len(self.owner), torch.arange(models, device=counts.device)[:, None]
        self.row = torch.arange(n, device=counts.device).repeat(models)  # model after model
        self.starts = (counts.cumsum(0) - counts + n * model).flatten()

    @cached_property
    def pattern(self) -> Tensor:
        """Which directions each row meets: zeros [n, M B] where it does, sparse."""
        n = len(self.owner)
        model = len(self.counts) * torch.arange(self.models)
        meets = self.owner[:, None] + model  # [n, M]
        ends, zeros = self.models * torch.arange(n + 1), torch.zeros(meets.numel())
        shape = (n, len(self.counts) * self.models)
        with warnings.catch_warnings():  # torch announces that its CSR format may change
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            return torch.sparse_csr_tensor(
                ends, meets.flatten(), zeros, shape, check_invariants=True
            )

    def dots(self, x: Tensor, D: Tensor) -> Tensor:
        """Products of rows x [n, F] with their owners' directions D [M B, F]: [n, M]."""
        if x.device.type != "cpu":
            return torch.stack([(x * d[self.owner]).sum(1) for d in D.chunk(self.models)], 1)
        pattern = self.pattern.to(x.dtype)
        return torch.sparse.sampled_addmm(pattern, x, D.T, beta=0).values().view(-1, self.models)

    def sums(self, x: Tensor, scale: Tensor) -> Tensor:
        """Each owner's sum of rows x [n, F] times each model's scale [n, M]: [M B, F]."""
        scale = scale.T.contiguous().flatten()
        return embedding_bag(self.row, x, self.starts, mode="sum", per_sample_weights=scale)


class Comparisons:
    """The comparisons of U users, packed: features [N, F], user [N] ascending, weight [N].

    Args:
        features: the feature differences.
        counts: number of comparisons of each user [U]; every user has at least one.
        weight: how much each comparison counts [N]; one each if None.
    """

    def __init__(
        self, features: Features, counts: Sequence[int], weight: Tensor | None = None
    ) -> None:
        self.features, self.device = features, features.device
        self.counts = torch.as_tensor(counts, device=self.device)
        self.num_users = len(self.counts)
        _require(self.num_users > 0, "no users: give at least one user with comparisons")
        for u, count in enumerate(self.counts.tolist()):
            _require(count > 0, f"user {u} has no comparisons: leave the user out")
        self.owners = Owners(self.counts)
        self.user = self.owners.owner
        _require(len(self.user) == len(features), "counts do not add up to the comparisons")
        if weight is None:
            weight = torch.ones(len(features), dtype=torch.float64)
        weight = weight.to(self.device)
        _require(weight.shape == (len(features),), "give one weight per comparison")
        _require(bool((weight > 0).all()), "weights of comparisons must be positive")
        self.weight = weight

    @classmethod
    def from_list(
        cls,
        X: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Comparisons:
        """Pack a list of U tensors [m_u, F]; views of one tensor, in order, are not copied.

        Raises:
            InputError: a user without comparisons, another width, NaN or infinity (with the user
                and row), or weights that do not match.
        """
        _check_features(X)
        if weights is not None:
            for u, (x, w) in enumerate(zip(X, weights, strict=True)):
                _require(w.shape == (len(x),), f"user {u}: {len(x)} comparisons, {len(w)} weights")
        weight = None if weights is None else torch.cat([w.double() for w in weights])
        x = _pack(X)
        x = x if device is None else x.to(device)
        return cls(DenseFeatures(x), [len(x) for x in X], weight)

    def __len__(self) -> int:
        return len(self.user)

    def sum_by_user(self, scale: Tensor, values: Tensor) -> Tensor:
        """Sums over each user's comparisons of scale [N] times values [N, C]: [U, C]."""
        return self.owners.sums(values, scale[:, None])

    def user_weight(self) -> Tensor:
        """Sum of the weights of each user's comparisons [U]; the number of them by default."""
        weight = self.weight.double()
        return self.sum_by_user(weight, torch.ones_like(weight)[:, None])[:, 0]

    def accuracies(self, Z: Tensor, W: Tensor) -> Tensor:
        """Share of each user's comparisons with a positive logit (eq. 15), weighted: [U].

        Args:
            Z: projected comparisons X V [N, K].
            W: weights of the users [U, K].
        """
        right = (Z * W.to(Z)[self.user]).sum(1) > 0
        return self.share(right)

    def share(self, right: Tensor) -> Tensor:
        """Weighted share of each user's comparisons that are right [N], true or false: [U]."""
        weight = self.weight.double()
        return self.sum_by_user(weight, right.double()[:, None])[:, 0] / self.user_weight()

    def select(self, rows: Tensor, counts: Sequence[int]) -> Comparisons:
        """Bookkeeping for some of the comparisons, as of other users; features stay behind."""
        stand_in = DenseFeatures(torch.empty(len(rows), 0, device=self.device))
        return Comparisons(stand_in, counts, self.weight[rows])


def _pack(X: Sequence[Tensor]) -> Tensor:
    """The tensors below each other [N, F]: without a copy where they already lie so."""
    first, end = X[0], X[0].data_ptr()
    for x in X:
        if x.data_ptr() != end or not x.is_contiguous() or x.dtype != first.dtype:
            return torch.cat(list(X))
        end += x.numel() * x.element_size()
    if first.untyped_storage().nbytes() < end - first.untyped_storage().data_ptr():
        return torch.cat(list(X))  # neighbours by chance, not parts of one tensor
    return first.detach().as_strided((sum(map(len, X)), first.shape[1]), (first.shape[1], 1))


def _check_features(X: Sequence[Tensor], width: int | None = None) -> None:
    _require(len(X) > 0, "no users: give a list with one tensor [comparisons, features] per user")
    for u, x in enumerate(X):
        _require(x.ndim == 2, f"user {u}: features must be [comparisons, features], not {x.ndim}-D")
        _require(len(x) > 0, f"user {u} has no comparisons: leave the user out")
        expected = width or X[0].shape[1]
        _require(
            x.shape[1] == expected, f"user {u}: {x.shape[1]} features where {expected} are expected"
        )
        _require(x.device == X[0].device, f"user {u}: features on {x.device}, not {X[0].device}")
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(f"user {u}, row {row}: NaN or infinity among the features")


def _check_reference(V_sft: Tensor | None, num_features: int) -> Tensor | None:
    """The reference as [F], from [F] or [F, 1]."""
    if V_sft is None:
        return None
    shapes = {(num_features,), (num_features, 1)}
    _require(
        tuple(V_sft.shape) in shapes,
        f"the reference has shape {tuple(V_sft.shape)}; ({num_features},) or ({num_features}, 1) "
        "is expected",
    )
    _require(bool(torch.isfinite(V_sft).all()), "the reference holds NaN or infinity")
    return V_sft.detach().reshape(-1)


# ------------------------------------------------------------- Weights of users


class Reading(Protocol):
    """Comparisons [n] of some users [B] in M models with C columns, against bases of the moment."""

    users: slice
    rows: slice

    def products(self, W: Tensor) -> Tensor:
        """x^T V w [n, M] of each model, for weights W [B, C]."""

    def weights_gradient(self, slope: Tensor) -> Tensor:
        """Sums over each user's comparisons of slope [n, M] times V^T x: [B, C]."""

    def add_basis_gradient(self, total: Tensor, slope: Tensor, W: Tensor) -> None:
        """Add the sum over the comparisons of slope times w x^T to the total [C, F]."""


class Projected:
    """All comparisons, read as their projections Z = X V [N, C] on the models' columns.

    Args:
        data: the comparisons; their features are read for a basis' gradient alone.
        ranks: columns of each model [M], adding up to C.
        Z: the projections.
    """

    def __init__(self, data: Comparisons, ranks: Sequence[int], Z: Tensor) -> None:
        self.data, self.ranks, self.Z = data, ranks, Z
        self.users, self.rows = slice(0, data.num_users), slice(0, len(Z))
        self.member = _members(ranks).to(Z)

    def products(self, W: Tensor) -> Tensor:
        """x^T V w [N, M] of each model, for weights W [U, C]."""
        return (self.Z * W.index_select(0, self.data.user)) @ self.member

    def weights_gradient(self, slope: Tensor) -> Tensor:
        """Sums over each user's comparisons of slope [N, M] times V^T x: [U, C]."""
        parts = zip(slope.split(1, 1), self.Z.split(self.ranks, 1), strict=True)
        return torch.cat([self.data.owners.sums(z.contiguous(), d) for d, z in parts], 1)

    def add_basis_gradient(self, total: Tensor, slope: Tensor, W: Tensor) -> None:
        """Add the sum over the comparisons of slope times w x^T to the total [C, F]."""
        G = (slope @ self.member.T) * W.index_select(0, self.data.user)
        total += self.data.features.backproject(G).T


class Owned:
    """Some users' comparisons x [n, F], each met by its own user's reward directions V w.

    A comparison then takes one product with each model, and one more for the gradients, however
    many columns V has: with H [M, B, F] the sums over each user's comparisons of slope times x,
    the gradients are V^T h in the weights and the sum over users of w h^T in the basis.

    Args:
        users, rows: which users and comparisons of all.
        x: the comparisons.
        owners: how many of them each user has.
        bases: V^T [K, F] of each model.
    """

    def __init__(
        self, users: slice, rows: slice, x: Tensor, owners: Owners, bases: Sequence[Tensor]
    ) -> None:
        self.users, self.rows, self.x, self.owners, self.bases = users, rows, x, owners, bases
        self.ranks = [len(basis) for basis in bases]
        self.known: tuple[Tensor | None, Sequence[Tensor]] = None, ()

    def products(self, W: Tensor) -> Tensor:
        """x^T V w [n, M] of each model, for weights W [B, C]."""
        D = self.x.new_empty(len(self.bases), len(W), self.x.shape[1])
        for own, w, basis in zip(D, W.split(self.ranks, 1), self.bases, strict=True):
            torch.mm(w, basis, out=own)
        return self.owners.dots(self.x, D.flatten(0, 1))

    def weights_gradient(self, slope: Tensor) -> Tensor:
        """Sums over each user's comparisons of slope [n, M] times V^T x: [B, C]."""
        pairs = zip(self._sums(slope), self.bases, strict=True)
        return torch.cat([h @ basis.T for h, basis in pairs], 1)

    def add_basis_gradient(self, total: Tensor, slope: Tensor, W: Tensor) -> None:
        """Add the sum over the comparisons of slope times w x^T to the total [C, F]."""
        parts = zip(total.split(self.ranks), W.split(self.ranks, 1), self._sums(slope), strict=True)
        for part, w, h in parts:
            part.addmm_(w.T, h)

    def _sums(self, slope: Tensor) -> Sequence[Tensor]:
        """H, kept for the other gradient at the same slopes."""
        if self.known[0] is not slope:
            self.known = slope, self.owners.sums(self.x, slope).chunk(len(self.ranks))
        return self.known[1]


def _runs(counts: Sequence[int], most: int, besides: int) -> Iterator[slice]:
    """Runs of users with at most so many rows, if they have fewer alone.

    Args:
        counts: comparisons of each user.
        most: rows of a run.
        besides: rows that each user takes besides the comparisons.
    """
    first = filled = 0
    for user, count in enumerate(counts):
        if filled and filled + count + besides > most:
            yield slice(first, user)
            first, filled = user, 0
        filled += count + besides
    yield slice(first, len(counts))


def _members(ranks: Sequence[int]) -> Tensor:
    """Which columns are whose: [C, M], ones and zeros."""
    model = torch.repeat_interleave(torch.tensor(ranks))
    return torch.nn.functional.one_hot(model, len(ranks))


class Reader:
    """Reads comparisons for models' bases, block by block: each block's features once a reading.

    On a CPU a block is a few users' features, as many as its cache holds, so that everything is
    computed on them while they are there. Elsewhere, and for streamed features, all are one block.

    Args:
        data: the comparisons.
        ranks: columns of each model [M], adding up to C.
        whole: one block in any case.
    """

    def __init__(self, data: Comparisons, ranks: Sequence[int], whole: bool = False) -> None:
        self.data, self.ranks = data, list(ranks)
        self.users = [slice(0, data.num_users)]
        self.owned = data.device.type == "cpu" and isinstance(data.features, DenseFeatures)
        self.blocks: list[tuple[slice, slice, Owners]] = []
        if self.owned:
            if not whole:
                rows = BLOCK_BYTES // (4 * data.features.num_features)
                self.users = list(_runs(data.counts.tolist(), rows, besides=2 * len(self.ranks)))
            ends = [0, *data.counts.cumsum(0).tolist()]
            for users in self.users:
                rows = slice(ends[users.start], ends[users.stop])
                self.blocks.append((users, rows, Owners(data.counts[users], len(self.ranks))))

    def __call__(self, V: Tensor) -> Iterator[Reading]:
        """The blocks, for bases V [F, C] side by side."""
        if not self.owned:
            yield Projected(self.data, self.ranks, self.data.features.project(V))
            return
        bases = [part.T.contiguous() for part in V.split(self.ranks, 1)]
        for users, rows, owners in self.blocks:
            x = self.data.features.x[rows].to(V.dtype)
            yield Owned(users, rows, x, owners, bases)


class UserWeights:
    """Simplex weights of U users in M models side by side, and the loss's gradient in them.

    Args:
        logits: free logits [U, C] before the softmax; the optimiser's tensor.
        ranks: columns of each model [M], adding up to C.
        coefficient: of each comparison's loss [N].
        shrinkage: strength of each model's pull towards the population's weights [M], in
            comparisons: a user's loss gains shrinkage * coefficient * KL(population || w).
        per_comparison: what one comparison of a user weighs [U], for the pull.
        population: weights [C] to pull to; None for the users' own mean at each step.
        distributed: the users' mean is over all processes' users.
    """

    def __init__(
        self,
        logits: Tensor,
        ranks: Sequence[int],
        coefficient: Tensor,
        shrinkage: Sequence[float] = (0.0,),
        per_comparison: Tensor | None = None,
        population: Tensor | None = None,
        distributed: bool = False,
    ) -> None:
        self.logits, self.ranks, self.coefficient = logits, list(ranks), coefficient
        self.population, self.distributed = population, distributed
        self.target = population
        self.member = _members(ranks).to(logits)  # [C, M]
        self.shrinks = any(shrinkage)
        if self.shrinks:
            strength = torch.tensor(shrinkage).to(logits)
            self.pull = per_comparison.to(logits)[:, None] * (strength @ self.member.T)  # [U, C]

    def simplex(self, users: slice = slice(None)) -> Tensor:
        """W [B, C] of some users: the softmax of each model's logits."""
        parts = self.logits[users].split(self.ranks, 1)
        return torch.cat([part.softmax(1) for part in parts], 1)

    def aim(self) -> None:
        """Settle what weights are pulled to in this step: the population, or the mean of now."""
        if self.shrinks and self.population is None:
            W = self.simplex()
            sums = torch.cat([W.sum(0), W.new_tensor([len(W)])])
            sums = _sum_over_processes(sums) if self.distributed else sums
            self.target = sums[:-1] / sums[-1]

    def slopes(self, reading: Reading, W: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [M], and their slopes in the products x^T V w [n, M], at W [B, C]."""
        logits, c = reading.products(W) / TEMPERATURE, self.coefficient[reading.rows]
        return -(c @ logsigmoid(logits)), torch.sigmoid(-logits) * (c / -TEMPERATURE)[:, None]

    def gradient(self, reading: Reading, W: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the pull alone [M], and the gradient of everything in the logits [B, C]."""
        gradient = reading.weights_gradient(slope)
        inner = (W * gradient) @ self.member @ self.member.T
        gradient = W * (gradient - inner)  # through the softmax
        if not self.shrinks:
            return W.new_zeros(len(self.ranks)), gradient
        pull = self.pull[reading.users]
        divergence = self.target * (self.target.clamp_min(1e-30).log() - W.clamp_min(1e-30).log())
        return (pull * divergence).sum(0) @ self.member, gradient + pull * (W - self.target)

    def set_gradient(self, reading: Reading, logits: Tensor) -> Tensor:
        """Put the gradient into the grad of these users' logits; returns the losses [M]."""
        W = self.simplex(reading.users)
        losses, slope = self.slopes(reading, W)
        pull, logits.grad = self.gradient(reading, W, slope)
        return losses + pull


def fit_weights(
    Z: Tensor,
    data: Comparisons,
    logits: Tensor,
    *,
    num_iterations: int = 500,
    learning_rate: float = 0.1,
    optimizer: OptimizerFactory | None = None,
    shrinkage: float = 0.0,
    population: Tensor | None = None,
    progress: bool = False,
    losses: list[float] | None = None,
) -> Tensor:
    """Weights of users for a fixed basis (eq. 11), all users at once, on projected comparisons.

    Each user's weights minimise the mean of that user's losses; users do not touch each other.

    Args:
        Z: projected comparisons X V [N, K].
        data: whose they are.
        logits: initial logits [U, K]; not changed.
        num_iterations: steps of the optimiser.
        learning_rate: of Adam.
        optimizer: another optimiser, see ``make_optimizer``.
        shrinkage: pull towards ``population``, in comparisons; 0 for none.
        population: weights [K] of the population; required with shrinkage.
        progress: show a bar.
        losses: a list to which the sum over users is appended at every step.

    Returns:
        W [U, K] on the simplex.
    """
    _require(not shrinkage or population is not None, "shrinkage needs the population's weights")
    logits = logits.detach().to(Z, copy=True)
    per_comparison = 1 / data.user_weight()
    coefficient = (data.weight * per_comparison[data.user]).to(Z)
    target = None if population is None else population.to(Z)
    ranks, reading = [Z.shape[1]], Projected(data, [Z.shape[1]], Z)
    weights = UserWeights(logits, ranks, coefficient, [shrinkage], per_comparison, target)
    steps = make_optimizer(optimizer, [logits], learning_rate)
    for _ in tqdm(range(num_iterations), "users' weights", disable=not progress, leave=False):
        loss = steps.step(lambda: weights.set_gradient(reading, logits))
        if losses is not None:
            losses.append(float(loss))
    return weights.simplex()


class PersonalizeBatch:
    """Few-shot weights of new users with the basis frozen (eq. 11).

    Args:
        num_classes: users U.
        num_features: F.
        num_basis_vectors: K.
        num_iterations, learning_rate: of the optimiser, the paper's Adam by default.
        generator: of the initial logits, standard normal, drawn user by user.
        optimizer: another optimiser, see ``make_optimizer``.
        shrinkage: pull towards ``population`` [K], in comparisons; 0 for none.
        population: mean weights of the users the basis was learned from.
        dtype: of the arithmetic; torch's default (float32) if None.
        progress: show a bar.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        num_basis_vectors: int,
        num_iterations: int = 500,
        learning_rate: float = 0.1,
        *,
        generator: Seed = None,
        optimizer: OptimizerFactory | None = None,
        shrinkage: float = 0.0,
        population: Tensor | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        _require(num_basis_vectors >= 1, f"the rank must be at least 1, not {num_basis_vectors}")
        self.num_classes, self.num_features = num_classes, num_features
        self.settings = {
            "num_iterations": num_iterations, "learning_rate": learning_rate,
            "optimizer": optimizer, "shrinkage": shrinkage, "population": population,
            "progress": progress,
        }  # fmt: skip
        self.dtype = dtype or torch.get_default_dtype()
        self.logits = draw_logits(num_classes, num_basis_vectors, generator, self.dtype)
        self.losses: list[float] = []

    def train(
        self, X: Sequence[Tensor], V: Tensor, weights: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Fit every user's weights.

        Args:
            X: U tensors [m_u, F].
            V: basis [F, K], frozen.
            weights: how much each comparison counts, U tensors [m_u].

        Returns:
            U weight vectors [K].
        """
        _check_basis(V, self.num_features, self.logits.shape[1])
        _require(len(X) == self.num_classes, f"{len(X)} users given, {self.num_classes} expected")
        _same_device(X[0], V)
        data = Comparisons.from_list(X, weights)
        Z = data.features.project(V.detach().to(self.dtype))
        self.losses = []
        return list(fit_weights(Z, data, self.logits, losses=self.losses, **self.settings))


def draw_logits(users: int, rank: int, generator: Seed, dtype: torch.dtype | None = None) -> Tensor:
    """Initial logits [U, K] of new users: standard normal, drawn user by user."""
    generator = as_generator(generator)
    return torch.stack([torch.randn(rank, generator=generator, dtype=dtype) for _ in range(users)])


def _check_basis(V: Tensor, num_features: int, rank: int | None = None) -> None:
    expected = (num_features, V.shape[-1] if rank is None else rank)
    _require(
        tuple(V.shape) == expected, f"the basis has shape {tuple(V.shape)}, expected {expected}"
    )


def _same_device(features: Tensor, *others: Tensor) -> None:
    for other in others:
        _require(
            features.device == other.device,
            f"features are on {features.device}, basis or weights on {other.device}: "
            "move them to one device",
        )


# ------------------------------------------------------------- Joint estimators


class LoRe:
    """A shared basis and every user's weights, learned jointly (eq. 10).

    Minimises sum_u mean_{i of u} softplus(-logit_i) + alpha sum_k ||V[:, k] - reference||^2 by one
    optimiser over weights and basis, on all comparisons at every step.

    Args:
        V_sft: reference reward direction [F] or [F, 1]; None if there is none (alpha must be 0).
        alpha: strength of the pull of the basis to the reference.
        num_classes: users U.
        num_features: F.
        num_basis_vectors: K, at least 1; 1 is Bradley-Terry.
        num_iterations, learning_rate: of the optimiser, the paper's Adam by default.
        generator: of the initial values, a seed or generator; None for torch's global one.
        optimizer: another optimiser, see ``make_optimizer``.
        shrinkage: pull of each user's weights towards the users' mean, in comparisons; 0 is LoRe.
        dtype: of the arithmetic; torch's default (float32) if None.
        progress: show a bar with the loss.
        distributed: the comparisons given to ``train`` are this process's share of the U users,
            in order of rank (torch.distributed); every process returns all weights.

    Attributes:
        losses: the objective at every step [T], after ``train``.
    """

    alternating = False

    def __init__(
        self,
        V_sft: Tensor | None,
        alpha: float,
        num_classes: int,
        num_features: int,
        num_basis_vectors: int,
        num_iterations: int = 1000,
        learning_rate: float = 0.5,
        *,
        generator: Seed = None,
        optimizer: OptimizerFactory | None = None,
        shrinkage: float = 0.0,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        distributed: bool = False,
    ) -> None:
        check_rank(num_basis_vectors, num_features, num_classes)
        _require(num_basis_vectors > 0, "rank 0 is the reference itself and is not trained")
        _require(alpha >= 0 and shrinkage >= 0, "alpha and shrinkage must not be negative")
        self.reference = _check_reference(V_sft, num_features)
        _require(alpha == 0 or V_sft is not None, "alpha > 0 pulls to a reference: there is none")
        self.alpha, self.shrinkage = float(alpha), float(shrinkage)
        self.num_classes, self.num_features = num_classes, num_features
        self.rank, self.num_iterations = num_basis_vectors, num_iterations
        self.learning_rate, self.optimizer = learning_rate, optimizer
        self.progress, self.distributed = progress, distributed
        self.W0, self.V0 = self._draw(as_generator(generator), dtype or torch.get_default_dtype())
        self.losses = torch.empty(0)

    def _draw(self, generator: torch.Generator | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Initial logits [U, K] and basis [F, K], in this order."""
        W0 = torch.randn(self.num_classes, self.rank, generator=generator, dtype=dtype)
        return W0, torch.randn(self.num_features, self.rank, generator=generator, dtype=dtype)

    def per_comparison(self, data: Comparisons) -> Tensor:
        """What one comparison of a user weighs in the objective [U]."""
        return 1 / data.user_weight()

    def penalty(self, V: Tensor, step: int) -> Tensor:
        """alpha sum_k ||V[:, k] - reference||^2 for V [F, K]."""
        if not self.alpha:
            return 0 * V.sum()
        return self.alpha * (V - self.reference.to(V)[:, None]).square().sum()

    def train(
        self, X: Sequence[Tensor], weights: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit on U tensors [m_u, F]; comparisons may carry weights, U tensors [m_u].

        Returns:
            W [U, K] on the simplex, and V [F, K].
        """
        return train_together([self], Comparisons.from_list(X, weights))[0]

    def finish(self, W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """What ``train`` returns, from the last weights and basis."""
        return W, V


class LoRe_regularized(LoRe):
    """The published scripts' second estimator: alternating steps, cosine pull, unused columns cut.

    Minimises the mean over all comparisons of softplus(-logit) + alpha_t mean_k (1 - cos(V[:, k],
    reference)): one step on the weights without the pull, then one on the basis with it at the new
    weights. alpha_t is 0 before a fifth of the steps and alpha after four fifths, linear between.
    Columns whose largest weight over the users stays under 0.01 are dropped at the end and the
    remaining weights are not rescaled. Arguments as for ``LoRe``.
    """

    alternating = True

    def __init__(
        self,
        V_sft: Tensor | None,
        alpha: float,
        num_classes: int,
        num_features: int,
        num_basis_vectors: int,
        num_iterations: int = 20_000,
        learning_rate: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(
            V_sft, alpha, num_classes, num_features, num_basis_vectors,
            num_iterations, learning_rate, **settings,
        )  # fmt: skip

    def _draw(self, generator: torch.Generator | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        W0 = torch.rand(self.num_classes, self.rank, generator=generator, dtype=dtype)
        return W0, torch.randn(self.num_features, self.rank, generator=generator, dtype=dtype)

    def per_comparison(self, data: Comparisons) -> Tensor:
        """One comparison's share of all of them [U], over all processes."""
        total = data.weight.sum()
        if self.distributed:
            total = _sum_over_processes(total)
        return (1 / total).expand(data.num_users)

    def schedule(self, step: int) -> float:
        """alpha_t at a step."""
        begin, end = int(0.2 * self.num_iterations), int(0.8 * self.num_iterations)
        if step < begin:
            return 0.0
        return self.alpha if step >= end else self.alpha * (step - begin) / (end - begin)

    def penalty(self, V: Tensor, step: int) -> Tensor:
        """alpha_t mean_k (1 - cos(V[:, k], reference)) for V [F, K]."""
        if not self.schedule(step):
            return 0 * V.sum()
        cosines = cosine_similarity(V, self.reference.to(V)[:, None], dim=0)
        return self.schedule(step) * (1 - cosines).mean()

    def finish(self, W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """W [U, K'] and V [F, K'] without the columns that nobody uses."""
        largest = W.amax(0)
        kept = (largest >= MIN_WEIGHT) | (largest == largest.max())
        return W[:, kept], V[:, kept]


def check_rank(rank: int, num_features: int, num_users: int) -> None:
    """Refuse a rank that is negative or larger than users or features can tell apart."""
    _require(rank >= 0, f"rank {rank}: ranks start at 0 (the reference)")
    limit = min(num_features, num_users)
    _require(
        rank <= limit,
        f"rank {rank} is more than {num_users} users and {num_features} features can support: "
        f"choose at most {limit}",
    )


def train_together(
    models: Sequence[LoRe], data: Comparisons, checkpoint: Checkpoint | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Fit models of one kind on the same comparisons, sharing each pass over the features.

    The models' columns stand side by side, so that one product serves them all, and each follows
    the trajectory it follows alone. An optimiser whose update mixes entries (LBFGS) trains them
    one after the other.

    Args:
        models: with the same iterations, learning rate, optimiser and kind.
        data: the comparisons of all users, or this process's share.
        checkpoint: where to keep the state, to go on after a kill.

    Returns:
        (W, V) of every model.
    """
    lead = models[0]
    elementwise = is_elementwise(lead)
    _require(
        elementwise or not lead.distributed,
        "this optimiser needs all users in one process: use Adam, AdamW or SGD",
    )
    if elementwise or len(models) == 1:
        return _Training(models, data).fit(checkpoint)
    return [_Training([model], data).fit(None)[0] for model in models]


def is_elementwise(model: LoRe) -> bool:
    """Whether the model's optimiser updates each entry by that entry alone."""
    probe = make_optimizer(model.optimizer, [torch.zeros(1)], model.learning_rate)
    return isinstance(probe, ELEMENTWISE)


class _Training:
    """Several models' weights and bases side by side while they are trained."""

    def __init__(self, models: Sequence[LoRe], data: Comparisons) -> None:
        self.models, self.data, lead = models, data, models[0]
        _require(
            data.features.num_features == lead.num_features,
            f"features are {data.features.num_features} wide, the model expects "
            f"{lead.num_features}",
        )
        self.mine = self._share(lead, data)
        ranks = [model.rank for model in models]
        logits = torch.cat([model.W0 for model in models], 1)[self.mine]
        self.V = torch.cat([model.V0 for model in models], 1).to(data.device)
        per_comparison = lead.per_comparison(data)
        coefficient = (data.weight * per_comparison[data.user]).to(self.V)
        logits = logits.to(data.device, copy=True)
        self.weights = UserWeights(
            logits, ranks, coefficient, [model.shrinkage for model in models], per_comparison,
            distributed=lead.distributed,
        )  # fmt: skip
        self.read = Reader(data, ranks, whole=not is_elementwise(lead))
        groups = [[logits, self.V]]
        if lead.alternating:  # each block's users have an optimiser, and step while it is read
            groups = [*([logits[users]] for users in self.read.users), [self.V]]
        self.optimizers = [make_optimizer(lead.optimizer, g, lead.learning_rate) for g in groups]
        self.losses = self.V.new_zeros(lead.num_iterations, len(models))

    @staticmethod
    def _share(lead: LoRe, data: Comparisons) -> slice:
        """This process's rows of W."""
        counts = [data.num_users]
        rank = 0
        if lead.distributed:
            rank = dist.get_rank()
            here = torch.zeros(dist.get_world_size(), device=data.device)
            here[rank] = data.num_users
            counts = _sum_over_processes(here).long().tolist()
        _require(
            sum(counts) == lead.num_classes,
            f"{sum(counts)} users given, the model expects {lead.num_classes}",
        )
        return slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    def fit(self, checkpoint: Checkpoint | None) -> list[tuple[Tensor, Tensor]]:
        lead = self.models[0]
        start = checkpoint.restore(self) if checkpoint else 0
        steps = range(start, lead.num_iterations)
        bar = tqdm(steps, f"rank {self._label()}", initial=start, total=lead.num_iterations,
                   disable=not lead.progress)  # fmt: skip
        step_once = self._alternating_step if lead.alternating else self._joint_step
        for step in bar:
            self.losses[step] = step_once(step)
            if lead.progress and step % 50 == 0:
                bar.set_postfix(loss=" ".join(f"{x:.4f}" for x in self.losses[step].tolist()))
            if checkpoint:
                checkpoint.tick(self, step + 1)
        return self._results()

    def _label(self) -> str:
        return ", ".join(str(model.rank) for model in self.models)

    def _joint_step(self, step: int) -> Tensor:
        def closure() -> Tensor:
            self.weights.aim()
            logits, total = self.weights.logits, self.V.new_zeros(self.V.T.shape)
            logits.grad, losses = torch.empty_like(logits), 0.0
            for reading in self.read(self.V):
                W = self.weights.simplex(reading.users)
                some, slope = self.weights.slopes(reading, W)
                pull, logits.grad[reading.users] = self.weights.gradient(reading, W, slope)
                reading.add_basis_gradient(total, slope, W)
                losses = losses + some + pull
            return self._set_basis_gradient(losses, total.T, step)

        return self._step(self.optimizers[0], closure)

    def _alternating_step(self, step: int) -> Tensor:
        self.weights.aim()
        # One reading serves both halves: V does not move while the weights do.
        known = [self._basis_gradient(self.optimizers[:-1])]

        def closure() -> Tensor:
            losses, gradient = known.pop() if known else self._basis_gradient()
            return self._set_basis_gradient(losses, gradient, step)

        return self._step(self.optimizers[-1], closure)

    def _basis_gradient(self, steps: Sequence[Optimizer] = ()) -> tuple[Tensor, Tensor]:
        """Losses [M] and gradient [F, C]; the optimisers first step each block's weights."""
        total, losses = self.V.new_zeros(self.V.T.shape), self.V.new_zeros(len(self.models))
        for reading, optimizer in zip_longest(self.read(self.V), steps):
            if optimizer:
                (logits,) = optimizer.param_groups[0]["params"]
                closure = partial(self.weights.set_gradient, reading, logits)
                self._step(optimizer, closure)
            W = self.weights.simplex(reading.users)
            some, slope = self.weights.slopes(reading, W)
            reading.add_basis_gradient(total, slope, W)
            losses += some
        return losses, total.T

    @staticmethod
    def _step(optimizer: Optimizer, closure: Callable[[], Tensor]) -> Tensor:
        """One step; returns the losses [M] at the point it started from."""
        first: list[Tensor] = []

        def total() -> Tensor:
            losses = closure()
            first.append(losses)
            return losses.sum()

        optimizer.step(total)
        return first[0]

    def _set_basis_gradient(self, losses: Tensor, gradient: Tensor, step: int) -> Tensor:
        """Put the gradient [F, C] and the pull's into V.grad; returns all losses [M]."""
        if self.models[0].distributed:
            gradient, losses = _sum_over_processes(gradient), _sum_over_processes(losses)
        if any(model.alpha for model in self.models):
            with torch.enable_grad():
                V = self.V.detach().requires_grad_()
                parts = V.split(self.weights.ranks, 1)
                pairs = zip(self.models, parts, strict=True)
                penalties = torch.stack([model.penalty(part, step) for model, part in pairs])
                gradient = gradient + torch.autograd.grad(penalties.sum(), V)[0]
            losses = losses + penalties.detach()
        self.V.grad = gradient.contiguous()
        return losses

    def _results(self) -> list[tuple[Tensor, Tensor]]:
        W = self.weights.simplex()
        if self.models[0].distributed:
            everyone = W.new_zeros(self.models[0].num_classes, W.shape[1])
            everyone[self.mine] = W
            W = _sum_over_processes(everyone)
        ranks = self.weights.ranks
        parts = zip(self.models, W.split(ranks, 1), self.V.split(ranks, 1), strict=True)
        results = []
        for i, (model, w, v) in enumerate(parts):
            model.losses = self.losses[:, i].cpu().clone()
            results.append(model.finish(w.contiguous(), v.contiguous()))
        return results


def _sum_over_processes(value: Tensor) -> Tensor:
    """The sum of every process's tensor."""
    value = value.contiguous().clone()
    dist.all_reduce(value)
    return value


@dataclass
class Checkpoint:
    """The state of a training kept on disk, so that a killed one goes on where it was.

    Each process keeps the last two states: where several train together, they go on from the last
    step that all of them have.

    Args:
        path: the file; ``path.<process>.<step>.pt`` are written.
        every: steps between two states.
    """

    path: Path
    every: int = 200

    def tick(self, training: _Training, step: int) -> None:
        """Keep the state after a step, if it is time."""
        if step % self.every:
            return
        state = {
            "identity": _identity(training), "step": step, "losses": training.losses[:step].clone(),
            "logits": training.weights.logits, "V": training.V,
            "optimizers": [o.state_dict() for o in training.optimizers],
        }  # fmt: skip
        write_whole(self._file(step), lambda draft: torch.save(state, draft))
        for old in self._steps()[:-2]:
            self._file(old).unlink()

    def restore(self, training: _Training) -> int:
        """Bring the training to the last kept state; returns the step to go on from.

        Raises:
            InputError: the state is of other models, settings or data.
        """
        step = max(self._steps(), default=0)
        if training.models[0].distributed:
            last = torch.tensor(step, device=training.V.device)
            dist.all_reduce(last, op=dist.ReduceOp.MIN)
            step = int(last)
        if step == 0:
            return 0
        file = self._file(step)
        try:
            state = torch.load(file, weights_only=True, map_location=training.V.device)
        except Exception as error:  # torch names no common class for what a damaged file raises
            raise InputError(f"{file}: unreadable ({error}); remove it to start again") from error
        _require(
            state["identity"] == _identity(training),
            f"{file}: belongs to a training with other settings or data; remove it to start again",
        )
        training.weights.logits.copy_(state["logits"])
        training.V.copy_(state["V"])
        for optimizer, kept in zip(training.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        training.losses[:step] = state["losses"]
        log.info("going on from step %d of %s", step, file)
        return step

    def remove(self) -> None:
        """Delete the kept states of this process."""
        for step in self._steps():
            self._file(step).unlink()

    def _file(self, step: int) -> Path:
        return self.path.with_name(f"{self._stem()}{step}.pt")

    def _stem(self) -> str:
        process = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return f"{self.path.name}.{process}."

    def _steps(self) -> list[int]:
        files = self.path.parent.glob(f"{self._stem()}*.pt")
        return sorted(int(file.name.split(".")[-2]) for file in files)


def _identity(training: _Training) -> dict[str, Any]:
    """What must agree for a kept state to be of this training."""
    data, lead = training.data, training.models[0]
    return {
        "kind": type(lead).__name__,
        "models": [(m.rank, m.alpha, m.shrinkage) for m in training.models],
        "iterations": lead.num_iterations,
        "optimizers": [str(o) for o in training.optimizers],
        "users": (training.mine.start, training.mine.stop, lead.num_classes),
        "comparisons": (len(data), data.features.num_features, float(data.weight.sum())),
        "start": float(sum(m.V0.double().sum() + m.W0.double().sum() for m in training.models)),
    }


def solve_regularized(
    V_sft: Tensor | None,
    alpha: float,
    train_features: Sequence[Tensor],
    num_basis_vectors: int,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    estimator: type[LoRe] = LoRe,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Fit ``LoRe`` on U tensors [m_u, F]: weights W [U, K] and basis V [F, K]."""
    _require(len(train_features) > 0, "no users: give one tensor of comparisons per user")
    model = estimator(
        V_sft, alpha, len(train_features), train_features[0].shape[-1], num_basis_vectors,
        num_iterations, learning_rate, **settings,
    )  # fmt: skip
    return model.train(train_features)


def solve_regularized_simplex(
    V_sft: Tensor | None,
    alpha: float,
    train_features: Sequence[Tensor],
    num_basis_vectors: int,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Fit ``LoRe_regularized`` on U tensors [m_u, F]: W [U, K'] and V [F, K']."""
    return solve_regularized(
        V_sft, alpha, train_features, num_basis_vectors, num_iterations, learning_rate,
        LoRe_regularized, **settings,
    )  # fmt: skip


def learn_multiple_few_shot(
    train_features: Sequence[Tensor],
    V: Tensor,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    **settings: Any,
) -> list[Tensor]:
    """Few-shot weights [K] of each new user, for U tensors [m_u, F] and a frozen V [F, K]."""
    F, K = V.shape
    model = PersonalizeBatch(len(train_features), F, K, num_iterations, learning_rate, **settings)
    return model.train(train_features, V)


def learn_single_reward(
    train_features: Sequence[Tensor],
    num_iterations: int = 1000,
    learning_rate: float = 0.5,
    **settings: Any,
) -> Tensor:
    """One reward direction V [F, 1] shared by all users: Bradley-Terry, the rank-1 ``LoRe``."""
    return solve_regularized(
        None, 0.0, train_features, 1, num_iterations, learning_rate, **settings
    )[1]


def learn_single_reward_regularized(
    V_sft: Tensor,
    alpha: float,
    train_features: Sequence[Tensor],
    num_iterations: int = 1000,
    learning_rate: float = 0.5,
    **settings: Any,
) -> Tensor:
    """One shared direction V [F, 1], pulled to the reference: the rank-1 ``LoRe_regularized``."""
    return solve_regularized_simplex(
        V_sft, alpha, train_features, 1, num_iterations, learning_rate, **settings
    )[1]


def learn_multiple(
    train_features: Sequence[Tensor],
    num_iterations: int = 1000,
    learning_rate: float = 0.5,
    *,
    weights: Sequence[Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Every user's own reward direction, with nothing shared: the per-user baseline.

    Each user's direction starts at zero and minimises the mean of that user's losses.

    Args:
        train_features: U tensors [m_u, F].
        num_iterations, learning_rate: of the optimiser, the paper's Adam by default.
        weights: how much each comparison counts, U tensors [m_u].
        optimizer: another optimiser, see ``make_optimizer``.
        progress: show a bar over the blocks.

    Returns:
        U directions [F, 1].
    """
    _check_features(train_features)
    X, counts = train_features, [len(x) for x in train_features]
    weights = weights or [x.new_ones(len(x)) for x in X]
    blocks = list(_runs(counts, BLOCK_BYTES // (4 * X[0].shape[1]), besides=2))
    directions: list[Tensor] = []
    for users in tqdm(blocks, "own models", disable=not progress, leave=False):
        x = torch.cat([x.float() for x in X[users]])
        c = torch.cat([w.to(x) / w.sum() for w in weights[users]])
        owners = Owners(torch.tensor(counts[users], device=x.device))
        V = x.new_zeros(len(counts[users]), x.shape[1])
        steps = make_optimizer(optimizer, [V], learning_rate)
        for _ in range(num_iterations):
            steps.step(partial(_own_gradient, owners, x, c, V))
        directions += list(V[:, :, None])
    return directions


def _own_gradient(owners: Owners, x: Tensor, c: Tensor, V: Tensor) -> Tensor:
    """Loss of users' own directions V [B, F] on their x [n, F] with coefficients c [n]."""
    logits = owners.dots(x, V) / TEMPERATURE
    V.grad = owners.sums(x, torch.sigmoid(-logits) * (c / -TEMPERATURE)[:, None])
    return -(c @ logsigmoid(logits)).sum()


# ------------------------------------------------------------------- Evaluation


def evaluate_model(X: Tensor, V: Tensor, w: Tensor) -> float:
    """Share of comparisons [m, F] with x^T V w > 0 (eq. 15), for V [F, K] and w [K]."""
    _check_features([X])
    _check_basis(V, X.shape[1], len(w))
    _same_device(X, V, w)
    return float((X.float() @ (V.float() @ w.float()) > 0).float().mean())


def eval_multiple(
    W_list: Sequence[Tensor], V_list: Sequence[Tensor] | Tensor, test_features: Sequence[Tensor]
) -> np.ndarray:
    """Accuracy of every user [U] on U tensors [m_u, F].

    Args:
        W_list: U weight vectors [K], or W [U, K].
        V_list: a basis for each user, or one basis [F, K] for all.
        test_features: the users' held-out comparisons.
    """
    bases = [V_list] * len(W_list) if isinstance(V_list, Tensor) else V_list
    triples = zip(test_features, bases, W_list, strict=True)
    return np.array([evaluate_model(x, V, w) for x, V, w in triples])


# --------------------------------------------------------------------- Pipeline


def fit_bases(
    estimator: type[LoRe],
    ranks: Sequence[int],
    alphas: Sequence[float],
    reference: Tensor | None,
    data: Comparisons,
    num_users: int,
    *,
    shrinkages: Sequence[float] = (0.0,),
    checkpoint: Checkpoint | None = None,
    **settings: Any,
) -> list[Basis]:
    """A basis for every (alpha, rank), alphas outermost; rank 0 is the reference itself.

    With several shrinkages, each rank above 1 gets a basis for each of them (lower ranks have no
    weights to shrink).

    Args:
        estimator: ``LoRe`` or ``LoRe_regularized``.
        ranks: ranks K; 0 reference, 1 Bradley-Terry.
        alphas: strengths of the pull to the reference.
        reference: [F] or [F, 1]; None if there is none.
        data: comparisons of the users, or this process's share.
        num_users: users in all.
        shrinkages: pulls of the weights towards the users' mean, in comparisons.
        checkpoint: where to keep the state of the training.
        settings: of the estimator: num_iterations, learning_rate, generator, optimizer, ...

    Raises:
        InputError: rank 0 without a reference, or a rank beyond users or features.
    """
    F = data.features.num_features
    direction = _check_reference(reference, F)
    for rank in ranks:
        check_rank(rank, F, num_users)
        _require(rank > 0 or direction is not None, "rank 0 is the reference model: there is none")
    asked = [
        {"rank": int(rank), "alpha": float(alpha), "shrinkage": float(shrinkage)}
        for alpha in alphas
        for rank in ranks
        for shrinkage in (shrinkages if rank > 1 else (0.0,))
    ]
    models = [
        estimator(
            direction, about["alpha"], num_users, F, about["rank"],
            shrinkage=about["shrinkage"], **settings,
        )
        for about in asked if about["rank"]
    ]  # fmt: skip
    trained = iter(train_together(models, data, checkpoint) if models else [])
    losses = iter(model.losses for model in models)
    bases = []
    for about in asked:
        about["estimator"] = estimator.__name__
        if about["rank"]:
            W, V = next(trained)
            bases.append(Basis(V, W, direction, settings=about, losses=next(losses)))
        else:
            W, V = torch.ones(num_users, 1), direction.float()[:, None]
            bases.append(Basis(V.to(data.device), W.to(data.device), direction, settings=about))
    return bases


def personalize(
    basis: Basis,
    data: Comparisons,
    generator: Seed = None,
    Z: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Weights [U, K] of new users from their few comparisons (eq. 11); ones where K <= 1.

    Args:
        basis: with V frozen; shrunk like its own users, towards their mean weights.
        data: the few comparisons.
        generator: of the initial logits.
        Z: the comparisons projected on V, where that is already known.
        settings: of ``fit_weights``.
    """
    K = basis.V.shape[1]
    if K == 1:
        return torch.ones(data.num_users, 1, device=data.device)
    Z = data.features.project(basis.V) if Z is None else Z
    logits = draw_logits(data.num_users, K, generator, Z.dtype)
    shrinkage = basis.settings.get("shrinkage", 0.0)
    return fit_weights(
        Z, data, logits, population=basis.W.mean(0), shrinkage=shrinkage, **settings
    )


class Accuracies(NamedTuple):
    """Accuracy of every (alpha, K), alphas outermost: means over users, then the spreads.

    The spread is the standard deviation over users (dividing by U).
    """

    train: np.ndarray
    seen: np.ndarray
    few_shot: np.ndarray
    unseen: np.ndarray
    train_std: np.ndarray
    seen_std: np.ndarray
    few_shot_std: np.ndarray
    unseen_std: np.ndarray


def run(
    K_list: Sequence[int],
    alpha_list: Sequence[float],
    V_final: Tensor | None,
    train_features: Sequence[Tensor],
    test_features_sparse: Sequence[Tensor],
    train_features_unseen: Sequence[Tensor],
    test_features_sparse_unseen: Sequence[Tensor],
    N: int,
    N_unseen: int,
    device: torch.device | str = "cpu",
    *,
    estimator: type[LoRe] = LoRe,
    num_iterations: int = 1000,
    learning_rate: float = 0.5,
    few_shot_iterations: int = 500,
    few_shot_learning_rate: float = 0.1,
    optimizer: OptimizerFactory | None = None,
    generator: Seed = None,
    progress: bool = True,
    save_dir: str | Path | None = None,
    user_ids: Sequence[str] = (),
    unseen_user_ids: Sequence[str] = (),
) -> Accuracies:
    """Fit, personalise and evaluate every (alpha, K) (the experiment of Table 1).

    Args:
        K_list, alpha_list: ranks (0 reference, 1 Bradley-Terry) and strengths of the pull.
        V_final: the reference [F] or [F, 1]; None if there is none.
        train_features, test_features_sparse: comparisons of the N seen users, U tensors [m_u, F].
        train_features_unseen, test_features_sparse_unseen: the same of the N_unseen new users;
            the first are the few shots.
        N, N_unseen: numbers of users.
        device: where to compute.
        estimator: ``LoRe`` or ``LoRe_regularized``.
        num_iterations, learning_rate: of the joint fit.
        few_shot_iterations, few_shot_learning_rate: of the new users' weights.
        optimizer: another optimiser for both, see ``make_optimizer``.
        generator: seed or generator of all initial values.
        progress: show bars.
        save_dir: folder for one basis file per (alpha, K).
        user_ids, unseen_user_ids: names of the users, kept in the files.

    Raises:
        InputError: unusable features, ranks, reference or numbers of users.
    """
    sets = _pack_all(
        (train_features, N), (test_features_sparse, N), (train_features_unseen, N_unseen),
        (test_features_sparse_unseen, N_unseen), device=device,
    )  # fmt: skip
    bases = fit_bases(
        estimator, K_list, alpha_list, V_final, sets[0], N, generator=generator,
        num_iterations=num_iterations, learning_rate=learning_rate, optimizer=optimizer,
        progress=progress,
    )  # fmt: skip
    rows = []
    for basis in bases:
        basis.users, basis.users_unseen = list(user_ids), list(unseen_user_ids)
        basis.W_unseen = personalize(
            basis, sets[2], generator, num_iterations=few_shot_iterations, optimizer=optimizer,
            learning_rate=few_shot_learning_rate, progress=progress,
        )  # fmt: skip
        rows.append(evaluate(basis, *sets))
        if save_dir is not None:
            save_basis(Path(save_dir) / basis_name(basis, alpha_list), basis)
    means, spreads = (np.array([[f(u) for u in row] for row in rows]) for f in (np.mean, np.std))
    return Accuracies(*means.T, *spreads.T)


def _pack_all(
    *sets: tuple[Sequence[Tensor], int], device: torch.device | str
) -> list[Comparisons]:
    """Pack several lists of features, each with the number of users it must have."""
    for X, users in sets:
        _require(len(X) == users, f"{len(X)} users' features given where {users} are expected")
        _check_features(X, sets[0][0][0].shape[-1] if users else None)
    return [Comparisons.from_list(X, device=device) for X, _ in sets]


def run_regularized(*args: Any, **settings: Any) -> Accuracies:
    """``run`` with ``LoRe_regularized``: 20,000 iterations, few-shot learning rate 0.5."""
    defaults = {
        "estimator": LoRe_regularized, "num_iterations": 20_000, "few_shot_learning_rate": 0.5,
    }  # fmt: skip
    return run(*args, **{**defaults, **settings})


def evaluate(
    basis: Basis, train: Comparisons, seen: Comparisons, few: Comparisons, unseen: Comparisons
) -> list[np.ndarray]:
    """Accuracy of every user on the four sets: [U], [U], [U'], [U']."""
    weights = (basis.W, basis.W, basis.W_unseen, basis.W_unseen)
    return [
        data.accuracies(data.features.project(basis.V), W).cpu().numpy()
        for data, W in zip((train, seen, few, unseen), weights, strict=True)
    ]


def basis_name(basis: Basis, alphas: Sequence[float]) -> str:
    """File name of a basis: basis-K05.safetensors, with its alpha where there are several."""
    suffix = f"-alpha{basis.settings['alpha']:g}" if len(alphas) > 1 else ""
    return f"basis-K{basis.settings['rank']:02d}{suffix}.safetensors"


class ShotAccuracies(NamedTuple):
    """Accuracy per number of shots, over trials: means, then standard deviations.

    Arrays [S] for one (alpha, K), else [alphas * ranks, S], alphas outermost.
    """

    few_shot: np.ndarray
    unseen: np.ndarray
    few_shot_std: np.ndarray
    unseen_std: np.ndarray


def run_few_shot_vary_shots(
    trials: int,
    alpha_list: Sequence[float],
    K_list: Sequence[int],
    num_shots: Sequence[int],
    train_features: Sequence[Tensor],
    train_features_unseen: Sequence[Tensor],
    test_features_sparse_unseen: Sequence[Tensor],
    V_final: Tensor | None,
    N: int,
    N_unseen: int,
    device: torch.device | str = "cpu",
    *,
    estimator: type[LoRe] = LoRe,
    num_iterations: int = 500,
    learning_rate: float = 0.5,
    few_shot_iterations: int = 500,
    few_shot_learning_rate: float = 0.1,
    optimizer: OptimizerFactory | None = None,
    generator: Seed = None,
    progress: bool = True,
) -> ShotAccuracies:
    """Accuracy of new users against the number of their comparisons (the few-shot curves).

    Args:
        trials: random draws of the shots, per number of shots.
        num_shots: numbers of comparisons drawn from each new user's ``train_features_unseen``.
        (others): as for ``run``.
    """
    train, few, unseen = _pack_all(
        (train_features, N), (train_features_unseen, N_unseen),
        (test_features_sparse_unseen, N_unseen), device=device,
    )  # fmt: skip
    bases = fit_bases(
        estimator, K_list, alpha_list, V_final, train, N, generator=generator,
        num_iterations=num_iterations, learning_rate=learning_rate, optimizer=optimizer,
        progress=progress,
    )  # fmt: skip
    draws = draw_shots(few, num_shots, trials, generator)
    rows = []
    for basis in bases:
        W, fitted = sweep_shots(
            basis, few, draws, generator, num_iterations=few_shot_iterations,
            learning_rate=few_shot_learning_rate, optimizer=optimizer, progress=progress,
        )  # fmt: skip
        both = (fitted, sweep_accuracies(basis, unseen, W))
        over_trials = [accuracy.mean(2).cpu().numpy() for accuracy in both]  # [trials, S]
        rows.append([a.mean(0) for a in over_trials] + [a.std(0) for a in over_trials])
    columns = np.array(rows).transpose(1, 0, 2)  # [4, alphas * ranks, S]
    return ShotAccuracies(*(columns[:, 0] if len(bases) == 1 else columns))


class Shots(NamedTuple):
    """Random shots of new users: ``rows[(trial * S + s) * U + u]`` are a user's row numbers."""

    rows: list[Tensor]
    sizes: list[int]  # the S numbers of shots
    trials: int


def draw_shots(
    few: Comparisons,
    sizes: Sequence[int],
    trials: int,
    generator: Seed = None,
    dialogs: Tensor | None = None,
) -> Shots:
    """Draw every new user's shots, for every trial and number of shots; all where too few.

    Args:
        few: the new users' comparisons.
        sizes: numbers of shots.
        trials: draws per number of shots.
        generator: of the draws.
        dialogs: dialogue of each comparison [N]; a shot is then a whole dialogue.
    """
    _require(trials >= 1 and all(size >= 1 for size in sizes), "trials and shots start at 1")
    generator = as_generator(generator)
    units = _shot_units(few, dialogs)
    _warn_of_short_users(min(map(len, units)), sizes)
    rows = []
    for size in [*sizes] * trials:
        for unit in units:
            order = torch.randperm(len(unit), generator=generator)[:size].tolist()
            rows.append(torch.cat([unit[i] for i in order]))
    return Shots(rows, list(sizes), trials)


def _shot_units(data: Comparisons, dialogs: Tensor | None) -> list[list[Tensor]]:
    """Each user's shots: the row numbers of one comparison, or of one dialogue."""
    rows = torch.arange(len(data)).split(data.counts.tolist())
    if dialogs is None:
        return [list(row.split(1)) for row in rows]
    return [[row[dialogs[row] == d] for d in dialogs[row].unique()] for row in rows]


def sweep_shots(
    basis: Basis,
    few: Comparisons,
    draws: Shots,
    generator: Seed = None,
    flip: bool = False,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Few-shot weights of every trial, number of shots and user, fitted in one batch.

    The comparisons are projected once; every (trial, number of shots, user) is then a user of its
    own.

    Args:
        basis: with V frozen.
        few: the new users' comparisons.
        draws: which of them are the shots.
        generator: of the initial logits, and of the flips.
        flip: swap chosen and rejected of each shot by a coin: what is left when the labels say
            nothing.
        settings: of ``fit_weights``.

    Returns:
        Weights [trials, S, U, K], and accuracies [trials, S, U] on the shots themselves.
    """
    generator = as_generator(generator)
    Z = few.features.project(basis.V)
    if flip:
        Z = Z * (torch.randint(2, (len(Z), 1), generator=generator) * 2 - 1).to(Z)
    fits = few.num_users * len(draws.sizes)
    batch = max(1, (1 << 24) // (Z.numel() * len(draws.sizes))) * fits  # what fits in memory
    weights, fitted = [], []
    for start in range(0, len(draws.rows), batch):
        some = draws.rows[start : start + batch]
        rows = torch.cat(some).to(Z.device)
        drawn = few.select(rows, [len(row) for row in some])
        weights.append(personalize(basis, drawn, generator, Z[rows], **settings))
        fitted.append(drawn.accuracies(Z[rows], weights[-1]))
    shape = (draws.trials, len(draws.sizes), few.num_users)
    return torch.cat(weights).view(*shape, -1), torch.cat(fitted).view(shape)


def sweep_accuracies(basis: Basis, unseen: Comparisons, W: Tensor) -> Tensor:
    """Held-out accuracies [trials, S, U] of weights [trials, S, U, K]."""
    Z = unseen.features.project(basis.V)
    return torch.stack([unseen.accuracies(Z, w) for w in W.flatten(0, 1)]).view(W.shape[:3])


def _warn_of_short_users(fewest: int, shots: Iterable[int]) -> None:
    if fewest < max(shots):
        log.warning(
            "%d shots asked for, but a user has only %d: all of that user's are used",
            max(shots), fewest,
        )  # fmt: skip


# --------------------------------------------------------------------- Sampling


def sample_shots(features: Sequence[Tensor], shots: int, generator: Seed = None) -> list[Tensor]:
    """``shots`` random comparisons of each user, from U tensors [m_u, F]: U tensors [shots, F].

    A user with fewer gives all, and a warning says so once.
    """
    _require(shots >= 1, f"{shots} shots: at least 1 is needed")
    _warn_of_short_users(min(map(len, features)), [shots])
    generator = as_generator(generator)
    return [x[torch.randperm(len(x), generator=generator)[:shots].to(x.device)] for x in features]


def generate_population(
    alpha: float, N: int, generator: Seed = None, num_models: int = 10
) -> Tensor:
    """Simulated users' weights over reward models, Dirichlet(alpha * 1): [N, num_models]."""
    _require(alpha > 0, f"Dirichlet alpha must be positive, not {alpha}")
    seed = torch.randint(2**62, (1,), generator=as_generator(generator)).item()
    draws = np.random.default_rng(seed).dirichlet(np.full(num_models, alpha), N)
    return torch.from_numpy(draws).float()


generate_popupulation = generate_population  # the published name


def simulate_choices(rewards: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Simulated users' best and worst response of every prompt, as indices.

    Args:
        rewards: scores [P, R, M] of R responses to P prompts by M reward models.
        W: users' weights [U, M].

    Returns:
        chosen and rejected [U, P], in 0..R-1; the first of equals.
    """
    _require(rewards.ndim == 3, f"rewards are [prompts, responses, models], not {rewards.ndim}-D")
    _require(rewards.shape[2] == W.shape[1], "as many weights as reward models are needed")
    best = torch.empty(len(W), len(rewards), dtype=torch.long)
    worst = torch.empty_like(best)
    for u, w in enumerate(W.to(rewards)):
        scores = rewards @ w  # [P, R]
        best[u], worst[u] = scores.argmax(1), scores.argmin(1)
    return best, worst


def simulate_user(reward_tensor: Tensor, features: Tensor, w: Tensor) -> Tensor:
    """Differences [P, F], best minus worst response of every prompt, of one simulated user.

    Args:
        reward_tensor: scores [P, R, M].
        features: embeddings of the responses [P, R, F].
        w: the user's weights [M].
    """
    return simulate_population(reward_tensor, features, w[None])[0]


def simulate_population(reward_tensor: Tensor, features: Tensor, W: Tensor) -> Tensor:
    """``simulate_user`` of every row of W [U, M]: [U, P, F]. ``simulate_choices`` needs less."""
    chosen, rejected = simulate_choices(reward_tensor, W)
    prompts = torch.arange(len(features))
    return features[prompts, chosen] - features[prompts, rejected]


def create_sparse_tensor(dense: Tensor, fraction: float, generator: Seed = None) -> list[Tensor]:
    """A random share of each user's comparisons: [U, P, F] -> U tensors [about fraction P, F]."""
    _require(0 < fraction <= 1, f"the fraction must be in (0, 1], not {fraction}")
    return sample_shots(list(dense), max(1, round(fraction * dense.shape[1])), generator)


Dialogs = Mapping[str, Mapping[str, Sequence[tuple[Tensor, Tensor]]]]


def create_dataset_prism(embeddings: Dialogs) -> list[Tensor]:
    """Differences of every user's dialogues: U tensors [m_u, F].

    Args:
        embeddings: user -> dialogue -> list of (chosen [F], rejected [F]).
    """
    return [
        torch.stack([chosen - rejected for pairs in dialogs.values() for chosen, rejected in pairs])
        for dialogs in embeddings.values()
    ]


def create_dataset_prism_shots(
    embeddings: Dialogs, shots: int, generator: Seed = None
) -> list[Tensor]:
    """The same from ``shots`` random dialogues of each user; all of them where there are fewer."""
    _require(shots >= 1, f"{shots} shots: at least 1 is needed")
    _warn_of_short_users(min(map(len, embeddings.values())), [shots])
    generator = as_generator(generator)
    drawn = {}
    for user, dialogs in embeddings.items():
        names = list(dialogs)
        order = torch.randperm(len(names), generator=generator)[:shots].tolist()
        drawn[user] = {names[i]: dialogs[names[i]] for i in order}
    return create_dataset_prism(drawn)
