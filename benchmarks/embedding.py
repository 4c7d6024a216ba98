"""Embedding against one conversation at a time: tokens and seconds in the same run.

    python benchmarks/embedding.py                    # SmolLM2-135M, float32, on a CPU
    python benchmarks/embedding.py --device cuda      # random weights of 8B shape, bfloat16

Cases a to c have made-up tokens in the lengths of the data sets, d has the text of a PRISM slice.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from lore.common.cli import cli
from lore.common.settings import NonNegativeInt, PositiveInt, SeedNumber
from lore.embeddings.prefix_trees import Tokens
from lore.embeddings.reward_model import Engine, Source, load_engine, load_tokenizer, render
from lore.embeddings.smollm2 import reward_model
from lore.experiments.report.tables import markdown
from measure import product_speed

PRISM = ROOT.parent / "shared" / "data" / "prism_slice" / "conversations.jsonl"
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "num_labels": 1,
}  # fmt: skip


def main(
    model: str | None = None,
    device: str = "cpu",
    posts: NonNegativeInt = 50,
    dialogues: NonNegativeInt = 25,
    prompts: NonNegativeInt = 50,
    prism: NonNegativeInt = 100,
    batch_tokens: NonNegativeInt = 0,
    parts: PositiveInt = 5,
    seed: SeedNumber = 0,
) -> None:
    """Print tokens given and computed, seconds one at a time and shared, and their ratios.

    Floor is the seconds of the computed tokens' products with the model's weights at the speed of
    one large product; share is the seconds' ratio over the tokens' ratio; deviation is the largest
    difference of a row between the two, over the row's length.

    Args:
        model: local reward model; by default SmolLM2 on a CPU and a random 8B Llama on CUDA.
        device: cpu or cuda; float32 or bfloat16 goes with it.
        posts: case a, posts with six short summaries each.
        dialogues: case b, dialogues of four turns with two candidates each.
        prompts: case c, prompts with eight responses each.
        prism: case d, dialogues of the PRISM slice beside the project.
        batch_tokens: most tokens in one forward pass; 0 means 1024 on a CPU, 4096 on a GPU.
        parts: each case is timed in so many parts, alternating, as machines have other work.
        seed: of the made-up tokens and random weights.
    """
    rows = measure(model, device, (posts, dialogues, prompts, prism), batch_tokens, parts, seed)
    table = pd.DataFrame(rows).set_index("case")
    print(markdown(table.map(lambda x: f"{x:.4g}")))
    if prism and not any(row["case"].startswith("d") for row in rows):
        print(f"d  PRISM is skipped: it takes {PRISM} and a model with a tokenizer (--model)")


def measure(
    model: str | None,
    device: str,
    sizes: Sequence[int],
    batch_tokens: int = 0,
    parts: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row of numbers for each case; arguments as for ``main``, sizes of the cases a to d."""
    name = model or (str(reward_model()) if device == "cpu" else None)
    engine = _engine(name, device, batch_tokens or (1024 if device == "cpu" else 4096), seed)
    vocabulary = engine.model.config.vocab_size
    cases = made_up(vocabulary, *sizes[:3], np.random.default_rng(seed))
    if name and PRISM.exists():
        cases["d  PRISM, opening turns"] = _prism(load_tokenizer(Source(name)), sizes[3])
    _time(engine, [np.arange(9), np.arange(20)])
    named = engine.model.base_model.named_parameters()
    weights = [p for n, p in named if p.dim() > 1 and "embed" not in n]
    speed = product_speed(weights[0].dtype, device)
    per_token = 2 * sum(p.numel() for p in weights) / speed
    return [
        {"case": case, **_measure(engine, conversations, parts, per_token)}
        for case, conversations in cases.items()
        if conversations
    ]


def _engine(name: str | None, device: str, batch_tokens: int, seed: int) -> Engine:
    if name:
        dtype = "float32" if device == "cpu" else "bfloat16"
        return load_engine(Source(name), dtype, device, "sdpa", "auto", batch_tokens)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**LLAMA_8B, dtype=torch.bfloat16)
    with torch.device(device):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return Engine(model.eval(), True, "tree", batch_tokens)


# -------------------------------------------------------------------- The four cases


class Writer:
    """Made-up messages of random tokens, framed as a chat template frames them."""

    def __init__(self, vocabulary: int, generator: np.random.Generator) -> None:
        self.vocabulary, self.generator = vocabulary, generator
        self.system, self.header = self.text(20), self.text(4)

    def text(self, length: int) -> Tokens:
        """So many random tokens."""
        return self.generator.integers(3, self.vocabulary, length)

    def message(self, mean: int) -> Tokens:
        """From half to one and a half times the mean length."""
        length = self.generator.integers(mean // 2, mean + mean // 2 + 1)
        return np.concatenate([self.header, self.text(length)])

    def answers(self, history: Tokens, count: int, mean: int) -> list[Tokens]:
        """A history with as many answers."""
        return [np.append(history, self.message(mean)) for _ in range(count)]

    def prompt(self, mean: int) -> Tokens:
        """System text and a first message."""
        return np.append(self.system, self.message(mean))

    def dialogue(self, turns: int, mean: int) -> list[Tokens]:
        """Both candidates of every turn, the first of which goes on."""
        history, candidates = self.system, []
        for _ in range(turns):
            pair = self.answers(np.append(history, self.message(25)), 2, mean)
            history, candidates = pair[0], candidates + pair
        return candidates


def made_up(
    vocabulary: int, posts: int, dialogues: int, prompts: int, generator: np.random.Generator
) -> dict[str, list[Tokens]]:
    """Cases a to c: conversations of each, in the order that a dataset has them."""
    write = Writer(vocabulary, generator)
    summaries = [write.answers(write.prompt(300), 6, 35) for _ in range(posts)]
    turns = [write.dialogue(4, 80) for _ in range(dialogues)]
    responses = [write.answers(write.prompt(40), 8, 100) for _ in range(prompts)]
    return {
        "a  six summaries of a post": sum(summaries, []),
        "b  four turns, two candidates": sum(turns, []),
        "c  eight responses to a prompt": sum(responses, []),
    }


def _prism(tokenizer: object, dialogues: int) -> list[Tokens]:
    lines = PRISM.read_text(encoding="utf-8").splitlines()[:dialogues]
    histories = [json.loads(line)["conversation_history"] for line in lines]
    chats = [
        [{"role": "user", "content": prompt["content"]}, {"role": "assistant", "content": text}]
        for prompt, *responses in histories
        for text in (response["content"] for response in responses)
    ]
    return [np.array(render(tokenizer, chat)) for chat in chats]


# --------------------------------------------------------------------------- Measuring


def _measure(
    engine: Engine, conversations: list[Tokens], parts: int, per_token: float
) -> dict[str, float]:
    method, seconds, computed, deviation = engine.method, np.zeros(2), 0, 0.0
    cuts = np.unique(np.linspace(0, len(conversations), parts + 1).astype(int))
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        part = sorted(conversations[start:stop], key=tuple)
        engine.method = "single"
        alone, now = _time(engine, part)
        engine.method, before = method, engine.tokens_computed
        rows, later = _time(engine, part)
        seconds += now, later
        computed += engine.tokens_computed - before
        deviation = max(deviation, float(((rows - alone).norm(dim=1) / alone.norm(dim=1)).max()))
    given, (plain, ours) = sum(map(len, conversations)), seconds
    return {
        "given": given, "computed": computed, "given / computed": given / computed,
        "floor s": per_token * computed, "ours s": ours, "plain s": plain,
        "ours / floor": ours / (per_token * computed), "plain / ours": plain / ours,
        "share": plain / ours * computed / given, "deviation": deviation,
    }  # fmt: skip


def _time(engine: Engine, tokens: list[Tokens]) -> tuple[torch.Tensor, float]:
    begin = time.perf_counter()
    rows = engine.embed(tokens, tqdm(disable=True))
    return rows.float(), time.perf_counter() - begin


if __name__ == "__main__":
    cli(main)
