"""From a prepared folder to the comparisons of each repeat: who is seen, what is held out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor

from lore.common.files import InputError, require
from lore.embeddings.store import Store
from lore.learning.comparisons import Comparisons, RowFeatures
from lore.learning.kinds import shares_of_test
from lore.learning.method import Task
from lore.learning.simulated_users import generate_population, simulate_choices
from lore.preparing import tables as preparing

log = logging.getLogger(__name__)

Unit = Literal["comparisons", "dialogues"]
Feature = Literal["length"]
SIDES = {"train": (True, "train"), "seen": (True, "test"),
         "few": (False, "train"), "unseen": (False, "test"),
         "validation": (True, preparing.VALIDATION)}  # fmt: skip


@dataclass
class Tasks:
    """A prepared and embedded dataset, and how the repeats of an experiment are drawn from it."""

    info: dict[str, Any]  # what prepare.json says
    store: "Store | Extended"
    draw: Callable[[int, torch.device], Task]  # the sets of a seed, on a device, and no more
    unit: Unit  # what a shot is
    about: dict[str, Any]  # the script's own settings, recorded with the results
    folder: Path

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return str(self.info["dataset"])

    @cached_property
    def conversations(self) -> list[preparing.Conversation]:
        """The conversations, row i being embedding i."""
        return preparing.read_conversations(self.folder)

    def facts(self) -> dict[str, Any]:
        """What decides the results of a run, as far as the data do."""
        manifest = self.store.manifest
        return {
            "dataset": self.dataset, "warning": self.info.get("warning"), "unit": self.unit,
            "prepared": {k: v for k, v in self.info.items() if k != "warning"},
            "embeddings": {k: v for k, v in manifest.items() if not isinstance(v, list | dict)},
            **self.about,
        }  # fmt: skip

    def reference(self, which: str) -> Tensor | None:
        """The reference direction [F]: the model's score head, the published code's, or none; one
        that cannot tell responses apart is warned of."""
        if which == "last_linear":
            log.warning("WARNING: the reference is the published code's mistaken one (last_linear)")
        found = None if which == "none" else getattr(self.store, which)
        if found is not None and found.min() == found.max():
            what = "zero" if not found.any() else f"{float(found[0]):.4g} in every feature"
            log.warning("WARNING: the reference (%s) is %s and says nothing", which, what)
        return found

    def task(
        self, seed: int, device: torch.device, reference: Tensor | None, stream: bool | None,
        processes: tuple[int, int], **options: Any,
    ) -> Task:  # fmt: skip
        """The task of a seed, with further attributes; see ``Task``. Where ``stream`` is None,
        features are read from disk at every pass if they take more than half the free memory."""
        sets = self.draw(seed, device)
        if stream is None:
            gpu = device.type == "cuda"
            free = torch.cuda.mem_get_info(device)[0] if gpu else psutil.virtual_memory().available
            stream = len(sets.train) * self.store.num_features * 4 > free / 2
        kinds = shares_of_test(sets.train, sets.few, sets.seen, sets.unseen)
        return replace(sets, reference=reference, seed=seed, stream=stream, kinds=kinds,
                       process=processes[0], processes=processes[1], **options)  # fmt: skip


def given_split(data: Path, dataset: str | None = None, features: Sequence[Feature] = ()) -> Tasks:
    """The four sets that prepare.py drew, the same for every seed; a shot is a dialogue, or a
    comparison where no dialogue has more than one. ``features`` stand beside the embeddings."""
    info, store, table, about = _read(data, dataset, features)
    alone = not table.duplicated(["user_id", "dialog_id"]).any()
    unit: Unit = "comparisons" if alone else "dialogues"

    def draw(_: int, device: torch.device) -> Task:
        return four_sets(table, store, device, unit)

    return Tasks(info, store, draw, unit, about, data)


def seen_users(tasks: Tasks) -> int:
    """How many users of a prepared folder are seen, as ``given_split`` has them."""
    table = preparing.read_comparisons(tasks.folder, len(tasks.store))
    return table.user_id[table.seen].nunique()


def drawn_split(
    data: Path, seen_fraction: float, pairs_per_user: int, few_shot_pairs: int,
    dataset: str | None = None, features: Sequence[Feature] = (),
) -> Tasks:  # fmt: skip
    """Seen users, a fraction of all, and unseen ones drawn again for every seed, with that many of
    their training comparisons (or all, if fewer); what is held out is as prepare.py split it."""
    info, store, table, about = _read(data, dataset, features)
    about |= {"pairs_per_user": pairs_per_user, "few_shot_pairs": few_shot_pairs,
              "seen_fraction": seen_fraction}  # fmt: skip

    def draw(seed: int, device: torch.device) -> Task:
        drawn = preparing.split_users(table, seed, seen_fraction)
        drawn = drawn.sort_values(["user_id", "dialog_id", "chosen", "rejected"], kind="stable")
        drawn["order"] = np.random.default_rng(seed).random(len(drawn))
        place = drawn.groupby(["user_id", "split"])["order"].rank(method="first")
        most = np.where(drawn["seen"], pairs_per_user, few_shot_pairs)
        kept = drawn[(drawn["split"] == "test") | (place <= most)]
        return four_sets(kept, store, device, "comparisons")

    return Tasks(info, store, draw, "comparisons", about, data)


def simulated_users(
    data: Path, dirichlet_alpha: float, users: int, unseen_users: int, pairs_per_user: int,
    few_shot_pairs: int, dataset: str | None = None, features: Sequence[Feature] = (),
) -> Tasks:  # fmt: skip
    """Users simulated for every seed: their best response of a prompt against their worst.

    Their weights over M reward models are Dirichlet(alpha * 1). scores.safetensors has the scores
    [P, R, M] of R responses to each prompt and their rows [P, R] among the embeddings, by split.
    Seen and unseen users see that many training prompts each, and all test prompts.
    """
    about = {"dirichlet_alpha": dirichlet_alpha, "users": users, "unseen_users": unseen_users,
             "pairs_per_user": pairs_per_user, "few_shot_pairs": few_shot_pairs}  # fmt: skip
    info, store = load(data, dataset)
    tensors = preparing.read_scores(data, len(store))
    prompts, most = len(tensors["train.scores"]), max(pairs_per_user, few_shot_pairs)
    why = f"{most} training prompts per user are wanted and {prompts} are there"
    require(most <= prompts, f"{why}; lower --pairs-per-user or --few-shot-pairs")
    rows = {split: tensors[f"{split}.rows"].numpy() for split in preparing.SPLITS}
    pairs = [pd.DataFrame({"chosen": each[:, :-1].ravel(), "rejected": each[:, 1:].ravel(),
                           "split": split, "seen": True})
             for split, each in rows.items()]  # fmt: skip
    table = pd.concat(pairs, ignore_index=True)
    store, about = _extended(data, store, table, about, features)

    def draw(seed: int, device: torch.device) -> Task:
        generator = torch.Generator().manual_seed(seed)
        W = generate_population(dirichlet_alpha, users + unseen_users, generator)
        groups = ("user", W[:users], pairs_per_user), ("new user", W[users:], few_shot_pairs)
        sets = []
        for name, weights, pairs in groups:
            names = [f"{name} {seed}.{i}" for i in range(len(weights))]
            for split, count in (("train", pairs), ("test", None)):
                rows = _simulate(tensors, split, weights, count, generator)
                features = RowFeatures(store.rows, store.num_features, *rows, device)
                counts = [len(rows[0]) // len(names)] * len(names)
                sets.append(Comparisons(features, counts, names=names))
        return Task(**dict(zip(SIDES, sets, strict=False)))

    return Tasks(info, store, draw, "comparisons", about, data)


def _simulate(
    tensors: Mapping[str, Tensor], split: str, W: Tensor, count: int | None, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows chosen and rejected by users on ``count`` random prompts of a split each, or on all."""
    scores, rows = tensors[f"{split}.scores"], tensors[f"{split}.rows"]
    some, pairs = torch.arange(len(scores)), []
    for w in W:
        if count is not None:
            some = torch.randperm(len(scores), generator=g)[:count]
        ends = torch.cat(simulate_choices(scores[some], w[None]))  # the best and the worst
        pairs.append(rows[some].gather(1, ends.T))
    return torch.cat(pairs).unbind(1)


def load(data: Path, dataset: str | None = None) -> tuple[dict[str, Any], Store]:
    """prepare.json and the embeddings of a folder that ``prepare.py`` wrote; InputError if one is
    missing or damaged, or the embeddings are of other conversations."""
    info = preparing.read_info(data, dataset)
    folder = data / "embeddings"
    require(folder.exists(), f"{folder}: not there; embed the conversations first")
    store = Store(folder)
    store.check(info["conversations_sha256"])
    return info, store


def _read(
    data: Path, dataset: str | None, features: Sequence[Feature]
) -> "tuple[dict[str, Any], Store | Extended, pd.DataFrame, dict[str, Any]]":
    """prepare.json, store, the comparisons whose sides differ in tokens, and what to record."""
    info, store = load(data, dataset)
    table, about = preparing.read_comparisons(data, len(store)), {}
    same = store.same(*(torch.tensor(table[side].to_numpy()) for side in preparing.EXTRA)).numpy()
    if same.any():
        why = "their two sides have the same tokens, either cut (--max_length, --truncation_side) "
        why += "or because the chat template leaves the responses out"
        require(not same.all(), f"{data}: no comparisons are left: {why}")
        log.warning("WARNING: left out %d of %d comparisons: %s", same.sum(), len(same), why)
        table, about = table[~same].reset_index(drop=True), {"same_tokens": int(same.sum())}
    store, about = _extended(data, store, table, about, features)
    return info, store, table, about


def _extended(
    data: Path, store: Store, table: pd.DataFrame, about: dict[str, Any],
    features: Sequence[Feature],
) -> "tuple[Store | Extended, dict[str, Any]]":  # fmt: skip
    """The store with the numbers of a table, and with ``features``; and what is recorded of it."""
    if "length" in features:  # of the response, logarithm of its characters
        talks = preparing.read_conversations(data)
        length = np.log1p([len(talk[-1]["content"]) for talk in talks])
        table = table.assign(**{f"{start}log length": length[table[side]]
                                for side, start in preparing.EXTRA.items()})  # fmt: skip
    names = preparing.extra_names(table)
    return (Extended(store, table), {**about, "extra": names}) if names else (store, about)


class Extended:
    """A store with the further features of a table beside the embeddings, where references are 0.

    A conversation's feature is the mean of what the table says of it, else of the others; scaled to
    differences of mean square one in the seen users' training comparisons, and refused without any.
    """

    def __init__(self, store: Store, table: pd.DataFrame) -> None:
        self._store, self._extra = store, torch.zeros(len(store), 0)
        train = table[table["seen"] & (table["split"] == "train")]
        for name in preparing.extra_names(table):
            sides = preparing.EXTRA.items()
            said = pd.concat(table.set_index(side)[f"{start}{name}"] for side, start in sides)
            column = said.groupby(level=0).mean().reindex(range(len(store)))
            column = column.fillna(column.mean()).fillna(0.0).to_numpy()
            spread = np.sqrt(np.mean((column[train["chosen"]] - column[train["rejected"]]) ** 2))
            why = f"the feature {name} differs in no training comparison; leave it out"
            require(spread > 0, why)
            column = torch.from_numpy((column - column.mean()) / spread).float()
            self._extra = torch.cat([self._extra, column[:, None]], 1)
        self.num_features, none = store.num_features + self._extra.shape[1], self._extra[0] * 0
        self.head, self.last_linear = (
            head if head is None else torch.cat([head, none])
            for head in (store.head, store.last_linear)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def rows(self, index: Tensor) -> Tensor:
        """Embeddings and further features [n, F + E] of the conversations numbered ``index``."""
        return torch.cat([self._store.rows(index), self._extra[index]], 1)


def four_sets(table: pd.DataFrame, store: Store, device: torch.device, unit: Unit) -> Task:
    """The sets of a table by its ``seen`` and ``split``, without users who lack training or test
    comparisons; InputError if no seen user is left, or no unseen one though the table has some."""
    both = preparing.on_both_sides(table)
    if lost := table["user_id"][~both].nunique():
        log.info("left out %d users without both training and test data", lost)
    whole = table[both]
    parts: dict[str, Comparisons | None] = {}
    for name, (seen, split) in SIDES.items():
        part = whole[(whole["seen"] == seen) & (whole["split"] == split)]
        needed = name != "validation" and (seen or not table["seen"].all())
        if part.empty and needed:
            kind = "seen" if seen else "unseen"
            raise InputError(f"no {kind} users are left; loosen the filters of prepare.py")
        parts[name] = None if part.empty else _comparisons(part, store, device)
    if unit == "comparisons" and parts["few"] is not None:
        parts["few"].dialogs = None
    return Task(**parts)


def _comparisons(table: pd.DataFrame, store: Store, device: torch.device) -> Comparisons:
    """A table's rows as comparisons, users sorted."""
    table = table.sort_values(["user_id", "dialog_id", "turn", "rejected"], kind="stable")
    sizes, numbers = table.groupby("user_id", sort=True).size(), ("chosen", "rejected", "weight")
    chosen, rejected, weight = (torch.tensor(table[column].to_numpy()) for column in numbers)
    dialogs = torch.from_numpy(pd.factorize(table["dialog_id"])[0].astype(np.int64))
    features = RowFeatures(store.rows, store.num_features, chosen, rejected, device)
    return Comparisons(features, sizes.tolist(), weight, sizes.index.tolist(), dialogs)
