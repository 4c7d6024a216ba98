"""Score a reward model, a basis and its users on RewardBench 2, with the official formula.

    python eval_rb2.py --basis ../results/PRISM/<run>/basis-K05-seed0.safetensors --users user12

embeds every completion once; the model's own score head (the reference), every basis column, the
average user and the users asked for are then one matrix product, and a row each of one table.
Without a basis or a head file, the model's own classification forward is scored (mode seqclf).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lore.common.cli import cli
from lore.common.files import begins, check_output, digest, has_keys, require
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.embeddings import reward_model as rm
from lore.embeddings.store import embed
from lore.methods.saved import load_learned
from PRISM import rewardbench2 as rb2
from PRISM.rewardbench2 import Head, HeadFile

NO_FILE = HeadFile()


def main(
    source: str = "allenai/reward-bench-2", split: str = "test", subset: Sequence[str] = (),
    limit: NonNegativeInt = 0, basis: str | None = None, users: Sequence[str] = (),
    list_users: bool = False, file: HeadFile = NO_FILE, lm: rm.ModelChoice = rm.OF_BASIS,
    mode: Literal["auto", "seqclf", "lmhead"] = "auto", results: str | None = None,
    save_csv: str | None = None, verbose_failures: bool = False, top_k: PositiveInt = 10,
    **scoring: Any,
) -> None:  # fmt: skip
    """Score a reward model, a basis and its users on RewardBench 2.

    Args:
        source: hub dataset, a local .jsonl or .parquet file with the same columns, or a folder with
            such a file named like the split.
        split: split of the hub dataset.
        subset: subsets to keep, such as Focus "Precise IF"; all when empty.
        limit: keep the first rows, so many; 0 keeps all.
        basis: basis or mixed_logit file of a run: its columns, average user and users are scored.
        users: names of users of the basis to score, each with their own weights.
        list_users: print the names of the basis' users and do nothing else.
        file: reward heads of a file.
        lm: the reward model; the paper's if neither it nor a basis is given.
        mode: seqclf scores with the model's own classification forward; lmhead embeds once and
            multiplies with heads, the model's own among them; auto is lmhead where heads are given.
        results: folder for scores.csv and, in the official layout, scores/<reward>.json; by
            default results/rewardbench2/<model>.
        save_csv: write the table to this file too.
        verbose_failures: show the worst failures of the last reward above the baseline's row.
        top_k: how many failures to show.
    """
    if save_csv:
        inputs = source, basis, file.rm_head, file.head_bias
        check_output(Path(save_csv), "--save-csv", begins("reward,"), inputs)
    of_basis = "--users and --list-users belong to --basis: give the basis file that knows them"
    require(bool(basis) or not (users or list_users), of_basis)
    learned = load_learned(basis) if basis else None
    if list_users:
        print("\n".join(learned.names))
        return
    bench = rb2.read_bench(source, split, subset, limit)
    heads, papers = file.heads(), {"model": rm.PAPERS_MODEL}
    if learned:
        directions = {**learned.columns(), "average user": learned.direction()}
        directions |= {f"user {name}": learned.direction(name, "--users") for name in users}
        heads |= {name: Head(direction) for name, direction in directions.items()}
    model = lm.of_basis(learned.settings, basis) if learned else lm.resolve(papers, "")
    mode = check_mode(mode, model, heads)
    folder = Path(results) if results else ROOT / "results/rewardbench2" / rb2.slug(model.model)
    check_output(folder / "scores.csv", "--results", begins("reward,"))
    for path in sorted((folder / "scores").glob("*.json")):
        check_output(path, "--results", has_keys("model", "num_correct", "scores"))
    rewards = all_rewards(rb2.as_conversations(bench), heads, model, mode, **scoring)
    if rewards is None:
        return
    rewards["shortest response"] = rb2.length_baseline(bench)
    table = rb2.save(folder, save_csv, bench, rewards)
    print(table.to_string(float_format="%.4f"))
    if "Mean" in table:
        print("Mean is over the subsets shown and not official: these are not the official rows.")
    if verbose_failures:
        print(rb2.worst_failures(bench, list(rewards.values())[-2], top_k).to_string(index=False))


def check_mode(mode: str, source: rm.Source, heads: Mapping[str, Head]) -> str:
    """The mode that auto stands for; InputError if mode or model do not go with the heads."""
    own = mode == "seqclf" and heads
    require(not own, "--mode seqclf scores with the model's own head: use lmhead for others")
    width = rm.load_config(source).get_text_config().hidden_size
    for name, head in heads.items():
        has = f"{name} has {len(head.weight)} features, embeddings of {source.model} have {width}"
        require(len(head.weight) == width, f"{has}: it was made with another model")
    return mode if mode != "auto" else "lmhead" if heads else "seqclf"


def all_rewards(
    conversations: Sequence[rm.Conversation], heads: Mapping[str, Head], source: rm.Source,
    mode: str, max_length: PositiveInt = 2048,
    truncation_side: Literal["left", "right"] = "right", batch_size: PositiveInt = 8,
    device: str = "auto", dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    embeddings: str | None = None, **embedding: Any,
) -> rb2.Rewards | None:  # fmt: skip
    """Rewards [conversations] by name; None while other processes are still embedding.

    Args:
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
    positions = getattr(rm.load_config(source), "max_position_embeddings", None) or max_length
    tokenizer = rm.load_tokenizer(source)
    start = rm.render_text(tokenizer, [{"role": "user", "content": ""}])
    # The harness counts a BOS of the template and one of the tokenizer, and then masks one of them.
    doubled = tokenizer(start)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    max_length = min(max(max_length - doubled, 1), positions)
    limits = max_length, truncation_side
    if mode == "seqclf":
        shown = embedding.get("progress", True)
        own = rb2.own_rewards(source, conversations, *limits, batch_size, device, dtype, shown)
        return {"model": own}
    facts = [source[:3], source.pool, (dtype, *limits), conversations]
    name = f"{rb2.slug(source.model)}-{digest(facts)[:8]}"
    folder = embeddings or ROOT / "PRISM" / "data" / "rewardbench2" / name
    store = embed(  # named one by one: these are no flags of this script
        conversations, folder, model=source.model, tokenizer=source.tokenizer,
        revision=source.revision, trust_remote_code=source.trust_remote_code, pool=source.pool,
        max_length=max_length, truncation_side=truncation_side, dtype=dtype, device=device,
        **embedding,
    )  # fmt: skip
    return rb2.head_rewards(store, heads) if store else None


if __name__ == "__main__":
    cli(main, short="file lm")
