"""The data of the comparison: which prepared folder, how it is split, what is planted."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests" / "helpers"))  # planted choices
from safetensors.torch import load_file

from lore.experiments import splits
from lore.experiments.splits import SIDES, Tasks
from lore.learning.comparisons import Comparisons, RowFeatures
from lore.learning.method import Task
from lore.preparing import tables as preparing
from lore.preparing.hold_out import hold_out
from planted import prefer

PLANTED = 4  # dimensions in which planted tastes differ
SHARED = 2.0  # standard deviation of the shared part of a planted log odds
COMPONENTS = 20  # principal components of the responses that planted tastes see


class World(NamedTuple):
    """One dataset of the comparison.

    Attributes:
        name: of the run and of the table's section.
        title: one line on what it is.
        folder: the flag that names the prepared folder.
        seeds: of the full number of repeats.
        shots: of new users.
        unit: what a shot is.
        tasks: from the prepared folder to the repeats.
    """

    name: str
    title: str
    folder: str
    seeds: tuple[int, ...]
    shots: tuple[int, ...]
    unit: str
    tasks: Callable[[Path], Tasks]


def redrawn(data: Path, seen_fraction: float = 0.5) -> Tasks:
    """PRISM's draw of seen people and everybody's training dialogues, drawn again for every seed.

    Args:
        data: a prepared folder whose own draw is forgotten.
        seen_fraction: share of the users who are seen.
    """
    info, store = splits.load(data)
    table = preparing.read_comparisons(data, len(store))

    def draw(seed: int, device: torch.device) -> Task:
        drawn = preparing.split_dialogues(table, seed, preparing.Funnel())
        drawn = preparing.split_users(drawn, seed, seen_fraction)
        return splits.four_sets(drawn, store, device, "dialogues")

    return Tasks(info, store, draw, "dialogues", {"drawn": "anew for every seed"}, data)


def held_out_anew(data: Path, by: Literal["pairs", "responses"]) -> Tasks:
    """A draw of seen people and of what is held out, drawn again for every seed.

    Args:
        data: a prepared folder of OwnData with all its comparisons (``--split pairs``).
        by: what is held out, as prepare.py's ``--split`` says it.
    """
    info, store = splits.load(data)
    info = {k: v for k, v in info.items() if k not in ("split", "overlap")}  # of the folder's draw
    table = preparing.read_comparisons(data, len(store))
    names = {f"{side}_name": table[side].astype(str) for side in ("chosen", "rejected")}

    def draw(seed: int, device: torch.device) -> Task:
        whole = table.assign(**names, row=range(len(table)))
        drawn, _ = hold_out(whole, by, seed, preparing.Funnel())
        drawn = preparing.split_users(drawn, seed, 0.5)
        return splits.four_sets(drawn, store, device, "comparisons")

    about = {"drawn": "anew for every seed", "by": by}
    return Tasks(info, store, draw, "comparisons", about, data)


def planted(
    data: Path, spread: float, users: int = 100, shots: int = 50, held_out: int = 60
) -> Tasks:
    """Users with Gaussian tastes who choose by chance, between responses to the same prompt.

    The shared reward and ``PLANTED`` directions of taste are random combinations of the responses'
    leading principal components, scaled to unit variance; log odds are noisy as in a logit.

    Args:
        data: a prepared folder with the rows [P, R] of R responses to each prompt.
        spread: standard deviation of the tastes' part of the log odds, all directions together.
        users: seen ones, and as many new ones.
        shots, held_out: comparisons of each, from training and from test prompts.
    """
    info, store = splits.load(data)
    rows = {split: load_file(data / "scores.safetensors")[f"{split}.rows"] for split in SPLITS}
    about = {"planted": PLANTED, "spread": spread, "users": users, "held_out": held_out}

    def draw(seed: int, device: torch.device) -> Task:
        generator = torch.Generator().manual_seed(seed)
        rewards = plant(store.rows(torch.arange(len(store))), spread, 2 * users, generator)
        sets = []
        for kind, which in (("user", slice(0, users)), ("new user", slice(users, None))):
            for split, count in zip(SPLITS, (shots, held_out), strict=True):
                chosen, rejected = choose(rewards[which], rows[split], count, generator)
                features = RowFeatures(store.rows, store.num_features, chosen, rejected, device)
                names = [f"{kind} {seed}.{u}" for u in range(users)]
                sets.append(Comparisons(features, [count] * users, names=names))
        return Task(**dict(zip(SIDES, sets, strict=False)))

    return Tasks(info, store, draw, "comparisons", about, data)


SPLITS = ("train", "test")


def plant(table: Tensor, spread: float, users: int, generator: torch.Generator) -> Tensor:
    """Rewards [U, n] of all responses for users with random tastes, from embeddings [n, F]."""
    table = table - table.mean(0)
    left, size, _ = torch.linalg.svd(table, full_matrices=False)
    kept = int((size > 1e-6 * size[0]).sum())
    parts = left[:, : min(COMPONENTS, kept)] * len(table) ** 0.5  # [n, C], of unit variance
    basis = torch.randn(parts.shape[1], PLANTED + 1, generator=generator)
    basis = torch.linalg.qr(basis)[0]
    tastes = torch.randn(users, PLANTED, generator=generator) / PLANTED**0.5
    weights = torch.cat([torch.full((users, 1), SHARED), spread * tastes], 1) / 2**0.5
    return weights @ (parts @ basis).T  # a difference of two has twice the variance of one


def choose(
    rewards: Tensor, rows: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows chosen and rejected [U * count] of two random responses to random prompts.

    Args:
        rewards: of every response for every user [U, n].
        rows: of the responses to each prompt [P, R].
        count: comparisons of each user.
        generator: of the draws.
    """
    U, (P, R) = len(rewards), rows.shape
    prompt = torch.randint(P, (U, count), generator=generator)
    first = torch.randint(R, (U, count), generator=generator)
    second = (first + 1 + torch.randint(R - 1, (U, count), generator=generator)) % R
    first, second = rows[prompt, first].long(), rows[prompt, second].long()
    apart = rewards.gather(1, first) - rewards.gather(1, second)
    chosen, rejected = prefer(apart, first, second, generator)
    return chosen.flatten(), rejected.flatten()


def arguments(data: Path) -> Tasks:
    """The judges of arguments: half of them seen, 150 training comparisons each, 50 of new ones."""
    return splits.drawn_split(data, 0.5, 150, 50)


def demo(data: Path, alpha: float) -> Tasks:
    """The demo's simulated users, with up to 50 comparisons of new ones."""
    return splits.simulated_users(data, alpha, 100, 60, 45, 50)


UP_TO_50, DEMO = (0, 1, 2, 5, 10, 20, 50), "demo"
WORLDS = (
    World("jokes", "People who rate jokes, known and met responses", "jokes", (0, 1, 2),
          (0, 2, 10, 40), "comparisons", partial(held_out_anew, by="pairs")),
    World("jokes-new", "People who rate jokes, new responses", "jokes", (0, 1, 2),
          (0, 2, 10, 40), "comparisons", partial(held_out_anew, by="responses")),
    World("ukp", "People who judge arguments (UKPConvArg1)", "ukp", tuple(range(1, 21)), UP_TO_50,
          "comparisons", arguments),
    World("prism", "PRISM, a slice of it", "prism", tuple(range(10)), (0, 1, 2), "dialogues",
          redrawn),
    World("demo-0.001", "The demo's users, Dirichlet alpha .001, without noise", DEMO,
          (0, 1, 2), UP_TO_50, "comparisons", partial(demo, alpha=0.001)),
    World("demo-0.01", "The demo's users, Dirichlet alpha .01, without noise", DEMO,
          (0, 1, 2), UP_TO_50, "comparisons", partial(demo, alpha=0.01)),
    World("demo-0.1", "The demo's users, Dirichlet alpha .1, without noise", DEMO,
          (0, 1, 2), UP_TO_50, "comparisons", partial(demo, alpha=0.1)),
    World("planted", "Planted: Gaussian tastes in 4 dimensions, noisy choices", DEMO,
          (0, 1, 2), UP_TO_50, "comparisons", partial(planted, spread=2.0)),
    World("planted-alike", "Planted: everybody alike, noisy choices", DEMO,
          (0, 1, 2), UP_TO_50, "comparisons", partial(planted, spread=0.0)),
)  # fmt: skip
