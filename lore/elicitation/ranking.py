"""One person's choices and candidate responses: read, embedded, weighed and put in order.

Shape letters: K rank, n conversations or comparisons.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor

from lore.common.files import InputError, require
from lore.embeddings.reward_model import Conversation, Source, load_config
from lore.embeddings.store import embed
from lore.learning.basis import TEMPERATURE, Basis
from lore.preparing.own_rows import (
    NO_PROMPT,
    TIES,
    USUAL,
    Choice,
    Columns,
    read_choices,
    read_endings,
    resolve,
)
from lore.preparing.raw import read_file
from utils import PersonalizeBatch

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------ Input


class Liked(NamedTuple):
    """One person's choices, a pair for every chosen and rejected response of a row.

    Attributes:
        chosen, rejected: conversations that end in the response [n].
        row: the number of the row that each pair comes from, from 0 [n].
    """

    chosen: list[Conversation]
    rejected: list[Conversation]
    row: Tensor


def read_liked(file: Path, columns: Columns) -> Liked:
    """One person's choices from a file.

    Raises:
        InputError: no such file, no rows, a row that lacks something, or rows of several users.
    """
    found: list[tuple[Conversation, Conversation, int]] = []
    choices = read_choices(read_file(file), columns)
    counted = [row for row in choices if row.left_out != TIES]
    if len(counted) < len(choices):
        log.info("%s: %d ties left out", file, len(choices) - len(counted))
    for number, row in enumerate(counted):
        found += [(liked, other, number) for liked, other in both_endings(row, columns)]
    require(bool(found), f"{file} is empty")
    users = {row.user for row in counted}
    some = ", ".join(sorted(users)[:3])
    require(len(users) == 1, f"{file} has the choices of {len(users)} users ({some}); keep one's")
    chosen, rejected, rows = zip(*found, strict=True)
    return Liked(list(chosen), list(rejected), torch.tensor(rows))


def both_endings(
    row: Choice, columns: Columns = USUAL
) -> Iterator[tuple[Conversation, Conversation]]:
    """Every conversation that was chosen beside every one that was rejected.

    Raises:
        InputError: the dialogue or a response has no text, or the two are equal.
    """
    require(row.left_out != NO_PROMPT, f"{row.place}: the prompt or a message is empty")
    for liked, other in product(row.chosen, row.rejected):
        same = f"{row.place}: {columns.chosen} and {columns.rejected} are equal"
        require(liked != other, same)
        yield (
            with_text(liked, row.place, columns.chosen),
            with_text(other, row.place, columns.rejected),
        )


def read_drafts(file: Path, columns: Columns) -> list[Conversation]:
    """The conversations that end in a candidate response.

    Raises:
        InputError: no such file, no rows, or a row that lacks something.
    """
    drafts = []
    for place, row in read_file(file):
        column = columns.response
        require(column in row, f"{place} has no column {column}")
        found = read_endings(place, row, resolve(row, columns), [column])
        if found is None:
            raise InputError(f"{place}: the prompt or a message is empty")
        drafts += [with_text(draft, place, column) for draft in found[0]]
    require(bool(drafts), f"{file} is empty")
    return drafts


def with_text(conversation: Conversation, place: str, column: str) -> Conversation:
    """The conversation; InputError where its response has no text."""
    require(bool(conversation[-1]["content"]), f"{place}: {column} is empty")
    return conversation


def directed_rewards(
    directions: Tensor,
    source: Source,
    conversations: Sequence[Conversation],
    folder: Path | None = None,
    **embedding: Any,
) -> Tensor:
    """The rewards of every conversation in some directions, such as a basis' columns: [n, C].

    Args:
        directions: among the embeddings [F, C].
        source: the reward model.
        conversations: each ends in a response; n of them.
        folder: where the embeddings are kept for another time; nowhere if None.
        embedding: more arguments of ``embeddings.embed``.

    Raises:
        InputError: embeddings of another size than the basis has, or work shared by processes.
    """
    width, expected = load_config(source).get_text_config().hidden_size, len(directions)
    same = width == expected
    require(same, f"--model {source.model} has {width} features, the basis {expected}")
    with tempfile.TemporaryDirectory() as passing:
        store = embed(
            conversations,
            folder or passing,
            model=source.model,
            tokenizer=source.tokenizer,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **embedding,
        )
        require(store is not None, "run this in one process, without --shard")
        rows = store.rows(torch.arange(len(conversations)))
        return rows @ directions.to(rows)


# --------------------------------------------------------------------------- The user


def fit_user(
    basis: Basis, Z: Tensor, seed: int, num_iterations: int, learning_rate: float,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The user's weights from all n choices, and from all but those of each row (eq. 11).

    Args:
        basis: whose users' mean weights the new ones are shrunk to, if its own were.
        Z: rewards of chosen minus rejected, in log odds [n, K].
        seed: of the initial values.
        num_iterations, learning_rate: of Adam.
        row: number of each choice's row, 0 to R - 1 [n]; each has its own if None.

    Returns:
        w [K], and weights [R, K], each without the choices of one row; [0, K] of a single row.
    """
    K, Z = Z.shape[1], (TEMPERATURE * Z).to(basis.W)
    others = [Z[apart] for apart in all_but_one(len(Z), row)]
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


def all_but_one(n: int, row: Tensor | None = None) -> Tensor:
    """Which of n choices are not of a row, for every row [R, n]; [0, n] of a single row.

    What is learned from such choices says nothing of the row, whose pairs share responses.
    """
    row = torch.arange(n) if row is None else row
    numbers = row.unique()
    return row != numbers[:, None] if len(numbers) > 1 else torch.ones(0, n, dtype=torch.bool)


# ------------------------------------------------------------------------------ Ranking


def rank(conversations: list[Conversation], rewards: Tensor) -> pd.DataFrame:
    """One row per candidate, prompts in their order, the best first within a prompt.

    Args:
        conversations: each ends in a candidate.
        rewards: of each, in log odds [n].

    Returns:
        line in the file, prompt, place within the prompt, reward, p_over_next (probability that it
        is preferred to the next one of its prompt, missing for the last) and response.
    """
    columns = {
        "line": range(1, len(rewards) + 1),
        "prompt": [history[-1]["content"] for *history, _ in conversations],
        "reward": rewards.double().numpy(),
        "response": [answer["content"] for *_, answer in conversations],
    }
    table = pd.DataFrame(columns)
    table["dialogue"] = pd.factorize(pd.Series([str(h) for *h, _ in conversations]))[0]
    places = table.groupby("dialogue")["reward"].rank(ascending=False, method="min")
    table.insert(2, "place", places.astype(int))
    table = table.sort_values(["dialogue", "place"], kind="stable", ignore_index=True)
    ahead = table.groupby("dialogue")["reward"].diff(-1)
    table.insert(4, "p_over_next", expit(ahead))
    return table.drop(columns="dialogue")


def as_text(ranking: pd.DataFrame) -> str:
    """A ranking as a terminal shows it: rewards, with standard deviations where they are known, and
    P that a response is preferred to the next."""
    names = {"deviation": "sd", "p_over_next": "P"}
    kept = [name for name in ("prompt", "place", "reward", *names, "response") if name in ranking]
    shown = ranking[kept].rename(columns=names)
    return shown.to_string(index=False, max_colwidth=60, float_format="%.3f", na_rep="")
