"""A tree's mask for FlexAttention: the dense mask's, its rows those of one at a time."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from tqdm import tqdm

import models
from lore.common.files import InputError
from lore.embeddings import prefix_trees as passes
from lore.embeddings import reward_model
from lore.embeddings.reward_model import Engine, Source, load_engine

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """FlexAttention as plain torch code, as the compiler is slow and differs between machines."""
    with torch.compiler.set_stance("force_eager"):
        yield


def conversations(groups: int, seed: int = 0, vocabulary: int = 60) -> list[np.ndarray]:
    """Token ids with prefixes shared by four and, of these, halves shared by two; sorted."""
    g = np.random.default_rng(seed)
    rows = []
    for _ in range(groups):
        prompt = g.integers(5, vocabulary, g.integers(20, 200))
        for _ in range(2):
            turn = np.append(prompt, g.integers(5, vocabulary, g.integers(1, 60)))
            rows += [np.append(turn, g.integers(5, vocabulary, g.integers(1, 40))) for _ in "ab"]
    return sorted(rows, key=tuple)


def tree_of(tokens: list[np.ndarray]) -> passes.Pass:
    shared = [0] + [passes.shared_prefix(a, b) for a, b in pairwise(tokens)]
    starts = [len(ids) - 1 for ids in tokens]
    return passes.tree_pass(list(range(len(tokens))), tokens, starts, shared)


def tree_engine(folder: Path, kind: str = "llama", batch_tokens: int = 500) -> Engine:
    model = models.TREE_KINDS[kind](folder / "model")
    return load_engine(Source(str(model)), "float32", "cpu", "sdpa", "tree", batch_tokens)


def cut(ends: torch.Tensor, length: int) -> torch.Tensor:
    """The tree of the first tokens."""
    return ends[:length].clamp(max=length)


def listed(count: torch.Tensor, which: torch.Tensor) -> list[set[int]]:
    return [set(row[:n].tolist()) for n, row in zip(count[0, 0], which[0, 0], strict=True)]


def listed_all(mask: BlockMask) -> list[set[int]]:
    """For each block of queries the blocks of keys that it takes."""
    some = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    return [a | b for a, b in zip(some, whole, strict=True)]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 640, 700])
def test_the_block_mask_is_the_dense_mask(length):
    for seed in range(4):
        ends = cut(tree_of(conversations(6, seed)).ends, length)
        ours, dense = passes.tree_blocks(ends, "cpu"), passes.tree_mask(ends, torch.float32)
        sees = create_mask(ours.mask_mod, 1, 1, length, length, device="cpu")
        assert torch.equal(sees, dense == 0)
        made = create_block_mask(ours.mask_mod, 1, 1, length, length, device="cpu")
        assert ours.shape == made.shape
        assert listed_all(ours) == listed_all(made)
        whole = listed(ours.full_kv_num_blocks, ours.full_kv_indices)
        for query, keys in enumerate(whole):  # taken without asking the mask
            for key in keys:
                assert sees[0, 0, 128 * query :, 128 * key : 128 * key + 128][:128].all()


def test_blocks_are_skipped_and_taken_whole():
    first, second = np.full(600, 7), np.full(600, 9)
    first[300:] = 8
    tokens = sorted([first, second, np.append(first[:500], 5)], key=tuple)
    mask = passes.tree_blocks(tree_of(tokens).ends, "cpu")
    number = mask.kv_indices.shape[2]
    taken = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert taken < number * (number + 1) / 2 and int(mask.full_kv_num_blocks.sum()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.TREE_KINDS)
def test_rows_are_those_of_one_at_a_time_and_of_the_dense_mask(kind, tmp_path, uncompiled):
    engine = tree_engine(tmp_path, kind, 300)
    tokens, rows = conversations(2), {}
    for name, method, flex in (
        ("alone", "single", False), ("dense", "tree", False), ("flex", "tree", True),
    ):  # fmt: skip
        engine.method, engine.flex = method, flex
        rows[name] = engine.embed(tokens, tqdm(disable=True))
        assert engine.flex == flex and engine.model.config._attn_implementation == "sdpa"
    for other in ("alone", "dense"):
        assert float((rows["flex"] - rows[other]).norm(dim=1).max()) < 1e-5 * float(
            rows[other].norm(dim=1).min()
        )


def test_a_wrong_block_mask_stops_the_run(tmp_path, uncompiled, monkeypatch):
    right = passes.tree_blocks
    monkeypatch.setattr(
        reward_model, "tree_blocks", lambda ends, device: right(0 * ends + len(ends), device)
    )
    engine = tree_engine(tmp_path)
    engine.flex = True
    with pytest.raises(InputError, match="does not give what"):
        engine.embed(conversations(1), tqdm(disable=True))


def test_where_flexattention_cannot_run_trees_take_the_dense_mask(tmp_path, monkeypatch, caplog):
    def broken(*_: Any) -> None:
        raise NotImplementedError("no kernel\nfor this card")

    engine = tree_engine(tmp_path)
    tokens = conversations(4)
    dense = engine.embed(tokens, tqdm(disable=True))
    monkeypatch.setattr(reward_model, "tree_blocks", broken)
    caplog.clear()
    engine.flex = True
    assert torch.equal(engine.embed(tokens, tqdm(disable=True)), dense)
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1 and warned[0].endswith("NotImplementedError: no kernel")


def test_full_memory_is_no_reason_for_the_dense_mask(tmp_path, monkeypatch):
    def full(ends: torch.Tensor, device: Any) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(reward_model, "tree_blocks", full)
    engine = tree_engine(tmp_path)
    engine.flex = True
    with pytest.raises(InputError, match="do not fit"):
        engine.embed(conversations(2), tqdm(disable=True))
    assert engine.flex and engine.batch_tokens < 500
