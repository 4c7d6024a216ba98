"""Users' comparisons as every method takes them: whose they are, what they weigh, their features.
U users, N comparisons (chosen minus rejected), F features, C columns."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from lore.common.files import InputError, require

log = logging.getLogger(__name__)

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # features read at a time
PART_BYTES = 128 << 20  # features worked on together on a CPU, which bounds what else is held
CACHE_BYTES = 8 << 20  # features that a CPU's cache holds while they are worked on again and again
Seed = int | torch.Generator | None
Device = torch.device | str | None


def as_generator(seed: Seed) -> torch.Generator | None:
    """A generator for a seed; a generator and None (torch's global one) stay what they are."""
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(int(seed))


def _chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * columns))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _project(parts: Iterator[tuple[slice, Tensor]], rows: int, V: Tensor) -> Tensor:
    """x V [rows, C] of the parts of x for V [F, C]."""
    out, VT = V.new_empty(rows, V.shape[1]), V.T.contiguous()
    for part, x in parts:
        torch.mm(x, VT.T, out=out[part])  # twice as fast as x @ V with rows of a few columns
    return out


def _backproject(parts: Iterator[tuple[slice, Tensor]], G: Tensor, num_features: int) -> Tensor:
    """x^T G [F, C] of the parts of x for G [rows, C]."""
    total = G.new_zeros(G.shape[1], num_features)
    for part, x in parts:
        total.addmm_(G[part].T, x)  # (G^T x)^T: x^T G of a tall x is several times slower
    return total.T


class DenseFeatures:
    """Differences x [N, F] of any float type, in memory or memory-mapped; products are formed on
    ``device``, by default where x lies."""

    def __init__(self, x: Tensor, device: Device = None) -> None:
        self.x, self.num_features = x, x.shape[1]
        self.device = x.device if device is None else torch.device(device)

    def __len__(self) -> int:
        return len(self.x)

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for part in _chunks(len(self), self.num_features, self.device):
            yield part, self.x[part].to(self.device, dtype)

    def project(self, V: Tensor) -> Tensor:
        """X V [N, C] for V [F, C]."""
        return _project(self._parts(V.dtype), len(self), V)

    def backproject(self, G: Tensor) -> Tensor:
        """X^T G [F, C] for G [N, C]."""
        return _backproject(self._parts(G.dtype), G, self.num_features)

    def squared(self) -> Tensor:
        """X^T X [F, F] in float32."""
        total = torch.zeros(self.num_features, self.num_features, device=self.device)
        for _, x in self._parts(total.dtype):
            total.addmm_(x.T, x)
        return total

    def select(self, rows: Tensor) -> "DenseFeatures":
        """Some of the comparisons, by their numbers [n]."""
        return DenseFeatures(self.x[rows.to(self.x.device)], self.device)

    def flipped(self, coin: Tensor) -> "DenseFeatures":
        """Chosen and rejected swapped where the coin [N] is true."""
        sign = 1 - 2 * coin.to(self.x.device, self.x.dtype)
        return DenseFeatures(self.x * sign[:, None], self.device)


class RowFeatures:
    """Differences of rows, numbered ``chosen`` and ``rejected`` [N], of an embedding table that
    stays on disk; ``rows`` reads a chunk of it, numbers [n] -> embeddings [n, F]. Products are
    formed on ``device`` from distinct rows: X V = (E V)[chosen] - (E V)[rejected]."""

    def __init__(
        self, rows: Callable[[Tensor], Tensor], num_features: int,
        chosen: Tensor, rejected: Tensor, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.rows, self.num_features = rows, num_features
        self.device = torch.device(device)
        both = torch.cat([torch.as_tensor(chosen).long(), torch.as_tensor(rejected).long()])
        self.index, places = torch.unique(both, return_inverse=True)
        self.chosen, self.rejected = places.to(self.device).chunk(2)
        self.table: Tensor | None = None  # the distinct rows [R, F], where they are held in memory

    def __len__(self) -> int:
        return len(self.chosen)

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for part in _chunks(len(self.index), self.num_features, self.device):
            x = self.rows(self.index[part]) if self.table is None else self.table[part]
            yield part, x.to(self.device, dtype)

    def pairs(self, of: Callable[[Tensor], Tensor] | None = None) -> "Pairs":
        """The two embeddings of every comparison, or what a function makes of distinct rows
        e [n, F] in float32, a chunk at a time."""
        parts = [e if of is None else of(e) for _, e in self._parts(torch.float32)]
        return Pairs(torch.cat(parts), self.chosen, self.rejected)

    def project(self, V: Tensor) -> Tensor:
        """X V [N, C] for V [F, C]."""
        rewards = _project(self._parts(V.dtype), len(self.index), V)
        return rewards[self.chosen] - rewards[self.rejected]

    def backproject(self, G: Tensor) -> Tensor:
        """X^T G [F, C] for G [N, C]."""
        per_row = G.new_zeros(len(self.index), G.shape[1])
        per_row.index_add_(0, self.chosen, G).index_add_(0, self.rejected, G, alpha=-1)
        return _backproject(self._parts(G.dtype), per_row, self.num_features)

    def _with(self, chosen: Tensor, rejected: Tensor) -> "RowFeatures":
        """The same table with other comparisons, by their places in ``index``."""
        ends = (self.index[side.cpu()] for side in (chosen, rejected))
        return RowFeatures(self.rows, self.num_features, *ends, self.device)

    def select(self, rows: Tensor) -> "RowFeatures":
        """Some of the comparisons, by their numbers [n]."""
        rows = rows.to(self.device)
        return self._with(self.chosen[rows], self.rejected[rows])

    __getitem__ = select

    def flipped(self, coin: Tensor) -> "RowFeatures":
        """Chosen and rejected swapped where the coin [N] is true."""
        coin = coin.to(self.device)
        chosen = torch.where(coin, self.rejected, self.chosen)
        return self._with(chosen, torch.where(coin, self.chosen, self.rejected))

    def held(self) -> "Features":
        """The same held in memory: the distinct rows, or the differences where these are fewer."""
        if len(self.index) >= len(self):
            return self.dense()
        table = self.rows(self.index).to(self.device, torch.float32)
        ends = self.chosen.cpu(), self.rejected.cpu()
        held = RowFeatures(table.__getitem__, self.num_features, *ends, self.device)
        held.table = table
        return held

    def dense(self, dtype: torch.dtype = torch.float32) -> DenseFeatures:
        """The same differences, held in memory: [N, F]."""
        x = torch.empty(len(self), self.num_features, dtype=dtype, device=self.device)
        for part in _chunks(len(self), self.num_features, self.device):
            chosen, rejected = (self.index[i[part].cpu()] for i in (self.chosen, self.rejected))
            x[part] = (self.rows(chosen) - self.rows(rejected)).to(self.device, dtype)
        return DenseFeatures(x)


Features = DenseFeatures | RowFeatures


@dataclass
class Pairs:
    """Values of distinct rows [R, ...], and the numbers [N] of the two of each comparison."""

    values: Tensor
    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def num_features(self) -> int:
        """Numbers of a row."""
        return self.values.shape[-1]

    def __getitem__(self, some: Tensor) -> "Pairs":
        return Pairs(self.values, self.chosen[some], self.rejected[some])

    def difference(self) -> Tensor:
        """Chosen minus rejected [N, ...]."""
        return self.values[self.chosen] - self.values[self.rejected]


class Users:
    """Whose each comparison is, ``user`` [N], ascending, from their counts [U], which may be 0, and
    what each weighs [N], positive, by default one; by default on the weights' device."""

    def __init__(
        self, counts: Sequence[int] | Tensor, weight: Tensor | None = None, device: Device = None
    ) -> None:
        if weight is None:
            weight = torch.ones(int(torch.as_tensor(counts).sum()), dtype=torch.float64)
        self.device = torch.device(device) if device is not None else weight.device
        self.counts = torch.as_tensor(counts, dtype=torch.long, device=self.device)
        self.num_users = len(self.counts)
        self.user = torch.repeat_interleave(self.counts)
        self.weight = weight.to(self.device, torch.float64)
        require(self.weight.shape == self.user.shape, "give one weight per comparison")
        require(bool((self.weight > 0).all()), "weights of comparisons must be positive")
        self._starts = self.counts.cumsum(0) - self.counts
        self._rows = torch.arange(len(self.user), device=self.device)
        self._patterns: dict[int, Tensor] = {}
        self._orders: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.user)

    def sum(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Each user's sum of values [N, C], times scale [N]: [U, C]."""
        given = self._rows, values.contiguous(), self._starts
        return embedding_bag(*given, mode="sum", per_sample_weights=scale)

    def sums(self, x: Tensor, scale: Tensor) -> Tensor:
        """Each user's sum of rows x [N, F] times each model's scale [N, M]: [U, M, F]. All models
        of a user are summed in turn, while the cache holds that user's rows."""
        models = scale.shape[1]
        if models not in self._orders:
            order = self.user.repeat(models).argsort(stable=True)
            within = self.counts[:, None] * torch.arange(models, device=self.device)
            starts = models * self._starts[:, None] + within
            self._orders[models] = order % len(self), order // len(self), starts.flatten()
        rows, model, starts = self._orders[models]
        weights = scale[rows, model]
        both = embedding_bag(rows, x, starts, mode="sum", per_sample_weights=weights)
        return both.view(self.num_users, models, -1)

    def dots(self, x: Tensor, directions: Tensor) -> Tensor:
        """Products of rows x [N, F] with their users' directions [U, M, F]: [N, M]."""
        models = directions.shape[1]
        if x.device.type != "cpu":
            return torch.stack([(x * d[self.user]).sum(1) for d in directions.unbind(1)], 1)
        if models not in self._patterns:  # which directions each row meets: sparse zeros [N, U M]
            n, meets = len(self), self.user[:, None] * models + torch.arange(models)
            with warnings.catch_warnings():  # torch announces that its CSR format may change
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
                self._patterns[models] = torch.sparse_csr_tensor(
                    models * torch.arange(n + 1), meets.flatten(), torch.zeros(meets.numel()),
                    (n, self.num_users * models), check_invariants=True,
                )  # fmt: skip
        pattern, flat = self._patterns[models].to(x.dtype), directions.flatten(0, 1)
        return torch.sparse.sampled_addmm(pattern, x, flat.T, beta=0).values().view(-1, models)

    def user_weight(self) -> Tensor:
        """Sum of the weights of each user's comparisons [U], in float64."""
        return self.sum(self.weight[:, None])[:, 0]

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean of values [N] over each user's comparisons: [U], in float64."""
        return self.sum((self.weight * values.double())[:, None])[:, 0] / self.user_weight()

    def accuracies(self, logits: Tensor) -> Tensor:
        """Weighted share of each user's comparisons with a logit [N] above 0 (eq. 15), where a
        logit of exactly 0 counts one half: [U]."""
        return self.mean((logits > 0) + 0.5 * (logits == 0))

    def log_losses(self, logits: Tensor) -> Tensor:
        """Weighted mean of -log sigmoid(logit) over each user's comparisons [N]: [U]."""
        return self.mean(softplus(-logits.double()))

    def user_blocks(
        self, max_rows: int, extra_rows_per_user: int = 0, padded: bool = False
    ) -> Iterator[tuple[slice, slice]]:
        """Consecutive users, and their comparisons, that fit into ``max_rows``, with the extra rows
        of each user; a larger user forms a block alone. Padded, every user of a block counts as
        many comparisons as the largest has."""
        counts, row = self.counts.tolist(), 0
        first = filled = longest = 0
        for user, count in enumerate([*counts, math.inf]):
            longest = max(longest, count)
            rows = longest * (user + 1 - first) if padded else filled + count
            if user > first and rows + extra_rows_per_user * (user + 1 - first) > max_rows:
                end = row + filled
                yield slice(first, user), slice(row, end)
                first, row, filled, longest = user, end, 0, count
            filled += count

    def pick(self, rows: Tensor, counts: Sequence[int]) -> "Users":
        """Some of the comparisons, by number [n], as those of other users; features stay behind."""
        return Users(counts, self.weight[rows.to(self.device)])


class Comparisons(Users):
    """The comparisons of U users, at least one of each, with their features: counts and weights as
    for ``Users``, the users' names [U] or none, and the number of each comparison's dialogue [N],
    None where every one stands alone. ``project`` and ``backproject`` are the features'."""

    def __init__(
        self, features: Features, counts: Sequence[int] | Tensor, weight: Tensor | None = None,
        names: Iterable[str] = (), dialogs: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(counts, weight, features.device)
        self.features, self.names, self.dialogs = features, list(names), dialogs
        self.num_features = features.num_features
        self.project, self.backproject = features.project, features.backproject
        require(self.num_users > 0, "no users: give at least one user with comparisons")
        for u, count in enumerate(self.counts.tolist()):
            require(count > 0, f"user {u} has no comparisons: leave the user out")
        require(len(self) == len(features), "counts do not add up to the comparisons")

    @classmethod
    def from_list(
        cls, X: Sequence[Tensor], weights: Sequence[Tensor] | None = None, device: Device = None
    ) -> "Comparisons":
        """Pack U tensors [m_u, F], and of weights [m_u]; views of one tensor, in order, are not
        copied. InputErrors as of ``check_features``, or for weights that do not match."""
        check_features(X)
        weight = None
        if weights is not None:
            for u, (x, w) in enumerate(zip(X, weights, strict=True)):
                require(w.shape == (len(x),), f"user {u}: {len(x)} comparisons, {len(w)} weights")
            weight = torch.cat([w.double() for w in weights])
        return cls(DenseFeatures(_pack(X).to(device or X[0].device)), list(map(len, X)), weight)

    def select(self, keep: Tensor) -> "Comparisons":
        """Those where ``keep`` [N] is true; users left without any are left out."""
        keep = keep.to(self.device)
        counts = torch.bincount(self.user[keep], minlength=self.num_users)
        names = [name for name, n in zip(self.names, counts.tolist(), strict=False) if n]
        dialogs = None if self.dialogs is None else self.dialogs[keep.to(self.dialogs.device)]
        features = self.features.select(keep.nonzero()[:, 0])
        return Comparisons(features, counts[counts > 0], self.weight[keep], names, dialogs)

    def flipped(self, coin: Tensor) -> "Comparisons":
        """Chosen and rejected swapped where the coin [N] is true."""
        return self._with(self.features.flipped(coin))

    def in_memory(self, rows: bool = False) -> "Comparisons":
        """The same read from memory alone, where the differences [N, F] are held or, if asked for
        and there are fewer of them, distinct ``rows``."""
        if isinstance(self.features, DenseFeatures):
            return self
        return self._with(self.features.held() if rows else self.features.dense())

    def _with(self, features: Features) -> "Comparisons":
        return Comparisons(features, self.counts, self.weight, self.names, self.dialogs)

    def parts(
        self, user_rows: int = 0, size: int | None = None
    ) -> "Iterator[tuple[slice, slice, Comparisons]]":
        """Users that are worked on together: which, their rows and comparisons. A part has at most
        ``size`` bytes (PART_BYTES if None), with ``user_rows`` more rows for each user. Streamed,
        or off the CPU, everything is one part."""
        if self.device.type != "cpu" or not isinstance(self.features, DenseFeatures):
            yield slice(0, self.num_users), slice(0, len(self)), self
            return
        rows = (size or PART_BYTES) // (4 * self.num_features)
        for users, some in self.user_blocks(rows, user_rows):
            features = DenseFeatures(self.features.x[some])
            yield users, some, Comparisons(features, self.counts[users], self.weight[some])

    def share(self, process: int, processes: int) -> "Comparisons":
        """One process's users: consecutive ones, at least one, with about its share of comparisons;
        InputError if there are fewer users than processes."""
        if processes == 1:
            return self
        fewer = f"{processes} processes for {self.num_users} users: start fewer"
        require(processes <= self.num_users, fewer)
        middle = self.counts.cumsum(0) - self.counts / 2
        owner, last = (middle * processes / self.counts.sum()).long().tolist(), -1
        for u, wanted in enumerate(owner):  # in order, and enough users left for all who follow
            last = owner[u] = min(max(wanted, processes - len(owner) + u), last + 1)
        own = torch.tensor(owner, device=self.device) == process
        return self.select(own[self.user])

    @cached_property
    def units(self) -> list[list[Tensor]]:
        """Each user's shots: the numbers of the comparisons of each dialogue, or of each one."""
        rows = torch.arange(len(self)).split(self.counts.tolist())
        if self.dialogs is None:
            return [list(row.split(1)) for row in rows]
        dialogs = self.dialogs.cpu()
        return [[row[dialogs[row] == d] for d in dialogs[row].unique()] for row in rows]


def _pack(X: Sequence[Tensor]) -> Tensor:
    """The tensors below each other [N, F]; no copy where they already lie so."""
    first, end = X[0], X[0].data_ptr()
    for x in X:
        if x.data_ptr() != end or not x.is_contiguous() or x.dtype != first.dtype:
            return torch.cat(list(X))
        end += x.numel() * x.element_size()
    if first.untyped_storage().nbytes() < end - first.untyped_storage().data_ptr():
        return torch.cat(list(X))  # neighbours by chance, not parts of one tensor
    return first.detach().as_strided((sum(map(len, X)), first.shape[1]), (first.shape[1], 1))


def check_features(X: Sequence[Tensor]) -> None:
    """InputError, with the user and row, unless X is U finite tensors [m_u, F] on one device."""
    require(len(X) > 0, "no users: give a list with one tensor [comparisons, features] per user")
    for u, x in enumerate(X):
        require(isinstance(x, Tensor), f"user {u}: a torch tensor is expected, not {type(x)}")
        require(x.ndim == 2, f"user {u}: features must be [comparisons, features], not {x.ndim}-D")
        require(len(x) > 0, f"user {u} has no comparisons: leave the user out")
        found, expected = x.shape[1], X[0].shape[1]
        require(found == expected, f"user {u}: {found} features where {expected} are expected")
        require(x.device == X[0].device, f"user {u}: features on {x.device}, not {X[0].device}")
        for row in (~torch.isfinite(x).all(1)).nonzero()[:1, 0].tolist():
            raise InputError(f"user {u}, row {row}: NaN or infinity among the features")


@dataclass
class Shots:
    """Random shots of new users."""

    rows: list[Tensor]  # numbers of comparisons by trial, number of shots and user, users innermost
    sizes: list[int]  # the S numbers of shots; may be 0
    trials: int  # draws per number of shots
    users_with_that_many: list[int]  # how many users have that many shots [S]


def draw_shots(
    few: Comparisons, sizes: Sequence[int], trials: int, generator: Seed = None
) -> Shots:
    """Draw new users' shots for every trial and size, all where there are too few: comparisons, or
    whole dialogues where the comparisons have dialogues."""
    require(trials >= 1 and all(size >= 0 for size in sizes), "at least one trial is needed")
    generator, units = as_generator(generator), few.units
    warn_of_short_users(min(map(len, units)), sizes)
    none = torch.empty(0, dtype=torch.long)
    rows = []
    for size in [*sizes] * trials:
        for unit in units:
            order = torch.randperm(len(unit), generator=generator)[:size].tolist()
            rows.append(torch.cat([none, *(unit[i] for i in order)]))
    that_many = [sum(len(unit) >= size for unit in units) for size in sizes]
    return Shots(rows, list(sizes), trials, that_many)


def warn_of_short_users(fewest: int, shots: Iterable[int]) -> None:
    """Say once that a user has fewer shots than are wanted."""
    if fewest < max(shots):
        message = "%d shots asked for, but a user has only %d: all of that user's are used"
        log.warning(message, max(shots), fewest)
