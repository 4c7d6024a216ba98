"""One side of a benchmark in a process of its own: a checkout of this project, or plain loops.

    python side.py CHECKOUT        # reads cases from stdin and writes what they took, as JSON lines

Names that every checkout has are all that is used, so that older ones can be timed as well.
"""

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import extra_memory, iteration_seconds, made_up_users, timed

LEARNING_RATE = 0.5
SAMPLE = 64  # rows of a basis by which sides are compared
PLAIN_STEPS = 10  # of the plain few-shot loop, which is scaled to all


@lru_cache(maxsize=1)
def made_up(users: int, pairs: int, features: int, device: str, seed: int) -> list[Tensor]:
    """The last users that were made up."""
    return made_up_users(users, pairs, features, device, seed)


def features_of(case: dict[str, Any]) -> list[Tensor]:
    """A case's comparisons, U tensors [pairs, F]."""
    return made_up(*(case[key] for key in ("users", "pairs", "features", "device", "seed")))


def models_of(case: dict[str, Any]) -> list[Any]:
    """The untrained models of a case, with the reference that they are pulled to."""
    import utils

    direction = features_of(case)[0][0]
    sizes = case["users"], case["features"]
    return [
        getattr(utils, case["estimator"])(
            direction, case["alpha"], *sizes, rank, case["steps"], LEARNING_RATE,
            generator=case["seed"],
        )
        for rank in case["ranks"]
    ]  # fmt: skip


def train(case: dict[str, Any]) -> Tensor:
    """Train a case's models together; the last basis."""
    import utils

    try:
        from lore.learning.comparisons import Comparisons
    except ImportError:
        from utils import Comparisons
    return utils.train_together(models_of(case), Comparisons.from_list(features_of(case)))[-1][1]


def train_plainly(case: dict[str, Any]) -> Tensor:
    """The same by the loops of tests/helpers/reference.py, for the last rank."""
    import reference

    X, model = features_of(case), models_of(case)[-1]
    loop = reference.alternating if model.alternating else reference.joint
    start = model.W0.to(case["device"]), model.V0.to(case["device"])
    return loop(X, *start, case["steps"], LEARNING_RATE, X[0][0], case["alpha"])[1]


def sweep(case: dict[str, Any]) -> None:
    """Fit new users at every number of shots, after one step of a joint fit."""
    import utils

    X = features_of(case)
    utils.run_few_shot_vary_shots(
        case["trials"], [0.0], case["ranks"], case["shots"], X, X, [x[:1] for x in X], None,
        len(X), len(X), case["device"], num_iterations=1, few_shot_iterations=case["steps"],
        generator=case["seed"], progress=False,
    )  # fmt: skip


def sweep_plainly(case: dict[str, Any]) -> float:
    """Seconds of the same one fit after the other; scaled from one trial of few steps."""
    import reference

    X, rank, device = features_of(case), case["ranks"][-1], case["device"]
    V = made_up_users(1, case["features"], rank, device, case["seed"] + 1)[0] / 30
    drawn = [x[:size] for size in case["shots"] for x in X]
    logits = [torch.zeros(rank, device=device) for _ in drawn]
    steps = min(case["steps"], PLAIN_STEPS)
    seconds = timed(lambda: reference.few_shot(drawn, V, logits, steps, 0.1), device)
    return seconds * case["trials"] * case["steps"] / steps


def answer(case: dict[str, Any], plain: bool) -> dict[str, Any]:
    """Seconds of every iteration but the first, or of a whole sweep; and some of the basis."""
    if "shots" in case:
        seconds = sweep_plainly(case) if plain else timed(lambda: sweep(case), case["device"])
        return {"seconds": [seconds]}
    work = train_plainly if plain else train
    if case.get("memory"):
        few = max(max(case["ranks"]), case["users"] // 8)
        train({**case, "users": few})  # what the libraries set up once is not counted
        features_of(case)
        return {"extra": extra_memory(lambda: train(case), case["device"])}
    V: list[Tensor] = []
    seconds = iteration_seconds(lambda: V.append(work(case)), case["device"], case["steps"])
    return {"seconds": seconds.tolist(), "sample": V[0][:SAMPLE].tolist()}


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    checkout = root if sys.argv[1] == "plain" else Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(checkout)]
    sys.path.append(str(root / "tests" / "helpers"))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), sys.argv[1] == "plain")), flush=True)
