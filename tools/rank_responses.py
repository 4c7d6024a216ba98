"""Candidate responses in the order a new user would like them, from a few of the user's choices.

    python tools/rank_responses.py --basis results/PRISM/<run>/basis-K05-seed0.safetensors \\
        --choices alice.jsonl --candidates drafts.jsonl
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import softplus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import begins, check_output, has_keys, require, write_text, write_whole
from lore.common.settings import PositiveInt, Rate, SeedNumber
from lore.elicitation.ranking import (
    all_but_one,
    as_text,
    directed_rewards,
    fit_user,
    rank,
    read_drafts,
    read_liked,
)
from lore.embeddings.reward_model import OF_BASIS, Conversation, ModelChoice
from lore.learning.basis import Basis
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import covariances, posteriors
from lore.methods.mixed_logit import Saved
from lore.methods.saved import load_learned
from lore.preparing.own_rows import USUAL, Columns


def main(
    basis: Path,
    choices: Path,
    candidates: Path,
    columns: Columns = USUAL,
    save: Path | None = None,
    lm: ModelChoice = OF_BASIS,
    num_iterations: PositiveInt = 500,
    learning_rate: Rate = 0.1,
    seed: SeedNumber = 0,
    **embedding: Any,
) -> None:
    """Learn a new user's weights with the basis frozen, and rank candidates by the user's reward.

    Rewards are log odds: the probability that one response is preferred to another is
    sigmoid(reward - other reward). A mixed logit also knows how sure it is: its rewards have
    standard deviations. What is known of the user is judged by leaving out each row of choices in
    turn and predicting it from the others.

    Args:
        basis: basis file of a run, or mixed_logit file.
        choices: the user's choices, a file of rows as OwnData/prepare.py reads them: "prompt" (a
            text) or "messages" (the dialogue so far, a list of role and content), "chosen" and
            "rejected" (one text or a list).
        candidates: a file with "prompt" or "messages", and "response" (one text or a list).
        columns: what the columns are called, such as --chosen better.
        save: also write the ranking to this .csv, or weights and ranking to this .json file.
        lm: the reward model.
        num_iterations: steps of Adam on the weights; a mixed logit needs none of these.
        learning_rate: of Adam.
        seed: of the weights' initial values.
    """
    if save:
        require(save.suffix in (".csv", ".json"), f"--save {save}: end its name in .csv or .json")
        require(save.parent.is_dir(), f"--save {save}: there is no folder {save.parent}")
        is_ours = begins("line,prompt,place") if save.suffix == ".csv" else has_keys("ranking")
        check_output(save, "--save", is_ours, [basis, choices, candidates])
    learned = load_learned(basis)
    chosen, rejected, row = read_liked(choices, columns)
    drafts = read_drafts(candidates, columns)
    source = lm.of_basis(learned.settings, basis)
    if isinstance(learned, Basis):
        directions = torch.stack(list(learned.columns().values()), 1)
    else:
        directions = learned.fit.all_directions().float()
    rewards = directed_rewards(directions, source, [*chosen, *rejected, *drafts], **embedding)
    liked, disliked, offered = rewards.split([len(chosen), len(rejected), len(drafts)])
    Z = liked - disliked
    if isinstance(learned, Basis):
        person = with_weights(learned, Z, seed, num_iterations, learning_rate, row)
    else:
        person = with_tastes(learned, Z, row)
    ranking = ranked(drafts, offered, person)
    tell(person, ranking)
    if save:
        write(save, person.known, ranking)


@dataclass
class Person:
    """What choices say of their user.

    Attributes:
        known: what to print and to keep of it, by name.
        left_out: log odds [n] of each choice, predicted from the other rows; [0] of a single row.
        rewards: log odds [m] of candidates, from their rewards by each column [m, C].
        odds: log odds [m] of the predictive probability that the first of two responses is
            preferred, from differences of such rewards [m, C].
        deviations: standard deviations [m] of such differences; None if not known.
    """

    known: dict[str, list[float]]
    left_out: Tensor
    rewards: Callable[[Tensor], Tensor]
    odds: Callable[[Tensor], Tensor]
    deviations: Callable[[Tensor], Tensor] | None = None


def with_weights(
    basis: Basis, Z: Tensor, seed: int, num_iterations: int, learning_rate: float,
    row: Tensor | None = None,
) -> Person:  # fmt: skip
    """A user with weights of a basis, by their choices' differences Z [n, K], of some rows [n]."""
    w, without = fit_user(basis, Z, seed, num_iterations, learning_rate, row)

    def rewards(Z: Tensor) -> Tensor:
        return (Z @ w).double()

    row = torch.arange(len(Z)) if row is None else row
    left_out = (Z * without[row]).sum(1).double() if len(without) else Z[:0, 0]
    return Person({"weights": w.tolist()}, left_out, rewards, rewards)


def with_tastes(saved: Saved, Z: Tensor, row: Tensor | None = None) -> Person:
    """A user of a mixed logit, by their choices' differences Z [n, 1 + D], of some rows [n]."""
    n, fit = len(Z), saved.fit
    row = torch.arange(n) if row is None else row
    apart = all_but_one(n, row)
    rows = torch.cat([torch.arange(n), *(some.nonzero()[:, 0] for some in apart)])
    users = Users([n, *apart.sum(1).tolist()])
    view = Z.double()
    states = fit.adapt(view[rows], users)  # all at once: the user, and who lacks a row

    def rewards(Z: Tensor) -> Tensor:
        return fit.logits(Z.double(), states[:1], torch.zeros(len(Z), dtype=torch.long))

    predicted = slice(n if len(apart) else 0)
    left_out = fit.logits(view[predicted], states[1:], row[predicted])
    if fit.prior is None:  # ridge BT: nothing personal
        return Person({}, left_out, rewards, rewards)
    one = Users([n])
    cov = covariances(view, one, fit.prior, posteriors(view, one, fit.prior))[0]

    def deviations(Z: Tensor) -> Tensor:
        z = fit.scale * Z[:, 1:].double()
        return ((z @ cov) * z).sum(1).clamp(min=0).sqrt()

    places = fit.places()
    sd = torch.einsum("dk,de,ek->k", places, cov, places).clamp(min=0).sqrt()
    known = {"tastes": (states[0] @ places).tolist(), "standard deviations": sd.tolist()}
    return Person(known, left_out, rewards, rewards, deviations)


def ranked(drafts: list[Conversation], Z: Tensor, person: Person) -> pd.DataFrame:
    """``ranking.rank`` by a person's rewards, with what else is known of them.

    Args:
        drafts: conversations that end in a candidate.
        Z: their rewards by each column of the file [n, C].
        person: whose rewards rank them.

    Returns:
        The table of ``ranking.rank`` with predictive probabilities and, where it is known,
        deviation: standard deviation of the reward's distance from its prompt's mean.
    """
    table = rank(drafts, person.rewards(Z))
    order = torch.from_numpy(table["line"].to_numpy() - 1)
    ahead = expit(person.odds(Z[order] - Z[order.roll(-1)]).numpy())
    table["p_over_next"] = pd.Series(ahead).mask(table["p_over_next"].isna())
    if person.deviations is not None:
        prompts = [str(history) for *history, _ in drafts]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([number[prompt] for prompt in prompts])
        count = torch.bincount(group)[:, None]
        mean = torch.zeros(len(number), Z.shape[1]).index_add_(0, group, Z) / count
        apart = person.deviations(Z - mean[group])
        table.insert(4, "deviation", apart[order].numpy())
    return table


def agreement(left_out: Tensor) -> str:
    """How well each choice is predicted from the other rows, from its log odds [n] so predicted."""
    if not len(left_out):
        return "leave-one-out: needs two rows of choices"
    right, loss = int((left_out > 0).sum()), float(softplus(-left_out).mean())
    return (
        f"leave-one-out: {right} of {len(left_out)} choices predicted from the other rows, "
        f"log loss {loss:.3f} (a coin's is {math.log(2):.3f})"
    )


def tell(person: Person, ranking: pd.DataFrame) -> None:
    """Print what is known of a person, how well it foretells, and the ranking."""
    for name, values in person.known.items():
        print(f"{name}: {' '.join(f'{x:.3f}' for x in values)}")
    print(agreement(person.left_out))
    print("reward: log odds; P: that the response is preferred to the next one of its prompt")
    if person.deviations is not None:
        print("sd: standard deviation of the reward's distance from its prompt's mean")
    print(f"\n{as_text(ranking)}")


def write(save: Path, known: dict[str, list[float]], ranking: pd.DataFrame) -> None:
    """The ranking as .csv, or what is known of the user and the ranking as .json."""
    if save.suffix == ".csv":
        write_whole(save, lambda draft: ranking.to_csv(draft, index=False))
    else:
        rows = ranking.astype(object).where(ranking.notna(), None).to_dict("records")
        kept = {name.replace(" ", "_"): values for name, values in known.items()}
        write_text(save, json.dumps({**kept, "ranking": rows}, indent=2))


if __name__ == "__main__":
    cli(main, short="columns lm")
