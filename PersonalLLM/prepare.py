"""PersonalLLM: prompts with eight responses each, scored by ten reward models."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import embeddings
import experiments
from experiments import text
from utils import InputError

HERE = Path(__file__).resolve().parent
SCORERS = (
    "gemma_2b", "gemma_7b", "mistral_raft", "llama3_sfairx", "oasst_deberta_v3", "beaver_7b",
    "oasst_pythia_7b", "oasst_pythia_1b", "mistral_ray", "mistral_weqweasdas",
)  # fmt: skip
RESPONSES = tuple(f"response_{i}" for i in range(1, 9))
COLUMNS = ("prompt", *RESPONSES, *(f"{r}_{scorer}" for r in RESPONSES for scorer in SCORERS))


class Prompt(NamedTuple):
    """One row of the raw table."""

    prompt: str
    responses: list[str]
    scores: list[list[float]]  # [8, 10]


def main(
    source: str = "namkoong-lab/PersonalLLM",
    out: Path = HERE / "data",
    embed: bool = True,
    **embedding: Any,
) -> None:
    """Make the score tensors, from which users are simulated later, and embed the responses.

    Args:
        source: hub dataset, or a folder with train and test as .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        embed: false writes the tables only.
    """
    counts: Counter[str] = Counter()
    number = experiments.Numbering()
    prompts = {split: read(source, split, counts) for split in ("train", "test")}
    tables = {}
    for split, rows in prompts.items():
        tables[f"{split}.scores"] = np.array([row.scores for row in rows], np.float32)  # [P, 8, 10]
        tables[f"{split}.rows"] = np.array([conversation_rows(row, number) for row in rows])
    train, test = ({row.prompt for row in rows} for rows in prompts.values())
    counts["prompts on both sides"] = len(train & test)
    counts["distinct conversations"] = len(number.conversations)
    info = {"dataset": "PersonalLLM", "users_split": "simulated", "settings": {"source": source}}
    experiments.write_prepared(out, number.conversations, tables, {**info, "counts": counts})
    print(experiments.funnel(counts))
    if embed:
        embeddings.embed(number.conversations, out / "embeddings", **embedding)
    print(f"prepared {len(number.conversations):,} conversations with scores in {out}")


def read(source: str, split: str, counts: Counter[str]) -> list[Prompt]:
    """The prompts of a split, in an order that does not depend on that of the rows."""
    rows = experiments.read_rows(source, split, COLUMNS, split=split)
    prompts = [read_prompt(place, row) for place, row in rows]
    if not prompts:
        raise InputError(f"--source {source} has no {split} rows")
    counts[f"{split} prompts"] = len(prompts)
    counts[f"{split} responses without text"] = sum(row.responses.count("") for row in prompts)
    return sorted(prompts, key=json.dumps)


def read_prompt(place: str, row: dict[str, Any]) -> Prompt:
    """A row's prompt, its eight responses and their scores by the ten reward models."""
    extra = [name for name in row if re.fullmatch(r"response_\d+", name) and name not in RESPONSES]
    if extra:
        raise InputError(f"{place} has {', '.join(extra)}: eight responses are expected")
    prompt = text(row["prompt"], place, "prompt")
    if not prompt:
        raise InputError(f"{place} has an empty prompt")
    for name in RESPONSES:
        if row[name] is None:
            raise InputError(f"{place} has no {name}: eight responses are expected")
    responses = [text(row[name], place, name) for name in RESPONSES]
    scores = [
        [read_score(place, row, f"{name}_{scorer}") for scorer in SCORERS] for name in RESPONSES
    ]
    return Prompt(prompt, responses, scores)


def read_score(place: str, row: dict[str, Any], column: str) -> float:
    """A score, which must be a finite number."""
    score = row[column]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise InputError(f"{place}: {column} must be a number, not {score!r}")
    return float(score)


def conversation_rows(row: Prompt, number: experiments.Numbering) -> list[int]:
    """Where the eight conversations of a prompt lie."""
    ask = {"role": "user", "content": row.prompt}
    return [number([ask, {"role": "assistant", "content": answer}]) for answer in row.responses]


if __name__ == "__main__":
    experiments.cli(main)
