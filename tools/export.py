"""A learned basis or mixed logit as a stock Hugging Face reward model.

    python tools/export.py --basis results/PRISM/<run>/basis-K05-seed0.safetensors --out rewards

writes the whole basis, one label for each of its K rewards; with --user, that user's own reward,
and with --average the population's. The file of a mixed logit is taken as that of a basis is.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import InputError, require
from lore.embeddings.reward_model import Source, load_tokenizer, model_of_basis, pretrained, render
from lore.learning.basis import Learned
from lore.methods.saved import load_learned

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
{heads}. Learned by {method}.

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
    out: Path | None = None,
    user: str | None = None,
    average: bool = False,
    list_users: bool = False,
    model: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
    any_model: bool = False,
) -> None:
    """Write a sequence-classification checkpoint with tokenizer and model card.

    Without --user or --average it holds the whole basis, one label for each of its K rewards.

    Args:
        basis: basis file of a run, or mixed_logit file.
        out: folder to make.
        user: export the reward of this user as the one label; a mixed logit's is its mean.
        average: export the reward of the average user as the one label.
        list_users: print the names of the basis' users and do nothing else.
        model: reward model; by default the one that the basis was learned with.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        dtype: of the weights; auto keeps the model's own.
        trust_remote_code: run model code that comes with a hub model.
        any_model: take the model even if the basis was learned with another one.
    """
    learned = load_learned(basis)
    if list_users:
        print("\n".join(learned.names))
        return
    require(out is not None, "--out is missing: name the folder to make")
    require(not out.exists(), f"--out {out} already exists: remove it or choose another folder")
    rewards = choose_rewards(learned, user, average)
    named = (model, tokenizer, revision, trust_remote_code)
    source = model_of_basis(learned.settings, basis, *named, any_model)
    exported, chat_tokenizer = load_model(source, dtype), load_tokenizer(source)
    replace_head(exported, rewards)
    settle(chat_tokenizer, exported)
    text = card(out.name, source.model, list(rewards), learned)
    write_checkpoint(out, exported, chat_tokenizer, text)
    print(f"{', '.join(rewards)}: {out}")


def choose_rewards(basis: Learned, user: str | None, average: bool) -> dict[str, Tensor]:
    """The directions [F] to export, by the name of their label.

    Raises:
        InputError: both a user and the average are asked for, or the user is not in the basis.
    """
    require(user is None or not average, "--user and --average exclude each other")
    if average:
        return {"average user": basis.direction()}
    if user is not None:
        return {f"user {user}": basis.direction(user, "--user")}
    return basis.columns()


def load_model(source: Source, dtype: str) -> Any:
    """The reward model, or language model, as one for sequence classification."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # that a language model has no score head does not matter here
    options = {"dtype": dtype, "num_labels": 1, "ignore_mismatched_sizes": True}
    loader = AutoModelForSequenceClassification
    return pretrained(loader, source.model, source, **options).eval()


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
            "name the model it was learned with by --model"
        )
    model.score = nn.Linear(*head.T.shape, bias=False, dtype=old.weight.dtype)
    model.score.weight.data = head.to(old.weight)
    model.config.id2label = dict(enumerate(rewards))
    model.config.label2id = {label: i for i, label in enumerate(rewards)}
    model.num_labels = len(rewards)


@torch.inference_mode()
def settle(tokenizer: Any, model: Any) -> None:
    """Make stock calls see the same tokens, and pool the same one, as the basis was learned on.

    The template then writes the BOS that ``reward_model.render`` puts in front. The pad token
    becomes one that does not end a conversation, since the last token before padding is pooled.

    Raises:
        InputError: the model's logits are not its head times the last hidden state even so.
    """
    expected = render(tokenizer, EXAMPLE)
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


def card(folder: str, model: str, labels: list[str], learned: Learned) -> str:
    """The model card."""
    what, use = "Rewards that users mix with weights.", learned.use
    title, heads = f"{folder}: a basis of {len(labels)} rewards", f"{len(labels)} directions"
    if len(labels) == 1:
        what, use = f"The reward of {labels[0]}.", "A higher reward is a better response."
        title, heads = f"{folder}: {labels[0]}", "one direction"
    rows = "\n".join(f"| {key} | {value} |" for key, value in learned.settings.items())
    filled = {"what": what, "use": use, "title": title, "heads": heads, "settings": rows}
    filled["method"] = learned.method
    return CARD.format(model=model, folder=folder, labels=len(labels), **filled)


def write_checkpoint(out: Path, model: Any, tokenizer: Any, text: str) -> None:
    """Write model, tokenizer and card to a folder that appears whole or not at all.

    Raises:
        InputError: it cannot be written, for want of room or of permission.
    """
    draft = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        draft.mkdir(parents=True)  # an error if it is there: what we did not make is not ours
    except OSError as error:
        raise InputError(f"--out {out}: cannot make {draft} ({error.strerror})") from error
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(text, encoding="utf-8")
        os.rename(draft, out)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


if __name__ == "__main__":
    cli(main)
