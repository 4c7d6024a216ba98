"""The learning core against plain per-user loops: seconds, memory, and the memory's bound.

    python benchmarks/core.py                    # the data sets' shapes, some minutes
    python benchmarks/core.py --device cuda

The plain loops are those of tests/reference.py. Both sides run in turn in one process for each
case, so that what else the machine does falls on both.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
import experiments
import reference
from measure import copy_bandwidth, extra_memory, iteration_seconds, made_up_users, timed
from reports import markdown
from utils import (
    Basis,
    Comparisons,
    DenseFeatures,
    LoRe,
    LoRe_regularized,
    RowFeatures,
    draw_shots,
    sweep_shots,
    train_together,
)

log = logging.getLogger(__name__)

LEARNING_RATE = 0.5
ALPHA = 1e4  # as published with the alternating estimator


class Measured(NamedTuple):
    """One case: both sides' seconds, and what bounds ours."""

    case: str
    plain: float
    ours: float
    aim: float
    feature_bytes: int
    floor_bytes: int  # that must be read
    bandwidth: float
    extra_bytes: int
    deviation: float

    def row(self) -> dict[str, str]:
        """The numbers of the table."""
        floor = self.floor_bytes / self.bandwidth
        share = self.extra_bytes / self.feature_bytes
        return {
            "case": self.case,
            "plain s": f"{self.plain:.4g}",
            "ours s": f"{self.ours:.4g}",
            "ratio": f"{self.plain / self.ours:.1f}",
            "aim": f"{self.aim:g}",
            "floor s": f"{floor:.4g}",
            "ours / floor": f"{self.ours / floor:.1f}",
            "extra MB": f"{self.extra_bytes / 1e6:.0f}",
            "of features": f"{share:.1%}",
            "deviation": f"{self.deviation:.0e}",
        }


def main(device: str = "cpu", **sizes: Any) -> None:
    """Print a table: seconds of the plain loops and of ours, their ratio, and what bounds it.

    Floor is the time to read what must be read, at the bandwidth measured by copying as many bytes
    as the features have (read and written bytes both count): the features once, and for few-shot
    also every fit's projected comparisons at every step. Extra is how far peak memory rises above
    the features, and deviation the relative difference of the two sides' results.

    Args:
        device: cpu or cuda.
    """
    rows = [measured.row() for measured in measure(cases(device, **sizes))]
    print(markdown(pd.DataFrame(rows).set_index("case")))
    print(note())


def note() -> str:
    """What a reader of the table must know of the few-shot row."""
    return (
        "Seconds are of one iteration (medians), of the whole sweep for few-shot, and of one "
        "scoring for the heads. The plain few-shot loop is timed on one trial and a few iterations "
        "and scaled to all."
    )


def measure(todo: Iterable[Callable[[], Measured]]) -> Iterator[Measured]:
    """Each case in a process of its own, as its peak memory is of the process's life."""
    # A fork has the libraries already; elsewhere than on Linux some of them do not survive it.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    for case in todo:
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            measured = fresh.submit(case).result()
        log.info("%s", ", ".join(f"{k}: {v}" for k, v in measured.row().items()))
        yield measured


def cases(
    device: str,
    features: int = 4096,
    joint: list[int] = [1000, 47, 5],  # noqa: B006
    alternating: list[int] = [640, 15, 10],  # noqa: B006
    few_shot: list[int] = [20, 10, 20, 5],  # noqa: B006
    ranks: list[int] = [1, 2, 3, 4, 5],  # noqa: B006
    heads: list[int] = [1865, 4, 16],  # noqa: B006
    steps: int = 6,
    rounds: int = 3,
    few_shot_iterations: int = 500,
    seed: int = 0,
) -> list[Callable[[], Measured]]:
    """What is measured, to be called one by one.

    Args:
        device: cpu or cuda.
        features: F.
        joint: users, pairs of each and rank of the joint estimator (PersonalLLM); the sweep over
            ranks has the same users and pairs.
        alternating: the same of the alternating estimator (PRISM).
        few_shot: trials, numbers of shots (5, 10, ...), new users and rank (Reddit TLDR).
        ranks: ranks of the sweep that is trained side by side.
        heads: prompts, completions of each and reward heads (RewardBench 2).
        steps: iterations in a row; the first one is not counted.
        rounds: how often both sides take their turn.
        few_shot_iterations: of the new users' weights.
        seed: of everything random.
    """
    turns = {"device": device, "steps": steps, "rounds": rounds, "seed": seed}
    return [
        partial(joint_case, *joint, features, **turns),
        partial(alternating_case, *alternating, features, **turns),
        partial(few_shot_case, *few_shot, features, few_shot_iterations, device, seed),
        partial(ranks_case, *joint[:2], features, ranks, False, **turns),
        partial(ranks_case, *joint[:2], features, ranks, True, **turns),
        partial(heads_case, *heads, features, device, rounds, seed),
    ]


# ----------------------------------------------------------------------- Two sides


def joint_case(users: int, pairs: int, rank: int, features: int, **turns: Any) -> Measured:
    """The joint estimator's iteration against the plain loop's."""
    name = f"joint, {users} users x {pairs}, rank {rank}"
    return _fit_case(name, LoRe, reference.joint, 0.0, users, pairs, rank, features, **turns)


def alternating_case(users: int, pairs: int, rank: int, features: int, **turns: Any) -> Measured:
    """The same of the alternating estimator, with its pull to a reference."""
    name = f"alternating, {users} users x {pairs}, rank {rank}"
    plain = reference.alternating
    return _fit_case(name, LoRe_regularized, plain, ALPHA, users, pairs, rank, features, **turns)


def _fit_case(
    name: str,
    estimator: type[LoRe],
    loop: Callable[..., tuple[Tensor, ...]],
    alpha: float,
    users: int,
    pairs: int,
    rank: int,
    features: int,
    device: str,
    steps: int,
    rounds: int,
    seed: int,
) -> Measured:
    X = made_up_users(users, pairs, features, device, seed)
    direction = made_up_users(1, 1, features, device, seed + 1)[0][0]
    fresh = partial(_model, estimator, direction, alpha, features=features, steps=steps, seed=seed)

    def plain() -> Tensor:
        model = fresh(users=users, rank=rank)
        start = model.W0.to(device), model.V0.to(device)
        return loop(X, *start, steps, LEARNING_RATE, direction, alpha)[1]

    def ours() -> Tensor:
        return fresh(users=users, rank=rank).train(X)[1]

    few = max(rank, users // 8)  # what the libraries set up once is not counted
    fresh(users=few, rank=rank).train(X[:few])
    extra = extra_memory(ours, device)
    apart = _deviation(ours(), plain())
    seconds = _in_turn([plain, ours], device, rounds, steps)
    aim = 20 if estimator.alternating else 8
    return _measured(name, seconds, aim, X, device, extra, apart)


def _model(
    estimator: type[LoRe],
    direction: Tensor,
    alpha: float,
    users: int,
    features: int,
    rank: int,
    steps: int,
    seed: int,
) -> LoRe:
    return estimator(
        direction, alpha, users, features, rank, steps, LEARNING_RATE, generator=seed
    )


def _in_turn(
    sides: Sequence[Callable[[], object]], device: str, rounds: int, steps: int
) -> list[float]:
    """Median seconds of each side's iterations, over all its turns."""
    seconds = [
        [iteration_seconds(side, device, steps) for side in sides] for _ in range(rounds)
    ]
    return [float(np.median(np.concatenate(turns))) for turns in zip(*seconds, strict=True)]


def _deviation(ours: Tensor, plain: Tensor) -> float:
    return float((ours - plain).norm() / plain.norm())


def _measured(
    name: str,
    seconds: Sequence[float],
    aim: float,
    X: Sequence[Tensor],
    device: str,
    extra: int,
    deviation: float,
    read_besides: int = 0,
) -> Measured:
    size = sum(x.nbytes for x in X)
    floor = size + read_besides
    return Measured(
        name, *seconds, aim, size, floor, copy_bandwidth(size, device), extra, deviation
    )


# ----------------------------------------------------------------------- Few shots


def few_shot_case(
    trials: int,
    sizes: int,
    users: int,
    rank: int,
    features: int,
    iterations: int,
    device: str,
    seed: int,
) -> Measured:
    """The whole sweep against one fit after the other; the plain loop is timed on a sample."""
    shots = [5 * (i + 1) for i in range(sizes)]
    X = made_up_users(users, shots[-1], features, device, seed)
    V = made_up_users(1, features, rank, device, seed + 1)[0] / 30
    basis = Basis(V, torch.ones(1, rank))

    def ours(trials: int, iterations: int) -> Tensor:
        few = Comparisons.from_list(X)
        draws = draw_shots(few, shots, trials, seed)
        return sweep_shots(basis, few, draws, seed, num_iterations=iterations)[0]

    ours(1, 1)
    extra = extra_memory(lambda: ours(trials, 2), device)
    seconds = timed(lambda: ours(trials, iterations), device)
    few = min(iterations, 10)
    plain, W = _plain_fits(X, V, shots, few, device, seed)
    scaled = plain * trials * iterations / few
    apart = _deviation(ours(1, few).flatten(0, 2), W)
    name = f"few-shot, {trials} trials x {sizes} sizes x {users} users, rank {rank}"
    projected = 4 * rank * sum(shots) * users * trials * iterations
    return _measured(
        name, [scaled, seconds], 300, X, device, extra, apart, read_besides=projected
    )


def _plain_fits(
    X: Sequence[Tensor], V: Tensor, shots: Sequence[int], steps: int, device: str, seed: int
) -> tuple[float, Tensor]:
    """Seconds and weights of one trial's fits, one after the other, with the sweep's own draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        x[torch.randperm(len(x), generator=generator)[:size]] for size in shots for x in X
    ]
    generator.manual_seed(seed)
    logits = [torch.randn(V.shape[1], generator=generator).to(device) for _ in drawn]
    reference.few_shot(drawn[:1], V, logits[:1], 2, 0.1)
    weights: list[Tensor] = []
    seconds = timed(
        lambda: weights.extend(reference.few_shot(drawn, V, logits, steps, 0.1)), device
    )
    return seconds, torch.stack(weights)


# ------------------------------------------------------------------- Side by side


def ranks_case(
    users: int,
    pairs: int,
    features: int,
    ranks: Sequence[int],
    streamed: bool,
    device: str,
    steps: int,
    rounds: int,
    seed: int,
) -> Measured:
    """Ranks trained side by side against one by one, both with our code.

    Streamed, the comparisons are differences of neighbouring rows of a table that is read anew.
    """
    X = made_up_users(users, pairs, features, device, seed)
    direction = X[0][0]
    fresh = partial(_model, LoRe, direction, 0.0, features=features, steps=steps, seed=seed)
    data = Comparisons.from_list(X)
    if streamed:
        table, row = data.features.x, torch.arange(users * pairs)
        data.features = RowFeatures(lambda i: table[i], features, row, row.roll(1), device)

    def train(ranks: Sequence[int]) -> Tensor:
        models = [fresh(users=users, rank=rank) for rank in ranks]
        return torch.cat([V for _, V in train_together(models, data)], 1)

    train(ranks[:1])
    extra = extra_memory(lambda: train(ranks), device)
    apart = _deviation(train(ranks), torch.cat([train([rank]) for rank in ranks], 1))
    sides = [partial(train, [rank]) for rank in ranks]
    *alone, together = _in_turn([*sides, partial(train, ranks)], device, rounds, steps)
    name = f"ranks {ranks[0]} to {ranks[-1]} together, {users} users x {pairs}"
    name += ", streamed" if streamed else ""
    return _measured(name, [sum(alone), together], 2, X, device, extra, apart)


def heads_case(
    prompts: int,
    completions: int,
    heads: int,
    features: int,
    device: str,
    rounds: int,
    seed: int,
) -> Measured:
    """Rewards of all heads by one product against a pass over the embeddings for each."""
    X = made_up_users(prompts, completions, features, device, seed)
    E = DenseFeatures(Comparisons.from_list(X).features.x)
    H = made_up_users(1, features, heads, device, seed + 1)[0]
    sides = [lambda: torch.cat([E.project(h) for h in H.split(1, 1)], 1), lambda: E.project(H)]
    E.project(H[:, :1])
    extra = extra_memory(sides[1], device)
    apart = _deviation(sides[1](), sides[0]())
    seconds = [[timed(side, device) for side in sides] for _ in range(3 * rounds)]
    name = f"{heads} heads, {prompts} prompts x {completions}"
    return _measured(name, np.median(seconds, 0).tolist(), 2, X, device, extra, apart)


if __name__ == "__main__":
    experiments.cli(main)
