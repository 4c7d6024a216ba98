"""A learned basis as a stock Hugging Face reward model: all rewards, or one user's.

For example: python tools/export.py --basis results/prism/run/basis.safetensors --out rewards
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import embeddings
import experiments
from utils import Basis, InputError, load_basis

EXAMPLE = [
    {"role": "user", "content": "How do I keep basil alive?"},
    {"role": "assistant", "content": "Give it sun, and water it when the soil is dry."},
]
CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, lore]
---

# {title}

{what} It scores a conversation by the last hidden state of `{model}`, which was not changed, times
{heads}. Learned by LoRe (low-rank reward modelling, https://arxiv.org/abs/2504.14439).

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
chat = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
tokens = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
with torch.no_grad():
    rewards = model(**tokens).logits[0]  # [{labels}]
```

{use}
The probability that one response is preferred to another is sigmoid((reward - other reward) / 100).

| setting | value |
|---|---|
{settings}

The licence of the original model holds for its weights.
"""


def main(
    basis: Path,
    out: Path,
    user: str | None = None,
    average: bool = False,
    model: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write a sequence-classification checkpoint with tokenizer and model card.

    Without --user or --average it holds the whole basis, one label for each of its K rewards.

    Args:
        basis: basis file of a run.
        out: folder to make.
        user: export this user's own reward, V w, as the one label.
        average: export the reward of the seen users' mean weights as the one label.
        model: the reward model the basis was learned on; by default the one its file names.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        dtype: of the weights; auto keeps the model's own.
        trust_remote_code: run model code that comes with a hub model.
    """
    if out.exists():
        raise InputError(f"--out {out} is there already: remove it or choose another folder")
    learned = load_basis(basis)
    rewards = choose_rewards(learned, user, average)
    name = model or learned.settings.get("model")
    if not name:
        raise InputError(f"{basis} does not say which model it was learned on: name it by --model")
    source = embeddings.Source(str(name), tokenizer, revision, trust_remote_code)
    exported = load_model(source, dtype)
    words = embeddings.load_tokenizer(source)
    replace_head(exported, rewards)
    settle(words, exported)

    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    exported.save_pretrained(draft)
    words.save_pretrained(draft)
    (draft / "README.md").write_text(card(out.name, str(name), list(rewards), learned.settings))
    os.rename(draft, out)
    print(f"{', '.join(rewards)}: {out}")


def choose_rewards(basis: Basis, user: str | None, average: bool) -> dict[str, Tensor]:
    """The directions [F] to export, by the name of their label.

    Raises:
        InputError: both a user and the average are asked for, or the user is not in the basis.
    """
    if user is not None and average:
        raise InputError("--user and --average exclude each other")
    if average:
        return {"average user": basis.V @ basis.W.mean(0)}
    if user is None:
        return {f"basis {k}": column for k, column in enumerate(basis.V.T, start=1)}
    weights = dict(zip(basis.users, basis.W, strict=False))
    if basis.W_unseen is not None:
        weights |= dict(zip(basis.users_unseen, basis.W_unseen, strict=False))
    if user not in weights:
        known = f"{len(weights)} users, such as {', '.join(list(weights)[:3])}"
        raise InputError(f"--user {user} is not in the basis, which has {known}")
    return {f"user {user}": basis.V @ weights[user]}


def load_model(source: embeddings.Source, dtype: str) -> Any:
    """The reward model, or language model, as one for sequence classification."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # a language model's missing score head is what we bring
    loader, options = AutoModelForSequenceClassification, {"ignore_mismatched_sizes": True}
    return embeddings.pretrained(
        loader, source.model, source, dtype=dtype, num_labels=1, **options
    ).eval()


def replace_head(model: Any, rewards: dict[str, Tensor]) -> None:
    """Make directions [F] the labels of a sequence-classification model, without a bias.

    Raises:
        InputError: the model has no score head to replace, or embeddings of another size.
    """
    old, head = getattr(model, "score", None), torch.stack(list(rewards.values()))
    if not isinstance(old, nn.Linear):
        raise InputError(f"{type(model).__name__} has no linear score head: it cannot be exported")
    if old.in_features != head.shape[1]:
        raise InputError(
            f"the basis has {head.shape[1]} features, the model {old.in_features}: "
            "name the model it was learned on by --model"
        )
    model.score = nn.Linear(*head.T.shape, bias=False, dtype=old.weight.dtype)
    model.score.weight.data = head.to(old.weight)
    model.config.id2label = dict(enumerate(rewards))
    model.config.label2id = {label: i for i, label in enumerate(rewards)}
    model.num_labels = len(rewards)


@torch.inference_mode()
def settle(tokenizer: Any, model: Any) -> None:
    """Make stock calls see the tokens, and pool the token, that the basis was learned on.

    The template writes the BOS that the embedding engine puts in front, and the pad token is one
    that does not end a conversation, since pooling takes the last token that is no padding.

    Raises:
        InputError: the model's logits are not its head times the last hidden state even so.
    """
    expected = embeddings.render(tokenizer, EXAMPLE)
    if _stock(tokenizer)["input_ids"][0].tolist() != expected:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.get_chat_template()
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token)
    last = tokenizer.convert_ids_to_tokens(expected[-1])
    tokenizer.pad_token = next((t for t in special if t not in (None, last)), None)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokens = _stock(tokenizer)
    hidden = model.base_model(**tokens).last_hidden_state[0, -1]
    same = torch.allclose(model(**tokens).logits[0], model.score(hidden), rtol=1e-2, atol=1e-3)
    if tokens["input_ids"][0].tolist() != expected or not same:
        raise InputError("stock transformers would not give this model's rewards: not exported")


def _stock(tokenizer: Any) -> Any:
    return tokenizer.apply_chat_template(EXAMPLE, return_tensors="pt", return_dict=True)


def card(folder: str, model: str, labels: list[str], settings: dict[str, Any]) -> str:
    """The model card."""
    one = len(labels) == 1
    return CARD.format(
        title=f"{folder}: {labels[0]}" if one else f"{folder}: a basis of {len(labels)} rewards",
        what=f"The reward of {labels[0]}." if one else "Rewards that users mix with weights.",
        model=model, folder=folder, labels=len(labels),
        heads="one direction" if one else f"{len(labels)} directions",
        use="A higher reward is a better response." if one else
        "A user's reward is `rewards @ w` with the user's weights w >= 0, which add up to one.",
        settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
    )  # fmt: skip


if __name__ == "__main__":
    experiments.cli(main)
