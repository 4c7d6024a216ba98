"""Score a reward model, a basis and its users on RewardBench 2, with the official formula.

    python eval_rb2.py --basis ../results/PRISM/<run>/basis-K05-seed0.safetensors --users user12

embeds every completion once; the model's own score head (the reference), every basis column, the
average user and the users asked for are then one matrix product, and a row each of one table.
Without a basis or a head file, the model's own classification forward is scored (mode seqclf).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import (
    begins,
    check_output,
    check_place,
    digest,
    has_keys,
    require,
    write_text,
    write_whole,
)
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.embeddings.prefix_trees import Tokens
from lore.embeddings.reward_model import (
    OF_BASIS,
    PAPERS_MODEL,
    Conversation,
    ModelChoice,
    Source,
    cut_tokens,
    device_and_dtype,
    load_config,
    load_engine,
    load_tokenizer,
    render,
    render_text,
)
from lore.embeddings.store import Store, embed
from lore.methods.saved import Learned, load_learned
from PRISM.rewardbench2 import (
    Head,
    as_conversations,
    file_heads,
    is_official,
    length_baseline,
    official_record,
    read_bench,
    score_table,
    worst_failures,
)

CACHE = Path(__file__).resolve().parent / "data" / "rewardbench2"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "rewardbench2"


def main(
    source: str = "allenai/reward-bench-2",
    split: str = "test",
    subset: Sequence[str] = (),
    limit: NonNegativeInt = 0,
    basis: str | None = None,
    users: Sequence[str] = (),
    list_users: bool = False,
    rm_head: str | None = None,
    head_bias: str | None = None,
    head_key: str | None = None,
    lm: ModelChoice = OF_BASIS,
    mode: Literal["auto", "seqclf", "lmhead"] = "auto",
    results: str | None = None,
    save_csv: str | None = None,
    verbose_failures: bool = False,
    top_k: PositiveInt = 10,
    **scoring: Any,
) -> None:
    """Score a reward model, a basis and its users on RewardBench 2.

    Args:
        source: hub dataset, a local .jsonl or .parquet file with the same columns, or a folder with
            such a file named like the split.
        split: split of the hub dataset.
        subset: subsets to keep, such as Focus "Precise IF"; all when empty.
        limit: keep the first rows, so many; 0 keeps all.
        basis: basis file of a run, or mixed_logit file: its columns, its average user and its users
            are scored.
        users: names of users of the basis to score, each with their own weights.
        list_users: print the names of the basis' users and do nothing else.
        rm_head: file with reward heads, .npy, .pt or .safetensors, of shape (F,), (F, 1), (F, B) or
            (1, F).
        head_bias: a number to add to the rewards of rm_head, or such a file with one per head.
        head_key: name of the entry to take from rm_head if it holds several.
        lm: the reward model; the paper's if neither it nor a basis is given.
        mode: seqclf scores with the model's own classification forward; lmhead embeds once and
            multiplies with heads, the model's own among them; auto is lmhead if a head file or a
            basis is given, else seqclf.
        results: folder for scores.csv and, in the official layout, scores/<reward>.json; by
            default results/rewardbench2/<model>.
        save_csv: write the table to this file too.
        verbose_failures: show the worst failures of the last reward above the baseline's row.
        top_k: how many failures to show.
    """
    if save_csv:
        check_place(Path(save_csv), "--save-csv")
        is_table = begins("reward,")
        check_output(Path(save_csv), "--save-csv", is_table, (source, basis, rm_head, head_bias))
    learned = load_learned(basis) if basis else None
    if list_users:
        require(learned is not None, "--list-users lists the users of a basis: give --basis")
        print("\n".join(learned.names))
        return
    bench = read_bench(source, split, subset, limit)
    heads = asked_heads(rm_head, head_key, head_bias, learned, users)
    if learned:
        model = lm.of_basis(learned.settings, basis)
    else:
        model = lm.resolve({"model": PAPERS_MODEL}, "")
    mode = check_mode(mode, model, heads)
    folder = Path(results) if results else RESULTS / slug(model.model)
    check_output(folder / "scores.csv", "--results", begins("reward,"))
    for path in sorted((folder / "scores").glob("*.json")):
        check_output(path, "--results", has_keys("model", "num_correct", "scores"))
    (folder / "scores").mkdir(parents=True, exist_ok=True)

    rewards = all_rewards(as_conversations(bench), heads, model, mode, **scoring)
    if rewards is None:
        return
    rewards["shortest response"] = length_baseline(bench)
    table = score_table(bench, rewards)
    save(folder, table, bench, rewards)
    if save_csv:
        write_whole(Path(save_csv), table.to_csv)
    print(table.to_string(float_format="%.4f"))
    if not is_official(bench):
        print("Mean is over the subsets shown and not official: these are not the official rows.")
    if verbose_failures:
        print(worst_failures(bench, list(rewards.values())[-2], top_k).to_string(index=False))


# ---------------------------------------------------------------------------- Heads


def asked_heads(
    rm_head: str | None,
    head_key: str | None,
    head_bias: str | None,
    basis: Learned | None,
    users: Sequence[str],
) -> dict[str, Head]:
    """Heads of the head file and of the basis, whichever are given."""
    without_file = not rm_head and (head_key or head_bias)
    require(not without_file, "--head_key and --head_bias belong to --rm_head: give that file too")
    lost_users = bool(users) and basis is None
    require(not lost_users, "--users belongs to --basis: give the basis file that knows them")
    from_file = file_heads(rm_head, head_key, head_bias) if rm_head else {}
    return {**from_file, **(basis_heads(basis, users) if basis else {})}


def basis_heads(basis: Learned, users: Sequence[str]) -> dict[str, Head]:
    """Heads of a basis or a mixed logit: its columns, its average user, and the users asked for.

    Raises:
        InputError: a user whom the basis does not know.
    """
    directions = {**basis.columns(), "average user": basis.direction()}
    directions |= {f"user {name}": basis.direction(name, "--users") for name in users}
    return {name: Head(direction) for name, direction in directions.items()}


def check_mode(mode: str, source: Source, heads: Mapping[str, Head]) -> str:
    """The mode that auto stands for; InputError if mode or model do not go with the heads."""
    own = mode == "seqclf" and heads
    require(not own, "--mode seqclf scores with the model's own head: use lmhead for others")
    width = load_config(source).get_text_config().hidden_size
    for name, head in heads.items():
        require(
            len(head.weight) == width,
            f"{name} has {len(head.weight)} features, embeddings of {source.model} have {width}: "
            "it was made with another model",
        )
    return mode if mode != "auto" else "lmhead" if heads else "seqclf"


# --------------------------------------------------------------------------- Rewards


def all_rewards(
    conversations: Sequence[Conversation],
    heads: Mapping[str, Head],
    source: Source,
    mode: str,
    max_length: PositiveInt = 2048,
    truncation_side: Literal["left", "right"] = "right",
    batch_size: PositiveInt = 8,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    embeddings: str | None = None,
    **embedding: Any,
) -> dict[str, np.ndarray] | None:
    """Rewards [conversations] by name; None while other processes are still embedding.

    Args:
        conversations: what is scored.
        heads: linear rewards on embeddings.
        source: the reward model.
        mode: seqclf or lmhead.
        max_length: longest completion in tokens, prompt and template included, counted as the
            official harness does (a doubled BOS counts, though the model sees one).
        truncation_side: side that is cut off; the official harness leaves it to the tokenizer,
            which mostly cuts on the right.
        batch_size: completions per forward pass in mode seqclf (see batch_tokens for lmhead).
        device: auto (a GPU if there is one), cpu, cuda, or one GPU such as cuda:1.
        dtype: of arithmetic; auto is bfloat16 on a GPU and float32 on a CPU.
        embeddings: folder that keeps the embeddings; by default one for this model, these settings
            and these completions under PRISM/data/rewardbench2.
    """
    max_length = official_length(source, max_length)
    if mode == "seqclf":
        limits = (max_length, truncation_side, batch_size)
        progress = embedding.get("progress", True)
        return {"model": own_rewards(source, conversations, *limits, device, dtype, progress)}
    facts = (dtype, max_length, truncation_side)
    store = embed(
        conversations,
        embeddings or cache_folder(source, conversations, *facts),
        model=source.model,
        tokenizer=source.tokenizer,
        revision=source.revision,
        max_length=max_length,
        truncation_side=truncation_side,
        dtype=dtype,
        device=device,
        trust_remote_code=source.trust_remote_code,
        pool=source.pool,
        **embedding,
    )
    return head_rewards(store, heads) if store else None


def cache_folder(source: Source, conversations: Sequence[Conversation], *settings: Any) -> Path:
    """Folder of the embeddings of these conversations by this model with these settings."""
    facts = [source[:3], source.pool, settings, conversations]
    return CACHE / f"{slug(source.model)}-{digest(facts)[:8]}"


def head_rewards(store: Store, heads: Mapping[str, Head]) -> dict[str, np.ndarray]:
    """Rewards [rows of the store] by every head: one matrix product on embeddings read once."""
    if store.head is not None:
        heads = {"reference": Head(store.head), **heads}
    require(bool(heads), "the model has no score head: give one with --rm_head or --basis")
    matrix = torch.stack([head.weight for head in heads.values()], dim=1)  # [F, heads]
    bias = torch.tensor([head.bias for head in heads.values()])
    parts = [store.rows(index) @ matrix + bias for index in torch.arange(len(store)).split(1024)]
    return dict(zip(heads, torch.cat(parts).T.numpy(), strict=True))


def official_length(source: Source, max_length: int) -> int:
    """Most tokens of a completion, if ``max_length`` means what it means in the official harness.

    The harness tokenizes the rendered text, so that a BOS of the template and one of the tokenizer
    both count before one of them is masked. No more are kept than the model has positions.
    """
    positions = getattr(load_config(source), "max_position_embeddings", None) or max_length
    tokenizer = load_tokenizer(source)
    start = render_text(tokenizer, [{"role": "user", "content": ""}])
    doubled = tokenizer(start)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    return min(max(max_length - doubled, 1), positions)


@torch.inference_mode()
def own_rewards(
    source: Source,
    conversations: Sequence[Conversation],
    max_length: int,
    truncation_side: str,
    batch_size: int,
    device: str,
    dtype: str,
    progress: bool = True,
) -> np.ndarray:
    """Logits [conversations] of the model's own classification forward.

    All conversations of a batch have one length, so nothing is padded.

    Raises:
        InputError: the model cannot be loaded or has no score head with one output.
    """
    device, dtype = device_and_dtype(device, dtype)
    engine = load_engine(source, dtype, device, "sdpa", "single", max_length)
    one = engine.head is not None and len(engine.head) == 1
    lacks = f"{source.model} has no score head with one output"
    require(one, f"{lacks}: give one with --rm_head or --basis")
    tokenizer = load_tokenizer(source)
    limits = tokenizer.bos_token_id, max_length, truncation_side
    tokens = [cut_tokens(np.array(render(tokenizer, each)), *limits) for each in conversations]
    rewards = np.empty(len(tokens))
    batches = _same_length_batches(tokens, batch_size)
    for batch in tqdm(batches, unit="batch", disable=not progress or None):
        input_ids = torch.from_numpy(np.stack([tokens[i] for i in batch])).to(device)
        rewards[batch] = engine.model(input_ids=input_ids).logits[:, 0].float().cpu()
    return rewards


def _same_length_batches(tokens: Sequence[Tokens], size: int) -> list[list[int]]:
    longest_first = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    groups = (list(group) for _, group in groupby(longest_first, key=lambda i: len(tokens[i])))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


# --------------------------------------------------------------------------- Results


def save(
    folder: Path, table: pd.DataFrame, bench: pd.DataFrame, rewards: Mapping[str, np.ndarray]
) -> None:
    """Write scores.csv, and scores/<reward>.json in the official layout for every reward."""
    write_whole(folder / "scores.csv", table.to_csv)
    for name, values in rewards.items():
        record = official_record(name, bench, values)
        write_text(folder / "scores" / f"{slug(name)}.json", json.dumps(record))


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


if __name__ == "__main__":
    cli(main, short="lm")
