"""Reward models for the tests: tiny random ones in the shape of real ones, and SmolLM2-135M."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lore.common.files import InputError
from lore.embeddings.smollm2 import reward_model

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_SPECIALS = ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>",
                  "<|end_header_id|>"]  # fmt: skip
CHATML_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "max_position_embeddings": 2048}  # fmt: skip


def tiny_llama(folder: Path, *, pad_is_eos: bool = False, **config: Any) -> Path:
    """A random Llama reward model with a Llama-3-like template; its tokenizer also adds a BOS."""
    return tiny_other(folder, "Llama", "<|eot_id|>" if pad_is_eos else "<|pad|>", **config)


def tiny_qwen(folder: Path, *, kind: str = "Qwen3", **config: Any) -> Path:
    """A random Qwen-type reward model: ChatML, no BOS."""
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _save(folder, kind, CHATML_SPECIALS, CHATML_TEMPLATE, tokens, **config)


def tiny_other(folder: Path, kind: str, pad: str = "<|pad|>", **config: Any) -> Path:
    """A random reward model of another architecture ("Mistral", "Gemma"), Llama's tokenizer."""
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": pad}
    return _save(folder, kind, LLAMA_SPECIALS, LLAMA_TEMPLATE, tokens, **config)


headless = partial(tiny_llama, form="ForCausalLM")  # no score head in its checkpoint
sliding_window = partial(tiny_other, kind="Mistral", sliding_window=8)
TREE_KINDS = {
    "llama": tiny_llama,
    "qwen2": partial(tiny_qwen, kind="Qwen2"),
    "qwen3": tiny_qwen,
    "mistral": partial(tiny_other, kind="Mistral", sliding_window=None),
    "gemma": partial(tiny_other, kind="Gemma"),
}


def smollm2(folder: Path, layers: int | None = None) -> Path:
    """The real SmolLM2-135M-Instruct without a score head, or a skip where it is missing."""
    try:
        return reward_model(folder, layers=layers)
    except InputError as error:
        pytest.skip(str(error))


def _save(
    folder: Path, kind: str, specials: list[str], template: str, tokens: dict[str, str],
    form: str = "ForSequenceClassification", seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """A model with bytes as tokens, so that nothing needs to be learnt or downloaded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if bos := tokens.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = template
    labels = {"num_labels": 1} if form == "ForSequenceClassification" else {}
    settings = {**SIZES, **labels, "vocab_size": len(fast), "pad_token_id": fast.pad_token_id}
    settings |= {**config, "bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings, initializer_range=0.1)
    getattr(transformers, kind + form)(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
