"""Candidate responses in the order a new user would like them, from a few of the user's choices.

For example: python tools/rank_responses.py --basis results/prism/run/basis.safetensors
--choices alice.jsonl --candidates drafts.jsonl
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import embeddings
import experiments
from experiments import Conversation, text
from utils import Basis, Comparisons, InputError, load_basis, personalize


def main(
    basis: Path,
    choices: Path,
    candidates: Path,
    save: Path | None = None,
    model: str | None = None,
    num_iterations: int = 500,
    learning_rate: float = 0.1,
    seed: int = 0,
    **embedding: Any,
) -> None:
    """Learn a new user's weights with the basis frozen, and rank candidates by the user's reward.

    Args:
        basis: basis file of a run.
        choices: jsonl, one choice a line: "prompt" (a text) or "messages" (the dialogue so far, a
            list of role and content), "chosen" and "rejected".
        candidates: jsonl, one candidate a line: "prompt" or "messages", and "response".
        save: also write weights and ranking there, as .json, or the ranking as .csv.
        model: the reward model the basis was learned on; by default the one its file names.
        num_iterations: steps of Adam on the weights.
        learning_rate: of Adam.
        seed: of the weights' initial values.
    """
    if save and save.suffix not in (".csv", ".json"):
        raise InputError(f"--save {save}: the name must end in .csv or .json")
    learned = load_basis(basis)
    name = model or learned.settings.get("model")
    if not name:
        raise InputError(f"{basis} does not say which model it was learned on: name it by --model")
    liked, table = read(choices, ("chosen", "rejected")), read(candidates, ("response",))
    everything = [*liked["chosen"], *liked["rejected"], *table["response"]]
    with tempfile.TemporaryDirectory() as folder:
        store = embeddings.embed(everything, folder, model=str(name), **embedding)
        if store is None:
            raise InputError("run this in one process, without --shard")
        rows = store.rows(torch.arange(len(everything)))  # [2 choices + candidates, F]
    if rows.shape[1] != len(learned.V):
        raise InputError(f"--model {name} has {rows.shape[1]} features, the basis {len(learned.V)}")
    chosen, rejected, drafts = rows.split([len(liked["chosen"])] * 2 + [len(table["response"])])
    fit = {"num_iterations": num_iterations, "learning_rate": learning_rate}
    w = fit_user(learned, chosen - rejected, seed, **fit)
    rewards = drafts @ learned.V @ w
    ranking = rank(table["response"], rewards)
    agreeing = int(((chosen - rejected) @ learned.V @ w > 0).sum())
    print(f"weights: {' '.join(f'{x:.3f}' for x in w.tolist())}")
    print(f"they agree with {agreeing} of the {len(chosen)} choices\n")
    print(ranking.drop(columns="line").to_string(index=False, max_colwidth=60))
    if save:
        write(save, w, ranking)


def read(file: Path, responses: tuple[str, ...]) -> dict[str, list[Conversation]]:
    """The conversations that end in each of the named responses, line by line.

    Raises:
        InputError: no such file, no lines, or a line that lacks something.
    """
    table = re.sub(r"\.jsonl(\.gz)?$", "", file.name)
    if not file.is_file() or table == file.name:
        raise InputError(f"{file}: a .jsonl file is expected there")
    found: dict[str, list[Conversation]] = {name: [] for name in responses}
    for place, row in experiments.read_rows(str(file.parent), table, responses):
        if not place.startswith(f"{file} row"):
            raise InputError(f"{file}: move it away from {place.split(' row ')[0]}")
        history = _history(place, row)
        for name in responses:
            answer = text(row[name], place, name)
            if not answer:
                raise InputError(f"{place}: {name} is empty")
            found[name].append([*history, {"role": "assistant", "content": answer}])
    if not found[responses[0]]:
        raise InputError(f"{file} is empty")
    return found


def _history(place: str, row: dict[str, Any]) -> Conversation:
    """What comes before the response."""
    if ("prompt" in row) == ("messages" in row):
        raise InputError(f"{place}: either prompt or messages is expected")
    history = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    try:
        return embeddings.check_conversations([history])[0]
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def fit_user(basis: Basis, x: Tensor, seed: int, **fit: Any) -> Tensor:
    """The user's weights [K], from differences chosen - rejected [choices, F] (eq. 11)."""
    return personalize(basis, Comparisons.from_list([x]), seed, **fit)[0]


def rank(conversations: list[Conversation], rewards: Tensor) -> pd.DataFrame:
    """One row a candidate: its line, prompt, place within the prompt (best first), reward."""
    table = pd.DataFrame({
        "line": range(1, len(rewards) + 1),
        "prompt": [history[-1]["content"] for *history, _ in conversations],
        "reward": rewards.numpy(),
        "response": [answer["content"] for *_, answer in conversations],
    })  # fmt: skip
    dialogue = pd.Series([str(history) for *history, _ in conversations])
    places = table["reward"].groupby(dialogue).rank(ascending=False, method="min").astype(int)
    table.insert(2, "place", places)
    first = dialogue.map({name: i for i, name in enumerate(dialogue.unique())})
    order = table.assign(first=first).sort_values(["first", "place"], kind="stable").index
    return table.loc[order].reset_index(drop=True)


def write(save: Path, w: Tensor, ranking: pd.DataFrame) -> None:
    """The ranking as .csv, or weights and ranking as .json."""
    if save.suffix == ".csv":
        ranking.to_csv(save, index=False)
    else:
        found = {"weights": w.tolist(), "ranking": ranking.to_dict("records")}
        experiments.write_text(save, json.dumps(found, indent=2))


if __name__ == "__main__":
    experiments.cli(main)
