"""Conversations in, reward-model embeddings on disk out: every shared token is computed once.

Conversations become token ids, identical ones are merged, and the distinct ones are sorted, so
that neighbours share the longest prefixes. A shard holds a fixed range of that order and depends
on nothing else: killed, resumed or spread over processes, its bytes stay the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from lore.common.files import (
    InputError,
    alone,
    digest,
    file_sha256,
    read_json,
    require,
    write_whole,
)
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.common.tensors import expect, read_tensors, require_finite
from lore.embeddings.prefix_trees import Tokens
from lore.embeddings.reward_model import (
    PAPERS_MODEL,
    Conversation,
    Engine,
    Source,
    cut_tokens,
    device_and_dtype,
    load_config,
    load_engine,
    load_tokenizer,
    model_facts,
    render_text,
    sha256,
    tokenize,
)

log = logging.getLogger(__name__)

POOLING = "last token, after the final norm"
NAMES = ("model", "tokenizer")  # facts that may change: the same files under another path
MANIFEST, INDEX, HEAD = "manifest.json", "index.safetensors", "head.safetensors"
VERIFIED = "verified.json"  # size, time and inode of the files whose checksums were right
AGAIN = "embed again; the rest is kept"
FACTS = {"model": str, "revision": str | None, "weights_sha256": str | None, "tokenizer": str,
         "template_sha256": str, "pooling": str, "dtype": str, "max_length": int,
         "truncation_side": str, "conversations_sha256": str, "num_conversations": int,
         "tokens_sha256": str, "shard_size": int}  # fmt: skip
COUNTS = {"num_distinct": int, "num_features": int, "num_shards": int, "files": dict}


def embed(
    conversations: Sequence[Conversation],
    folder: str | Path,
    *,
    model: str = PAPERS_MODEL,
    tokenizer: str | None = None,
    revision: str | None = None,
    max_length: PositiveInt = 4096,
    truncation_side: Literal["left", "right"] = "left",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    method: Literal["auto", "tree", "sorted", "single"] = "auto",
    padding: Literal["right", "left"] = "right",
    batch_tokens: NonNegativeInt = 0,
    shard_size: PositiveInt = 512,
    shard: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Store | None:
    """Embed conversations with a frozen reward model and keep the embeddings [n, F] on disk.

    An embedding is the last hidden state, after the final norm, of the last token of the
    chat-templated conversation. Started again, a killed run continues where it stopped. Under
    torchrun or accelerate launch each process embeds its share of the shards.

    Args:
        conversations: lists of {"role": text, "content": text}; row i of the store is the i-th.
        folder: where the embeddings are kept; made if missing.
        model: reward model, a hub name or a local folder.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        max_length: most tokens of a conversation; longer ones are cut, and counted.
        truncation_side: side that is cut off; left keeps the end of the response.
        dtype: of arithmetic and storage; auto is bfloat16 on a GPU and float32 on a CPU.
        device: auto (a GPU if there is one), cpu, cuda, or one GPU such as cuda:1.
        attention: attention implementation of transformers, such as sdpa or eager.
        method: tree computes shared prefixes once, sorted pads batches of similar length, single
            takes one conversation at a time; auto is tree where tests show that it is exact.
        padding: side on which the sorted method pads; the embeddings are the same.
        batch_tokens: most tokens in one forward pass; 0 means 1024 on a CPU, 4096 on a GPU.
        shard_size: distinct conversations in one file.
        shard: for job arrays, i/n: embed shards i, i + n, i + 2n, ... only, i from 1 to n.
        trust_remote_code: run model code that comes with a hub model.
        progress: show a progress bar.

    Returns:
        The embeddings; None while shards of other processes are missing.

    Raises:
        InputError: bad conversations or settings, a folder with embeddings of something else, a
            full disk, or a model whose logit is not its score head times this embedding.
    """
    worker, workers = _worker(shard)
    device, dtype = device_and_dtype(device, dtype)
    batch_tokens = batch_tokens or (1024 if device == "cpu" else 4096)
    positive = min(max_length, batch_tokens, shard_size) > 0
    require(positive, "--max-length, --batch-tokens and --shard-size must be positive")
    source = Source(model, tokenizer, revision, trust_remote_code)
    plan = _plan(conversations, source, dtype, max_length, truncation_side, shard_size)
    load = partial(load_engine, source, dtype, device, attention, method, batch_tokens, padding)
    with alone(Path(folder), shard):
        return _complete(Path(folder), plan, load, worker, workers, progress)


def check_model(settings: Mapping[str, Any]) -> None:
    """Notice early, before data are read, that ``embed`` could not load the model it is to use.

    Args:
        settings: the arguments that ``embed`` will be given.

    Raises:
        InputError: model or tokenizer cannot be loaded, or there is no such device or shard.
    """
    _worker(settings.get("shard"))
    device_and_dtype(settings.get("device", "auto"), "auto")
    named = {key: settings[key] for key in Source._fields if key in settings}
    source = Source(**{"model": embed.__kwdefaults__["model"], **named})
    load_config(source)
    load_tokenizer(source)


def open_store(folder: str | Path) -> Store:
    """Open finished embeddings.

    Raises:
        InputError: there are none, or a file is missing, cut, damaged or edited.
    """
    return Store(Path(folder))


class Store:
    """Finished embeddings on disk, one row per conversation; the files are memory-mapped.

    Nothing is believed that ``embed`` did not write: the manifest's facts are those that the files
    were written for, index and head have the manifest's checksums, every shard has its shape and
    type, and its checksum when it is first opened here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._rows = self._read(INDEX, "rows", torch.int64, self.manifest["num_conversations"])
        inside = (self._rows >= 0) & (self._rows < self.manifest["num_distinct"])
        require(bool(inside.all()), f"{folder / INDEX}: names rows that are not there; {AGAIN}")
        self._head = _open(folder / HEAD)[1]
        require_finite(folder / HEAD, self._head, AGAIN)
        for name in ("head", "last_linear"):
            if name in self._head:
                shape = (None, self.num_features) if name == "head" else (self.num_features,)
                expect(folder / HEAD, self._head, AGAIN, name, torch.float32, *shape)
        self._shards = [self._shard(i) for i in range(self.manifest["num_shards"])]
        self.verify(_known(folder))

    def _read(self, file: str, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        """A tensor of a file that was written for this manifest's facts."""
        note, tensors = _open(self.folder / file)
        ours = note.get("identity") == _identity(self.manifest)
        require(ours, f"{self.folder / file} is of other embeddings than {MANIFEST} says: {AGAIN}")
        return expect(self.folder / file, tensors, AGAIN, name, dtype, *shape)

    def _shard(self, number: int) -> Tensor:
        facts = self.manifest
        rows = min(facts["shard_size"], facts["num_distinct"] - number * facts["shard_size"])
        file, dtype = shard_name(number, facts["num_shards"]), getattr(torch, facts["dtype"])
        return self._read(file, "embeddings", dtype, rows, facts["num_features"])

    def verify(self, known: Mapping[str, Any] | None = None) -> None:
        """Compare the files with the manifest's checksums.

        Args:
            known: file -> size, time and inode of those that need not be read again, index and
                head excepted; by default all are read.

        Raises:
            InputError: a file is another one.
        """
        known, stamps = known or {}, {}
        for name, checksum in self.manifest["files"].items():
            path = self.folder / name
            stamps[name] = _stamp(path)
            is_known = stamps[name] == known.get(name) and name not in (INDEX, HEAD)
            if not is_known and file_sha256(path) != checksum:
                raise InputError(f"{path} is not the file that was embedded: {AGAIN}")
        if stamps != known:
            _remember(self.folder, stamps)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_features(self) -> int:
        """F, the width of a row."""
        return self.manifest["num_features"]

    @property
    def head(self) -> Tensor | None:
        """The model's own score head [F] in float32; None unless it has one with one output."""
        head = self._head.get("head")
        return head[0] if head is not None and len(head) == 1 else None

    @property
    def last_linear(self) -> Tensor | None:
        """What the published code takes for the score head [F], see ``Engine.reference``."""
        return self._head.get("last_linear")

    def rows(self, index: Tensor) -> Tensor:
        """Embeddings [n, F] in float32 of the conversations numbered ``index`` [n], read alone."""
        row, size = self._rows[index], self.manifest["shard_size"]
        out = torch.empty(len(row), self.num_features)
        order = row.argsort()
        shards, counts = (row[order] // size).unique_consecutive(return_counts=True)
        for shard, here in zip(shards.tolist(), order.split(counts.tolist()), strict=True):
            out[here] = self._shards[shard][row[here] - shard * size].float()
        return out

    def same(self, some: Tensor, others: Tensor) -> Tensor:
        """Whether conversations have the tokens of others, number by number [n]."""
        return self._rows[some] == self._rows[others]

    def check(self, conversations_sha256: str) -> None:
        """Raise InputError if the rows are not those of the conversations with this checksum."""
        same = conversations_sha256 == self.manifest["conversations_sha256"]
        require(same, f"{self.folder} holds embeddings of other conversations: embed again")


# -------------------------------------------------------------------- Conversations


def check_conversations(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Conversations with role and content alone; InputError naming the first that is not text."""
    checked = [_messages(row, conversation) for row, conversation in enumerate(conversations)]
    require(bool(checked), "there are no conversations to embed")
    return checked


def _messages(row: int, conversation: Any) -> Conversation:
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Iterable):
        raise InputError(f"conversation {row}: expected a list of messages, not {conversation!r}")
    messages = [_message(f"conversation {row}, message {i}", m) for i, m in enumerate(conversation)]
    require(bool(messages), f"conversation {row} has no messages")
    return messages


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected role and content, not {message!r}")
    for key in ("role", "content"):
        text = message.get(key)
        if not isinstance(text, str):
            kind = type(text).__name__
            raise InputError(f"{where}: {key} must be one text, not {kind}")
        if not text.isascii() and text.encode(errors="replace").decode() != text:
            raise InputError(f"{where}: {key} holds half a surrogate pair; clean the text")
    return {"role": message["role"], "content": message["content"]}


# ------------------------------------------------------------------------------ Plan


@dataclass(frozen=True)
class _Plan:
    """What is to be embedded; it follows from the inputs alone.

    Attributes:
        tokens: the distinct conversations, sorted; ids are big-endian, so that bytes sort alike.
        rows: which of them each conversation is [n].
        facts: what the embeddings depend on.
        counts: what was counted on the way.
    """

    tokens: list[bytes]
    rows: Tensor
    facts: dict[str, Any]
    counts: dict[str, int]

    @cached_property
    def identity(self) -> str:
        """Hash of the facts."""
        return _identity(self.facts)

    @property
    def num_shards(self) -> int:
        """Number of files that the distinct conversations fill."""
        return -(-len(self.tokens) // self.facts["shard_size"])

    def path(self, folder: Path, shard: int) -> Path:
        """File of shard 0, 1, .."""
        return folder / shard_name(shard, self.num_shards)

    def shard(self, shard: int) -> list[Tokens]:
        """Token ids of a shard's conversations."""
        size = self.facts["shard_size"]
        part = self.tokens[shard * size : (shard + 1) * size]
        return [np.frombuffer(ids, dtype=">u4").astype(np.int64) for ids in part]


def _identity(facts: Mapping[str, Any]) -> str:
    """Hash of the facts; the same weights are the same model, whatever its path."""
    return digest({key: facts[key] for key in FACTS if key not in NAMES})


def shard_name(shard: int, num_shards: int) -> str:
    """File of shard 0, 1, ..: embeddings-00001-of-00147.safetensors."""
    return f"embeddings-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def _plan(
    conversations: Sequence[Conversation],
    source: Source,
    dtype: str,
    max_length: int,
    truncation_side: str,
    shard_size: int,
) -> _Plan:
    conversations = check_conversations(conversations)
    config, tokenizer = load_config(source), load_tokenizer(source)
    max_length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    require(max_length > 0, f"{source.model}: its config.json leaves no room for any token")
    cut, num_truncated = [], 0
    for ids in tokenize(tokenizer, (render_text(tokenizer, each) for each in conversations)):
        short = cut_tokens(ids, tokenizer.bos_token_id, max_length, truncation_side)
        cut.append(short.astype(">u4").tobytes())
        num_truncated += len(short) < len(ids)
    tokens = sorted(set(cut))
    number = {ids: i for i, ids in enumerate(tokens)}
    facts = {
        **model_facts(source, tokenizer),
        "pooling": POOLING,
        "dtype": dtype,
        "max_length": max_length,
        "truncation_side": truncation_side,
        "conversations_sha256": digest(conversations),
        "num_conversations": len(conversations),
        "tokens_sha256": sha256(*(len(ids).to_bytes(8) + ids for ids in cut)),
        "shard_size": shard_size,
    }
    counts = {
        "num_distinct": len(tokens),
        "num_truncated": num_truncated,
        "tokens_given": sum(map(len, cut)) // 4,
    }
    return _Plan(tokens, torch.tensor([number[ids] for ids in cut]), facts, counts)


def _worker(shard: str | None) -> tuple[int, int]:
    """Number of this process, and how many there are over all tasks of the job array."""
    given = re.fullmatch(r"(\d+)/(\d+)", shard or "1/1")
    if not given or not 1 <= int(given[1]) <= int(given[2]):
        raise InputError(f"--shard {shard}: expected i/n with i from 1 to n, such as 2/8")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    process = int(os.environ.get("RANK", 0))
    return (int(given[1]) - 1) * processes + process, int(given[2]) * processes


# ------------------------------------------------------------------------------ Disk


def _complete(
    folder: Path,
    plan: _Plan,
    load: Callable[[], Engine],
    worker: int,
    workers: int,
    progress: bool,
) -> Store | None:
    """Embed what is missing of this worker's share; the model is loaded only for that."""
    _refuse_others(folder, plan)
    mine = range(worker, plan.num_shards, workers)
    missing = [i for i in mine if not _is_sound(plan.path(folder, i), plan.identity)]
    engine = load() if missing or not _is_sound(folder / HEAD, plan.identity) else None
    _claim(folder, plan)  # once the model is there, so that a damaged one claims nothing
    if engine is not None:
        _write_tensors(folder / HEAD, engine.reference(), plan.identity)
        _embed_shards(folder, plan, engine, missing, progress and worker == 0)
    return _finish(folder, plan)


def _embed_shards(
    folder: Path, plan: _Plan, engine: Engine, numbers: list[int], progress: bool
) -> None:
    shards = [plan.shard(i) for i in numbers]
    total = sum(len(ids) for tokens in shards for ids in tokens)
    begin = time.perf_counter()
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
        for i, tokens in zip(numbers, shards, strict=True):
            before = engine.tokens_computed
            rows = {"embeddings": engine.embed(tokens, bar)}
            computed = engine.tokens_computed - before
            note = {"method": engine.method, "tokens_computed": computed}
            _write_tensors(plan.path(folder, i), rows, plan.identity, **note)
    seconds = time.perf_counter() - begin
    computed = engine.tokens_computed
    log.info(
        "%d conversations, %d distinct, %d cut, %d tokens; now %d tokens computed, %.0f a second",
        *(len(plan.rows), *plan.counts.values(), computed, computed / seconds),
    )


def _refuse_others(folder: Path, plan: _Plan) -> dict[str, Any]:
    """The manifest that is there, or an empty one; InputError if it is of other embeddings."""
    found = _found_manifest(folder)
    is_edited = any(found.get(k) != v for k, v in plan.facts.items() if k not in NAMES)
    if is_edited and _is_of(folder / INDEX, plan.identity):
        found = {}
    for key, value in plan.facts.items():
        if found and key not in NAMES and found.get(key) != value:
            raise InputError(
                f"{folder} holds embeddings with {key} = {found.get(key)}, but {value} is asked "
                "for: take another folder or remove this one"
            )
    ours = {plan.path(folder, i).name for i in range(plan.num_shards)}
    for path in sorted(folder.glob("embeddings-*.safetensors")):
        require(path.name in ours, f"{path} belongs to other embeddings: take another folder")
    return found


def _claim(folder: Path, plan: _Plan) -> None:
    """Take the folder for these embeddings."""
    found = _refuse_others(folder, plan)
    if not _is_sound(folder / INDEX, plan.identity):
        _write_tensors(folder / INDEX, {"rows": plan.rows}, plan.identity)
    if not found:
        _write_manifest(folder, {**plan.facts, "complete": False})


def _finish(folder: Path, plan: _Plan) -> Store | None:
    """Complete the manifest once all files are there, whichever process wrote them."""
    shards = [plan.path(folder, i) for i in range(plan.num_shards)]
    files = [*shards, folder / INDEX, folder / HEAD]
    waiting = [path.name for path in files if not _is_sound(path, plan.identity)]
    if waiting:
        log.info("%d files are still to come from other processes: %s ..", len(waiting), waiting[0])
        return None
    full = _full_manifest(plan, shards, files)
    if _found_manifest(folder) != full:
        try:
            _write_manifest(folder, full)
        except InputError:
            if _found_manifest(folder) != full:
                raise  # else another process completed it at the same time, and removed our draft
        _remember(folder, {path.name: _stamp(path) for path in files})
        for draft in folder.glob("*.part"):  # of a run that was killed
            draft.unlink(missing_ok=True)
    return Store(folder)


def _full_manifest(plan: _Plan, shards: list[Path], files: list[Path]) -> dict[str, Any]:
    """The manifest of finished embeddings."""
    notes = [_open(path)[0] for path in shards]
    head = _open(shards[0].with_name(HEAD))[1].get("head")
    return {
        **plan.facts,
        **plan.counts,
        "tokens_computed": sum(note.get("tokens_computed", 0) for note in notes),
        "method": ", ".join(sorted({note.get("method", "") for note in notes})),
        "num_features": _open(shards[0])[1]["embeddings"].shape[1],
        "num_shards": len(shards),
        "reference": "none" if head is None else f"score head with {len(head)} outputs",
        "files": {path.name: file_sha256(path) for path in files},
        "complete": True,
    }


def _found_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or an empty one if there is none or it is unreadable."""
    try:
        found = read_json(folder / MANIFEST)
    except InputError as error:
        log.warning("%s", error)
        found = None
    return found if isinstance(found, dict) else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished embeddings.

    Raises:
        InputError: there is none, it is damaged or of another form.
    """
    path = folder / MANIFEST
    found = read_json(path)
    missing = f"{folder} holds no finished embeddings: embed first"
    require(found is not None, missing)
    damaged = f"{path} is not as expected"
    require(isinstance(found, dict), f"{damaged}: {AGAIN}")
    require(found.get("complete") is True, missing)
    for key, kind in (FACTS | COUNTS).items():
        right = isinstance(found.get(key), kind) and not isinstance(found.get(key), bool)
        require(right, f"{damaged}, {key} is {found.get(key)!r:.40}: {AGAIN}")
    size, distinct, shards = (found[k] for k in ("shard_size", "num_distinct", "num_shards"))
    fits = size > 0 and distinct > 0 and shards == -(-distinct // size) and shards < 10**5
    require(fits, f"{damaged}, {distinct} rows in {shards} files of {size}: {AGAIN}")
    known = found["dtype"] in ("float32", "bfloat16", "float16")
    require(known, f"{damaged}, dtype is {found['dtype']!r:.40}: {AGAIN}")
    names = {shard_name(i, shards) for i in range(shards)} | {INDEX, HEAD}
    require(set(found["files"]) == names, f"{damaged}, files names others: {AGAIN}")
    return found


def _stamp(path: Path) -> list[int]:
    """What changes where a file is written anew."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: {AGAIN}") from error
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _known(folder: Path) -> dict[str, Any]:
    """The files that were verified before."""
    try:
        found = read_json(folder / VERIFIED)
    except InputError:
        found = None
    return found if isinstance(found, dict) else {}


def _remember(folder: Path, stamps: Mapping[str, list[int]]) -> None:
    """Keep what was verified, unless the folder is read-only: then it is verified each time."""
    try:
        _write(folder / VERIFIED, json.dumps(stamps).encode())
    except InputError as error:
        log.debug("%s", error)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    _write(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def _write_tensors(path: Path, tensors: dict[str, Tensor], identity: str, **note: Any) -> None:
    """Write tensors with a note that says what they belong to and shows damage."""
    note = {"identity": identity, "sha256": _tensors_sha256(tensors), **note}
    # One key, since safetensors does not keep the order of several.
    _write(path, safetensors.torch.save(tensors, {"note": json.dumps(note)}))


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk: hours of work may be in it."""

    def write(draft: Path) -> None:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Note and memory-mapped tensors of a file."""
    metadata, tensors = read_tensors(path, AGAIN)
    try:
        note = json.loads(metadata.get("note", "{}"))
    except (ValueError, RecursionError):
        note = None
    require(isinstance(note, dict), f"{path} is damaged (its note is unreadable): {AGAIN}")
    return note, tensors


def _is_of(path: Path, identity: str) -> bool:
    """Whether a file is there and belongs to these embeddings."""
    try:
        return _open(path)[0].get("identity") == identity
    except InputError:
        return False


def _is_sound(path: Path, identity: str) -> bool:
    """Whether a file is there and whole; InputError if it belongs to other embeddings."""
    if not path.exists():
        return False
    try:
        note, tensors = _open(path)
    except InputError as error:
        log.warning("%s", error)
        return False
    ours = note.get("identity") == identity
    require(ours, f"{path} belongs to other embeddings: take another folder or remove it")
    is_counted = isinstance(note.get("tokens_computed", 0), int)
    is_told = is_counted and isinstance(note.get("method", ""), str)
    if not is_told or note.get("sha256") != _tensors_sha256(tensors):
        log.warning("%s is damaged: it is made again", path)
        return False
    return True


def _tensors_sha256(tensors: dict[str, Tensor]) -> str:
    parts = [tensors[name].contiguous().flatten().view(torch.uint8) for name in sorted(tensors)]
    return sha256(*(part.numpy().data for part in parts))
