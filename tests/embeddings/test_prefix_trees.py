"""Prefix trees: their cuts; a mask for FlexAttention that is the dense mask's."""

import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from tqdm import tqdm

import models
from lore.common.files import InputError
from lore.embeddings import prefix_trees as passes
from lore.embeddings import reward_model
from lore.embeddings.reward_model import Engine, Source, load_engine

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SIZES = st.tuples(st.integers(1, 60), st.integers(0, 60))
NO_BAR = tqdm(disable=True)


@pytest.fixture
def engine(tmp_path, request) -> Iterator[Engine]:
    """A tiny model, a Llama if no other kind is asked for, that takes trees; FlexAttention as plain
    torch code, as the compiler is slow and differs between machines."""
    model = models.TREE_KINDS[getattr(request, "param", "llama")](tmp_path / "model")
    with torch.compiler.set_stance("force_eager"):
        yield load_engine(Source(str(model)), "float32", "cpu", "sdpa", "tree", 300)


def conversations(groups: int, seed: int = 0) -> list[np.ndarray]:
    """Token ids with prefixes shared by four and, of these, halves shared by two; sorted."""
    g = np.random.default_rng(seed)
    rows = []
    for _ in range(groups):
        prompt = g.integers(5, 60, g.integers(20, 200))
        for _ in range(2):
            turn = np.append(prompt, g.integers(5, 60, g.integers(1, 60)))
            rows += [np.append(turn, g.integers(5, 60, g.integers(1, 40))) for _ in "ab"]
    return sorted(rows, key=tuple)


@hypothesis.settings(deadline=None)
@hypothesis.example([(12, 0), (12, 0)])  # two in one only if attention is cheap
@hypothesis.given(st.lists(SIZES, min_size=1, max_size=8))
def test_packing_is_the_cheapest_of_all_cuts(sizes):
    lengths = [length for length, _ in sizes]
    shared = [min(s, a, b) for (b, s), a in zip(sizes, [0, *lengths[:-1]], strict=True)]
    budget, n = 64, len(sizes)

    def cost(trees: list[tuple[int, int]]) -> float:
        tokens = [sum(lengths[a:b]) - sum(shared[a + 1 : b]) for a, b in trees]
        if any(b - a > 1 and budget < T for (a, b), T in zip(trees, tokens, strict=True)):
            return float("inf")
        return sum(budget / 32 + T + T**2 / (3 * budget) for T in tokens)

    def cuts(start: int) -> list[list[tuple[int, int]]]:
        ends = range(start + 1, n + 1)
        return [[(start, end), *rest] for end in ends for rest in cuts(end)] if start < n else [[]]

    assert cost(passes.pack(lengths, shared, budget)) == pytest.approx(min(map(cost, cuts(0))))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 640, 700])
def test_the_block_mask_is_the_dense_mask(length):
    skipped, taken_whole, size = 0, 0, (1, 1, length, length)
    for seed in range(4):
        (tree,) = passes.tree_passes(conversations(6, seed), [0] * 24, 10**6)
        ends = tree.ends[:length].clamp(max=length)
        ours, dense = passes.tree_blocks(ends, "cpu"), passes.tree_mask(ends, torch.float32)
        sees = create_mask(ours.mask_mod, *size, device="cpu")
        assert torch.equal(sees, dense == 0)
        made, taken = create_block_mask(ours.mask_mod, *size, device="cpu"), ours.to_dense()[0, 0]
        assert ours.shape == made.shape and torch.equal(taken, made.to_dense()[0, 0])
        skipped += int((torch.ones_like(taken).tril() - taken).sum())
        for query, number in enumerate(ours.full_kv_num_blocks[0, 0].tolist()):
            for key in ours.full_kv_indices[0, 0, query, :number]:  # without asking the mask
                assert sees[0, 0, 128 * query :, 128 * key : 128 * key + 128][:128].all()
                taken_whole += 1
    assert length < 640 or (skipped and taken_whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", models.TREE_KINDS, indirect=True)
def test_rows_are_those_of_one_at_a_time_and_a_wrong_block_mask_stops_the_run(engine, monkeypatch):
    rows, right = [], passes.tree_blocks
    for method, flex in (("single", False), ("tree", False), ("tree", True)):
        engine.method, engine.flex = method, flex
        rows.append(engine.embed(conversations(2), NO_BAR))
        assert engine.flex == flex and engine.model.config._attn_implementation == "sdpa"
    length = float(rows[0].norm(dim=1).min())
    for other in rows[:2]:
        assert float((rows[2] - other).norm(dim=1).max()) < 1e-5 * length
    causal = mock.Mock(side_effect=lambda ends, device: right(0 * ends + len(ends), device))
    monkeypatch.setattr(reward_model, "tree_blocks", causal)
    engine.checked = False
    with pytest.raises(InputError, match="--method single"):
        engine.embed(conversations(1), NO_BAR)


def test_where_flexattention_cannot_run_trees_take_the_dense_mask(engine, monkeypatch, caplog):
    def fails(*_: Any) -> None:
        raise problem

    dense = engine.embed(conversations(2), NO_BAR)
    monkeypatch.setattr(reward_model, "tree_blocks", fails)
    caplog.clear()
    engine.flex, problem = True, NotImplementedError("no kernel\nfor this card")
    assert torch.equal(engine.embed(conversations(2), NO_BAR), dense)
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1 and warned[0].endswith("NotImplementedError: no kernel")
    assert not engine.flex
    engine.flex, problem = True, torch.cuda.OutOfMemoryError("full")  # which is no reason for it
    with pytest.raises(InputError, match="do not fit into .* lower --max-length"):
        engine.embed(conversations(2), NO_BAR)
    assert engine.flex and engine.batch_tokens < 300
