"""PersonalLLM: prompts with eight responses each, scored by ten reward models."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import digest, require
from lore.embeddings import store as embeddings
from lore.preparing import raw, tables

HERE = Path(__file__).resolve().parent
SCORERS = ("gemma_2b", "gemma_7b", "mistral_raft", "llama3_sfairx", "oasst_deberta_v3", "beaver_7b",
           "oasst_pythia_7b", "oasst_pythia_1b", "mistral_ray", "mistral_weqweasdas")  # fmt: skip
RESPONSES = tuple(f"response_{i}" for i in range(1, 9))
COLUMNS = ("prompt", *RESPONSES, *(f"{r}_{scorer}" for r in RESPONSES for scorer in SCORERS))
Prompt = tuple[str, list[str], list[list[float]]]  # with eight responses and their scores [8, 10]


def main(
    source: str = "namkoong-lab/PersonalLLM", out: Path = HERE / "data",
    embed: bool = True, **embedding: Any,
) -> None:  # fmt: skip
    """Make the score tensors, from which users are simulated later, and embed the responses.

    Args:
        source: hub dataset, or a folder with train and test as .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        embed: false writes the tables only.
    """
    if embed:
        embeddings.check_model(embedding)
    funnel = tables.Funnel()
    prompts = {split: read(source, split, funnel) for split in ("train", "test")}
    talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
             for some in prompts.values() for prompt, responses, _ in some
             for response in responses]  # fmt: skip
    names = [digest(talk) for talk in talks]
    conversations = list(dict(zip(names, talks, strict=True)).values())  # in order of first use
    rows = pd.factorize(np.array(names))[0].reshape(-1, len(RESPONSES))
    rows = np.split(rows, [len(prompts["train"])])
    arrays = {f"{split}.rows": part for split, part in zip(prompts, rows, strict=True)}
    for split, some in prompts.items():
        arrays[f"{split}.scores"] = np.array([scores for *_, scores in some], np.float32)
    shared = overlap(prompts)
    funnel.count("prompts on both sides", shared["prompt"])
    funnel.count("distinct conversations", len(conversations))
    info = {"dataset": "PersonalLLM", "settings": {"source": source}, "overlap": shared}
    print(tables.write_prepared(out, conversations, arrays, info, funnel, embedding.get("shard")))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)


def read(source: str, split: str, funnel: tables.Funnel) -> list[Prompt]:
    """The prompts of a split, in an order that does not depend on that of the rows."""
    rows = raw.read_rows(source, split, COLUMNS, split=split)
    prompts = [read_prompt(place, row) for place, row in rows]
    require(bool(prompts), f"--source {source} has no {split} rows")
    funnel.count(f"{split} prompts", len(prompts))
    empty = sum(responses.count("") for _, responses, _ in prompts)
    funnel.count(f"{split} responses without text", empty)
    return sorted(prompts, key=json.dumps)


def read_prompt(place: str, row: dict[str, Any]) -> Prompt:
    """A row's prompt, its eight responses and their scores by the ten reward models."""
    eight = "eight responses are expected"
    extra = [name for name in row if re.fullmatch(r"response_\d+", name) and name not in RESPONSES]
    require(not extra, f"{place} has {', '.join(extra)}: {eight}")
    prompt = raw.text(row["prompt"], place, "prompt")
    require(bool(prompt), f"{place} has an empty prompt")
    for name in RESPONSES:
        require(row[name] is not None, f"{place} has no {name}: {eight}")
    responses = [raw.text(row[name], place, name) for name in RESPONSES]
    columns = [[f"{name}_{scorer}" for scorer in SCORERS] for name in RESPONSES]
    scores = [[raw.number(row[name], place, name) for name in names] for names in columns]
    return prompt, responses, scores


def overlap(prompts: dict[str, list[Prompt]]) -> dict[str, Any]:
    """How many held-out prompts training has too, also with one of the responses."""
    train, test = ({(prompt, response) for prompt, responses, _ in some for response in responses}
                   for some in prompts.values())  # fmt: skip
    ours, held_out, both = ({prompt for prompt, _ in some} for some in (train, test, train & test))
    found = {"held_out": len(held_out), "prompt": len(ours & held_out), "response": len(both)}
    sentence = "Of {held_out:,} held-out prompts, {prompt:,} are training prompts too, "
    sentence += "{response:,} of them with a response that training has."
    return {**found, "sentence": sentence.format(**found)}


if __name__ == "__main__":
    cli(main, kept="what is embedded already is kept")
