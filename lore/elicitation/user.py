"""A new user in the light of a run's file: weights, how sure they are, and candidates in order."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import softplus

from lore.common.files import require
from lore.elicitation.criteria import UserPosterior
from lore.embeddings.reward_model import OF_BASIS, ModelChoice
from lore.embeddings.store import embed
from lore.learning.basis import Basis
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import deviations
from lore.methods.lore import Lore, LoreFit
from lore.methods.mixed_logit import MixedFit
from lore.methods.saved import load_learned
from lore.preparing.messages import Conversation


class FittedFile(NamedTuple):
    """What a run's file holds: the basis of LoRe, or a mixed logit."""

    path: Path
    fit: LoreFit | MixedFit
    directions: Tensor  # on which its ``view`` projects embeddings [F, C]
    settings: Mapping[str, Any]  # of the run, such as the model


def load_fit(path: Path) -> FittedFile:
    """Read a basis file or a mixed logit; InputError for no such file, a damaged or another one."""
    learned = load_learned(path)
    if isinstance(learned, Basis):
        own = learned.settings.get("estimator") == "lore_regularized"
        method = Lore(estimator="lore_regularized" if own else "lore")
        fit, directions = LoreFit(method, learned, "LoRe"), learned.V
    else:
        fit, directions = learned.fit, learned.fit.all_directions().float()
    return FittedFile(path, fit, directions, learned.settings)


def view_conversations(
    found: FittedFile, conversations: Sequence[Conversation], embeddings: Path | None = None,
    lm: ModelChoice = OF_BASIS, **embedding: Any,
) -> Tensor:  # fmt: skip
    """The embeddings of n conversations along the directions of a run's file [n, C].

    InputError for embeddings of another size than the file has, or work shared by processes.

    Args:
        embeddings: folder to keep the embeddings in, for another time.
        lm: the reward model.
        embedding: more arguments of ``embeddings.embed``.
    """
    source = lm.of_basis(found.settings, found.path, len(found.directions))
    with tempfile.TemporaryDirectory() as passing:
        store = embed(  # the model's arguments by name, so that these are no flags beside lm's
            conversations, embeddings or passing, model=source.model, tokenizer=source.tokenizer,
            revision=source.revision, trust_remote_code=source.trust_remote_code, pool=source.pool,
            **embedding,
        )  # fmt: skip
        require(store is not None, "run this in one process, without --shard")
        rows = store.rows(torch.arange(len(conversations)))
        return rows @ found.directions.to(rows)


@dataclass(frozen=True)
class User:
    """Who made choices [n, C], chosen minus rejected as a fit views them. How much each counts is
    ``weight`` [n]; the seed is of the initial values of LoRe's weights."""

    fit: LoreFit | MixedFit
    choices: Tensor
    weight: Tensor | None = None
    seed: int = 0

    @cached_property
    def weights(self) -> Tensor:
        """The user's state [S]."""
        users = Users([len(self.choices)], self.weight)
        return self.fit.adapt(self.choices, users, self.seed)[0]

    @cached_property
    def posterior(self) -> UserPosterior | None:
        """What is known of the user's tastes; None where the fit does not know how they vary."""
        prior = self.fit.population()
        return prior and UserPosterior.after(prior, self.fit.questions(self.choices), self.weight)

    def known(self) -> dict[str, list[float]]:
        """LoRe's weights, or a mixed logit's standardised tastes and their standard deviations."""
        if isinstance(self.fit, LoreFit) or self.posterior is None:
            return {"weights": self.weights.tolist()} if self.fit.personal else {}
        places = self.fit.places()
        sd = deviations(places.T, self.posterior.covariance).tolist()
        return {"tastes": (self.weights.double() @ places).tolist(), "standard_deviations": sd}

    def lines(self) -> list[str]:
        """What is known, to be read."""
        known = self.known().items()
        return [f"{k.replace('_', ' ')}: {' '.join(f'{x:.3f}' for x in xs)}" for k, xs in known]

    def rewards(self, views: Tensor) -> Tensor:
        """Log odds [m] of conversations, or of differences of two [m, C]."""
        own = torch.zeros(len(views), dtype=torch.long)
        return self.fit.logits(views, self.weights[None], own).double()

    def deviations(self, views: Tensor) -> Tensor | None:
        """Standard deviations of these rewards [m]; None for LoRe, which has no prior."""
        if not isinstance(self.fit, MixedFit) or self.posterior is None:
            return None
        Z = self.fit.scale * self.fit.questions(views)[:, 1:]
        return deviations(Z, self.posterior.covariance)

    def leave_one_out(self, row: Tensor) -> Tensor:
        """Log odds [n] of each choice by weights from those of all other rows; [0] of one row. A
        row's pairs share responses and say too much of each other; ``row`` [n] numbers rows from 0.
        """
        others = [(row != number).nonzero()[:, 0] for number in row.unique()]
        if len(others) < 2:
            return self.choices.new_zeros(0)
        picked = torch.cat(others)
        weight = None if self.weight is None else self.weight[picked]
        users = Users(list(map(len, others)), weight)  # all at once: each is a user
        weights = self.fit.adapt(self.choices[picked], users, self.seed)
        return self.fit.logits(self.choices, weights, row).double()

    def rank(self, candidates: Sequence[Conversation], views: Tensor) -> pd.DataFrame:
        """The ``ranking`` of candidates with views [m, C]; deviations from their prompt's mean."""
        group = torch.from_numpy(_dialogues(candidates))
        count = torch.bincount(group)[:, None]
        means = views.new_zeros(len(count), views.shape[1]).index_add_(0, group, views) / count
        return ranking(candidates, self.rewards(views), self.deviations(views - means[group]))


def agreement(left_out: Tensor) -> str:
    """How well each choice is predicted from the other rows, from its log odds [n] so predicted."""
    if not len(left_out):
        return "leave-one-out: needs two rows of choices"
    right, loss = int((left_out > 0).sum()), float(softplus(-left_out).mean())
    said = f"leave-one-out: {right} of {len(left_out)} choices predicted from the other rows, "
    return said + f"log loss {loss:.3f} (by chance {math.log(2):.3f})"


def ranking(
    candidates: Sequence[Conversation], rewards: Tensor, deviations: Tensor | None = None
) -> pd.DataFrame:
    """One row per candidate, prompts in their order, the best first within a prompt; with the
    probability ``p_over_next`` that it is preferred to the next one of its prompt."""
    columns = {
        "line": range(1, len(candidates) + 1),
        "prompt": [history[-1]["content"] for *history, _ in candidates],
        "place": 0, "reward": rewards.numpy(),
        **({} if deviations is None else {"deviation": deviations.numpy()}), "p_over_next": 0.0,
        "response": [answer["content"] for *_, answer in candidates],
        "dialogue": _dialogues(candidates),
    }  # fmt: skip
    table = pd.DataFrame(columns)
    places = table.groupby("dialogue")["reward"].rank(ascending=False, method="min")
    table["place"] = places.astype(int)
    table = table.sort_values(["dialogue", "place"], kind="stable", ignore_index=True)
    table["p_over_next"] = expit(table.groupby("dialogue")["reward"].diff(-1))
    return table.drop(columns="dialogue")


def _dialogues(candidates: Sequence[Conversation]) -> np.ndarray:
    """The number of each candidate's dialogue [m]."""
    return pd.factorize(pd.Series([str(history) for *history, _ in candidates]))[0]


def as_text(table: pd.DataFrame | list[dict[str, Any]]) -> str:
    """A ranking, or its records, as a terminal shows it, and what its columns mean."""
    names = {"deviation": "sd", "p_over_next": "P"}
    shown = pd.DataFrame(table).drop(columns="line").rename(columns=names)
    lines = ["reward: log odds; P: that the response is preferred to the next one of its prompt"]
    if "sd" in shown:
        lines.append("sd: standard deviation of the reward's distance from its prompt's mean")
    text = shown.to_string(index=False, max_colwidth=60, float_format="%.3f", na_rep="")
    return "\n".join([*lines, "", text])


def as_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a ranking as JSON has them."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
