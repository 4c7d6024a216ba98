"""A learned basis or mixed logit as a stock Hugging Face reward model.

    python tools/export.py --basis results/PRISM/<run>/basis-K05-seed0.safetensors --out rewards

writes the whole basis, one label for each of its K rewards; with --users, a label for each user
named, and with --average the population's reward. Files of a mixed logit and of ridge BT are taken
as that of a basis is. Rewards are log odds; config.json says so, and what to subtract.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import UMASK, InputError, require
from lore.embeddings.reward_model import (
    OF_BASIS,
    ModelChoice,
    Source,
    load_tokenizer,
    pretrained,
    render,
)
from lore.methods.saved import Learned, load_learned

UNIT = "log odds"
PLACES = ("model", "tokenizer")  # settings that may be paths of the machine

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

folder = "{folder}"  # where this model lies, or its name on the hub
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
tokens = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
with torch.no_grad():
    rewards = model(**tokens).logits[0]  # [{labels}]
```

{use}
Rewards are log odds: the probability that one response is preferred to another is sigmoid(reward -
other reward). {offset}

| setting | value |
|---|---|
{settings}

The licence of the original model holds for its weights.
"""


def main(
    basis: Path,
    out: Path | None = None,
    users: tuple[str, ...] = (),
    average: bool = False,
    list_users: bool = False,
    lm: ModelChoice = OF_BASIS,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Write a sequence-classification checkpoint with tokenizer and model card.

    Without --users or --average it holds the whole basis, one label for each of its K rewards.

    Args:
        basis: basis file of a run, or mixed_logit file.
        out: folder to make.
        users: export the rewards of these users, a label each; a mixed logit's is the mode.
        average: export the reward of the average user as the one label.
        list_users: print the names of the file's users and do nothing else.
        lm: the reward model.
        dtype: of the weights; auto keeps the model's own.
    """
    learned = load_learned(basis)
    if list_users:
        print("\n".join(learned.names))
        return
    require(out is not None, "--out is missing: name the folder to make")
    require(not out.exists(), f"--out {out} already exists: remove it or choose another folder")
    rewards = choose_rewards(learned, users, average)
    source = lm.of_basis(learned.settings, basis)
    pooled = f"{basis} reads {source.pool} states, a score head the last token's: --pool last alone"
    require(source.pool == "last", f"{pooled} can be exported")
    exported, chat_tokenizer = load_model(source, dtype), load_tokenizer(source)
    offsets = replace_head(exported, rewards, learned.center)
    settle(chat_tokenizer, exported)
    text = card(out.name, source.model, offsets, rewards, learned)
    write_checkpoint(out, exported, chat_tokenizer, text)
    print(f"{', '.join(rewards)}: {out}")


def choose_rewards(basis: Learned, users: Sequence[str], average: bool) -> dict[str, Tensor]:
    """The directions [F] to export, in log odds, by the name of their label.

    Raises:
        InputError: both users and the average are asked for, or a user is not in the basis.
    """
    require(not users or not average, "--users and --average exclude each other")
    if average:
        return {"average user": basis.direction()}
    return {user: basis.direction(user, "--users") for user in users} or basis.columns()


def load_model(source: Source, dtype: str) -> Any:
    """The reward model, or language model, as one for sequence classification."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # that a language model has no score head does not matter here
    options = {"dtype": dtype, "num_labels": 1, "ignore_mismatched_sizes": True}
    loader = AutoModelForSequenceClassification
    return pretrained(loader, source.model, source, **options).eval()


def replace_head(
    model: Any, rewards: Mapping[str, Tensor], center: Tensor | None
) -> list[float] | None:
    """Make directions [F] the labels of a model; its head's bias, if it has one, centres them.

    The config then says that logits are to be left as they are, their unit, and the offsets.

    Args:
        model: for sequence classification.
        rewards: directions in log odds, by label.
        center: mean embedding [F] of the conversations they were learned on, if it is known.

    Returns:
        Each label's logit at the center, to be subtracted; None if that is not known.

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
    biased = old.bias is not None
    model.score = nn.Linear(*head.T.shape, bias=biased, dtype=old.weight.dtype)
    model.score.weight.data = head.to(old.weight)
    at_center = torch.zeros(len(head))
    if center is not None:
        at_center = model.score.weight.detach().float() @ center  # of the head as it is rounded
    if biased:
        model.score.bias.data, at_center = -at_center.to(old.bias), torch.zeros(len(head))
    offsets = None if center is None else at_center.tolist()
    model.config.id2label = dict(enumerate(rewards))
    model.config.label2id = {label: i for i, label in enumerate(rewards)}
    model.config.problem_type = "regression"  # pipelines and servers then leave logits as they are
    model.config.lore = {"unit": UNIT, "offset": offsets}
    model.num_labels = len(rewards)
    return offsets


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


def card(
    folder: str,
    model: str,
    offsets: list[float] | None,
    rewards: Mapping[str, Tensor],
    learned: Learned,
) -> str:
    """The model card."""
    labels = list(rewards)
    what, use = "Rewards that users mix with weights.", learned.use
    title, heads = f"{folder}: a basis of {len(labels)} rewards", f"{len(labels)} directions"
    if len(labels) == 1:
        what, use = f"The reward of {labels[0]}.", "A higher reward is a better response."
        title, heads = f"{folder}: {labels[0]}", "one direction"
    told = {key: value for key, value in learned.settings.items() if key not in PLACES}
    rows = "\n".join(f"| {key} | {value} |" for key, value in told.items())
    filled = {"what": what, "use": use, "title": title, "heads": heads, "settings": rows}
    filled["method"], filled["offset"] = learned.method, _said(offsets, labels)
    model = Path(model).resolve().name if Path(model).is_dir() else model
    return CARD.format(model=model, folder=folder, labels=len(labels), **filled)


def _said(offsets: list[float] | None, labels: list[str]) -> str:
    """What is to be subtracted from the logits, in words."""
    if offsets is None:
        return "They share an offset that is not known, which differences do not have."
    if not any(offsets):
        return "Their mean over the conversations that they were learned on is zero."
    told = ", ".join(f"{x:.2f}" for x in offsets[:8]) + (" .." if len(labels) > 8 else "")
    return (
        f"Their mean over the conversations that they were learned on is {told} (`lore.offset` in "
        "config.json has all digits): subtract it where the level matters."
    )


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
        for file in draft.iterdir():
            file.chmod(0o666 & ~UMASK)  # safetensors keeps its files from all but their owner
        os.rename(draft, out)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


if __name__ == "__main__":
    cli(main, short="lm")
