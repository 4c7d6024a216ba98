"""Forward passes over many conversations' token ids: shared prefixes once (a tree of T tokens), or
padded batches."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries and keys of a block that FlexAttention's kernel takes or leaves whole
Tokens = np.ndarray  # [length], token ids


class Pass(NamedTuple):
    """One forward pass over some of a shard's conversations, and where their embeddings stand."""

    rows: list[int]  # numbers of the conversations in the shard
    given: dict[str, Tensor]  # the model's input_ids, position_ids and attention_mask, as needed
    num_tokens: int  # computed, padding left out
    ends: Tensor | None  # of a tree [T]: before this place a token's descendants end
    pooled: tuple[Tensor, Tensor]  # batch number and place of the tokens whose states are averaged
    counts: Tensor  # how many of these each conversation has, one's after the other's


def shared_prefix(a: Tokens, b: Tokens) -> int:
    """Number of tokens with which both begin."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def pack(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Cut sorted conversations into the trees [start, stop) that cost least to compute; one longer
    than the budget is a tree alone. ``shared``: tokens shared with the one before.

    A pass over T tokens is taken to cost b/32 + T + T^2 / 3b for a budget of b: the overhead of a
    pass, the linear layers, and attention (measured on a CPU with b = 1024).
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


def tree_passes(tokens: list[Tokens], starts: list[int], budget: int) -> Iterator[Pass]:
    """Sorted conversations as prefix trees; from token ``starts`` on, states are averaged."""
    shared = [0] + [shared_prefix(a, b) for a, b in pairwise(tokens)]
    for start, stop in pack([len(ids) for ids in tokens], shared, budget):
        rows, kept = list(range(start, stop)), [0, *shared[start + 1 : stop]]
        yield tree_pass(rows, tokens[start:stop], starts[start:stop], kept)


def tree_pass(rows: list[int], tokens: list[Tokens], starts: list[int], shared: list[int]) -> Pass:
    """Sorted conversations as one row of tokens: their prefix tree, each token once, depth first: a
    token's descendants follow it without a gap, and where they end tells who attends to it."""
    total = sum(map(len, tokens)) - sum(shared)
    ids, depth, ends = np.empty(total, int), np.empty(total, int), np.full(total, total)
    path, pooled, filled = np.empty(0, int), [], 0
    for each, start, keep in zip(tokens, starts, shared, strict=True):
        ends[path[keep:]] = filled
        new = np.arange(filled, filled + len(each) - keep)
        path, filled = np.append(path[:keep], new), filled + len(new)
        ids[new], depth[new] = each[keep:], np.arange(keep, len(each))
        pooled.append(path[start:])
    places = np.concatenate(pooled)
    ids, depth, ends, places = map(torch.from_numpy, (ids, depth, ends, places))
    counts = torch.tensor([len(each) for each in pooled])
    given = {"input_ids": ids[None], "position_ids": depth[None]}
    return Pass(rows, given, total, ends, (0 * places, places), counts)


def tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [1, 1, T, T] by which a token sees itself and its ancestors."""
    place = torch.arange(len(ends), device=ends.device)
    sees = (place <= place[:, None]) & (place[:, None] < ends)
    mask = torch.zeros(sees.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[None, None]


def tree_blocks(ends: Tensor, device: torch.device | str) -> "BlockMask":
    """The same mask for FlexAttention, which forms no square: its kernel skips unseen blocks.

    The last and the first ``ends`` (on the CPU) in a block of keys tell whether a later block of
    queries sees some of them, and all, since a token's descendants have no gap.
    """
    from torch.nn.attention.flex_attention import BlockMask  # imports the compiler

    T, number = len(ends), -(-len(ends) // BLOCK)
    padded = np.zeros(number * BLOCK, dtype=np.int64)  # behind the last token: unseen
    padded[:T] = ends.numpy()
    by_block = padded.reshape(number, BLOCK)
    begin = BLOCK * np.arange(number)[:, None]  # of each block of queries, against keys in columns
    earlier = np.tri(number, k=-1, dtype=bool)
    every = earlier & (by_block.min(1) >= np.minimum(begin + BLOCK, T))
    some = (earlier & (by_block.max(1) > begin) & ~every) | np.eye(number, dtype=bool)
    own_ends, listed = ends.to(device), []
    for wanted in (some, every):  # how many blocks of keys each block of queries wants; these first
        both = wanted.sum(1), np.argsort(~wanted, axis=1, kind="stable")
        listed += [torch.from_numpy(x.astype(np.int32)).to(device)[None, None] for x in both]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < own_ends[key])

    form = {"BLOCK_SIZE": BLOCK, "seq_lengths": (T, T), "compute_q_blocks": False}
    return BlockMask.from_kv_blocks(*listed, mask_mod=sees, **form)


def batches(tokens: list[Tokens], starts: list[int], budget: int) -> Iterator[Pass]:
    """Conversations of similar length padded to at most ``budget`` tokens; 0: one at a time."""
    order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
    while order:
        most = max(budget // len(tokens[order[0]]), 1)
        rows, order = order[:most], order[most:]
        lengths = torch.tensor([len(tokens[i]) for i in rows])
        first = torch.tensor([starts[i] for i in rows])
        place = torch.arange(int(lengths.max())).expand(len(rows), -1)
        mask = place < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)  # any id: no real token sees padding
        ids[mask] = torch.from_numpy(np.concatenate([tokens[i] for i in rows]))
        is_pooled = mask & (place >= first[:, None])
        pooled, counts = is_pooled.nonzero(as_tuple=True), is_pooled.sum(1)
        # Attention is fastest without a mask.
        given = {"input_ids": ids} | ({} if mask.all() else {"attention_mask": mask.long()})
        yield Pass(rows, given, int(mask.sum()), None, pooled, counts)
