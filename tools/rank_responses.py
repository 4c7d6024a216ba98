"""Candidate responses in the order a new user would like them, from a few of the user's choices.

    python tools/rank_responses.py --basis results/PRISM/<run>/basis-K05-seed0.safetensors \\
        --choices alice.jsonl --candidates drafts.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from basis import load_basis
from choices import USUAL, Columns
from cli import cli
from files import require, write_text, write_whole
from ranking import as_text, directed_rewards, fit_user, rank, read_drafts, read_liked
from reward_model import model_of_basis
from settings import PositiveInt, Rate, SeedNumber


def main(
    basis: Path,
    choices: Path,
    candidates: Path,
    columns: Columns = USUAL,
    save: Path | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    any_model: bool = False,
    num_iterations: PositiveInt = 500,
    learning_rate: Rate = 0.1,
    seed: SeedNumber = 0,
    **embedding: Any,
) -> None:
    """Learn a new user's weights with the basis frozen, and rank candidates by the user's reward.

    Rewards are printed as logits: the probability that one response is preferred to another is
    sigmoid(reward - other reward). Whether the weights say anything about the user is judged by
    leaving out each choice in turn and predicting it from the others.

    Args:
        basis: basis file of a run.
        choices: the user's choices, a file of rows as OwnData/prepare.py reads them: "prompt" (a
            text) or "messages" (the dialogue so far, a list of role and content), "chosen" and
            "rejected" (one text or a list).
        candidates: a file with "prompt" or "messages", and "response" (one text or a list).
        columns: what the columns are called, such as --chosen better.
        save: also write the ranking to this .csv, or weights and ranking to this .json file.
        model: reward model; by default the one that the basis was learned with.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run model code that comes with a hub model.
        any_model: take the model even if the basis was learned with another one.
        num_iterations: steps of Adam on the weights.
        learning_rate: of Adam.
        seed: of the weights' initial values.
    """
    if save:
        require(save.suffix in (".csv", ".json"), f"--save {save}: end its name in .csv or .json")
        require(save.parent.is_dir(), f"--save {save}: there is no folder {save.parent}")
    learned = load_basis(basis)
    chosen, rejected = read_liked(choices, columns)
    drafts = read_drafts(candidates, columns)
    named = (model, tokenizer, revision, trust_remote_code)
    source = model_of_basis(learned.settings, basis, *named, any_model)
    rewards = directed_rewards(learned.V, source, [*chosen, *rejected, *drafts], **embedding)
    liked, disliked, offered = rewards.split([len(chosen), len(rejected), len(drafts)])
    w, without = fit_user(learned, liked - disliked, seed, num_iterations, learning_rate)
    ranking = rank(drafts, offered @ w)
    print(f"weights: {' '.join(f'{x:.3f}' for x in w.tolist())}")
    print(agreement(liked - disliked, w, without))
    print("reward: a logit; P: that the response is preferred to the next one of its prompt\n")
    print(as_text(ranking))
    if save:
        write(save, w, ranking)


def agreement(Z: Tensor, w: Tensor, without: Tensor) -> str:
    """With how many choices the weights agree: those fitted to, and each left out in turn."""
    fitted, left_out = int((Z @ w > 0).sum()), "needs two choices"
    if len(without):
        agreed = int(((Z * without).sum(1) > 0).sum())
        left_out = f"{agreed} of {len(Z)} (each predicted from the others alone)"
    return f"fitted choices: agree with {fitted} of the {len(Z)} choices\nleave-one-out: {left_out}"


def write(save: Path, w: Tensor, ranking: pd.DataFrame) -> None:
    """The ranking as .csv, or weights and ranking as .json."""
    if save.suffix == ".csv":
        write_whole(save, lambda draft: ranking.to_csv(draft, index=False))
    else:
        rows = ranking.astype(object).where(ranking.notna(), None).to_dict("records")
        write_text(save, json.dumps({"weights": w.tolist(), "ranking": rows}, indent=2))


if __name__ == "__main__":
    cli(main, short="columns")
