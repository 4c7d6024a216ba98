"""A learned basis, mixed logit or ridge BT as a stock Hugging Face reward model.

    python tools/export.py --basis results/PRISM/<run>/basis-K05-seed0.safetensors --out rewards
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli  # before torch, so that --help does not load it

# isort: split
import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lore.common.files import UMASK, InputError, first_line, require, write_text
from lore.embeddings import reward_model
from lore.embeddings.reward_model import OF_BASIS, ModelChoice, Source, render
from lore.experiments.report.intervals import columns, level
from lore.experiments.report.verdict import kind_sentence
from lore.experiments.results import ALWAYS, MEASURES, read_results
from lore.methods.saved import Learned, load_learned

EXPORTED = Path(__file__).resolve().parent / "exported"
HUB = {
    "PersonalLLM": "namkoong-lab/PersonalLLM",
    "RedditTLDR": "openai/summarize_from_feedback",
    "PRISM": "HannahRoseKirk/prism-alignment",
    "CommunityAlignment": "facebook/community-alignment-dataset",
}
MADE = {
    "How do I keep basil alive?": (
        "Give it sun, and water it when the soil is dry.", "Basil dies. Buy a new one.",
        "Water, light, warmth - and pinch off the flowers!", "I don't know."),
    "Why is the sky blue?": (
        "Air scatters blue light more than red light.", "Because of the sea.",
        "Good question! Nobody knows for sure, but it is beautiful.", "Rayleigh scattering: 1/λ⁴."),
}  # fmt: skip
CHATS = [
    [[{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for say in responses]
    for ask, responses in MADE.items()
]
FIRST = CHATS[0][0]


def main(
    basis: Path, out: Path | None = None, users: tuple[str, ...] = (), average: bool = False,
    adapter: bool = False, push: str | None = None, list_users: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto", lm: ModelChoice = OF_BASIS,
) -> None:  # fmt: skip
    """Write a sequence-classification checkpoint with tokenizer, model card and reward.py.

    Without --users or --average it holds the whole basis, one label for each of its K rewards.

    Args:
        basis: basis file of a run, or mixed_logit file.
        out: folder to make.
        users: export the rewards of these users, a label each; a mixed logit's is the mode.
        average: export the reward of the average user as the one label.
        adapter: write a PEFT adapter with the score head alone, not the model.
        push: also upload it to this new, private repository of the hub, such as ann/rewards.
        list_users: print the names of the file's users and do nothing else.
        dtype: of the weights; auto keeps the model's own.
        lm: the reward model.
    """
    learned = load_learned(basis)
    if list_users:
        print("\n".join(learned.names))
        return
    require(out is not None, "--out is missing: name the folder to make")
    require(not out.exists(), f"--out {out} already exists: remove it or choose another folder")
    require(not users or not average, "--users and --average exclude each other")
    rewards = {user: learned.direction(user, "--users") for user in users} or learned.columns()
    if average:
        rewards = {"average user": learned.direction()}
    source = lm.of_basis(learned.settings, basis)
    pooled = f"{basis} reads {source.pool} states, a score head the last token's: --pool last alone"
    require(source.pool == "last", f"{pooled} can be exported")
    if push:
        with on_hub(push, "is its name right, and `hf auth login` done?") as hub:
            hub.create_repo(push, private=True, exist_ok=True)
            held = set(hub.list_repo_files(push)) - {".gitattributes"}
        require(not held, f"--push {push}: {min(held, default='')} is there; name another")
    from transformers import AutoModelForSequenceClassification as Loader  # takes seconds
    from transformers.utils import logging

    logging.set_verbosity_error()  # that a language model has no score head does not matter
    options = {"dtype": dtype, "num_labels": 1, "ignore_mismatched_sizes": True}
    model = reward_model.pretrained(Loader, source.model, source, **options).eval()
    tokenizer = reward_model.load_tokenizer(source)
    replace_head(model, rewards, learned.center)
    settle(tokenizer, model)
    about = {"folder": push or out.name, "adapter": adapter, "average": average}
    about |= {**origin(source), **held_out(basis, average)}
    write_checkpoint(out, model, tokenizer, card(model, tokenizer, learned, about), about)
    print(f"{', '.join(rewards)}: {out}")
    if push:
        with on_hub(push, f"{out} is written, `hf upload` can go on") as hub:
            hub.upload_folder(folder_path=out, repo_id=push)
        print(f"uploaded to {push}, which only its members can see")


def replace_head(model: Any, rewards: Mapping[str, Tensor], center: Tensor | None) -> None:
    """Make directions [F] in log odds the labels of a model for sequence classification.

    The config then has the unit and the offsets: each label's logit at the center [F], the mean
    embedding of what was learned on, to be subtracted unless the head has a bias for it. InputError
    for a model without a score head, or with embeddings of another size.
    """
    old, head = getattr(model, "score", None), torch.stack(list(rewards.values()))
    linear, (labels, size) = isinstance(old, nn.Linear), head.shape
    require(linear, f"{type(model).__name__} has no linear score head: it cannot be exported")
    sizes = f"the basis has {size} features, the model {old.in_features}"
    require(old.in_features == size, f"{sizes}: name the model it was learned with by --model")
    biased = old.bias is not None
    model.score = nn.Linear(size, labels, bias=biased, dtype=old.weight.dtype)
    model.score.weight.data = head.to(old.weight)
    mean = torch.zeros(size) if center is None else center
    at_center = model.score.weight.detach().float() @ mean  # of the head as it is rounded
    if biased:
        model.score.bias.data, at_center = -at_center.to(old.bias), torch.zeros(labels)
    offsets = None if center is None else at_center.tolist()
    model.config.id2label = dict(enumerate(rewards))
    model.config.label2id = {label: i for i, label in enumerate(rewards)}
    model.config.problem_type = "regression"  # pipelines and servers then leave logits as they are
    model.config.lore = {"unit": "log odds", "offset": offsets}
    model.num_labels = len(rewards)


@torch.inference_mode()
def settle(tokenizer: Any, model: Any) -> None:
    """Make stock calls see the same tokens, and pool the same one, as the basis was learned on.

    The template then writes the BOS, and the tokenizer none. The pad token becomes one that ends no
    conversation, since the last token before padding is pooled. InputError where the logits are not
    the head times the last hidden state even so.
    """
    from tokenizers import processors

    expected = render(tokenizer, FIRST)
    stock = partial(tokenizer.apply_chat_template, FIRST, return_tensors="pt", return_dict=True)
    if stock()["input_ids"][0].tolist() != expected:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.get_chat_template()
    if not _is_plain(tokenizer) and tokenizer.is_fast:
        nothing = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        tokenizer.backend_tokenizer.post_processor = nothing
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token)
    last = tokenizer.convert_ids_to_tokens(expected[-1])
    tokenizer.pad_token = next((t for t in special if t not in (None, last)), None)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokens = stock()
    hidden = model.base_model(**tokens).last_hidden_state[0, -1]
    same = torch.allclose(model(**tokens).logits[0], model.score(hidden), rtol=1e-2, atol=1e-3)
    if tokens["input_ids"][0].tolist() != expected or not same:
        raise InputError("stock transformers would not give this model's rewards: not exported")


def _is_plain(tokenizer: Any) -> bool:
    """Whether a text that the template wrote becomes the right tokens without further flags."""
    text = tokenizer.apply_chat_template(FIRST, tokenize=False)
    return tokenizer(text)["input_ids"] == render(tokenizer, FIRST)


@torch.inference_mode()
def strip_cost(tokenizer: Any, model: Any) -> float | None:
    """Share of pairs of made responses that a strip of their texts turns; None if it is idle."""

    def logits(text: str) -> Tensor:
        return model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0]

    write, turned = partial(tokenizer.apply_chat_template, tokenize=False), []
    for texts in (list(map(write, chats)) for chats in CHATS):
        if texts == [text.rstrip() for text in texts]:
            return None
        both = [(logits(text), logits(text.rstrip())) for text in texts]
        turned += [(i > k) != (j > m) for (i, j), (k, m) in combinations(both, 2)]
    return float(torch.stack(turned).float().mean())


def held_out(basis: Path, average: bool) -> dict[str, Any]:
    """What the results beside a file say of it, for the card; nothing where there are none."""
    try:
        results = read_results(basis.parent)
    except InputError:
        return {}
    files = {fit.get("file"): label for label in results.labels for fit in results.fits(label)}
    if basis.name not in files:
        return {}
    label, rows = files[basis.name], []
    for name, *where in columns(results):
        control = "population" if average and results.personal(label) else ""
        found = {m: level(results, label, control, m, *where) for m in ALWAYS}
        if all(found.values()):
            units = {m: (MEASURES[m], *x[:3]) for m, x in found.items()}
            cells = {m: f"{u.text(x)} {u.between(*ends)}" for m, (u, x, *ends) in units.items()}
            rows.append({"name": f"{name} users", **cells})
    people, counts = (results.repeats[0][name] for name in ("users", "comparisons"))
    known = f"{counts['train']:,} comparisons of {len(people['seen'])} users"
    new = f", then {counts['few']:,} of {len(people['unseen'])} new ones"
    return {
        "rows": rows, "kinds": kind_sentence(results),
        "learned_from": known + (new if people["unseen"] else ""), "seeds": len(results.repeats),
    }  # fmt: skip


def origin(source: Source) -> dict[str, str | None]:
    """A model for the card: its name (of a local folder the last part, as another machine has no
    such folder), its name on the hub, and its licence as its own card names it, else other."""
    from huggingface_hub import ModelCard

    folder, there = Path(source.model), Path(source.model).is_dir()
    try:
        license = ModelCard.load(folder / "README.md" if there else source.model).data.license
    except Exception:  # whatever the hub's client raises, a card without a licence can be written
        license = None
    model, base = (folder.resolve().name, None) if there else (source.model, source.model)
    return {"model": model, "base": base, "license": license or "other"}


def card(model: Any, tokenizer: Any, learned: Learned, about: Mapping[str, Any]) -> str:
    """The model card, from tools/exported/card.md."""
    labels = list(model.config.id2label.values())
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.ChainableUndefined}
    text = (EXPORTED / "card.md").read_text(encoding="utf-8")
    return jinja2.Environment(**options).from_string(text).render(
        learned=learned, labels=labels, whole=labels == list(learned.columns()),
        dataset=HUB.get(str(learned.settings.get("dataset"))), plain=_is_plain(tokenizer),
        offset=model.config.lore["offset"], cost=strip_cost(tokenizer, model), **about,
    )  # fmt: skip


def save_adapter(folder: Path, model: Any, base: str) -> None:
    """The score head in PEFT's format, with labels, unit and offsets in lore.json.

    PEFT loads no adapter that changes no layer: the last linear one of the body is changed by zero.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "score"}
    name, layer = list(linear.items())[-1]
    changed, prefix = f"base_model.model.{name}", "base_model.model.score"
    tensors = {f"{prefix}.{key}": value for key, value in model.score.state_dict().items()}
    tensors[f"{changed}.lora_A.weight"] = torch.zeros(1, layer.in_features)
    tensors[f"{changed}.lora_B.weight"] = torch.zeros(layer.out_features, 1)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base, "r": 1,
        "lora_alpha": 1, "target_modules": [name], "modules_to_save": ["score"],
        "inference_mode": True,
    }  # fmt: skip
    about = {"labels": list(model.config.id2label.values()), **model.config.lore}
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2))
    write_text(folder / "lore.json", json.dumps(about, indent=2))


def write_checkpoint(
    out: Path, model: Any, tokenizer: Any, text: str, about: Mapping[str, Any]
) -> None:
    """Write the model with reward.py, or an adapter; tokenizer and card; whole or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".part", f"{out.name}.", out.parent) as beside:
            draft = Path(beside) / out.name
            draft.mkdir()
            if about["adapter"]:
                save_adapter(draft, model, about["model"])
            else:
                model.save_pretrained(draft)
                shutil.copyfile(EXPORTED / "reward.py", draft / "reward.py")
            tokenizer.save_pretrained(draft)
            write_text(draft / "README.md", text)
            for file in draft.iterdir():
                file.chmod(0o666 & ~UMASK)  # safetensors keeps its files from all but their owner
            os.rename(draft, out)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error


@contextmanager
def on_hub(name: str, advice: str) -> Iterator[Any]:
    """The hub's client; if it fails, InputError with its first line and advice."""
    from huggingface_hub import HfApi

    try:
        yield HfApi()
    except Exception as error:  # what the hub's client raises has no common class
        raise InputError(f"--push {name}: {first_line(error)}; {advice}") from error


if __name__ == "__main__":
    cli(main, short="lm")
