"""RewardBench 2 (allenai/reward-bench-2): the official score of a reward model and of a basis.

    python eval_rb2.py --basis ../results/PRISM/<run>/basis-K05.safetensors --users user12

embeds every completion once; the model's own score head (the reference), each basis column, the
average user and the users asked for are then one matrix product and the rows of one table. Without
a basis or a head of yours the model's own classification forward is scored (mode seqclf).
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments
from embeddings import (
    Conversation,
    Source,
    Store,
    Tokens,
    cut_tokens,
    device_and_dtype,
    embed,
    load_config,
    load_engine,
    load_tokenizer,
    render,
    render_text,
)
from utils import InputError, load_basis

log = logging.getLogger(__name__)

CACHE = Path(__file__).resolve().parent / "data" / "rewardbench2"
RESULTS = experiments.ROOT / "results" / "rewardbench2"
COLUMNS = ("id", "prompt", "chosen", "rejected", "num_correct", "subset")

# Rows of each subset in the published test split; only their mean is the official score.
OFFICIAL = {
    "Factuality": 475,
    "Precise IF": 160,
    "Math": 183,
    "Safety": 450,
    "Focus": 495,
    "Ties": 102,
}


# --------------------------------------------------------------------- Scoring


class Row(NamedTuple):
    """The scores of one prompt's completions, the ``num_correct`` correct ones first."""

    id: str
    subset: str
    num_correct: int
    scores: Sequence[float]


def score(rows: Iterable[Row]) -> dict[str, float]:
    """Score of each subset present, in the order of the leaderboard, and their mean, "Overall".

    Args:
        rows: (id, subset, num_correct, scores) of every prompt.

    Raises:
        InputError: no rows, scores that are not finite, or Ties ids other than ref:k and tied:k.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[1], []).append(_checked(Row(*row)))
    if not groups:
        raise InputError("there are no rows to score")
    known = [name for name in OFFICIAL if name in groups]
    order = known + sorted(groups.keys() - OFFICIAL.keys())
    result = {name: _subset_score(name, groups[name]) for name in order}
    return {**result, "Overall": float(np.mean(list(result.values())))}


def row_result(scores: Sequence[float]) -> float:
    """1 / (number of completions at the maximum) if the first, the chosen one, is there, else 0."""
    top = max(scores)
    return 1 / sum(s == top for s in scores) if scores[0] == top else 0.0


def margin(num_correct: int, scores: Sequence[float]) -> float:
    """Lowest correct score less highest incorrect one: the gap; negative where the row fails."""
    return min(scores[:num_correct]) - max(scores[num_correct:])


def ties_score(rows: Sequence[Row]) -> float:
    """Official Ties score: .30 a_t + .30 a_r + .20 p + .20 h + .01 g (a term without rows is 0).

    a_t, a_r are the shares of tied and of ref rows whose gap is above 0. Over the k with both rows,
    with the spread of the tied row's correct scores: p is the share of tied gaps above the spread,
    h the same for the smaller of both gaps, g the mean of tanh(smaller gap / spread - 1).
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for row in rows:
        kind, k = _ties_id(row.id)
        if k in gaps[kind]:
            raise InputError(f"id {row.id!r} of the Ties subset is there twice")
        gaps[kind][k] = margin(row.num_correct, row.scores)
        if kind == "tied":
            correct = row.scores[: row.num_correct]
            spreads[k] = max(correct) - min(correct)
    accurate = [_mean(np.fromiter(gaps[kind].values(), float) > 0) for kind in ("tied", "ref")]
    paired = [k for k in gaps["tied"] if k in gaps["ref"]]
    tied, ref, spread = (
        np.array([values[k] for k in paired]) for values in (gaps["tied"], gaps["ref"], spreads)
    )
    smaller = np.minimum(tied, ref)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A spread of 0 gives tanh(+-inf) = +-1, and 0/0 counts as 0.
        graded = np.nan_to_num(np.tanh(smaller / spread - 1))
    terms = [*accurate, _mean(tied > spread), _mean(smaller > spread), _mean(graded)]
    return float(np.dot([0.30, 0.30, 0.20, 0.20, 0.01], terms))


def _subset_score(name: str, rows: Sequence[Row]) -> float:
    return ties_score(rows) if _is_ties(name) else _mean([row_result(row.scores) for row in rows])


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _is_ties(subset: str) -> bool:
    return subset.lower() == "ties"


def _ties_id(name: str) -> tuple[str, str]:
    kind, _, k = name.partition(":")
    if kind not in ("ref", "tied") or not k:
        raise InputError(f"id {name!r} of the Ties subset is neither ref:k nor tied:k")
    return kind, k


def _checked(row: Row) -> Row:
    if not np.isfinite(row.scores).all():
        raise InputError(f"row {row.id!r} ({row.subset}) has a score that is not a finite number")
    if not 1 <= row.num_correct < len(row.scores):
        raise InputError(
            f"row {row.id!r} ({row.subset}): num_correct is {row.num_correct} of "
            f"{len(row.scores)} completions; at least one must be correct and one incorrect"
        )
    return row


# ------------------------------------------------------------------------ Data


def read_bench(source: str, split: str, subset: Sequence[str], limit: int) -> pd.DataFrame:
    """Rows of RewardBench 2 (id, prompt, chosen, rejected, num_correct, subset), all checked.

    Args:
        source: a .jsonl or .parquet file, a folder with one of the split's name, or a hub dataset.
        split: split of the hub dataset.
        subset: names of the subsets to keep; empty keeps all.
        limit: keep only so many rows, the first ones; 0 keeps all.

    Raises:
        InputError: a missing column, a malformed line or row, a subset that is not there.
    """
    rows = []
    for place, row in _raw_rows(source, split):
        if problem := _problem(row):
            raise InputError(f"{place} (id {row['id']}): {problem}")
        rows.append({**{name: row[name] for name in COLUMNS}, "id": str(row["id"])})
    if not rows:
        raise InputError(f"--source {source} has no rows")
    bench = _restrict(pd.DataFrame(rows), subset, limit)
    score(scored_rows(bench, length_baseline(bench)))  # refuses bad ids before any work
    return bench


def _raw_rows(source: str, split: str) -> experiments.Rows:
    file = Path(source)
    ending = re.search(r"\.(jsonl|jsonl\.gz|parquet)$", file.name)
    if not ending:
        yield from experiments.read_rows(source, split, COLUMNS, split=split)
        return
    if not file.is_file():
        raise InputError(f"--source {source}: there is no such file")
    table = file.name[: ending.start()]
    for place, row in experiments.read_rows(str(file.parent), table, COLUMNS):
        if not place.startswith(str(file)):
            raise InputError(f"--source {source}: move it away from {place.split(' row ')[0]}")
        yield place, row


def _problem(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row["subset"], str) or not isinstance(row["prompt"], str):
        return "subset and prompt must be text"
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], list) or not row[name]:
            return f"{name} must be a list of one or more texts"
        if not all(isinstance(text, str) for text in row[name]):
            return f"{name} holds something that is not text"
    if row["num_correct"] != len(row["chosen"]):
        return f"num_correct is {row['num_correct']}, but {len(row['chosen'])} texts are chosen"
    return None


def _restrict(bench: pd.DataFrame, subset: Sequence[str], limit: int) -> pd.DataFrame:
    names = {name.lower(): name for name in bench["subset"]}
    unknown = [name for name in subset if name.lower() not in names]
    if unknown:
        present = ", ".join(sorted(names.values()))
        raise InputError(f"--subset {', '.join(unknown)}: not there; the subsets are {present}")
    if subset:
        bench = bench[bench["subset"].isin([names[name.lower()] for name in subset])]
    return bench.head(limit) if limit else bench


def completions(bench: pd.DataFrame) -> list[tuple[str, str]]:
    """(prompt, completion) of every completion, row after row, the chosen ones first."""
    return [
        (row.prompt, text)
        for row in bench.itertuples(index=False)
        for text in (*row.chosen, *row.rejected)
    ]


def scored_rows(bench: pd.DataFrame, rewards: np.ndarray) -> list[Row]:
    """Rows with their scores, from the rewards [completions] in the order of ``completions``."""
    values = iter(rewards.tolist())
    return [
        Row(row.id, row.subset, row.num_correct, list(islice(values, len(texts))))
        for row in bench.itertuples(index=False)
        for texts in [(*row.chosen, *row.rejected)]
    ]


def as_conversations(bench: pd.DataFrame) -> list[Conversation]:
    """The conversation, one user and one assistant message, of every completion."""
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for prompt, text in completions(bench)
    ]


def length_baseline(bench: pd.DataFrame) -> np.ndarray:
    """Rewards [completions] that prefer the shortest response, in characters."""
    return np.array([-float(len(text)) for _, text in completions(bench)])


# ----------------------------------------------------------------------- Heads


class Head(NamedTuple):
    """A linear reward on embeddings: weight [F] and bias."""

    weight: Tensor
    bias: float = 0.0


def read_head(path: str, key: str | None = None) -> Tensor:
    """Columns [F, B] of a head file of shape (F,), (F, 1), (F, B) or (1, F).

    Args:
        path: a .npy, .pt or .safetensors file; nothing in it is unpickled.
        key: the entry to take where the file holds several.

    Raises:
        InputError: an unreadable file, an unknown entry, or another shape.
    """
    entries = _read_tensors(Path(path))
    if isinstance(entries, dict):
        key = next(iter(entries)) if key is None and len(entries) == 1 else key
        if key not in entries:
            raise InputError(f"{path}: choose one of {', '.join(entries)} with --head_key")
        entries = entries[key]
    if not isinstance(entries, Tensor) or entries.dim() not in (1, 2) or not entries.numel():
        raise InputError(f"{path}: a head is one tensor of shape (F,), (F, 1), (F, B) or (1, F)")
    head = entries.detach().float()
    if not head.isfinite().all():
        raise InputError(f"{path}: the head has entries that are not finite")
    return head.reshape(-1, 1) if head.dim() == 1 or len(head) == 1 else head


def _read_tensors(path: Path) -> Tensor | dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such head file")
    readers = {
        ".npy": lambda: torch.from_numpy(np.load(path, allow_pickle=False)),
        ".pt": lambda: torch.load(path, map_location="cpu", weights_only=True),
        ".safetensors": lambda: load_file(path),
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: a head file is one of {', '.join(readers)}")
    try:
        return readers[path.suffix]()
    except (ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as bad:
        raise InputError(f"{path}: cannot be read ({str(bad).splitlines()[0]})") from bad


def file_heads(path: str, key: str | None, bias: str | None) -> dict[str, Head]:
    """Heads "head 1" ... of a head file, with a bias (a number, or a file of [1] or [B])."""
    columns = read_head(path, key).T  # [B, F]
    biases = _read_bias(bias, len(columns)) if bias is not None else [0.0] * len(columns)
    return {
        f"head {i}": Head(column, b)
        for i, (column, b) in enumerate(zip(columns, biases, strict=True), start=1)
    }


def _read_bias(bias: str, count: int) -> list[float]:
    try:
        values = [float(bias)]
    except ValueError:
        values = read_head(bias).flatten().tolist()
    if len(values) not in (1, count):
        raise InputError(f"--head_bias {bias}: {len(values)} numbers for {count} heads")
    return values * (count // len(values))


def basis_heads(path: str, users: Sequence[str]) -> dict[str, Head]:
    """Heads of a saved basis: its columns, its average user V mean(w), the V w of users asked for.

    Raises:
        InputError: a user whom the basis does not know.
    """
    basis = load_basis(path)
    names = [*basis.users, *basis.users_unseen]
    W = basis.W if basis.W_unseen is None else torch.cat([basis.W, basis.W_unseen])
    weights = dict(zip(names, W, strict=False))
    unknown = [name for name in users if name not in weights]
    if unknown:
        known = f"{len(names)} users, such as {', '.join(names[:3])}" if names else "no user ids"
        raise InputError(f"--users {', '.join(unknown)}: not in {path}, which has {known}")
    return {
        **{f"basis {k}": Head(column) for k, column in enumerate(basis.V.T, start=1)},
        "average user": Head(basis.V @ basis.W.mean(0)),
        **{f"user {name}": Head(basis.V @ weights[name]) for name in users},
    }


def asked_heads(
    rm_head: str | None,
    head_key: str | None,
    head_bias: str | None,
    basis: str | None,
    users: Sequence[str],
) -> dict[str, Head]:
    """Heads of the head file and of the basis file, whichever are given."""
    if not rm_head and (head_key or head_bias):
        raise InputError("--head_key and --head_bias belong to --rm_head: give that file too")
    if users and not basis:
        raise InputError("--users belongs to --basis: give the basis file that knows them")
    from_file = file_heads(rm_head, head_key, head_bias) if rm_head else {}
    return {**from_file, **(basis_heads(basis, users) if basis else {})}


def check_mode(mode: str, source: Source, heads: Mapping[str, Head]) -> str:
    """The mode auto stands for; InputError if it or the model does not go with the heads."""
    if mode == "seqclf" and heads:
        raise InputError("--mode seqclf scores with the model's own head: use lmhead for others")
    check_width(heads, load_config(source).get_text_config().hidden_size, source.model)
    return mode if mode != "auto" else "lmhead" if heads else "seqclf"


def check_width(heads: Mapping[str, Head], width: int, model: str) -> None:
    """Refuse heads [F] of another size than the model's embeddings."""
    for name, head in heads.items():
        if len(head.weight) != width:
            raise InputError(
                f"{name} has {len(head.weight)} features, embeddings of {model} have {width}: "
                "it was made with another model"
            )


def head_rewards(store: Store, heads: Mapping[str, Head]) -> dict[str, np.ndarray]:
    """Rewards [rows of the store] of every head: one matrix product on embeddings read once."""
    if store.head is not None:
        heads = {"reference": Head(store.head), **heads}
    if not heads:
        raise InputError("the model has no score head: give one with --rm_head or --basis")
    matrix = torch.stack([head.weight for head in heads.values()], dim=1)  # [F, heads]
    bias = torch.tensor([head.bias for head in heads.values()])
    parts = [store.rows(index) @ matrix + bias for index in torch.arange(len(store)).split(1024)]
    return dict(zip(heads, torch.cat(parts).T.numpy(), strict=True))


# ------------------------------------------------------------------ Language model


def official_length(source: Source, max_length: int) -> int:
    """Tokens kept of a long completion if ``max_length`` is meant as in the official harness.

    It tokenizes the rendered text, so that a BOS of the template and one of the tokenizer both
    count before one of them is masked. No more than the model has positions for are kept.
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
) -> np.ndarray:
    """Logits [conversations] of the model's own classification forward.

    A batch holds conversations of one length: nothing is padded.

    Raises:
        InputError: the model cannot be loaded or has no score head with one output.
    """
    device, dtype = device_and_dtype(device, dtype)
    engine = load_engine(source, dtype, device, "sdpa", "single", max_length)
    if engine.head is None or len(engine.head) != 1:
        raise InputError(
            f"{source.model} has no score head with one output: give a head with --rm_head or "
            "--basis"
        )
    tokenizer = load_tokenizer(source)
    tokens = [
        cut_tokens(
            np.array(render(tokenizer, conversation)), tokenizer.bos_token_id, max_length,
            truncation_side,
        )
        for conversation in conversations
    ]  # fmt: skip
    rewards = np.empty(len(tokens))
    for batch in tqdm(_same_length_batches(tokens, batch_size), unit="batch"):
        input_ids = torch.from_numpy(np.stack([tokens[i] for i in batch])).to(device)
        rewards[batch] = engine.model(input_ids=input_ids).logits[:, 0].float().cpu()
    return rewards


def _same_length_batches(tokens: Sequence[Tokens], size: int) -> list[list[int]]:
    longest_first = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    groups = (list(group) for _, group in groupby(longest_first, key=lambda i: len(tokens[i])))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


# --------------------------------------------------------------------- Reporting


def is_official(bench: pd.DataFrame) -> bool:
    """Whether these are as many rows of each subset as the official score is made of."""
    return bench["subset"].value_counts().to_dict() == OFFICIAL


def score_table(bench: pd.DataFrame, rewards: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Scores, one row a reward: their mean (Score if official) and then every subset's."""
    scores = {name: score(scored_rows(bench, values)) for name, values in rewards.items()}
    table = pd.DataFrame.from_dict(scores, orient="index").rename_axis("reward")
    table.insert(0, "Score" if is_official(bench) else "Mean", table.pop("Overall"))
    return table


def official_record(name: str, bench: pd.DataFrame, rewards: np.ndarray) -> dict[str, Any]:
    """Scores of one reward in the official layout: lists id, subset, scores and results.

    As there, a row's result is its score, and null in Ties, where rows are scored together.
    """
    rows = scored_rows(bench, rewards)
    return {
        "model": name,
        "id": [row.id for row in rows],
        "subset": [row.subset for row in rows],
        "num_correct": [row.num_correct for row in rows],
        "scores": [row.scores for row in rows],
        "results": [None if _is_ties(row.subset) else row_result(row.scores) for row in rows],
    }


def worst_failures(bench: pd.DataFrame, rewards: np.ndarray, top_k: int) -> pd.DataFrame:
    """The rows where a rejected completion beat a chosen one by most: margin, texts cut short."""
    failures = []
    for row, (*_, n, scores) in zip(bench.itertuples(), scored_rows(bench, rewards), strict=True):
        lowest, highest = np.argmin(scores[:n]), np.argmax(scores[n:])
        texts = {"chosen": row.chosen[lowest], "rejected": row.rejected[highest]}
        short = {k: " ".join(v.split())[:40] for k, v in {"prompt": row.prompt, **texts}.items()}
        failures.append({"margin": -margin(n, scores), "subset": row.subset, "id": row.id, **short})
    table = pd.DataFrame(failures)
    return table[table["margin"] > 0].nlargest(top_k, "margin")


def save(
    folder: Path, table: pd.DataFrame, bench: pd.DataFrame, rewards: Mapping[str, np.ndarray]
) -> None:
    """Write scores.csv, and scores/<reward>.json in the official layout for every reward."""
    table.to_csv(folder / "scores.csv")
    for name, values in rewards.items():
        record = official_record(name, bench, values)
        experiments.write_text(folder / "scores" / f"{slug(name)}.json", json.dumps(record))


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def cache_folder(source: Source, conversations: Sequence[Conversation], *settings: Any) -> Path:
    """Folder of the embeddings of these conversations by this model with these settings."""
    digest = experiments.digest([source[:3], settings, conversations])
    return CACHE / f"{slug(source.model)}-{digest[:8]}"


# -------------------------------------------------------------------------- Main


def main(
    source: str = "allenai/reward-bench-2",
    split: str = "test",
    subset: list[str] = [],  # noqa: B006
    limit: NonNegativeInt = 0,
    model: str = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
    tokenizer: str | None = None,
    revision: str | None = None,
    mode: Literal["auto", "seqclf", "lmhead"] = "auto",
    rm_head: str | None = None,
    head_bias: str | None = None,
    head_key: str | None = None,
    basis: str | None = None,
    users: list[str] = [],  # noqa: B006
    max_length: PositiveInt = 2048,
    truncation_side: Literal["left", "right"] = "right",
    batch_size: PositiveInt = 8,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
    embeddings: str | None = None,
    results: str | None = None,
    save_csv: str | None = None,
    top_k: PositiveInt = 10,
    verbose_failures: bool = False,
    **embedding: Any,
) -> None:
    """Score a reward model, a basis and its users on RewardBench 2.

    Args:
        source: hub dataset, a local .jsonl or .parquet file with the same columns, or a folder with
            such a file that is named like the split.
        split: split of the hub dataset.
        subset: subsets to keep, such as Focus "Precise IF"; all when empty.
        limit: keep the first so many rows; 0 keeps all.
        model: reward model, a hub name or a local folder.
        tokenizer: tokenizer's hub name or folder, if not the model's own.
        revision: branch, tag or commit of a hub model.
        mode: seqclf scores with the model's own classification forward; lmhead embeds once and
            multiplies with heads, the model's own among them; auto is seqclf unless a head or a
            basis is given.
        rm_head: file with reward heads, .npy, .pt or .safetensors, of shape (H,), (H, 1), (H, B)
            or (1, H).
        head_bias: a number added to the rewards of rm_head, or such a file with one for each.
        head_key: name of the entry to take from rm_head where it holds several.
        basis: basis file saved by train_basis.py: its columns, its average user, its users.
        users: ids of users of the basis to score with their own weights.
        max_length: longest completion in tokens, prompt and template included, counted as the
            official harness does (a doubled BOS counts, though the model sees one).
        truncation_side: where longer ones are cut; the official harness leaves it to the
            tokenizer, for most the right.
        batch_size: completions a forward pass in mode seqclf (see batch_tokens for lmhead).
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        dtype: arithmetic of the model; auto is bfloat16 on CUDA and float32 on a CPU.
        trust_remote_code: run model code that comes with a hub model.
        embeddings: folder that keeps the embeddings; by default one for this model, these
            settings and these completions under PRISM/data/rewardbench2.
        results: folder for scores.csv and, in the official layout, scores/<reward>.json; by
            default results/rewardbench2/<model>.
        save_csv: write the table to this file too.
        top_k: how many failures verbose_failures shows.
        verbose_failures: show the worst failures of the last reward before the baseline.
    """
    bench = read_bench(source, split, subset, limit)
    conversations = as_conversations(bench)
    lm = Source(model, tokenizer, revision, trust_remote_code)
    heads = asked_heads(rm_head, head_key, head_bias, basis, users)
    mode = check_mode(mode, lm, heads)
    max_length = official_length(lm, max_length)
    folder = Path(results) if results else RESULTS / slug(model)
    (folder / "scores").mkdir(parents=True, exist_ok=True)

    if mode == "seqclf":
        limits = (max_length, truncation_side, batch_size)
        rewards = {"model": own_rewards(lm, conversations, *limits, device, dtype)}
    else:
        store = embed(
            conversations,
            embeddings or cache_folder(lm, conversations, dtype, max_length, truncation_side),
            model=model,
            tokenizer=tokenizer,
            revision=revision,
            max_length=max_length,
            truncation_side=truncation_side,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            **embedding,
        )
        if store is None:
            return
        rewards = head_rewards(store, heads)

    rewards["shortest response"] = length_baseline(bench)
    table = score_table(bench, rewards)
    save(folder, table, bench, rewards)
    if save_csv:
        table.to_csv(save_csv)
    print(table.to_string(float_format="%.4f"))
    if not is_official(bench):
        print("Mean is over the subsets shown and not official: these are not the official rows.")
    if verbose_failures:
        print(worst_failures(bench, list(rewards.values())[-2], top_k).to_string(index=False))


if __name__ == "__main__":
    experiments.cli(main)
