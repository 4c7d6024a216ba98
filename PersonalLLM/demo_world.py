"""A small world in PersonalLLM's raw schema: templated responses and ten scorers of their text.

    python demo_world.py

Responses are put together from the phrases of demo_words.json, in amounts that are drawn
independently. The scorers see nothing but the finished text.
"""

import json
import re
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli  # before torch, so that --help does not load it

# isort: split
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

from lore.common import files
from lore.common.settings import PositiveInt, SeedNumber
from lore.embeddings import smollm2
from lore.embeddings.reward_model import Conversation
from lore.embeddings.store import embed

HERE = Path(__file__).resolve().parent
NAMES = [f"response_{i}" for i in range(1, 9)]
HASH = "head_sha256"  # in world.json, once the world is finished

# How much of each ingredient the eight responses to a prompt hold; shuffled for each prompt.
AMOUNTS: dict[str, tuple[int | str, ...]] = {
    "steps": (1, 1, 1, 2, 2, 2, 3, 3),
    "listed": (0, 0, 0, 0, 0, 1, 1, 1),
    "register": ("casual", "casual", "plain", "plain", "plain", "plain", "formal", "formal"),
    "exclaims": (0, 0, 0, 0, 0, 1, 1, 1),
}
OTHERS = ("warmth", "cases", "hedges", "figures", "voice", "questions")
AMOUNTS |= dict.fromkeys(OTHERS, (0, 0, 0, 0, 0, 1, 1, 2))


@cache
def words() -> dict[str, Any]:
    """What texts are made of: topics (steps and cases of each), questions, frames and phrases."""
    return json.loads((HERE / "demo_words.json").read_text(encoding="utf-8"))


def write_response(topic: str, amounts: dict[str, int | str], rng: np.random.Generator) -> str:
    """A response about a topic, with the given amount of each ingredient of AMOUNTS."""
    steps, cases = words()["topics"][topic].values()
    frames = rng.permutation(words()["frames"][amounts["register"]])
    chosen = rng.permutation(steps)[: amounts["steps"]]
    body = [frame.format(step) for frame, step in zip(frames, chosen, strict=False)]
    around = [f"For example, {case}" for case in rng.permutation(cases)[: amounts["cases"]]]
    for name, phrases in words()["phrases"].items():
        some = rng.permutation(phrases)[: amounts[name]]
        around += [phrase.format(rng.integers(2, 60)) for phrase in some]
    around = rng.permutation(around).tolist()
    opening, closing = around[: len(around) // 3], around[len(around) // 3 :]
    mark = "!" if amounts["exclaims"] else "."
    if not amounts["listed"]:
        return _prose(opening + body + closing, mark)
    bullets = "\n".join(f"- {line[0].upper() + line[1:]}" for line in body)
    return f"{_prose(opening, mark)}\n{bullets}\n{_prose(closing, mark)}".strip()


def _prose(lines: list[str], mark: str) -> str:
    """The lines as sentences that end in the mark; questions keep theirs."""
    sentences = [line[0].upper() + line[1:] for line in lines]
    return " ".join(line if line.endswith("?") else line + mark for line in sentences)


def write_prompts(number: int, rng: np.random.Generator) -> pd.DataFrame:
    """Distinct prompts with eight responses each: prompt, response_1 .. response_8."""
    every = [(topic, form) for topic in words()["topics"] for form in words()["questions"]]
    possible = 0 < number <= len(every)
    files.require(possible, f"{number} prompts asked for: there can be 1 to {len(every)}")
    rows = []
    for topic, form in rng.permutation(every)[:number].tolist():
        drawn = pd.DataFrame({name: rng.permutation(some) for name, some in AMOUNTS.items()})
        texts = [write_response(topic, amounts, rng) for amounts in drawn.to_dict("records")]
        rows.append([form.format(topic), *texts])
    return pd.DataFrame(rows, columns=["prompt", *NAMES])


MEASURES = {
    "words": r"\S+",
    "long words": r"\b\w{7,}\b",
    "bullets": r"(?m)^- ",
    "formal": r"\b(?:advisable|one should|necessary|one ought)\b",
    "casual": r"\b(?:gonna|wanna|ok|don't|you'll)\b",
    "hedges": r"\b(?:perhaps|maybe|possibly|probably)\b",
    "warmth": r"\b(?:lovely|dear|friend|kind|enjoy|happy|joy|wishing)\b",
    "examples": r"\bfor example\b",
    "figures": r"\d+",
    "questions": r"\?",
    "voice": r"\b(?:I|my|myself)\b",
    "exclamations": r"!",
}

# What each scorer counts in a text, and how much it likes it. Some scorers resemble each other and
# some are opposites; all like some substance, as real reward models do, so that users differ but
# have something in common. How much they share was tuned by hand.
SUBSTANCE = {"words": 0.1, "long words": 0.3}
TASTES: dict[str, dict[str, float]] = {
    "gemma_2b": SUBSTANCE | {"bullets": 1.0},
    "gemma_7b": SUBSTANCE | {"bullets": 0.8, "formal": 0.6},
    "mistral_raft": SUBSTANCE | {"warmth": 1.0},
    "llama3_sfairx": SUBSTANCE | {"figures": 1.0, "examples": 0.5},
    "oasst_deberta_v3": SUBSTANCE | {"formal": 0.8, "casual": -0.8, "hedges": 0.3},
    "beaver_7b": SUBSTANCE | {"hedges": 1.0, "exclamations": -0.4},
    "oasst_pythia_7b": SUBSTANCE | {"questions": 0.9, "warmth": 0.5},
    "oasst_pythia_1b": SUBSTANCE | {"casual": 0.8, "bullets": -0.6},
    "mistral_ray": SUBSTANCE | {"voice": 1.0, "exclamations": 0.4, "casual": 0.3},
    "mistral_weqweasdas": SUBSTANCE | {"examples": 1.0, "figures": 0.4},
}


def measure(texts: list[str]) -> pd.DataFrame:
    """Square roots of how often each thing in MEASURES occurs: each further one adds less."""
    counts = {name: pd.Series(texts).str.count(pattern, re.IGNORECASE)
              for name, pattern in MEASURES.items()}  # fmt: skip
    return pd.DataFrame(counts).pow(0.5)


def score(train: pd.DataFrame, texts: pd.DataFrame) -> pd.DataFrame:
    """Scores of texts by the ten scorers [texts, 10], from measures of them and the train texts.

    Measures and scores each have mean 0 and SD 1 on the train texts.
    """
    tastes = pd.DataFrame(TASTES).fillna(0.0).reindex(list(MEASURES))
    center, spread = train.mean(), train.std(ddof=0)
    mixed = ((train - center) / spread) @ tastes
    return (((texts - center) / spread) @ tastes - mixed.mean()) / mixed.std(ddof=0)


def add_scores(table: pd.DataFrame, train: pd.DataFrame) -> pd.DataFrame:
    """The table with its columns response_{i}_{m} for every response i and scorer m."""
    scale = measure(train[NAMES].to_numpy().ravel().tolist())
    parts = [score(scale, measure(table[name].tolist())).add_prefix(name + "_") for name in NAMES]
    return pd.concat([table.reset_index(drop=True), *parts], axis=1)


def average_preferences(table: pd.DataFrame) -> list[Conversation]:
    """Conversations with each prompt's best response by the mean of all scorers, then the worst."""
    average = pd.DataFrame({n: table.filter(regex=f"^{n}_").mean(axis=1) for n in NAMES})
    return [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
        for names in (average.idxmax(axis=1), average.idxmin(axis=1))
        for row, name in zip(table.to_dict("records"), names, strict=True)
    ]


def main(
    out: Path = HERE / "data" / "demo-source", model: Path = HERE / "data" / "smollm2",
    train_prompts: PositiveInt = 120, test_prompts: PositiveInt = 40,
    head_prompts: PositiveInt = 20, layers: PositiveInt = 6, seed: SeedNumber = 0,
) -> None:  # fmt: skip
    """Write the demo's world (train.parquet, test.parquet) and a reward model that fits it.

    Nothing is made again that is there already.

    Args:
        out: folder for the two tables and world.json, which says what the scorers measure.
        model: folder of the reward model; made from SmolLM2-135M-Instruct if missing. Its score
            head is fitted to the preferences of an average user.
        train_prompts: prompts in the train split, with eight responses each.
        test_prompts: prompts in the test split; no prompt is in both.
        head_prompts: number of training prompts, the first ones, to fit the score head on.
        layers: first layers of SmolLM2 that a new reward model keeps, of 30; more take longer.
        seed: of everything that is drawn.
    """
    enough = head_prompts <= train_prompts
    files.require(enough, "give at least as many --train-prompts as --head-prompts")
    prompts = write_prompts(train_prompts + test_prompts, np.random.default_rng(seed))
    world = {
        "seed": seed, "train_prompts": train_prompts, "test_prompts": test_prompts,
        "head_prompts": head_prompts, "layers": layers, "measures": MEASURES, "tastes": TASTES,
    }  # fmt: skip
    says, head = out / "world.json", model / smollm2.HEAD
    # An earlier run finished this world, and the model still has the head that it fitted.
    if not head.exists() or files.read_json(says) != world | {HASH: files.file_sha256(head)}:
        made = says.exists()
        files.check_output(says, "--out", files.has_keys("measures"))
        for split in ("train", "test"):
            files.check_output(out / f"{split}.parquet", "--out", lambda _: made)
        files.write_text(says, json.dumps(world))  # not whole, but ours
        train, test = prompts[:train_prompts], prompts[train_prompts:]
        tables = {"train": add_scores(train, train), "test": add_scores(test, train)}
        for split, table in tables.items():
            files.write_whole(out / f"{split}.parquet", partial(table.to_parquet, index=False))
        smollm2.reward_model(model, layers=layers)
        conversations = average_preferences(tables["train"][:head_prompts])
        with tempfile.TemporaryDirectory() as folder:
            store = embed(conversations, folder, model=str(model), dtype="float32")
            rows = store.rows(torch.arange(len(store))).numpy()
        x = rows[:head_prompts] - rows[head_prompts:]  # chosen minus rejected
        fitted = LogisticRegression(fit_intercept=False, max_iter=1000)
        fitted.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)))
        smollm2.save_head(model, torch.from_numpy(fitted.coef_[0]).float())
        files.write_text(says, json.dumps(world | {HASH: files.file_sha256(head)}, indent=2))
    print(f"{train_prompts} train and {test_prompts} test prompts: {out}, reward model: {model}")


if __name__ == "__main__":
    cli(main)
