"""Conversations in, reward-model embeddings on disk out: every shared token is computed once.

The distinct conversations are sorted, so that neighbours share the longest prefixes. A shard holds
a range of those that no earlier shard holds, each with the hash of its tokens: killed, resumed or
spread over processes, its bytes stay the same, and only what is new is embedded.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from lore.common import files
from lore.common.files import InputError, digest, file_sha256, read_json, require
from lore.common.settings import NonNegativeInt, Pool, PositiveInt
from lore.common.tensors import expect, read_tensors, require_finite
from lore.embeddings import reward_model
from lore.embeddings.prefix_trees import shared_prefix
from lore.embeddings.reward_model import PAPERS_MODEL, Conversation, Engine, Source, sha256

log = logging.getLogger(__name__)

MANIFEST, INDEX, HEAD = "manifest.json", "index.safetensors", "head.safetensors"
VERIFIED = "verified.json"  # size, time and inode of the files whose checksums were right
AGAIN = "embed again; the rest is kept"
# What a manifest says: what a row depends on besides its tokens (the same weights are the same
# model, whatever its path), whose rows they are, and the rest.
SETTINGS = {"revision": str | None, "weights_sha256": str | None, "template_sha256": str,
            "pool": str, "dtype": str, "max_length": int, "truncation_side": str}  # fmt: skip
TEXTS = {"conversations_sha256": str, "num_conversations": int, "tokens_sha256": str}
OTHERS = {"model": str, "tokenizer": str, "num_distinct": int, "num_features": int, "files": dict}
KEY = 16  # bytes of the hash by which a conversation's tokens are known
SHARD = re.compile(r"embeddings-\d{5}-[0-9a-f]{8}\.safetensors")


def embed(
    conversations: Sequence[Conversation], folder: str | Path, *,
    model: str = PAPERS_MODEL, tokenizer: str | None = None, revision: str | None = None,
    max_length: PositiveInt = 4096, truncation_side: Literal["left", "right"] = "left",
    pool: Pool = "last", dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto", attention: str = "sdpa",
    method: Literal["auto", "tree", "sorted", "single"] = "auto",
    batch_tokens: NonNegativeInt = 0, shard_size: PositiveInt = 512, shard: str | None = None,
    trust_remote_code: bool = False, progress: bool = True,
) -> "Store | None":  # fmt: skip
    """Embed conversations, lists of {"role": text, "content": text}, with a frozen reward model.

    The embeddings [n, F], states of each one's last token (or see ``pool``), are kept in a folder
    for one model and setting. What is there of a killed run or of other conversations is used
    again, and differs from new ones by rounding alone. Under torchrun each process embeds its
    share; None is returned while shards of others are missing. InputError for bad conversations or
    settings, another model's folder, or a model whose logit is not its score head times a row.

    Args:
        model: reward model, a hub name or a local folder.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        max_length: most tokens of a conversation; longer ones are cut, and counted.
        truncation_side: side that is cut off; left keeps the end of the response.
        pool: last, the last token's state after the final norm, which a score head reads; mean,
            that over the response; layer:N, the mean after layer N, for plain language models.
        dtype: of arithmetic and storage; auto is bfloat16 on a GPU and float32 on a CPU.
        device: auto (a GPU if there is one), cpu, cuda, or one GPU such as cuda:1.
        attention: attention implementation of transformers, such as sdpa or eager.
        method: tree computes shared prefixes once, sorted pads batches of similar length, single
            takes one conversation at a time; auto is tree where tests show that it is exact.
        batch_tokens: most tokens in one forward pass; 0 means 1024 on a CPU, 4096 on a GPU.
        shard_size: distinct conversations in one file.
        shard: for job arrays, i/n: embed shards i, i + n, i + 2n, ... only, i from 1 to n.
        trust_remote_code: run model code that comes with a hub model.
        progress: show a progress bar.
    """
    worker, workers = _worker(shard)
    device, dtype = reward_model.device_and_dtype(device, dtype)
    batch_tokens = batch_tokens or (1024 if device == "cpu" else 4096)
    least = min(max_length, batch_tokens, shard_size)
    require(least > 0, "--max-length, --batch-tokens and --shard-size must be positive")
    source, folder = Source(model, tokenizer, revision, trust_remote_code, pool), Path(folder)
    plan = _plan(conversations, source, dtype, max_length, truncation_side, shard_size)
    load = partial(reward_model.load_engine, source, dtype, device, attention, method, batch_tokens)
    with files.lock_folder(folder, shard):
        return _complete(folder, plan, load, worker, workers, progress)


def check_model(settings: Mapping[str, Any]) -> None:
    """Before data are read, InputError for arguments of ``embed`` with a model or tokenizer that
    cannot be loaded, or no such device or shard."""
    _worker(settings.get("shard"))
    reward_model.device_and_dtype(settings.get("device", "auto"), "auto")
    source = Source(**{key: settings[key] for key in Source._fields if key in settings})
    reward_model.load_config(source)
    reward_model.load_tokenizer(source)


class Store:
    """Finished embeddings on disk, memory-mapped, one row of ``num_features`` per conversation.

    ``head`` [F] is the model's own score head in float32, None unless it has one with one output;
    ``last_linear`` [F] is what the published code takes for it, see ``Engine.reference``.
    InputError if there are none, or a file is missing, cut or edited: all must have the facts,
    shapes and types of the manifest, and its checksums (shards when first opened here).
    """

    def __init__(self, folder: str | Path) -> None:
        folder = self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.verify(_found(folder / VERIFIED))
        self.num_features: int = self.manifest["num_features"]
        note, tensors = _open(folder / INDEX)
        ours = note.get("identity") == _identity(self.manifest, SETTINGS | TEXTS)
        require(ours, f"{folder / INDEX} is of other embeddings than {MANIFEST} says: {AGAIN}")
        number = self.manifest["num_conversations"]
        self._rows = expect(folder / INDEX, tensors, AGAIN, "rows", torch.int64, number)
        _, tensors = _open(folder / HEAD)
        require_finite(folder / HEAD, tensors, AGAIN)
        shapes = {"head": (None, self.num_features), "last_linear": (self.num_features,)}
        for name in [name for name in shapes if name in tensors]:
            expect(folder / HEAD, tensors, AGAIN, name, torch.float32, *shapes[name])
        head, self.last_linear = tensors.get("head", ()), tensors.get("last_linear")
        self.head = head[0] if len(head) == 1 else None
        names = note.get("shards")
        listed = isinstance(names, list) and {*map(str, names), INDEX, HEAD}
        same = listed == set(self.manifest["files"])
        require(same, f"{folder / MANIFEST} names other files than {INDEX}: {AGAIN}")
        self._shards, form = [], (getattr(torch, self.manifest["dtype"]), None, self.num_features)
        for path in [folder / name for name in names]:
            _, tensors = _open(path)
            rows = expect(path, tensors, AGAIN, "embeddings", *form)
            expect(path, tensors, AGAIN, "keys", torch.uint8, len(rows), KEY)
            self._shards.append(rows)
        self._ends = torch.tensor([len(shard) for shard in self._shards]).cumsum(0)
        inside = (self._rows >= 0) & (self._rows < self._ends[-1])
        require(bool(inside.all()), f"{folder / INDEX}: names rows that are not there; {AGAIN}")
        whole = len(self._rows.unique()) == self.manifest["num_distinct"]
        require(whole, f"{folder / INDEX} and {MANIFEST} do not belong together: {AGAIN}")

    def verify(self, known: Mapping[str, Any] | None = None) -> None:
        """InputError if a file's checksum is not the manifest's; shards with the size, time and
        inode in ``known`` are not read again."""
        known, stamps = known or {}, {}
        for name, checksum in self.manifest["files"].items():
            path = self.folder / name
            require(path.is_file(), f"{path} is missing: {AGAIN}")
            found = path.stat()
            stamps[name] = [found.st_size, found.st_mtime_ns, found.st_ino]
            is_known = stamps[name] == known.get(name) and name not in (INDEX, HEAD)
            if not is_known and file_sha256(path) != checksum:
                raise InputError(f"{path} is not the file that was embedded: {AGAIN}")
        if stamps != known:
            with suppress(InputError):  # a read-only folder is verified each time
                _write(self.folder / VERIFIED, json.dumps(stamps).encode())

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, index: Tensor) -> Tensor:
        """Embeddings [n, F] in float32 of the conversations numbered ``index`` [n], read alone."""
        row = self._rows[index]
        out = torch.empty(len(row), self.num_features)
        shard, order = torch.bucketize(row, self._ends, right=True), row.argsort()
        numbers, counts = shard[order].unique_consecutive(return_counts=True)
        for number, here in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            rows = self._shards[number]
            out[here] = rows[row[here] - (self._ends[number] - len(rows))].float()
        return out

    def same(self, some: Tensor, others: Tensor) -> Tensor:
        """Whether conversations have the tokens of others, number by number [n]."""
        return self._rows[some] == self._rows[others]

    def check(self, conversations_sha256: str) -> None:
        """InputError if the rows are of other conversations than those with this checksum."""
        same = conversations_sha256 == self.manifest["conversations_sha256"]
        require(same, f"{self.folder} holds embeddings of other conversations: embed again")


def _checked(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Conversations with role and content alone; InputError naming the first that is not text."""
    checked = []
    for row, each in enumerate(conversations):
        where = f"conversation {row}"
        if isinstance(each, str | Mapping) or not isinstance(each, Iterable):
            raise InputError(f"{where}: expected a list of messages, not {each!r}")
        checked.append([])
        for i, message in enumerate(each):
            here = f"{where}, message {i}"
            if not isinstance(message, Mapping):
                raise InputError(f"{here}: expected role and content, not {message!r}")
            for key in ("role", "content"):
                text = message.get(key)
                is_text = isinstance(text, str)
                require(is_text, f"{here}: {key} must be one text, not {type(text).__name__}")
                whole = text.isascii() or text.encode(errors="replace").decode() == text
                require(whole, f"{here}: {key} holds half a surrogate pair; clean the text")
            checked[-1].append({"role": message["role"], "content": message["content"]})
        require(bool(checked[-1]), f"{where} has no messages")
    require(bool(checked), "there are no conversations to embed")
    return checked


class _Plan(NamedTuple):
    """What is to be embedded; it follows from the inputs alone."""

    tokens: list[tuple[bytes, int]]  # distinct, sorted: big-endian ids, first token that counts
    keys: list[bytes]  # their hashes
    rows: Tensor  # which of them each conversation is [n]
    facts: dict[str, Any]  # what the embeddings depend on
    source: str  # hash of those that a row depends on besides its tokens
    counts: dict[str, int]  # what was counted on the way
    shard_size: int  # most conversations in a shard


def _identity(facts: Mapping[str, Any], names: Iterable[str]) -> str:
    """Hash of the facts with these names."""
    return digest({name: facts[name] for name in names if name in facts})


def _plan(
    conversations: Sequence[Conversation], source: Source, dtype: str,
    max_length: int, truncation_side: str, shard_size: int,
) -> _Plan:  # fmt: skip
    conversations = _checked(conversations)
    config, tokenizer = reward_model.load_config(source), reward_model.load_tokenizer(source)
    max_length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    require(max_length > 0, f"{source.model}: its config.json leaves no room for any token")
    write = partial(reward_model.render_text, tokenizer)
    tokenize = partial(reward_model.tokenize, tokenizer)
    texts = tokenize(map(write, conversations))
    before = (write(each[:-1] or each, is_prompt=True) for each in conversations)
    prompts = repeat(None) if source.pool == "last" else tokenize(before)
    cut, num_truncated, bos = [], 0, tokenizer.bos_token_id
    for ids, prompt in zip(texts, prompts, strict=False):
        short = reward_model.cut_tokens(ids, bos, max_length, truncation_side)
        start = len(short) - 1
        if prompt is not None:  # the response begins where the prompt no longer says the same
            gone = (len(ids) - len(short)) * (truncation_side == "left")
            start = min(start, max(shared_prefix(prompt, ids) - gone, int(short[0] == bos)))
        cut.append((short.astype(">u4").tobytes(), start))
        num_truncated += len(short) < len(ids)
    tokens = sorted(set(cut))
    keys = [hashlib.sha256(ids + start.to_bytes(4)).digest()[:KEY] for ids, start in tokens]
    number = {each: i for i, each in enumerate(tokens)}
    facts = reward_model.model_facts(source, tokenizer) | {
        "pool": source.pool, "dtype": dtype,
        "max_length": max_length, "truncation_side": truncation_side,
        "conversations_sha256": digest(conversations), "num_conversations": len(conversations),
        "tokens_sha256": sha256(*(len(ids).to_bytes(8) + ids for ids, _ in cut)),
    }  # fmt: skip
    given = sum(len(ids) for ids, _ in cut) // 4
    counts = {"num_distinct": len(tokens), "num_truncated": num_truncated, "tokens_given": given}
    rows = torch.tensor([number[each] for each in cut])
    return _Plan(tokens, keys, rows, facts, _identity(facts, SETTINGS), counts, shard_size)


def _worker(shard: str | None) -> tuple[int, int]:
    """Number of this process, and how many there are over all tasks of the job array."""
    given = re.fullmatch(r"(\d+)/(\d+)", shard or "1/1")
    part, parts = map(int, given.groups()) if given else (0, 0)
    require(1 <= part <= parts, f"--shard {shard}: expected i/n with i from 1 to n, such as 2/8")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return (part - 1) * processes + int(os.environ.get("RANK", 0)), parts * processes


def _complete(
    folder: Path, plan: _Plan, load: Callable[[], Engine], worker: int, workers: int, progress: bool
) -> Store | None:
    """Embed what is missing of this worker's share; the model is loaded only for that."""
    claim, head = _found(folder / MANIFEST), {}
    with suppress(InputError):
        head, _ = _open(folder / HEAD)
    if claim and head.get("identity") != plan.source:  # else a manifest that differs was edited
        for key in SETTINGS:
            has, asked = claim.get(key), plan.facts[key]
            holds = f"{folder} holds embeddings with {key} = {has}, but {asked} is asked for"
            require(has == asked, f"{holds}: take another folder or remove this one")
    there = set().union(*_found_shards(folder, plan).values())
    new = [i for i, key in enumerate(plan.keys) if key not in there]
    if used := len(plan.keys) - len(new):
        log.info("%d of %d distinct conversations are there and used again", used, len(plan.keys))
    # A run that goes on, with whole shards there, makes the others as they would have been.
    missing = [new[i : i + plan.shard_size] for i in range(0, len(new), plan.shard_size)]
    own = [shard for shard in missing if shard[0] // plan.shard_size % workers == worker]
    engine = load() if own or not _is_sound(folder / HEAD, plan.source) else None
    if not claim:  # once the model is there, so that a damaged one claims nothing
        claim = plan.facts | {"complete": False}
        _write(folder / MANIFEST, json.dumps(claim, indent=2).encode())
    if engine is None:
        return _finish(folder, plan)
    _write(folder / HEAD, _as_bytes(engine.reference(), plan.source))
    total = sum(len(plan.tokens[i][0]) // 4 for shard in own for i in shard)
    shown, begin = progress and worker == 0, time.perf_counter()
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not shown or None) as bar:
        for shard in own:
            before = engine.tokens_computed
            texts, starts = zip(*(plan.tokens[i] for i in shard), strict=True)
            tokens = [np.frombuffer(ids, ">u4").astype(np.int64) for ids in texts]
            keys = bytearray().join(plan.keys[i] for i in shard)
            rows = {"embeddings": engine.embed(tokens, bar, list(starts)),
                    "keys": torch.frombuffer(keys, dtype=torch.uint8).view(-1, KEY)}  # fmt: skip
            note = {"method": engine.method, "tokens_computed": engine.tokens_computed - before}
            number = shard[0] // plan.shard_size + 1
            name = f"embeddings-{number:05d}-{sha256(keys)[:8]}.safetensors"
            _write(folder / name, _as_bytes(rows, plan.source, **note))
    computed, seconds = engine.tokens_computed, time.perf_counter() - begin
    log.info(
        "%d conversations, %d distinct, %d cut, %d tokens; now %d tokens computed, %.0f a second",
        *(len(plan.rows), *plan.counts.values(), computed, computed / seconds),
    )
    return _finish(folder, plan)


def _found_shards(folder: Path, plan: _Plan) -> dict[str, list[bytes]]:
    """The keys in every shard that is whole; InputError if one belongs to other embeddings."""
    found = {}
    for path in sorted(folder.glob("embeddings-*.safetensors")):
        if _is_sound(path, plan.source):
            keys = _open(path)[1]["keys"].numpy().tobytes()
            found[path.name] = [keys[i : i + KEY] for i in range(0, len(keys), KEY)]
    return found


def _finish(folder: Path, plan: _Plan) -> Store | None:
    """Complete index and manifest once all shards are there, whichever process wrote them."""
    row, wanted = {}, set(plan.keys)
    found = _found_shards(folder, plan)
    shards = [name for name, keys in found.items() if not wanted.isdisjoint(keys)]
    for number, key in enumerate(chain.from_iterable(found[name] for name in shards)):
        row.setdefault(key, number)
    if waiting := len(wanted - row.keys()):
        log.info("%d conversations are still to come from other processes", waiting)
        return None
    rows = torch.tensor([row[key] for key in plan.keys])[plan.rows]
    index = _as_bytes({"rows": rows}, _identity(plan.facts, SETTINGS | TEXTS), shards=shards)
    notes = [_open(folder / name)[0] for name in shards]
    head = _open(folder / HEAD)[1].get("head")
    sums = {name: file_sha256(folder / name) for name in (*shards, HEAD)}
    full = {
        **plan.facts, **plan.counts,
        "tokens_computed": sum(note.get("tokens_computed", 0) for note in notes),
        "method": ", ".join(sorted({note.get("method", "") for note in notes})),
        "num_features": _open(folder / shards[0])[1]["embeddings"].shape[1],
        "reference": "none" if head is None else f"score head with {len(head)} outputs",
        "files": sums | {INDEX: sha256(index)}, "complete": True,
    }  # fmt: skip
    is_old = not (folder / INDEX).is_file() or (folder / INDEX).read_bytes() != index
    if is_old or _found(folder / MANIFEST) != full:
        try:
            _write(folder / INDEX, index)
            _write(folder / MANIFEST, json.dumps(full, indent=2).encode())
        except InputError:
            if _found(folder / MANIFEST) != full:
                raise  # else another process completed it at the same time, and removed our draft
        for draft in folder.glob("*.part"):  # of a run that was killed
            draft.unlink(missing_ok=True)
    return Store(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished embeddings; InputError for none, or one of another form."""
    found = read_json(folder / MANIFEST)
    missing = f"{folder} holds no finished embeddings: embed first"
    damaged = f"{folder / MANIFEST} is not as expected"
    require(found is not None, missing)
    require(isinstance(found, dict), f"{damaged}: {AGAIN}")
    require(found.get("complete") is True, missing)
    for key, kind in (SETTINGS | TEXTS | OTHERS).items():
        right = isinstance(found.get(key), kind) and not isinstance(found.get(key), bool)
        right = right and (key != "dtype" or found[key] in reward_model.LOGIT_TOLERANCE)
        require(right, f"{damaged}, {key} is {found.get(key)!r:.40}: {AGAIN}")
    names = found["files"].keys() - {INDEX, HEAD}
    right = len(found["files"]) == len(names) + 2 and names and all(map(SHARD.fullmatch, names))
    require(bool(right), f"{damaged}, files names others: {AGAIN}")
    return found


def _found(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing if there is none or it is unreadable."""
    try:
        found = read_json(path)
    except InputError as error:
        log.warning("%s", error)
        return {}
    return found if isinstance(found, dict) else {}


def _as_bytes(tensors: dict[str, Tensor], identity: str, **note: Any) -> bytes:
    """A file of tensors with a note that says what they belong to and shows damage."""
    note = {"identity": identity, "sha256": _tensors_sha256(tensors), **note}
    # One key, since safetensors does not keep the order of several.
    return safetensors.torch.save(tensors, {"note": json.dumps(note)})


def _write(path: Path, data: bytes) -> None:
    """Write a file that lasts, for hours of work may be in it."""
    files.write_whole(path, lambda draft: draft.write_bytes(data), lasting=True)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Note and memory-mapped tensors of a file."""
    metadata, tensors = read_tensors(path, AGAIN)
    note = None
    with suppress(ValueError, RecursionError):
        note = json.loads(metadata.get("note", "{}"))
    require(isinstance(note, dict), f"{path} is damaged (its note is unreadable): {AGAIN}")
    return note, tensors


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
    counted = isinstance(note.get("tokens_computed", 0), int)
    noted = counted and isinstance(note.get("method", ""), str)
    if not noted or note.get("sha256") != _tensors_sha256(tensors):
        log.warning("%s is damaged: it is made again", path)
        return False
    return True


def _tensors_sha256(tensors: dict[str, Tensor]) -> str:
    parts = [tensors[name].contiguous().flatten().view(torch.uint8) for name in sorted(tensors)]
    return sha256(*(part.numpy().data for part in parts))
