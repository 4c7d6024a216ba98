"""LoRe, the learning core under its published names (arXiv 2504.14439).

U users, N comparisons, F features, K rank, M models side by side. A comparison x is the difference
of two embeddings, *chosen minus rejected*; its logit for a user with weights w on the simplex is
x^T V w / 100. ``from utils import *`` gives torch, np, nn and F as well.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn  # noqa: F401 (scripts take nn from here)

from lore.common.devices import sum_over_processes
from lore.common.files import InputError, require  # noqa: F401 (scripts catch InputError from here)
from lore.learning import comparisons
from lore.learning.basis import TEMPERATURE, Basis
from lore.learning.comparisons import Comparisons, Seed, Users, as_generator, check_features
from lore.learning.grid import check_reference, fit_bases, grid
from lore.learning.simulated_users import *  # noqa: F403 (all that it has is published)
from lore.learning.training import OptimizerFactory, fit_weights, own_directions, train_together

log = logging.getLogger(__name__)

MIN_WEIGHT = 1e-2  # a column that no user gives more weight is dropped (LoRe_regularized)


def preference_loss(products: Tensor, coefficient: Tensor) -> Tensor:
    """LoRe's loss sum_i c_i softplus(-x_i^T V w_u(i) / 100) of every model [M] (eq. 10), from
    x^T V w [N, M] of every comparison for its own user, and c [N]: 1 / m_u in equation 10, 1 / N in
    the published scripts' second estimator."""
    return -(coefficient @ F.logsigmoid(products / TEMPERATURE))


# ------------------------------------------------------------- Joint estimators


class LoRe:
    """A shared basis and every user's weights, learned jointly (eq. 10).

    Minimises sum_u mean_{i of u} softplus(-logit_i) + alpha sum_k ||V[:, k] - reference||^2 by one
    optimiser over weights and basis, on all comparisons at every step.

    Args:
        V_sft, alpha: reference direction [F] or [F, 1], and how strongly the basis is pulled to it;
            None and 0 if there is none.
        num_classes, num_features, num_basis_vectors: U, F and K; K = 1 is Bradley-Terry.
        num_iterations, learning_rate: of the optimiser, the paper's Adam by default.
        generator: of the initial values, a seed or generator; None for torch's global one.
        optimizer: another one, see ``training.make_optimizer``.
        shrinkage: pull of each user's weights towards the users' mean, in comparisons; 0 is LoRe.
        dtype: of the arithmetic; torch's default if None.
        distributed: ``train`` is given this process's share of the U users, in order of rank
            (torch.distributed); every process returns all weights.

    Attributes:
        losses: the objective at every step [T], after ``train``.
    """

    alternating = False
    drops_columns = False
    loss = staticmethod(preference_loss)
    draw_weights = staticmethod(torch.randn)  # the initial logits of the weights

    def __init__(
        self, V_sft: Tensor | None, alpha: float,
        num_classes: int, num_features: int, num_basis_vectors: int,
        num_iterations: int = 1000, learning_rate: float = 0.5, *,
        generator: Seed = None, optimizer: OptimizerFactory | None = None, shrinkage: float = 0.0,
        dtype: torch.dtype | None = None, progress: bool = False, distributed: bool = False,
    ) -> None:  # fmt: skip
        users, rank = num_classes, num_basis_vectors
        require(rank > 0, f"rank {rank}: ranks start at 0, the reference, which is not trained")
        if rank > (limit := min(num_features, users)):  # as the published code allows
            log.warning(
                "rank %d is more than %d users and %d features can support: columns beyond %d are "
                "not determined by the data", rank, users, num_features, limit,
            )  # fmt: skip
        require(alpha >= 0 and shrinkage >= 0, "alpha and shrinkage must not be negative")
        self.reference = check_reference(V_sft, num_features)
        require(alpha == 0 or V_sft is not None, "alpha > 0 pulls to a reference: there is none")
        self.alpha, self.shrinkage = float(alpha), float(shrinkage)
        self.num_classes, self.num_features, self.rank = users, num_features, rank
        self.num_iterations, self.learning_rate = num_iterations, learning_rate
        self.optimizer, self.progress = optimizer, progress
        self.processes = dist.get_world_size() if distributed else 1
        how = {"generator": as_generator(generator), "dtype": dtype or torch.get_default_dtype()}
        self.W0 = self.draw_weights(users, rank, **how)
        self.V0 = torch.randn(num_features, rank, **how)
        self.losses = torch.empty(0)

    def per_comparison(self, data: Comparisons) -> Tensor:
        """What one comparison of a user weighs in the objective [U]."""
        return 1 / data.user_weight()

    def penalty(self, V: Tensor, step: int) -> Tensor:
        """alpha sum_k ||V[:, k] - reference||^2 for V [F, K]."""
        return self.alpha * (V - self.reference.to(V)[:, None]).square().sum()

    def train(
        self, X: Sequence[Tensor], weights: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """W [U, K] on the simplex and V [F, K], from U tensors [m_u, F], which may carry weights,
        U tensors [m_u]."""
        return train_together([self], Comparisons.from_list(X, weights))[0]

    def finish(self, W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """What ``train`` returns, from the last weights and basis."""
        return W, V


class LoRe_regularized(LoRe):
    """The published scripts' second estimator: alternating steps, cosine pull, unused columns cut.

    Minimises the mean over all comparisons of softplus(-logit) + alpha_t mean_k (1 - cos(V[:, k],
    reference)): one step on the weights without the pull, then one on the basis with it. alpha_t is
    0 before a fifth of the steps and alpha after four fifths, linear between. Columns whose largest
    weight stays under 0.01 are dropped at the end; the others are not rescaled. Arguments as for
    ``LoRe``.
    """

    alternating = True
    drops_columns = True
    draw_weights = staticmethod(torch.rand)

    def __init__(
        self, V_sft: Tensor | None, alpha: float,
        num_classes: int, num_features: int, num_basis_vectors: int,
        num_iterations: int = 20_000, learning_rate: float = 0.5, **settings: Any,
    ) -> None:  # fmt: skip
        sizes = num_classes, num_features, num_basis_vectors
        super().__init__(V_sft, alpha, *sizes, num_iterations, learning_rate, **settings)

    def per_comparison(self, data: Comparisons) -> Tensor:
        """One comparison's share of all of them [U], over all processes."""
        total = sum_over_processes(data.weight.sum(), self.processes)
        return (1 / total).expand(data.num_users)

    def schedule(self, step: int) -> float:
        """alpha_t at a step."""
        begin, end = int(0.2 * self.num_iterations), int(0.8 * self.num_iterations)
        if step < begin:
            return 0.0
        return self.alpha if step >= end else self.alpha * (step - begin) / (end - begin)

    def penalty(self, V: Tensor, step: int) -> Tensor:
        """alpha_t mean_k (1 - cos(V[:, k], reference)) for V [F, K]."""
        cosines = F.cosine_similarity(V, self.reference.to(V)[:, None], dim=0)
        return self.schedule(step) * (1 - cosines).mean()

    def finish(self, W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """W [U, K'] and V [F, K'] without the columns that nobody uses."""
        largest = W.amax(0)
        kept = (largest >= MIN_WEIGHT) | (largest == largest.max())
        return W[:, kept], V[:, kept]


# ---------------------------------------------------------------- New users


class PersonalizeBatch:
    """Few-shot weights of new users with the basis frozen (eq. 11).

    Initial logits are standard normal, drawn user by user. Settings are those of
    ``training.fit_weights``: optimizer, shrinkage with population, progress.
    """

    def __init__(
        self, num_classes: int, num_features: int, num_basis_vectors: int,
        num_iterations: int = 500, learning_rate: float = 0.1, *,
        generator: Seed = None, dtype: torch.dtype | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        require(num_basis_vectors >= 1, f"the rank must be at least 1, not {num_basis_vectors}")
        self.num_classes, self.num_features = num_classes, num_features
        self.settings = {"num_iterations": num_iterations, "learning_rate": learning_rate}
        self.settings |= settings
        self.dtype = dtype or torch.get_default_dtype()
        self.logits = draw_logits(num_classes, num_basis_vectors, generator, self.dtype)

    def train(
        self, X: Sequence[Tensor], V: Tensor, weights: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """U weight vectors [K] for comparisons X, U tensors [m_u, F], which may carry weights, U
        tensors [m_u]; V [F, K] is frozen."""
        require(len(X) == self.num_classes, f"{len(X)} users given, {self.num_classes} expected")
        _check_basis(V, self.num_features, self.logits.shape[1], X[0])
        data = Comparisons.from_list(X, weights)
        Z = data.project(V.detach().to(self.dtype))
        return list(fit_weights(Z, data, self.logits, preference_loss, **self.settings))


def draw_logits(users: int, rank: int, generator: Seed, dtype: torch.dtype | None = None) -> Tensor:
    """Initial logits [U, K] of new users: standard normal, drawn user by user."""
    generator = as_generator(generator)
    return torch.stack([torch.randn(rank, generator=generator, dtype=dtype) for _ in range(users)])


def _check_basis(V: Tensor, num_features: int, rank: int, *others: Tensor) -> None:
    """Refuse a basis of another shape than [F, K], or on another device than the others."""
    found, expected = tuple(V.shape), (num_features, rank)
    require(found == expected, f"the basis has shape {found}, expected {expected}")
    for there in (other.device for other in others):
        where = f"the basis is on {V.device}, features or weights on {there}"
        require(V.device == there, f"{where}: move them to one device")


# --------------------------------------------------------------------- Pipeline


def personalize(
    basis: Basis, users: Users, Z: Tensor, start: Tensor | Seed = None, **settings: Any
) -> Tensor:
    """Weights [U, K] of new users from their few comparisons (eq. 11); ones where K is 1.

    Args:
        basis: with V frozen; weights are shrunk like those of its own users, to their mean.
        users, Z: whose the comparisons are, and their projections on V [N, K].
        start: initial logits [U, K], or a seed or generator of them.
        settings: of ``training.fit_weights``.
    """
    K = basis.V.shape[1]
    if K == 1:
        return torch.ones(users.num_users, 1, device=users.device)
    if not isinstance(start, Tensor):
        start = draw_logits(users.num_users, K, start, Z.dtype)
    shrunk = {"population": basis.W.mean(0), "shrinkage": basis.settings.get("shrinkage", 0.0)}
    return fit_weights(Z, users, start, preference_loss, **shrunk, **settings)


class Accuracies(NamedTuple):
    """Accuracy of every (alpha, K), alphas outermost: means, then standard deviations over users
    (dividing by U)."""

    train: np.ndarray
    seen: np.ndarray
    few_shot: np.ndarray
    unseen: np.ndarray
    train_std: np.ndarray
    seen_std: np.ndarray
    few_shot_std: np.ndarray
    unseen_std: np.ndarray


def run(
    K_list: Sequence[int], alpha_list: Sequence[float], V_final: Tensor | None,
    train_features: Sequence[Tensor], test_features_sparse: Sequence[Tensor],
    train_features_unseen: Sequence[Tensor], test_features_sparse_unseen: Sequence[Tensor],
    N: int, N_unseen: int, device: torch.device | str = "cpu", *,
    estimator: type[LoRe] = LoRe, num_iterations: int = 1000, learning_rate: float = 0.5,
    few_shot_iterations: int = 500, few_shot_learning_rate: float = 0.1,
    optimizer: OptimizerFactory | None = None, generator: Seed = None, progress: bool = True,
) -> Accuracies:  # fmt: skip
    """Fit, personalise and evaluate every (alpha, K) (the experiment of Table 1).

    Args:
        K_list, alpha_list: ranks (0 reference, 1 Bradley-Terry) and strengths of the pull.
        V_final: the reference [F] or [F, 1]; None if there is none.
        train_features, test_features_sparse: comparisons of the N seen users, N tensors [m_u, F].
        train_features_unseen, test_features_sparse_unseen: the same of the N_unseen new users.
        num_iterations, learning_rate: of the estimator; those of few shots of the new users.
        generator: seed or generator of all initial values; for each (alpha, K) W, V and then the
            new users' logits are drawn, as if the ranks were fitted one after the other.
    """
    generator, starts = as_generator(generator), []
    sets = _pack_all(
        (train_features, N), (test_features_sparse, N), (train_features_unseen, N_unseen),
        (test_features_sparse_unseen, N_unseen), device=device,
    )  # fmt: skip
    how = {"optimizer": optimizer, "progress": progress}
    bases = fit_bases(
        estimator, _points(K_list, alpha_list), V_final, sets[0], N, None,
        lambda columns: starts.append(draw_logits(N_unseen, columns, generator)),
        generator=generator, num_iterations=num_iterations, learning_rate=learning_rate, **how,
    )  # fmt: skip
    how |= {"num_iterations": few_shot_iterations, "learning_rate": few_shot_learning_rate}
    rows = []
    for basis, start in zip(bases, starts, strict=True):
        projected = [data.project(basis.V) for data in sets]
        W = personalize(basis, sets[2], projected[2], start, **how)
        four = zip(sets, projected, (basis.W, basis.W, W, W), strict=True)
        rows.append([data.accuracies(_rewards(Z, w, data)).cpu().numpy() for data, Z, w in four])
    means, spreads = (np.array([[f(u) for u in row] for row in rows]) for f in (np.mean, np.std))
    return Accuracies(*means.T, *spreads.T)


def run_regularized(*args: Any, **settings: Any) -> Accuracies:
    """``run`` with ``LoRe_regularized``: 20,000 iterations, few-shot learning rate 0.5."""
    published = {"num_iterations": 20_000, "few_shot_learning_rate": 0.5}
    return run(*args, **{"estimator": LoRe_regularized, **published, **settings})


def _pack_all(*sets: tuple[Sequence[Tensor], int], device: torch.device | str) -> list[Comparisons]:
    """Pack several lists of features, each with the number of users it must have."""
    for X, users in sets:
        require(len(X) == users, f"{len(X)} users' features given where {users} are expected")
    packed = [Comparisons.from_list(X, device=device) for X, _ in sets]
    widths = sorted({data.num_features for data in packed})
    require(len(widths) == 1, f"users of {widths} features: as many are expected of all")
    return packed


def _points(ranks: Sequence[int], alphas: Sequence[float]) -> list[dict[str, Any]]:
    for name, values in (("K_list", ranks), ("alpha_list", alphas)):
        some = isinstance(values, Sequence | np.ndarray) and len(values) > 0
        require(some, f"{name} is a list of numbers, not {values!r}")
    return grid(ranks, alphas)


def _rewards(Z: Tensor, W: Tensor, users: Users) -> Tensor:
    """z^T w [N] of projected comparisons Z [N, K] for their users' weights [U, K]."""
    return (Z * W.to(Z)[users.user]).sum(1)


class ShotAccuracies(NamedTuple):
    """Accuracy of new users per number of shots, over trials: arrays [S] for one (alpha, K), else
    [alphas * ranks, S], alphas outermost."""

    few_shot: np.ndarray
    few_shot_std: np.ndarray
    unseen: np.ndarray
    unseen_std: np.ndarray


def run_few_shot_vary_shots(
    trials: int, alpha_list: Sequence[float], K_list: Sequence[int], num_shots: Sequence[int],
    train_features: Sequence[Tensor], train_features_unseen: Sequence[Tensor],
    test_features_sparse_unseen: Sequence[Tensor], V_final: Tensor | None,
    N: int, N_unseen: int, device: torch.device | str = "cpu", *,
    estimator: type[LoRe] = LoRe, num_iterations: int = 500, learning_rate: float = 0.5,
    few_shot_iterations: int = 500, few_shot_learning_rate: float = 0.1,
    optimizer: OptimizerFactory | None = None, generator: Seed = None, progress: bool = True,
) -> ShotAccuracies:  # fmt: skip
    """Accuracy of new users against the number of their comparisons (the few-shot curves).

    Args:
        trials: random draws of the shots, per number of shots.
        num_shots: numbers of comparisons drawn from each new user's ``train_features_unseen``.
        generator: after each (alpha, K)'s initial W and V, every number of shots and trial draws
            its shots user by user, then the users' logits.
    """
    require(trials >= 1 and min(num_shots) >= 1, "trials and shots start at 1")
    generator, draws = as_generator(generator), []
    train, few, unseen = _pack_all(
        (train_features, N), (train_features_unseen, N_unseen),
        (test_features_sparse_unseen, N_unseen), device=device,
    )  # fmt: skip
    comparisons.warn_of_short_users(int(few.counts.min()), num_shots)
    own = torch.arange(len(few)).split(few.counts.tolist())

    def draw(columns: int) -> None:
        """Every size, trial and user's comparisons, by number, and the users' initial logits."""
        rows, logits = [], []
        for size in num_shots:
            for _ in range(trials):
                rows += [row[torch.randperm(len(row), generator=generator)[:size]] for row in own]
                logits.append(draw_logits(N_unseen, columns, generator))
        draws.append((rows, torch.cat(logits)))

    bases = fit_bases(
        estimator, _points(K_list, alpha_list), V_final, train, N, None, draw,
        num_iterations=num_iterations, learning_rate=learning_rate, generator=generator,
        optimizer=optimizer, progress=progress,
    )  # fmt: skip
    shape, rows = (len(num_shots), trials, N_unseen), []
    for basis, (drawn, start) in zip(bases, draws, strict=True):
        Z, Z_unseen = few.project(basis.V), unseen.project(basis.V)
        picked = torch.cat(drawn).to(Z.device)
        users = few.pick(picked, [len(d) for d in drawn])
        W = personalize(
            basis, users, Z[picked], start, num_iterations=few_shot_iterations,
            learning_rate=few_shot_learning_rate, optimizer=optimizer,
        )  # fmt: skip
        fitted = users.accuracies(_rewards(Z[picked], W, users))
        held_out = [unseen.accuracies(_rewards(Z_unseen, w, unseen)) for w in W.split(N_unseen)]
        both = (some.view(shape).mean(2).cpu().numpy() for some in (fitted, torch.cat(held_out)))
        rows.append([f(1) for means in both for f in (means.mean, means.std)])  # of [S, trials]
    columns = np.array(rows).transpose(1, 0, 2)  # [4, alphas * ranks, S]
    return ShotAccuracies(*(columns[:, 0] if len(bases) == 1 else columns))


# ------------------------------------------------------------- Single functions


def solve_regularized(
    V_sft: Tensor | None, alpha: float, train_features: Sequence[Tensor], num_basis_vectors: int,
    num_iterations: int = 1000, learning_rate: float = 0.01, estimator: type[LoRe] = LoRe,
    **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fit ``LoRe`` on U tensors [m_u, F]: weights W [U, K] and basis V [F, K]."""
    require(len(train_features) > 0, "no users: give one tensor of comparisons per user")
    sizes = len(train_features), train_features[0].shape[-1], num_basis_vectors
    model = estimator(V_sft, alpha, *sizes, num_iterations, learning_rate, **settings)
    return model.train(train_features)


def solve_regularized_simplex(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """``solve_regularized`` with ``LoRe_regularized``: W [U, K'] and V [F, K']."""
    return solve_regularized(*args, **{"estimator": LoRe_regularized, **settings})


def solve(
    train_features: Sequence[Tensor], num_basis_vectors: int, *args: Any, **settings: Any
) -> tuple[Tensor, Tensor]:
    """``solve_regularized`` without a pull: W [U, K] and V [F, K] of U tensors [m_u, F]."""
    return solve_regularized(None, 0.0, train_features, num_basis_vectors, *args, **settings)


def learn_single_reward(
    train_features: Sequence[Tensor], num_iterations: int = 1000, learning_rate: float = 0.5,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """One reward direction V [F, 1] shared by all users: Bradley-Terry, the rank-1 ``LoRe``."""
    return solve(train_features, 1, num_iterations, learning_rate, **settings)[1]


def learn_single_reward_regularized(
    V_sft: Tensor, alpha: float, train_features: Sequence[Tensor],
    num_iterations: int = 1000, learning_rate: float = 0.5, **settings: Any,
) -> Tensor:  # fmt: skip
    """One shared direction V [F, 1], pulled to the reference: the rank-1 ``LoRe_regularized``."""
    given = V_sft, alpha, train_features, 1, num_iterations, learning_rate
    return solve_regularized_simplex(*given, **settings)[1]


def learn_multiple_few_shot(
    train_features: Sequence[Tensor], V: Tensor,
    num_iterations: int = 1000, learning_rate: float = 0.01, **settings: Any,
) -> list[Tensor]:  # fmt: skip
    """Few-shot weights [K] of each new user, for U tensors [m_u, F] and a frozen V [F, K]."""
    sizes = len(train_features), *V.shape
    model = PersonalizeBatch(*sizes, num_iterations, learning_rate, **settings)
    return model.train(train_features, V)


def learn_multiple(
    train_features: Sequence[Tensor], num_iterations: int = 1000, learning_rate: float = 0.5, *,
    weights: Sequence[Tensor] | None = None, **settings: Any,
) -> list[Tensor]:  # fmt: skip
    """Every user's own reward direction [F, 1], from zero, with nothing shared: the per-user
    baseline. Comparisons may carry weights, U tensors [m_u]; settings: optimizer, progress."""
    data = Comparisons.from_list(train_features, weights)
    given = data, preference_loss, num_iterations, learning_rate
    return list(own_directions(*given, **settings)[:, :, None])


solve_multi_reward = learn_multiple  # a published name


def learn_multiple_few_shot_weighted(
    alpha: float, train_features: Sequence[Tensor], current_dialog_features: Sequence[Tensor],
    V: Tensor, num_iterations: int = 1000, learning_rate: float = 0.01, **settings: Any,
) -> list[Tensor]:  # fmt: skip
    """``learn_multiple_few_shot`` of earlier comparisons, U tensors [m_u, F], and those of the
    current dialogue, U tensors [n_u, F], which count alpha times; 0 leaves them out."""
    require(alpha >= 0, f"alpha must not be negative: {alpha}")
    X, weights = [], []
    for earlier, now in zip(train_features, current_dialog_features, strict=True):
        now = now if alpha else now[:0]
        X.append(torch.cat([earlier, now]))
        weights.append(earlier.new_tensor([1.0] * len(earlier) + [alpha] * len(now)))
    model = PersonalizeBatch(len(X), *V.shape, num_iterations, learning_rate, **settings)
    return model.train(X, V, weights)


def evaluate_model(X: Tensor, V: Tensor, w: Tensor) -> float:
    """Share of comparisons [m, F] with x^T V w > 0 (eq. 15), for V [F, K] and w [K]."""
    check_features([X])
    _check_basis(V, X.shape[1], len(w), X, w)
    return float((X.float() @ (V.float() @ w.float()) > 0).float().mean())


def eval_multiple(
    W_list: Sequence[Tensor], V_list: Sequence[Tensor] | Tensor, test_features: Sequence[Tensor]
) -> np.ndarray:
    """Accuracy of every user [U] on U tensors [m_u, F], with weights W [U, K] or U vectors [K], and
    a basis [F, K] for all or one for each."""
    bases = [V_list] * len(W_list) if isinstance(V_list, Tensor) else V_list
    triples = zip(test_features, bases, W_list, strict=True)
    return np.array([evaluate_model(x, V, w) for x, V, w in triples])
