"""Shots, simulated users and published data layouts, as the public scripts call them.

U users, P prompts, R responses, M reward models, F features.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lore.common.files import require
from lore.learning.comparisons import Seed, as_generator, warn_of_short_users


def sample_shots(features: Sequence[Tensor], shots: int, generator: Seed = None) -> list[Tensor]:
    """``shots`` random comparisons of each user, from U tensors [m_u, F]: U tensors [shots, F].

    A user with fewer gives all, and a warning says so once.
    """
    require(shots >= 1, f"{shots} shots: at least 1 is needed")
    warn_of_short_users(min(map(len, features)), [shots])
    generator = as_generator(generator)
    return [x[torch.randperm(len(x), generator=generator)[:shots].to(x.device)] for x in features]


def generate_population(
    alpha: float | Sequence[float] | np.ndarray | Tensor, N: int,
    generator: Seed = None, num_models: int = 10,
) -> Tensor:  # fmt: skip
    """Simulated users' weights over M reward models, Dirichlet(alpha): [N, M]; alpha are M
    concentrations, or one number for all of ``num_models``."""
    concentration = np.asarray(alpha, dtype=np.float64)
    if concentration.ndim == 0:
        concentration = np.full(num_models, float(concentration))
    fits = concentration.ndim == 1 and bool((concentration > 0).all())
    require(fits, f"Dirichlet alpha must be positive, not {alpha}")
    seed = torch.randint(2**62, (1,), generator=as_generator(generator)).item()
    draws = np.random.default_rng(seed).dirichlet(concentration, N)
    return torch.from_numpy(draws).float()


generate_popupulation = generate_population  # the published name

Scores = Tensor | np.ndarray


def simulate_choices(rewards: Scores, W: Scores) -> tuple[Tensor, Tensor]:
    """Best and worst response to every prompt for users with weights W [U, M], the first of
    equals: [U, P]. Rewards are scores [P, R, M] of R responses to P prompts by M reward models."""
    rewards = _numbers(rewards)
    require(rewards.ndim == 3, f"rewards are [prompts, responses, models], not {rewards.ndim}-D")
    require(rewards.shape[2] == W.shape[1], "as many weights as reward models are needed")
    best = torch.empty(len(W), len(rewards), dtype=torch.long)
    worst = torch.empty_like(best)
    for u, w in enumerate(_numbers(W).to(rewards)):
        scores = rewards @ w  # [P, R]
        best[u], worst[u] = scores.argmax(1), scores.argmin(1)
    return best, worst


def _numbers(values: Scores) -> Tensor:
    """A tensor of floats; arrays of Python objects are read as numbers."""
    if isinstance(values, Tensor):
        return values
    values = np.asarray(values)
    return torch.from_numpy(values.astype(np.float32) if values.dtype == object else values)


def simulate_user(
    reward_tensor: Scores, features: Tensor | Sequence[Sequence[Tensor]], w: Scores
) -> Tensor:
    """Differences [P, F], best minus worst response of every prompt, of a user with weights w [M].

    Scores are [P, R, M], a tensor or an array, of dtype object too; embeddings of the responses
    [P, R, F], or P lists of R tensors [F].
    """
    return simulate_population(reward_tensor, features, w[None])[0]


def simulate_population(
    reward_tensor: Scores, features: Tensor | Sequence[Sequence[Tensor]], W: Scores
) -> Tensor:
    """``simulate_user`` of every row of W [U, M]: [U, P, F]. ``simulate_choices`` needs less."""
    if not isinstance(features, Tensor):
        features = torch.stack([torch.stack(list(responses)) for responses in features])
    chosen, rejected = simulate_choices(reward_tensor, W)
    prompts = torch.arange(len(features))
    return features[prompts, chosen] - features[prompts, rejected]


def create_sparse_tensor(dense: Tensor, fraction: float, generator: Seed = None) -> list[Tensor]:
    """int(fraction P) random comparisons of each user, at least one, from dense [U, P, F]: U
    tensors in float32."""
    require(0 < fraction <= 1, f"the fraction must be in (0, 1], not {fraction}")
    shots = max(1, int(fraction * dense.shape[1]))
    return [x.float() for x in sample_shots(list(dense), shots, generator)]


Dialogs = Mapping[str, Mapping[str, Sequence[tuple[Tensor, Tensor]]]]  # user -> dialogue -> pairs


def create_dataset_prism(embeddings: Dialogs) -> list[Tensor]:
    """Differences of every user's pairs (chosen [F], rejected [F]): U tensors [m_u, F]."""
    return [
        torch.stack([chosen - rejected for pairs in dialogs.values() for chosen, rejected in pairs])
        for dialogs in embeddings.values()
    ]


def create_dataset_prism_shots(
    embeddings: Dialogs, shots: int, generator: Seed = None
) -> list[Tensor]:
    """The same from ``shots`` random dialogues of each user; all of them where there are fewer."""
    drawn, numbers = {}, [torch.arange(len(dialogs)) for dialogs in embeddings.values()]
    for user, some in zip(embeddings, sample_shots(numbers, shots, generator), strict=True):
        names = list(embeddings[user])
        drawn[user] = {names[i]: embeddings[user][names[i]] for i in some.tolist()}
    return create_dataset_prism(drawn)
