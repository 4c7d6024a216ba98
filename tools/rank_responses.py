"""Candidate responses in the order a new user would like them, from a few of the user's choices.

    python tools/rank_responses.py --basis results/PRISM/<run>/basis-K05-seed0.safetensors \\
        --choices alice.jsonl --candidates drafts.jsonl
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from basis import Basis, load_basis
from choices import USUAL, Columns, read_choices, read_history, read_responses
from cli import cli
from embeddings import embed
from files import require, write_text, write_whole
from raw import read_file
from reward_model import Conversation, Source, load_config, model_of_basis
from utils import TEMPERATURE, PersonalizeBatch


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
    num_iterations: int = 500,
    learning_rate: float = 0.1,
    seed: int = 0,
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
    source = model_of_basis(learned, basis, *named, any_model)
    rewards = basis_rewards(learned, source, [*chosen, *rejected, *drafts], **embedding)
    liked, disliked, offered = rewards.split([len(chosen), len(rejected), len(drafts)])
    w, without = fit_user(learned, liked - disliked, seed, num_iterations, learning_rate)
    ranking = rank(drafts, offered @ w)
    print(f"weights: {' '.join(f'{x:.3f}' for x in w.tolist())}")
    print(agreement(liked - disliked, w, without))
    print("reward: a logit; P: that the response is preferred to the next one of its prompt\n")
    shown = ranking[["prompt", "place", "logit", "p_over_next", "response"]]
    shown = shown.rename(columns={"logit": "reward", "p_over_next": "P"})
    print(shown.to_string(index=False, max_colwidth=60, float_format="%.3f", na_rep=""))
    if save:
        write(save, w, ranking)


# ------------------------------------------------------------------------------ Input


def read_liked(file: Path, columns: Columns) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations that end in a chosen response, and those that end in the one rejected.

    Raises:
        InputError: no such file, no rows, a row that lacks something, or rows of several users.
    """
    chosen: list[Conversation] = []
    rejected: list[Conversation] = []
    users = set()
    for row in read_choices(read_file(file), columns):
        users.add(row.user)
        for liked in row.chosen:
            for other in row.rejected:
                chosen.append(ending(row.place, row.history, liked, columns.chosen))
                rejected.append(ending(row.place, row.history, other, columns.rejected))
    require(bool(chosen), f"{file} is empty")
    some = ", ".join(sorted(users)[:3])
    require(len(users) == 1, f"{file} has the choices of {len(users)} users ({some}); keep one's")
    return chosen, rejected


def read_drafts(file: Path, columns: Columns) -> list[Conversation]:
    """The conversations that end in a candidate response.

    Raises:
        InputError: no such file, no rows, or a row that lacks something.
    """
    drafts = []
    for place, row in read_file(file):
        require("response" in row, f"{place} has no column response")
        history = read_history(place, row, columns)
        for answer in read_responses(place, row, "response"):
            drafts.append(ending(place, history, answer, "response"))
    require(bool(drafts), f"{file} is empty")
    return drafts


def ending(place: str, history: Conversation, answer: str, column: str) -> Conversation:
    """The dialogue with this answer; InputError where one of them has no text."""
    require(bool(history), f"{place}: the prompt or a message is empty")
    require(bool(answer), f"{place}: {column} is empty")
    return [*history, {"role": "assistant", "content": answer}]


def basis_rewards(
    basis: Basis, source: Source, conversations: list[Conversation], **embedding: Any
) -> Tensor:
    """The K rewards of every conversation, e V: [n, K].

    Raises:
        InputError: embeddings of another size than the basis has, or work shared by processes.
    """
    width, expected = load_config(source).get_text_config().hidden_size, len(basis.V)
    same = width == expected
    require(same, f"--model {source.model} has {width} features, the basis {expected}")
    with tempfile.TemporaryDirectory() as folder:
        store = embed(
            conversations,
            folder,
            model=source.model,
            tokenizer=source.tokenizer,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **embedding,
        )
        require(store is not None, "run this in one process, without --shard")
        return store.rows(torch.arange(len(conversations))) @ basis.V


# --------------------------------------------------------------------------- The user


def fit_user(
    basis: Basis, Z: Tensor, seed: int, num_iterations: int, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """The user's weights from all n choices, and from all choices but one (eq. 11).

    Args:
        basis: whose users' mean weights the new ones are shrunk to, if its own were.
        Z: rewards of chosen minus rejected [n, K].
        seed: of the initial values.
        num_iterations, learning_rate: of Adam.

    Returns:
        w [K], and weights [n, K], each without the choice of its row; [0, K] of a single choice.
    """
    n, K = Z.shape
    others = [torch.cat([Z[:i], Z[i + 1 :]]) for i in range(n)] if n > 1 else []
    fit = PersonalizeBatch(
        1 + len(others),
        K,
        K,
        num_iterations,
        learning_rate,
        generator=seed,
        shrinkage=basis.settings.get("shrinkage", 0.0),
        population=basis.W.mean(0),
    )
    w = torch.stack(fit.train([Z, *others], torch.eye(K)))  # all at once: each is its own user
    return w[0], w[1:]


def agreement(Z: Tensor, w: Tensor, without: Tensor) -> str:
    """With how many choices the weights agree: those fitted to, and each left out in turn."""
    fitted, left_out = int((Z @ w > 0).sum()), "needs two choices"
    if len(without):
        agreed = int(((Z * without).sum(1) > 0).sum())
        left_out = f"{agreed} of {len(Z)} (each predicted from the others alone)"
    return f"fitted choices: agree with {fitted} of the {len(Z)} choices\nleave-one-out: {left_out}"


def rank(conversations: list[Conversation], rewards: Tensor) -> pd.DataFrame:
    """One row per candidate, prompts in their order, the best first within a prompt.

    Returns:
        line in the file, prompt, place within the prompt, reward (as an exported model gives it),
        logit (reward / 100), p_over_next (probability that it is preferred to the next one of its
        prompt, missing for the last) and response.
    """
    logits = (rewards / TEMPERATURE).double()
    columns = {
        "line": range(1, len(rewards) + 1),
        "prompt": [history[-1]["content"] for *history, _ in conversations],
        "reward": rewards.numpy(),
        "logit": logits.numpy(),
        "response": [answer["content"] for *_, answer in conversations],
    }
    table = pd.DataFrame(columns)
    table["dialogue"] = pd.factorize(pd.Series([str(h) for *h, _ in conversations]))[0]
    places = table.groupby("dialogue")["reward"].rank(ascending=False, method="min")
    table.insert(2, "place", places.astype(int))
    table = table.sort_values(["dialogue", "place"], kind="stable", ignore_index=True)
    ahead = table.groupby("dialogue")["logit"].diff(-1)
    table.insert(5, "p_over_next", expit(ahead))
    return table.drop(columns="dialogue")


def write(save: Path, w: Tensor, ranking: pd.DataFrame) -> None:
    """The ranking as .csv, or weights and ranking as .json."""
    if save.suffix == ".csv":
        write_whole(save, lambda draft: ranking.to_csv(draft, index=False))
    else:
        rows = ranking.astype(object).where(ranking.notna(), None).to_dict("records")
        write_text(save, json.dumps({"weights": w.tolist(), "ranking": rows}, indent=2))


if __name__ == "__main__":
    cli(main, short="columns")
