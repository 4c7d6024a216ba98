"""Conversations in, reward-model embeddings on disk out: every shared token computed once.

Conversations become token ids, identical ones are merged, and the distinct ones are sorted, so
that neighbours share the longest prefixes. A shard holds a fixed range of that order and is
computed from nothing else: killed, resumed or spread over processes, its bytes stay the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from utils import InputError

log = logging.getLogger(__name__)

Conversation = list[dict[str, str]]
Tokens = np.ndarray  # [length], token ids
# How far embedding @ head may be from the model's own logit, as a share of |embedding| @ |head|.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
# Where tests/test_embeddings.py shows that the tree mask gives the one-at-a-time rows.
TREE_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma")
# Rotary embeddings that give a token the same angles whatever else is in its batch.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
POOLING = "last token, after the final norm"
FULL = "full_attention"
NAMES = ("model", "tokenizer")  # facts that may change: the same files under another path
MANIFEST, INDEX, HEAD = "manifest.json", "index.safetensors", "head.safetensors"


def embed(
    conversations: Sequence[Conversation],
    folder: str | Path,
    *,
    model: str = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
    tokenizer: str | None = None,
    revision: str | None = None,
    max_length: int = 4096,
    truncation_side: Literal["left", "right"] = "left",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    method: Literal["auto", "tree", "sorted", "single"] = "auto",
    padding: Literal["right", "left"] = "right",
    batch_tokens: int = 0,
    shard_size: int = 512,
    shard: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Store | None:
    """Embed conversations with a frozen reward model and keep the rows [n, F] on disk.

    A row is the last hidden state, after the final norm, of the last token of the chat-templated
    conversation. A killed run goes on where it was. Under torchrun or accelerate launch each
    process does its share of the shards; None is returned while those of others are missing.

    Args:
        conversations: lists of {"role": text, "content": text}; row i of the store is number i.
        folder: where the embeddings are kept; made if missing.
        model: reward model, a hub name or a local folder.
        tokenizer: hub name or folder of the tokenizer, if it is not the model's own.
        revision: branch, tag or commit of a hub model.
        max_length: most tokens of a conversation; longer ones are cut, and counted.
        truncation_side: where they are cut; left keeps the end of the response.
        dtype: of arithmetic and storage; auto is bfloat16 on CUDA and float32 on a CPU.
        device: auto (CUDA where there is one), cpu, cuda or a certain one such as cuda:1.
        attention: attention implementation of transformers, such as sdpa or eager.
        method: tree computes shared prefixes once, sorted pads batches of like length, single
            takes one conversation at a time; auto is tree where that is known to be right.
        padding: side on which the sorted method pads; the rows are the same.
        batch_tokens: most tokens in one forward pass; 0 means 1024 on a CPU, 4096 on a GPU.
        shard_size: distinct conversations in one file.
        shard: do only every n-th shard, from the i-th on, for job arrays; written i/n, i from 1.
        trust_remote_code: run model code that comes with a hub model.
        progress: show a bar.

    Raises:
        InputError: bad conversations or settings, a folder with embeddings of something else, a
            full disk, or a model whose logit is not its score head applied to this embedding.
    """
    worker, workers = _worker(shard)
    device, dtype = device_and_dtype(device, dtype)
    batch_tokens = batch_tokens or (1024 if device == "cpu" else 4096)
    if min(max_length, batch_tokens, shard_size) < 1:
        raise InputError("--max-length, --batch-tokens and --shard-size must be positive")
    source = Source(model, tokenizer, revision, trust_remote_code)
    plan = _plan(conversations, source, dtype, max_length, truncation_side, shard_size)
    load = partial(load_engine, source, dtype, device, attention, method, batch_tokens, padding)
    return _complete(Path(folder), plan, load, worker, workers, progress)


def check_model(settings: Mapping[str, Any]) -> None:
    """Notice early, before data are read, that ``embed`` could not load the model it is to use.

    Args:
        settings: the arguments that ``embed`` will be given.

    Raises:
        InputError: model or tokenizer cannot be loaded.
    """
    named = {key: settings[key] for key in Source._fields if key in settings}
    source = Source(**{"model": embed.__kwdefaults__["model"], **named})
    load_config(source)
    load_tokenizer(source)


def open_store(folder: str | Path) -> Store:
    """Open finished embeddings; InputError if there are none or a file is missing or cut."""
    return Store(Path(folder))


class Store:
    """Embeddings on disk, one row a conversation; reading maps the files into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        if not self.manifest.get("complete"):
            raise InputError(f"{folder} holds no finished embeddings: make or resume them first")
        self._rows = _open(folder / INDEX)[1]["rows"]
        self._head = _open(folder / HEAD)[1]
        shards = self.manifest["num_shards"]
        paths = [folder / shard_name(i, shards) for i in range(shards)]
        self._shards = [_open(path)[1]["embeddings"] for path in paths]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_features(self) -> int:
        """F, the width of a row."""
        return self.manifest["num_features"]

    @property
    def head(self) -> Tensor | None:
        """The model's own score head [F] in float32, or None if it has none with one output."""
        head = self._head.get("head")
        return head[0] if head is not None and len(head) == 1 else None

    @property
    def last_linear(self) -> Tensor | None:
        """[F] in float32: what the published code takes for the score head, column 0 of the last
        nn.Linear in the model's body; None if that is not F long."""
        return self._head.get("last_linear")

    def rows(self, index: Tensor) -> Tensor:
        """Embeddings [n, F] in float32 of the conversations ``index`` [n]; reads only those."""
        row, size = self._rows[index], self.manifest["shard_size"]
        out = torch.empty(len(row), self.num_features)
        order = row.argsort()
        shards, counts = (row[order] // size).unique_consecutive(return_counts=True)
        for shard, here in zip(shards.tolist(), order.split(counts.tolist()), strict=True):
            out[here] = self._shards[shard][row[here] - shard * size].float()
        return out

    def check(self, conversations: Sequence[Conversation]) -> None:
        """Raise InputError if the rows are those of other conversations."""
        if digest(check_conversations(conversations)) != self.manifest["conversations_sha256"]:
            raise InputError(f"{self.folder} holds embeddings of other conversations: embed again")


# ------------------------------------------------------------------------------ Text


def check_conversations(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Conversations with role and content alone; InputError naming the first that is not text."""
    checked = [_messages(row, conversation) for row, conversation in enumerate(conversations)]
    if not checked:
        raise InputError("there are no conversations to embed")
    return checked


def _messages(row: int, conversation: Any) -> Conversation:
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Iterable):
        raise InputError(f"conversation {row}: expected a list of messages, not {conversation!r}")
    messages = [_message(f"conversation {row}, message {i}", m) for i, m in enumerate(conversation)]
    if not messages:
        raise InputError(f"conversation {row} has no messages")
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


def digest(conversations: Sequence[Conversation]) -> str:
    """SHA-256 of conversations, which the manifest has under conversations_sha256."""
    return _sha256(json.dumps(list(conversations)).encode())


def render_text(tokenizer: Any, conversation: Conversation) -> str:
    """The conversation as the tokenizer's chat template writes it, without generation prompt.

    Raises:
        InputError: there is no template, or it refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=False
        )
    except (TemplateError, ValueError) as error:
        start = str(conversation)[:100]
        raise InputError(f"the chat template cannot write {start}...: {error}") from error


def render(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of the chat-templated conversation, one BOS in front if the model has one."""
    return next(_tokenize(tokenizer, [render_text(tokenizer, conversation)])).tolist()


def _tokenize(tokenizer: Any, texts: Iterable[str]) -> Iterator[Tokens]:
    """Template or tokenizer may write a BOS, or both, or neither: both would give two."""
    bos, texts = tokenizer.bos_token_id, iter(texts)
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    while some := list(islice(texts, 1000)):  # lists of ints take much memory
        for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
            yield _one_bos(np.array(ids, dtype=np.int64), bos, adds_bos)


def _one_bos(ids: Tokens, bos: int | None, adds_bos: bool) -> Tokens:
    written = int((np.append(ids, -1) != bos).argmax())
    first = [bos] if adds_bos or written else []
    return np.array([*first, *ids[written:]], dtype=np.int64)


def cut_tokens(ids: Tokens, bos: int | None, max_length: int, truncation_side: str) -> Tokens:
    """At most max_length tokens; a BOS stays in front."""
    if len(ids) <= max_length or truncation_side == "right":
        return ids[:max_length]
    first = ids[: int(ids[0] == bos and max_length > 1)]
    return np.append(first, ids[len(ids) - max_length + len(first) :])


# ------------------------------------------------------------------------------ Plan


class Source(NamedTuple):
    """Where model and tokenizer come from, as the arguments of ``embed`` say it."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Plan:
    """What is to be computed, from the inputs alone."""

    tokens: list[bytes]  # distinct conversations, sorted; ids are big-endian, so bytes sort alike
    rows: Tensor  # [conversations], number of the distinct one
    facts: dict[str, Any]  # what the rows depend on
    counts: dict[str, int]

    @cached_property
    def identity(self) -> str:
        # The same weights are the same model under whatever path.
        facts = {key: value for key, value in self.facts.items() if key not in NAMES}
        return _sha256(json.dumps(facts).encode())

    @property
    def num_shards(self) -> int:
        return -(-len(self.tokens) // self.facts["shard_size"])

    def path(self, folder: Path, shard: int) -> Path:
        return folder / shard_name(shard, self.num_shards)

    def shard(self, shard: int) -> list[Tokens]:
        size = self.facts["shard_size"]
        part = self.tokens[shard * size : (shard + 1) * size]
        return [np.frombuffer(ids, dtype=">u4").astype(np.int64) for ids in part]


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
    cut, num_truncated = [], 0
    for ids in _tokenize(tokenizer, (render_text(tokenizer, each) for each in conversations)):
        short = cut_tokens(ids, tokenizer.bos_token_id, max_length, truncation_side)
        cut.append(short.astype(">u4").tobytes())
        num_truncated += len(short) < len(ids)
    tokens = sorted(set(cut))
    number = {ids: i for i, ids in enumerate(tokens)}
    facts = {
        "model": source.model,
        **_weights(source),
        "tokenizer": source.tokenizer or source.model,
        "template_sha256": _sha256(tokenizer.get_chat_template().encode()),
        "pooling": POOLING,
        "dtype": dtype,
        "max_length": max_length,
        "truncation_side": truncation_side,
        "conversations_sha256": digest(conversations),
        "num_conversations": len(conversations),
        "tokens_sha256": _sha256(*(len(ids).to_bytes(8) + ids for ids in cut)),
        "shard_size": shard_size,
    }
    counts = {
        "num_distinct": len(tokens),
        "num_truncated": num_truncated,
        "tokens_given": sum(map(len, cut)) // 4,
    }
    return _Plan(tokens, torch.tensor([number[ids] for ids in cut]), facts, counts)


def _worker(shard: str | None) -> tuple[int, int]:
    """This process's number and how many there are, over job-array tasks and ranks."""
    given = re.fullmatch(r"(\d+)/(\d+)", shard or "1/1")
    if not given or not 1 <= int(given[1]) <= int(given[2]):
        raise InputError(f"--shard {shard}: expected i/n with i from 1 to n, such as 2/8")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    return (int(given[1]) - 1) * ranks + rank, int(given[2]) * ranks


def device_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """The device and dtype that auto stands for here.

    Raises:
        InputError: a CUDA device is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: there is no CUDA device here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device, ("bfloat16" if device != "cpu" else "float32") if dtype == "auto" else dtype


# ---------------------------------------------------------------------------- Passes


class _Pass(NamedTuple):
    """One forward pass over a [batch, length] of tokens and where its embeddings stand."""

    rows: list[int]  # conversations of the shard
    ids: Tensor  # [batch, length]
    positions: Tensor | None  # [batch, length]
    mask: Tensor | None  # [batch, length] of real tokens
    ends: Tensor | None  # [length], of a tree: the token's descendants are those before this one
    last: tuple[Tensor, Tensor]  # batch and place of every conversation's last token

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum()) if self.mask is not None else self.ids.numel()


def shared_prefix(a: Tokens, b: Tokens) -> int:
    """Number of tokens with which both begin."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def pack(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Cut sorted conversations into the trees [start, stop) that cost least to compute.

    A pass over T tokens is taken to cost b/32 + T + T^2 / 3b for a budget of b: what a pass costs
    by itself, the linear layers, and attention (measured on a CPU with b = 1024).

    Args:
        lengths: tokens of each conversation.
        shared: tokens that each shares with the one before it.
        budget: most tokens in a tree; a longer conversation stands alone.
    """
    n = len(lengths)
    best, start = [0.0] + [float("inf")] * n, [0] * (n + 1)
    for first in range(n):
        tokens = lengths[first]
        for stop in range(first + 1, n + 1):
            cost = best[first] + budget / 32 + tokens + tokens**2 / (3 * budget)
            if cost < best[stop]:
                best[stop], start[stop] = cost, first
            tokens += lengths[stop] - shared[stop] if stop < n else 0
            if tokens > budget:
                break
    trees, stop = [], n
    while stop:
        trees.append((start[stop], stop))
        stop = start[stop]
    return trees[::-1]


def _trees(tokens: list[Tokens], budget: int) -> Iterator[_Pass]:
    shared = [0] + [shared_prefix(a, b) for a, b in pairwise(tokens)]
    for start, stop in pack([len(ids) for ids in tokens], shared, budget):
        yield _tree(list(range(start, stop)), tokens[start:stop], [0, *shared[start + 1 : stop]])


def _tree(rows: list[int], tokens: list[Tokens], shared: list[int]) -> _Pass:
    """Prefix tree of sorted conversations as one row, depth first: each token once.

    Depth first, the descendants of a token follow it without a gap, so that its place and the
    place where they end say who may see it.
    """
    total = sum(map(len, tokens)) - sum(shared)
    ids, depth, ends = np.empty(total, int), np.empty(total, int), np.full(total, total)
    path, last, filled = np.empty(0, int), [], 0
    for each, keep in zip(tokens, shared, strict=True):
        ends[path[keep:]] = filled
        new = np.arange(filled, filled + len(each) - keep)
        path, filled = np.append(path[:keep], new), filled + len(new)
        ids[new], depth[new] = each[keep:], np.arange(keep, len(each))
        last.append(path[-1])
    ids, depth, ends = (torch.from_numpy(array) for array in (ids, depth, ends))
    places = torch.zeros(len(rows), dtype=torch.long), torch.tensor(last)
    return _Pass(rows, ids[None], depth[None], None, ends, places)


def tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [1, 1, T, T] by which a token sees itself and its ancestors."""
    place = torch.arange(len(ends), device=ends.device)
    sees = (place <= place[:, None]) & (place[:, None] < ends)
    mask = torch.zeros(sees.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[None, None]


def _batches(tokens: list[Tokens], budget: int, padding: str) -> Iterator[_Pass]:
    """Conversations of like length, padded; budget 0 gives one at a time."""
    batch: list[int] = []
    for row in sorted(range(len(tokens)), key=lambda row: -len(tokens[row])):
        if batch and (len(batch) + 1) * len(tokens[batch[0]]) > budget:
            yield _padded(batch, [tokens[i] for i in batch], padding)
            batch = []
        batch.append(row)
    yield _padded(batch, [tokens[i] for i in batch], padding)


def _padded(rows: list[int], tokens: list[Tokens], padding: str) -> _Pass:
    lengths = torch.tensor([len(ids) for ids in tokens])
    longest = int(lengths.max())
    place = torch.arange(longest).expand(len(rows), -1)
    left = (longest - lengths if padding == "left" else 0 * lengths)[:, None]
    mask = (place >= left) & (place < left + lengths[:, None])
    ids = torch.zeros(mask.shape, dtype=torch.long)  # any id will do: no real token sees padding
    ids[mask] = torch.from_numpy(np.concatenate(tokens))
    last = torch.arange(len(rows)), left[:, 0] + lengths - 1
    if mask.all():  # without a mask attention takes its fastest way
        return _Pass(rows, ids, None, None, None, last)
    positions = (place - left).clamp(min=0) if padding == "left" else None
    return _Pass(rows, ids, positions, mask.long(), None, last)


# ----------------------------------------------------------------------------- Model


@dataclass
class Engine:
    """A loaded reward model, and how it takes its conversations.

    Args:
        model: sequence-classification model of transformers on its device.
        has_head: whether its score head is the checkpoint's own, not a random one.
        method: tree, sorted or single.
        batch_tokens: most tokens in one forward pass.
        padding: side on which the sorted method pads.
    """

    model: Any
    has_head: bool
    method: str
    batch_tokens: int
    padding: str = "right"
    tokens_computed: int = 0
    checked: bool = False

    @property
    def body(self) -> Any:
        return self.model.base_model

    @property
    def head(self) -> Tensor | None:
        """Score head [outputs, F]."""
        return self.model.score.weight.detach() if self.has_head else None

    def reference(self) -> dict[str, Tensor]:
        """The tensors of head.safetensors: head, bias if any, last_linear."""
        tensors = {}
        if self.has_head:
            tensors = {"head": self.head}
            if getattr(self.model.score, "bias", None) is not None:
                tensors["bias"] = self.model.score.bias.detach()
        linear = [m for m in self.body.modules() if isinstance(m, torch.nn.Linear)]
        if linear and len(linear[-1].weight) == self.model.config.get_text_config().hidden_size:
            tensors["last_linear"] = linear[-1].weight.detach()[:, 0]
        return {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}

    def embed(self, tokens: list[Tokens], bar: tqdm) -> Tensor:
        """Embeddings [n, F] of n distinct, sorted conversations, in the model's dtype.

        The bar moves by the tokens given. Where a GPU runs full the passes are halved.
        """
        before = bar.n, self.tokens_computed
        while True:
            try:
                return self._embed(tokens, bar)
            except torch.cuda.OutOfMemoryError:
                self._shrink(max(map(len, tokens)))
            # The shard starts over, so that its bytes follow from the budget it was done with.
            bar.update(before[0] - bar.n)
            self.tokens_computed = before[1]
            torch.cuda.empty_cache()

    def _shrink(self, longest: int) -> None:
        if self.batch_tokens <= longest:
            raise InputError(
                f"{longest} tokens do not fit into the GPU's memory: lower --max-length"
            ) from None
        self.batch_tokens //= 2
        log.warning("GPU memory is full: going on with --batch-tokens %d", self.batch_tokens)

    @torch.inference_mode()
    def _embed(self, tokens: list[Tokens], bar: tqdm) -> Tensor:
        out = None
        for step in self._passes(tokens):
            rows = self._forward(step)
            if not self.checked:
                self._check(tokens[step.rows[-1]], rows[-1])
            out = rows.new_empty(len(tokens), rows.shape[1]) if out is None else out
            out[step.rows] = rows
            bar.update(sum(len(tokens[row]) for row in step.rows))
            self.tokens_computed += step.num_tokens
        if not out.isfinite().all():
            raise InputError("the model gives infinite embeddings: try another --dtype")
        return out.cpu()

    def _passes(self, tokens: list[Tokens]) -> Iterator[_Pass]:
        if self.method == "tree":
            return _trees(tokens, self.batch_tokens)
        return _batches(tokens, self.batch_tokens * (self.method == "sorted"), self.padding)

    def _forward(self, step: _Pass) -> Tensor:
        """Embeddings [conversations of the pass, F]."""
        given = {"position_ids": step.positions, "attention_mask": step.mask}
        given = {k: v.to(self.model.device) for k, v in given.items() if v is not None}
        if step.ends is not None:
            given["attention_mask"] = tree_mask(step.ends.to(self.model.device), self.model.dtype)
        ids = step.ids.to(self.model.device)
        hidden = self.body(input_ids=ids, use_cache=False, **given).last_hidden_state
        return hidden[step.last]

    def _check(self, ids: Tokens, row: Tensor) -> None:
        """Stop unless the row, times the head, is the model's own logit of the conversation."""
        self.checked = True
        if not self.has_head:
            return
        alone = torch.from_numpy(ids)[None].to(self.model.device)
        logit = self.model(input_ids=alone, use_cache=False).logits[0].float()
        if self._gives(row, logit):
            return
        hidden = self.body(input_ids=alone, use_cache=False).last_hidden_state[0]
        places = [i for i, state in enumerate(hidden) if self._gives(state, logit)]
        if places and places[-1] == len(ids) - 1:
            broken = f"a row of the {self.method} method is the same alone: try --method single"
        elif places:
            broken = f"it pools the last token: it pools number {places[-1] + 1} of {len(ids)}"
        else:
            broken = "its logit is its score head times the last hidden state"
        raise InputError(f"of this model it does not hold that {broken}")

    def _gives(self, state: Tensor, logit: Tensor) -> bool:
        """Whether the score head makes this logit [outputs] of a hidden state [F]."""
        head, state = self.head.float(), state.float()
        bias = getattr(self.model.score, "bias", None)
        own = head @ state + (0 if bias is None else bias.float())
        scale = head.abs() @ state.abs() + 1e-6
        tolerance = LOGIT_TOLERANCE[str(self.model.dtype).removeprefix("torch.")]
        return bool(((own - logit).abs() <= tolerance * scale).all())


def load_engine(
    source: Source,
    dtype: str,
    device: str,
    attention: str,
    method: str,
    batch_tokens: int,
    padding: str = "right",
) -> Engine:
    """Load a reward model with its score head; the arguments are those of ``embed``."""
    method, why = choose_method(load_config(source), method, attention)
    log.info("embedding method: %s (%s)", method, why)
    model, has_head = _load_model(source, getattr(torch, dtype), attention)
    # No token is padding: pooling takes a row's last token, whatever the pad token is.
    model.config.get_text_config().pad_token_id = -1
    return Engine(model.to(device).eval(), has_head, method, batch_tokens, padding)


def choose_method(config: Any, method: str, attention: str) -> tuple[str, str]:
    """The method to use for a model's config, and why; InputError if it would be wrong."""
    kind = config.model_type
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windows = [layer for layer in getattr(config, "layer_types", None) or [] if layer != FULL]
    reason = ""
    if kind not in TREE_MODELS:
        reason = f"the tree mask is not known to be right for {kind} models"
    elif windows or (kind == "mistral" and config.sliding_window):
        reason = f"this {kind} model's attention has a sliding window"
    elif rope not in STATIC_ROPE:
        reason = f"its {rope} position code depends on the batch"
    elif attention not in ("sdpa", "eager"):
        reason = f"{attention} attention takes no tree mask"
    if method == "tree" and reason:
        raise InputError(f"--method tree: {reason}; use --method auto")
    if method != "auto":
        return method, "as asked"
    if rope not in STATIC_ROPE:
        return "single", reason
    return ("sorted", reason) if reason else ("tree", "shared prefixes are computed once")


def _load_model(source: Source, dtype: torch.dtype, attention: str) -> tuple[Any, bool]:
    """The model and whether its checkpoint has a score head."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    options = {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    try:
        loader = AutoModelForSequenceClassification
        model, info = pretrained(loader, source.model, source, **options)
    except InputError as error:
        if "Unrecognized configuration class" not in str(error.__cause__):
            raise
        model, info = pretrained(AutoModel, source.model, source, **options)
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if not name.startswith("score.")]
    if lost or not hasattr(model, "base_model"):
        raise InputError(f"{source.model} has no {lost[0]}: not a decoder with a score head")
    has_head = hasattr(model, "score") and not missing
    if not has_head:
        log.warning("%s has no score head: there will be no reference (rank 0)", source.model)
    return model, has_head


def load_config(source: Source) -> Any:
    """The model's config."""
    from transformers import AutoConfig  # slow to import, and readers of a store do without

    return pretrained(AutoConfig, source.model, source)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer, which has a chat template; InputError otherwise."""
    from transformers import AutoTokenizer

    name = source.tokenizer or source.model
    tokenizer = pretrained(AutoTokenizer, name, source)
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer {name} has no chat template: name one with --tokenizer")
    return tokenizer


def pretrained(loader: Any, name: str, source: Source, **options: Any) -> Any:
    """What an Auto class of transformers makes of the source's model or tokenizer.

    Raises:
        InputError: it cannot be loaded.
    """
    if name == source.model:
        options["revision"] = source.revision
    try:
        return loader.from_pretrained(name, trust_remote_code=source.trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{name} cannot be loaded: {first}") from error


def _weights(source: Source) -> dict[str, str | None]:
    """What tells a model from another of the same name: its commit, or the hash of its files."""
    from huggingface_hub import try_to_load_from_cache

    if not Path(source.model).is_dir():
        config = try_to_load_from_cache(source.model, "config.json", revision=source.revision)
        return {"revision": Path(str(config)).parent.name, "weights_sha256": None}
    kinds = ("*.safetensors", "*.bin", "config.json")
    files = sorted(file for kind in kinds for file in Path(source.model).glob(kind))
    hashes = (_file_sha256(file).encode() for file in files)
    return {"revision": None, "weights_sha256": _sha256(*hashes)}


# ------------------------------------------------------------------------------ Disk


def _complete(
    folder: Path,
    plan: _Plan,
    load: Callable[[], Engine],
    worker: int,
    workers: int,
    progress: bool,
) -> Store | None:
    """Make what is missing of this worker's share; load the model only for that."""
    _claim(folder, plan, worker)
    mine = range(worker, plan.num_shards, workers)
    todo = [i for i in mine if not _is_sound(plan.path(folder, i), plan.identity)]
    if todo or not _is_sound(folder / HEAD, plan.identity):
        engine = load()
        _write_tensors(folder / HEAD, engine.reference(), plan.identity, worker)
        _embed_shards(folder, plan, engine, todo, worker, progress and worker == 0)
    return _finish(folder, plan, worker)


def _embed_shards(
    folder: Path, plan: _Plan, engine: Engine, todo: list[int], worker: int, progress: bool
) -> None:
    shards = [plan.shard(i) for i in todo]
    total = sum(len(ids) for tokens in shards for ids in tokens)
    begin = time.perf_counter()
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
        for i, tokens in zip(todo, shards, strict=True):
            before = engine.tokens_computed
            rows = {"embeddings": engine.embed(tokens, bar)}
            computed = engine.tokens_computed - before
            note = {"method": engine.method, "tokens_computed": computed}
            _write_tensors(plan.path(folder, i), rows, plan.identity, worker, **note)
    seconds = time.perf_counter() - begin
    computed = engine.tokens_computed
    log.info(
        "%d conversations, %d distinct, %d cut, %d tokens; now %d tokens computed, %.0f a second",
        *(len(plan.rows), *plan.counts.values(), computed, computed / seconds),
    )


def _claim(folder: Path, plan: _Plan, worker: int) -> None:
    """Make the folder ours, or refuse it if it holds embeddings of something else."""
    found = _read_manifest(folder)
    for key, value in plan.facts.items():
        if found and key not in NAMES and found.get(key) != value:
            raise InputError(
                f"{folder} holds embeddings with {key} = {found.get(key)}, asked for is {value}: "
                "take another folder or remove this one"
            )
    ours = {plan.path(folder, i).name for i in range(plan.num_shards)}
    for path in sorted(folder.glob("embeddings-*.safetensors")):
        if path.name not in ours:
            raise InputError(f"{path} belongs to other embeddings: take another folder")
    if not _is_sound(folder / INDEX, plan.identity):
        _write_tensors(folder / INDEX, {"rows": plan.rows}, plan.identity, worker)
    if not found:
        _write_manifest(folder, {**plan.facts, "complete": False}, worker)


def _finish(folder: Path, plan: _Plan, worker: int) -> Store | None:
    """Complete the manifest once all files are there, whoever wrote them."""
    shards = [plan.path(folder, i) for i in range(plan.num_shards)]
    files = [*shards, folder / INDEX, folder / HEAD]
    waiting = [path.name for path in files if not _is_sound(path, plan.identity)]
    if waiting:
        log.info("%d files are still to come from other processes: %s ..", len(waiting), waiting[0])
        return None
    if not _read_manifest(folder).get("complete"):
        notes = [_open(path)[0] for path in shards]
        head = _open(folder / HEAD)[1].get("head")
        manifest = {
            **plan.facts,
            **plan.counts,
            "tokens_computed": sum(note["tokens_computed"] for note in notes),
            "method": ", ".join(sorted({note["method"] for note in notes})),
            "num_features": _open(shards[0])[1]["embeddings"].shape[1],
            "num_shards": len(shards),
            "reference": "none" if head is None else f"score head with {len(head)} outputs",
            "files": {path.name: _file_sha256(path) for path in files},
            "complete": True,
        }
        _write_manifest(folder, manifest, worker)
        for part in folder.glob("embeddings-*.part*"):  # of a run that was killed
            part.unlink(missing_ok=True)
    return Store(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or an empty one if there is none or it is unreadable."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s is damaged", folder / MANIFEST)
        return {}


def _write_manifest(folder: Path, manifest: dict[str, Any], worker: int) -> None:
    _write(folder / MANIFEST, json.dumps(manifest, indent=2).encode(), worker)


def _write_tensors(
    path: Path, tensors: dict[str, Tensor], identity: str, worker: int, **note: Any
) -> None:
    """Write tensors with a note that says whose they are and shows damage."""
    note = {"identity": identity, "sha256": _tensors_sha256(tensors), **note}
    # One key, since safetensors does not keep the order of several.
    _write(path, safetensors.torch.save(tensors, {"note": json.dumps(note)}), worker)


def _write(path: Path, data: bytes, worker: int) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part{worker}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        advice = "the finished shards are kept: run again when it can be"
        raise InputError(f"cannot write {path}: {error.strerror}; {advice}") from error


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Note and memory-mapped tensors of a file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get("note", "{}"))
            return note, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: embed again, the rest is kept") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): embed again, the rest is kept") from error


def _is_sound(path: Path, identity: str) -> bool:
    """Whether a file is there and whole; InputError if it is of other embeddings."""
    if not path.exists():
        return False
    try:
        note, tensors = _open(path)
    except InputError as error:
        log.warning("%s", error)
        return False
    if note.get("identity") != identity:
        raise InputError(f"{path} belongs to other embeddings: take another folder or remove it")
    if note["sha256"] != _tensors_sha256(tensors):
        log.warning("%s is damaged: doing it again", path)
        return False
    return True


def _tensors_sha256(tensors: dict[str, Tensor]) -> str:
    parts = [tensors[name].contiguous().flatten().view(torch.uint8) for name in sorted(tensors)]
    return _sha256(*(part.numpy().data for part in parts))


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
