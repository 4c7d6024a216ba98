"""A small world in PersonalLLM's raw schema: templated responses and ten scorers of their text.

Every response is assembled from parts whose amounts are drawn independently (steps, layout,
register, exclamation marks, warmth, examples, hedges, figures, first person, questions). The
scorers see nothing but the finished text.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import embeddings
import experiments
import smollm2
from utils import InputError

HERE = Path(__file__).resolve().parent
RESPONSES = 8

# Topic: four steps, two cases.
TOPICS: dict[str, tuple[str, ...]] = {
    "growing tomatoes": (
        "pick a sunny spot", "water at the roots", "tie the stems to a stake", "pinch the shoots",
        "cherry tomatoes in a deep pot", "a plum variety on a balcony"),
    "baking bread": (
        "weigh the flour", "knead until smooth", "let the dough rise", "preheat the oven",
        "a plain white loaf in a tin", "rye with caraway seeds"),
    "learning Spanish": (
        "listen every morning", "write down new words", "speak with a partner", "reread old notes",
        "a radio play from Madrid", "ordering coffee aloud"),
    "repairing a bicycle": (
        "clean the chain", "check the brake pads", "patch the tube", "oil the derailleur",
        "a puncture near the valve", "a skipping third gear"),
    "saving money": (
        "list what you spend", "cancel old contracts", "cook at home", "move savings on payday",
        "an unused gym membership", "lunch brought from home"),
    "running a marathon": (
        "build up the distance", "rest between long runs", "eat before training", "buy good shoes",
        "a slow ten miles on Sunday", "oats two hours before the start"),
    "painting a room": (
        "wash the walls", "tape the edges", "roll on a primer", "paint in two coats",
        "a pale grey for the ceiling", "a short roller behind the radiator"),
    "playing the guitar": (
        "tune every string", "practise slow changes", "count aloud", "finish with a song",
        "three chords in a folk tune", "a blues in the key of E"),
    "keeping bees": (
        "join a local club", "inspect the hive", "leave honey for winter", "treat against mites",
        "a quiet colony from a neighbour", "a frame hive under fruit trees"),
    "training a puppy": (
        "reward good habits", "keep sessions short", "go out after meals", "ignore the jumping",
        "a biscuit for sitting still", "a nap in an open crate"),
    "writing a novel": (
        "sketch the ending", "write at a fixed hour", "leave edits for later", "read drafts aloud",
        "a crime story told backwards", "a diary of a lighthouse keeper"),
    "brewing coffee": (
        "grind the beans", "warm the cup", "pour in circles", "wait before stirring",
        "a light roast from Kenya", "a paper filter rinsed hot"),
    "sleeping better": (
        "dim the lights", "leave the phone outside", "get up at one hour", "air the bedroom",
        "a paper book in bed", "tea without caffeine"),
    "planning a hike": (
        "study the map", "check the weather", "pack spare layers", "tell a friend the route",
        "a ridge walk in early autumn", "a loop from the railway station"),
    "giving a speech": (
        "start with one story", "cut the slides", "rehearse standing up", "pause after key points",
        "a toast at a wedding", "a pitch to the city council"),
    "knitting a scarf": (
        "choose thick yarn", "cast on loosely", "count the stitches", "block the finished piece",
        "a ribbed pattern in wool", "stripes from leftover yarn"),
    "fixing a leaky tap": (
        "shut off the water", "unscrew the handle", "replace the washer", "test for drips",
        "a worn ring in the kitchen mixer", "scale under the old cartridge"),
    "taking photographs": (
        "look for soft light", "hold the camera still", "move closer", "sort the results",
        "a portrait beside a window", "boats in the morning fog"),
    "cooking rice": (
        "rinse the grains", "measure the water", "keep the lid on", "let it steam",
        "basmati with a bay leaf", "short grain for a pudding"),
    "moving house": (
        "sort every cupboard", "label the boxes", "book a van", "read the meters",
        "winter coats packed first", "plates wrapped in towels"),
    "starting a business": (
        "talk to customers", "test a small version", "track the costs", "find a mentor",
        "a market stall before a shop", "a weekend repair service"),
    "studying for exams": (
        "make a timetable", "practise old papers", "explain it to someone", "take real breaks",
        "chemistry on flash cards", "history as a story"),
    "playing chess": (
        "develop the pieces", "castle early", "look for threats", "review lost games",
        "a pin on the king's knight", "an endgame of rook and pawn"),
    "sewing curtains": (
        "measure the window", "wash the fabric", "pin the hem", "press the seams",
        "linen lined with cotton", "a heavy fabric for the hall"),
    "learning to swim": (
        "breathe out under water", "float on the back", "kick from the hips", "join a class",
        "a shallow pool on weekdays", "a foam board held in front"),
    "composting leaves": (
        "mix green and brown", "keep the heap damp", "turn it with a fork", "sieve the result",
        "coffee grounds under straw", "oak leaves in a wire bin"),
    "hosting a dinner": (
        "ask about allergies", "cook ahead", "set the table early", "plan one hot dish",
        "a stew made the day before", "a cold soup in summer"),
    "building a shelf": (
        "find the studs", "level the brackets", "sand the board", "drill small holes first",
        "pine boards in an alcove", "a spice rack over the stove"),
    "choosing a laptop": (
        "list the programs you use", "compare the weight", "try the keyboard", "check the battery",
        "a refurbished office model", "a small screen for travel"),
    "caring for roses": (
        "prune in late winter", "feed after flowering", "mulch the bed", "cut off faded blooms",
        "a climber on a south wall", "a shrub rose in clay soil"),
    "meditating daily": (
        "sit in one place", "follow the breath", "start with short sits", "forgive the wandering",
        "a cushion by the window", "a quiet bench at noon"),
    "making cheese": (
        "warm the milk", "stir in the rennet", "cut the curd", "salt and press it",
        "ricotta from leftover whey", "a soft goat cheese with herbs"),
    "watching birds": (
        "rise before dawn", "learn the calls", "move slowly", "keep a list",
        "a wren in the hedge", "geese over the estuary"),
    "organising photos": (
        "delete the duplicates", "sort by year", "tag the faces", "copy to a second drive",
        "a folder for each holiday", "prints of the grandparents"),
    "training for a climb": (
        "hang from a bar", "stretch the hips", "fall safely", "climb with a partner",
        "an easy slab in dry weather", "an indoor wall in winter"),
    "drawing portraits": (
        "block in the shapes", "measure the eyes", "shade from one side", "draw every day",
        "a self-portrait in charcoal", "a sleeping cat in pencil"),
}  # fmt: skip

QUESTIONS = (
    "How do I start {}?", "What matters most in {}?", "Any advice on {}?", "Explain {} to me.",
    "I keep failing at {}. What should I change?", "What would a beginner need for {}?",
    "Can you help me with {}?", "Give me a plan for {}.", "Is {} hard?",
    "My sister asks about {}. What do I tell her?", "What are common mistakes in {}?",
    "I have one free week for {}. Where do I begin?",
)  # fmt: skip

# How much of each ingredient the eight responses to a prompt hold; shuffled for each prompt.
AMOUNTS: dict[str, tuple[int, ...]] = {
    "steps": (1, 1, 1, 2, 2, 2, 3, 3),
    "listed": (0, 0, 0, 0, 0, 1, 1, 1),
    "register": (-1, -1, 0, 0, 0, 0, 1, 1),  # casual, plain, formal
    "exclaims": (0, 0, 0, 0, 0, 1, 1, 1),
    "warmth": (0, 0, 0, 0, 0, 1, 1, 2),
    "cases": (0, 0, 0, 0, 0, 1, 1, 2),
    "hedges": (0, 0, 0, 0, 0, 1, 1, 2),
    "figures": (0, 0, 0, 0, 0, 1, 1, 2),
    "voice": (0, 0, 0, 0, 0, 1, 1, 2),
    "questions": (0, 0, 0, 0, 0, 1, 1, 2),
}
FRAMES = {
    -1: ("gonna want to {}", "just {}, ok", "don't forget to {}", "you'll wanna {}"),
    0: ("{}", "then {}", "{} next", "also {}"),
    1: ("it is advisable to {}", "one should {}", "it is necessary to {}", "one ought to {}"),
}
PHRASES = {
    "warmth": ("What a lovely question, dear friend", "Be kind to yourself and enjoy it",
               "Happy to help, my dear", "Wishing you joy with it"),
    "hedges": ("Perhaps this varies", "Maybe other ways work too", "It probably depends",
               "This is possibly not for everyone"),
    "figures": ("Allow {} minutes a day", "Expect to spend {} euros", "Repeat it {} times"),
    "voice": ("I learned this myself", "In my own experience it works", "I do so at my place"),
    "questions": ("What have you tried so far?", "How much time do you have?",
                  "Which part worries you?"),
}  # fmt: skip


# ------------------------------------------------------------------- Responses


def write_response(topic: str, amounts: dict[str, int], rng: np.random.Generator) -> str:
    """A response about a topic that holds the given amount of each ingredient of AMOUNTS."""
    steps, cases = TOPICS[topic][:4], TOPICS[topic][4:]
    frames = rng.permutation(FRAMES[amounts["register"]])
    body = [
        frame.format(step)
        for frame, step in zip(frames, _some(steps, amounts["steps"], rng), strict=False)
    ]
    around = [f"For example, {case}" for case in _some(cases, amounts["cases"], rng)]
    for name, phrases in PHRASES.items():
        around += [p.format(rng.integers(2, 60)) for p in _some(phrases, amounts[name], rng)]
    around = [str(phrase) for phrase in rng.permutation(around)]
    opening, closing = around[: len(around) // 3], around[len(around) // 3 :]
    mark = "!" if amounts["exclaims"] else "."
    if not amounts["listed"]:
        return _prose(opening + body + closing, mark)
    bullets = "\n".join(f"- {line[0].upper() + line[1:]}" for line in body)
    return f"{_prose(opening, mark)}\n{bullets}\n{_prose(closing, mark)}".strip()


def _some(phrases: Sequence[str], number: int, rng: np.random.Generator) -> list[str]:
    return [str(phrase) for phrase in rng.permutation(phrases)[:number]]


def _prose(lines: list[str], mark: str) -> str:
    """Sentences that end in the mark, questions excepted."""
    sentences = [line[0].upper() + line[1:] for line in lines]
    return " ".join(line if line.endswith("?") else line + mark for line in sentences)


def write_prompts(number: int, rng: np.random.Generator) -> pd.DataFrame:
    """Distinct prompts with eight responses each: prompt, response_1 .. response_8."""
    every = [(topic, form) for topic in TOPICS for form in QUESTIONS]
    if not 0 < number <= len(every):
        raise InputError(f"{number} prompts asked for: there can be 1 to {len(every)}")
    rows = []
    for i in rng.permutation(len(every))[:number]:
        topic, form = every[i]
        drawn = {name: rng.permutation(amounts) for name, amounts in AMOUNTS.items()}
        row = {"prompt": form.format(topic)}
        for r in range(RESPONSES):
            amounts = {name: int(values[r]) for name, values in drawn.items()}
            row[f"response_{r + 1}"] = write_response(topic, amounts, rng)
        rows.append(row)
    return pd.DataFrame(rows)


# --------------------------------------------------------------------- Scorers

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

# What each scorer counts in a text, and its taste for it. Some resemble each other and some want
# the opposite of one another; all want some substance, as real reward models do, so that users
# differ without having nothing in common. How much they share was set by trying.
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
    """Square roots of how often each thing in MEASURES occurs: more counts, ever less."""
    counts = {
        name: [len(re.findall(pattern, text, re.IGNORECASE)) for text in texts]
        for name, pattern in MEASURES.items()
    }
    return pd.DataFrame(counts).pow(0.5)


def score(train: list[str], texts: list[str]) -> pd.DataFrame:
    """The ten scorers on texts: [texts, 10], each with mean 0 and spread 1 over the train texts.

    Args:
        train: the texts that set each measure's and each scorer's scale, so that none dominates.
        texts: what to score; a score depends on the text and these scales only.
    """
    tastes = pd.DataFrame(TASTES).fillna(0.0).reindex(list(MEASURES))
    scale = measure(train)
    center, spread = scale.mean(), scale.std(ddof=0)
    mixed = ((scale - center) / spread) @ tastes
    return (((measure(texts) - center) / spread) @ tastes - mixed.mean()) / mixed.std(ddof=0)


def add_scores(table: pd.DataFrame, train: pd.DataFrame) -> pd.DataFrame:
    """The table with its columns response_{i}_{m} for every response i and scorer m."""
    names = [f"response_{i + 1}" for i in range(RESPONSES)]
    scale = train[names].to_numpy().ravel().tolist()
    parts = [score(scale, table[name].tolist()).add_prefix(name + "_") for name in names]
    return pd.concat([table.reset_index(drop=True), *parts], axis=1)


# -------------------------------------------------------------- The score head


def average_preferences(table: pd.DataFrame) -> list[experiments.Conversation]:
    """What somebody who weighs all scorers alike likes best and least, prompt by prompt.

    Returns:
        Conversations: of every prompt the one with the best response, then, in the same order,
        those with the worst.
    """
    average = np.stack(
        [table.filter(regex=f"^response_{i + 1}_").mean(axis=1) for i in range(RESPONSES)], axis=1
    )
    return [
        [{"role": "user", "content": row["prompt"]},
         {"role": "assistant", "content": row[f"response_{i + 1}"]}]
        for places in (average.argmax(1), average.argmin(1))
        for row, i in zip(table.to_dict("records"), places, strict=True)
    ]  # fmt: skip


def fit_head(chosen: np.ndarray, rejected: np.ndarray) -> torch.Tensor:
    """Score head [F] of a reward model with such preferences: logistic on [pairs, F] each."""
    x = chosen - rejected
    likes = np.repeat([1, 0], len(x))
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(np.concatenate([x, -x]), likes)
    return torch.from_numpy(model.coef_[0]).float()


# ---------------------------------------------------------------------- Script


def main(
    out: Path = HERE / "data" / "demo-source",
    model: Path = HERE / "data" / "smollm2",
    train_prompts: int = 200,
    test_prompts: int = 60,
    head_prompts: int = 20,
    seed: int = 0,
) -> None:
    """Write the demo's world (train.parquet, test.parquet) and the reward model it is read with.

    What is already there is left as it is.

    Args:
        out: folder for the two tables and world.json, which says what the scorers measure.
        model: folder of the reward model; made from SmolLM2-135M-Instruct if missing. Its score
            head is fitted on the average user of a few training prompts.
        train_prompts: prompts in the train split, with eight responses each.
        test_prompts: prompts in the test split; no prompt is in both.
        head_prompts: the first so many training prompts are what the score head is fitted on.
        seed: of everything that is drawn.
    """
    if not 0 < head_prompts <= train_prompts or test_prompts < 1:
        raise InputError("give --test-prompts, --head-prompts and at least as many --train-prompts")
    prompts = write_prompts(train_prompts + test_prompts, np.random.default_rng(seed))
    world = {"seed": seed, "train_prompts": train_prompts, "test_prompts": test_prompts}
    world |= {"head_prompts": head_prompts, "measures": MEASURES, "tastes": TASTES}
    if not is_there(out, model, world):
        train, test = prompts[:train_prompts], prompts[train_prompts:]
        tables = {"train": add_scores(train, train), "test": add_scores(test, train)}
        out.mkdir(parents=True, exist_ok=True)
        for split, table in tables.items():
            table.to_parquet(out / f"{split}.parquet", index=False)
        fit_model(smollm2.reward_model(model), tables["train"][:head_prompts])
        text = json.dumps(world | {"head_sha256": head_hash(model)}, indent=2)
        experiments.write_text(out / "world.json", text)
    print(f"{train_prompts} train and {test_prompts} test prompts: {out}, reward model: {model}")


def is_there(out: Path, model: Path, world: dict[str, Any]) -> bool:
    """Whether an earlier run finished this world, and the model still has the head it fitted."""
    record = out / "world.json"
    if not record.exists() or not (model / smollm2.HEAD).exists():
        return False
    return json.loads(record.read_text()) == world | {"head_sha256": head_hash(model)}


def head_hash(model: Path) -> str:
    """SHA-256 of a reward model's score head."""
    return hashlib.sha256((model / smollm2.HEAD).read_bytes()).hexdigest()


def fit_model(model: Path, table: pd.DataFrame) -> None:
    """Give a reward model the head of an average user of these prompts."""
    conversations = average_preferences(table)
    with tempfile.TemporaryDirectory() as folder:
        store = embeddings.embed(conversations, folder, model=str(model), dtype="float32")
        rows = store.rows(torch.arange(len(store))).numpy()
    smollm2.save_head(model, fit_head(rows[: len(table)], rows[len(table) :]))


if __name__ == "__main__":
    experiments.cli(main)
