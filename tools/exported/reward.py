"""The rewards of this model's labels in the signatures of TRL, OpenRLHF and verl.

It lies beside config.json and needs torch and transformers alone. Every label, such as a user, is
scored by the same forward pass, in log odds less what config.json says to subtract. A model with
one label needs no names of users.
"""

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 4096  # tokens; of longer conversations the end is kept
BATCH = 16
SAID = "\N{WHITE SQUARE}"


@cache
def load():
    """The model, its tokenizer, and what the chat template writes at the start and the end."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(HERE, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    chat = [{"role": "user", "content": SAID}, {"role": "assistant", "content": SAID}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    bos = tokenizer.bos_token or ""
    return model.eval(), tokenizer, bos if text.startswith(bos) else "", text.rpartition(SAID)[2]


@torch.inference_mode()
def rewards(texts, users=None):
    """A reward for every text, as floats.

    Texts are conversations (lists of role and content) that end in a response, or what the chat
    template makes of these, whose start and end are mended where they were stripped. Each has a
    user, a label of the model (else ValueError), unless the model has one label alone.
    """
    model, tokenizer, *_ = load()
    labels = list(model.config.id2label.values())
    users = list(users) if users is not None else labels * len(texts) if len(labels) == 1 else []
    if len(users) != len(texts) or not set(users) <= set(labels):
        raise ValueError(f"one of {', '.join(labels)} must be the user of each text, not {users}")
    offset = model.config.lore["offset"] or [0.0] * len(labels)
    found = []
    for first in range(0, len(texts), BATCH):
        ids = [tokens(text) for text in texts[first : first + BATCH]]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        found += (model(**batch).logits.float().cpu() - torch.tensor(offset)).tolist()
    return [row[labels.index(user)] for row, user in zip(found, users, strict=True)]


def tokens(text):
    """Token ids of a conversation or of a text that the template wrote."""
    _, tokenizer, start, end = load()
    if not isinstance(text, str):
        text = tokenizer.apply_chat_template(text, tokenize=False)
    text = start + text.removeprefix(start).rstrip().removesuffix(end.rstrip()) + end
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = 1 if start else 0
    return ids if len(ids) <= MAX_LENGTH else ids[:kept] + ids[kept - MAX_LENGTH :]


def conversation(prompt, completion):
    """Prompt and completion, each a text or a list of messages, as one conversation."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*prompt, *completion]


def trl_reward(prompts, completions, user=None, **_):
    """For TRL's reward_funcs; the data have a column user."""
    return rewards([conversation(*both) for both in zip(prompts, completions, strict=True)], user)


def reward_func(queries, prompts, labels=None, **_):
    """For OpenRLHF's --remote_rm_url reward.py; --label_key names the column with the user."""
    named = labels is not None and any(labels)
    found = torch.tensor(rewards(queries, labels if named else None))
    return {"rewards": found, "scores": found, "extra_logs": {}}


def compute_score(data_source, solution_str, ground_truth=None, extra_info=None, **_):
    """For verl's custom_reward_function; extra_info has the prompt, and the user."""
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info])[0]


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, **_):
    """The same for verl's batch reward manager."""
    infos = [info or {} for info in extra_infos]
    users = [info.get("user") for info in infos]
    prompts = [info["prompt"] for info in infos]
    return trl_reward(prompts, solution_strs, users if any(users) else None)
