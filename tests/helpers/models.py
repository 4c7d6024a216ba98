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
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "max_position_embeddings": 2048}  # fmt: skip


def tiny(
    folder: Path, kind: str, *, pad_is_eos: bool = False,
    form: str = "ForSequenceClassification", seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """A random reward model whose tokens are bytes, so that nothing is learnt or downloaded. Qwen
    types have ChatML and no BOS, others a Llama-3-like template and a tokenizer that adds a BOS."""
    if kind.startswith("Qwen"):
        template, bos, eos, pad = CHATML_TEMPLATE, None, "<|im_end|>", "<|endoftext|>"
        specials = ["<|im_start|>", eos, pad]
    else:
        template, bos, eos, pad = LLAMA_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>", "<|pad|>"
        specials = [bos, eos, pad, "<|start_header_id|>", "<|end_header_id|>"]
    vocabulary = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": eos if pad_is_eos else pad}
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


tiny_llama, tiny_qwen = partial(tiny, kind="Llama"), partial(tiny, kind="Qwen3")
headless = partial(tiny_llama, form="ForCausalLM")  # no score head in its checkpoint
sliding_window = partial(tiny, kind="Mistral", sliding_window=8)
TREE_KINDS = {
    "llama": tiny_llama,
    "qwen2": partial(tiny, kind="Qwen2"),
    "qwen3": tiny_qwen,
    "mistral": partial(tiny, kind="Mistral", sliding_window=None),
    "gemma": partial(tiny, kind="Gemma"),
}


def smollm2(folder: Path, layers: int | None = None) -> Path:
    """The real SmolLM2-135M-Instruct without a score head, or a skip where it is missing."""
    try:
        return reward_model(folder, layers=layers)
    except InputError as error:
        pytest.skip(str(error))
