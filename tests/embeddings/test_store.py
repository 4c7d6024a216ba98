"""Embeddings equal those of plain transformers, whatever computes, kills or shares the run."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import models
import running
from lore.common.files import InputError, digest
from lore.embeddings import prefix_trees as passes
from lore.embeddings import reward_model
from lore.embeddings import store as embeddings
from lore.embeddings.reward_model import render
from lore.embeddings.store import embed, open_store

ROOT = Path(__file__).resolve().parents[2]
MODELS = models.TREE_KINDS | {
    "llama, pad is eos": lambda folder: models.tiny_llama(folder, pad_is_eos=True),
    "sliding window": models.sliding_window,
}
METHODS = {
    "auto": {},
    "tree, small rows": {"batch_tokens": 120, "shard_size": 5},
    "tree, eager": {"attention": "eager"},
    "sorted": {"method": "sorted"},
    "single": {"method": "single"},
}


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def some_chats() -> list[list[dict[str, str]]]:
    """Shared prompts, a dialogue's turns, a duplicate and text outside ASCII."""
    prompts = ["Hello there", "Hello then, who?", "Что?"]
    answers = ["yes", "yes, of course", "no " * 20, "ok 👍"]
    chats = [chat(prompt, answer) for prompt in prompts for answer in answers]
    chats += [chat("Hello there", "yes", "Why?", end) for end in ("So.", "So that you know.")]
    return [*chats, chats[3]]


def plain_rows(model: Path, chats: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One conversation at a time through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    body = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).base_model
    rows = []
    for each in chats:
        ids = tokenizer.apply_chat_template(each, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            rows.append(body(ids["input_ids"]).last_hidden_state[0, -1])
    return torch.stack(rows).float()


def distance(rows: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two rows, as a share of the row."""
    return float(((rows - other).norm(dim=1) / other.norm(dim=1)).max())


def all_rows(store: embeddings.Store) -> torch.Tensor:
    return store.rows(torch.arange(len(store)))


def contents(folder: Path) -> dict[str, bytes]:
    """Its files, but for the note on when they were written."""
    files = [path for path in sorted(folder.iterdir()) if embeddings.VERIFIED not in path.name]
    return {path.name: path.read_bytes() for path in files}


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("embeddings-*.safetensors"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the subprocesses: sums may differ in the last bit with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def quiet(llama: Path) -> dict[str, Any]:
    """Settings of most runs: several shards, no bar."""
    return {"model": str(llama), "shard_size": 4, "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quiet: dict[str, Any]) -> Path:
    """Finished embeddings, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    embed(some_chats(), folder, **quiet)
    return folder


@pytest.fixture
def finished(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "finished"))


# ------------------------------------------------------------------- The same rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_method_gives_the_rows_of_plain_transformers(kind, tmp_path):
    model, chats = MODELS[kind](tmp_path / "model"), some_chats()
    expected = plain_rows(model, chats)
    for name, settings in METHODS.items():
        store = embed(chats, tmp_path / name, model=str(model), progress=False, **settings)
        assert distance(all_rows(store), expected) < 1e-5, name


def test_batching_adds_no_error_to_bfloat16s_own(llama, tmp_path):
    chats, settings = some_chats(), {"dtype": "bfloat16", "progress": False}
    exact = plain_rows(llama, chats)
    own = distance(plain_rows(llama, chats, torch.bfloat16), exact)
    for method in ("tree", "sorted"):
        store = embed(chats, tmp_path / method, model=str(llama), method=method, **settings)
        assert store.manifest["dtype"] == "bfloat16"
        assert 1e-3 < distance(all_rows(store), exact) < 1.5 * own


def test_head_is_the_models_own_and_gives_its_logits(llama, finished):
    store = open_store(finished)
    model = AutoModelForSequenceClassification.from_pretrained(llama)
    assert torch.equal(store.head, model.score.weight[0])
    down = model.model.layers[-1].mlp.down_proj.weight
    assert torch.equal(store.last_linear, down[:, 0])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = torch.tensor([render(tokenizer, some_chats()[2])])
    logit = model(ids).logits[0, 0]
    assert all_rows(store)[2] @ store.head == pytest.approx(logit.item(), rel=1e-4)


def _first_token(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
    return _logits(self, self.model(input_ids).last_hidden_state[:, 0])


def _squashed(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
    return _logits(self, self.model(input_ids).last_hidden_state[:, -1].tanh())


def _logits(self: Any, states: torch.Tensor) -> Any:
    return type("Output", (), {"logits": self.score(states)})


def _causal(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((len(ends), len(ends)), torch.finfo(dtype).min).triu(1)[None, None]


FORWARD = "transformers.LlamaForSequenceClassification.forward"


@pytest.mark.parametrize(
    ("what", "wrong", "message"),
    [
        (FORWARD, _first_token, "pools token 1 of"),
        (FORWARD, _squashed, "score head times the last hidden state"),
        ("lore.embeddings.reward_model.tree_mask", _causal, "--method single"),
    ],
)
def test_another_pooling_head_or_mask_stops_the_run(
    what, wrong, message, monkeypatch, tmp_path, quiet
):
    monkeypatch.setattr(what, wrong)
    with pytest.raises(InputError, match=message):
        embed(some_chats(), tmp_path / "out", **quiet)


def test_infinite_embeddings_are_refused(monkeypatch, tmp_path, quiet):
    monkeypatch.setattr(reward_model.Engine, "_check", lambda *_: None)
    forward = reward_model.Engine._forward
    monkeypatch.setattr(reward_model.Engine, "_forward", lambda *a: forward(*a) / 0)
    with pytest.raises(InputError, match="--dtype"):
        embed(some_chats(), tmp_path / "out", **quiet)


# ------------------------------------------------------------------------- Pooling


def plain_means(model: Path, chats: list, layer: int = -1, most: int = 10**6) -> torch.Tensor:
    """Means over the response alone, one conversation at a time through transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    body = AutoModelForSequenceClassification.from_pretrained(model).base_model
    rows = []
    for each in chats:
        ids = tokenizer.apply_chat_template(each)["input_ids"]
        before = tokenizer.apply_chat_template(each[:-1], add_generation_prompt=True)["input_ids"]
        gone = max(len(ids) - most, 0)
        ids = torch.tensor([ids[:1] + ids[1 + gone :]])
        with torch.inference_mode():
            states = body(ids, output_hidden_states=True).hidden_states[layer]
        rows.append(states[0, max(len(before) - gone, 1) :].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize(("pool", "layer"), [("mean", -1), ("layer:2", 2)])
def test_the_mean_over_the_response_is_that_of_plain_transformers(
    pool, layer, llama, tmp_path, caplog
):
    expected = plain_means(llama, some_chats(), layer)
    for name in ("auto", "tree, small rows", "sorted", "single"):
        settings = METHODS[name] | {"model": str(llama), "pool": pool, "progress": False}
        store = embed(some_chats(), tmp_path / name, **settings)
        assert distance(all_rows(store), expected) < 1e-5, name
    assert store.manifest["pool"] == pool and store.manifest["reference"] == "none"
    assert store.head is None and store.last_linear is None
    assert f"--pool {pool}: a score head reads the last token" in caplog.text


def test_of_a_cut_response_the_rest_is_averaged(quiet, tmp_path):
    chats = [chat("Short", "one"), chat("Hello " * 9, "no " * 20)]
    settings = {**quiet, "pool": "mean", "max_length": 40}
    store = embed(chats, tmp_path / "out", **settings)
    expected = plain_means(Path(quiet["model"]), chats, most=40)
    assert store.manifest["num_truncated"] == 1
    assert distance(all_rows(store), expected) < 1e-5
    right = embed(chats, tmp_path / "right", **settings, truncation_side="right")
    last = embed(chats, tmp_path / "last", **settings | {"pool": "last"}, truncation_side="right")
    assert torch.equal(all_rows(right)[1], all_rows(last)[1])  # nothing is left of the response


def test_the_same_tokens_with_another_response_are_another_row(quiet, tmp_path):
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    chats = [chat("Hi", f"yes{header}no"), [*chat("Hi", "yes"), *chat("", "no")[1:]]]
    rows = all_rows(embed(chats, tmp_path / "mean", **quiet, pool="mean"))
    assert distance(rows, plain_means(Path(quiet["model"]), chats)) < 1e-5
    assert not torch.allclose(rows[0], rows[1])
    last = all_rows(embed(chats, tmp_path / "last", **quiet))
    assert torch.equal(last[0], last[1])


@pytest.mark.parametrize("pool", ["layer:4", "layer:0", "layer:x", "first:1", "median"])
def test_a_layer_that_is_not_there_is_refused(pool, quiet, tmp_path):
    with pytest.raises(InputError, match=f"--pool {pool}: .* has layers 1 to 3"):
        embed(some_chats(), tmp_path / "out", **quiet, pool=pool)
    with pytest.raises(InputError, match=f"--pool {pool}"):
        embeddings.check_model({"model": quiet["model"], "pool": pool})


# ---------------------------------------------------------------------------- Text


def test_one_bos_whether_template_or_tokenizer_writes_it(llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    text = reward_model.render_text(tokenizer, chat("Hi"))
    assert text == expected
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2  # the trap
    ids = render(tokenizer, chat("Hi"))
    assert tokenizer.decode(ids) == expected
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert render(tokenizer, chat("Hi")) == ids
    tokenizer.chat_template = "{{ bos_token }}" * 3 + tokenizer.chat_template
    assert render(tokenizer, chat("Hi")) == ids


def test_no_bos_where_the_model_has_none(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models.tiny_qwen(tmp_path))
    ids = render(tokenizer, chat("Hi", "you"))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n"
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_conversations_are_cut_and_counted(side, tmp_path, quiet):
    tokenizer = AutoTokenizer.from_pretrained(quiet["model"])
    chats = [chat("Short", "one"), chat("Long " * 30, "the end")]
    ids = [render(tokenizer, each) for each in chats]
    cut = [ids[1][0], *ids[1][-39:]] if side == "left" else ids[1][:40]
    store = embed(chats, tmp_path / "out", **quiet, max_length=40, truncation_side=side)
    assert store.manifest["num_truncated"] == 1
    assert store.manifest["tokens_given"] == len(ids[0]) + 40
    model = AutoModelForSequenceClassification.from_pretrained(quiet["model"])
    expected = model.base_model(torch.tensor([cut])).last_hidden_state[:, -1].detach()
    assert distance(store.rows(torch.tensor([1])), expected) < 1e-5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{"role": "user", "content": ["a", "b"]}], "conversation 1, message 0: content .* list"),
        ([*chat("a"), {"role": "assistant", "content": None}], "message 1: content .* NoneType"),
        ([{"content": "a"}], "conversation 1, message 0: role .* NoneType"),
        (["a"], "conversation 1, message 0: expected role and content"),
        ("text", "conversation 1: expected a list"),
        (None, "conversation 1: expected a list"),
        ([], "conversation 1 has no messages"),
        (chat("\ud83d"), "conversation 1, message 0: content .* surrogate"),
    ],
)
def test_what_is_not_text_is_refused_by_row(bad, message, tmp_path, quiet):
    with pytest.raises(InputError, match=message):
        embed([chat("a", "b"), bad], tmp_path / "out", **quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, "no/such-model cannot be loaded"),
        ({"device": "cuda:99"}, "--device cuda:99: not available here"),
        ({"shard": "3/2"}, "--shard 3/2"),
        ({"shard": "one"}, "--shard one"),
        ({"batch_tokens": -1}, "positive"),
        ({"max_length": 0}, "positive"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        embed(some_chats(), tmp_path / "out", **{**quiet, **settings})


def test_no_template_and_a_refusing_template_are_named(tmp_path):
    model = models.tiny_llama(tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        embed(some_chats(), tmp_path / "out", model=str(model))
    template.unlink()
    with pytest.raises(InputError, match="--tokenizer"):
        embed(some_chats(), tmp_path / "out", model=str(model))


# ------------------------------------------------------------------- Once, not twice


def test_shared_tokens_and_duplicates_are_computed_once_and_counted(llama, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lore")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = [tuple(render(tokenizer, each)) for each in some_chats()]
    prefixes = {each[: i + 1] for each in ids for i in range(len(each))}
    settings = {"model": str(llama), "batch_tokens": 10**6, "progress": False}
    manifest = embed(some_chats(), tmp_path / "out", **settings).manifest
    assert manifest["tokens_given"] == sum(map(len, ids))
    assert manifest["tokens_computed"] == len(prefixes)
    assert (manifest["num_conversations"], manifest["num_distinct"]) == (15, 14)
    expected = f"15 conversations, 14 distinct, 0 cut, {manifest['tokens_given']} tokens; "
    expected += f"now {manifest['tokens_computed']} tokens computed"
    assert caplog.messages[-1].startswith(expected)


token_lists = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=8
)


@hypothesis.settings(deadline=None)
@hypothesis.given(token_lists)
def test_tree_mask_lets_a_token_see_its_ancestors_only(lists):
    tokens = [np.array(ids) for ids in sorted(set(lists))]
    shared = [0] + [passes.shared_prefix(a, b) for a, b in zip(tokens, tokens[1:])]  # noqa: B905
    starts = [len(ids) // 2 for ids in tokens]
    tree = passes.tree_pass(list(range(len(tokens))), tokens, starts, shared)
    sees = passes.tree_mask(tree.ends, torch.float32)[0, 0] == 0
    pooled = tree.pooled[1].split(tree.counts.tolist())
    for row, start, places in zip(tokens, starts, pooled, strict=True):
        path = sees[places[-1]].nonzero()[:, 0]
        assert path[start:].tolist() == places.tolist()
        assert tree.ids[0, path].tolist() == row.tolist()
        assert tree.positions[0, path].tolist() == list(range(len(row)))
    assert len(tree.ends) == len({ids[: i + 1] for ids in lists for i in range(len(ids))})


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=8)
)
def test_packing_is_the_cheapest_of_all_cuts(sizes):
    lengths = [length for length, _ in sizes]
    shared = [min(s, a, b) for (b, s), a in zip(sizes, [0, *lengths[:-1]], strict=True)]
    budget, n = 64, len(sizes)

    def tokens(start: int, stop: int) -> int:
        return sum(lengths[start:stop]) - sum(shared[start + 1 : stop])

    def cost(trees: list[tuple[int, int]]) -> float:
        if any(b - a > 1 and tokens(a, b) > budget for a, b in trees):
            return float("inf")
        return sum(budget / 32 + tokens(*t) + tokens(*t) ** 2 / (3 * budget) for t in trees)

    def cuts(start: int) -> list[list[tuple[int, int]]]:
        ends = range(start + 1, n + 1)
        return [[(start, end), *rest] for end in ends for rest in cuts(end)] if start < n else [[]]

    found = passes.pack(lengths, shared, budget)
    assert cost(found) == pytest.approx(min(map(cost, cuts(0))))


ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("make", "method", "why"),
    [
        (models.tiny_llama, "tree", "shared prefixes"),
        (models.sliding_window, "sorted", "sliding window"),
        (partial(models.tiny_llama, rope_parameters=ROPE), "single", "depends on the batch"),
    ],
)
def test_method_is_chosen_by_architecture_and_said(make, method, why, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = {"model": str(make(tmp_path / "model")), "progress": False}
    assert embed(some_chats(), tmp_path / "out", **settings).manifest["method"] == method
    assert why in caplog.text
    if method != "tree":
        with pytest.raises(InputError, match=why):
            embed(some_chats(), tmp_path / "forced", **settings, method="tree")


@pytest.mark.parametrize("method", ["tree", "sorted"])
def test_full_gpu_memory_halves_the_batches(method, tmp_path, quiet, monkeypatch, caplog):
    forward, sizes = reward_model.Engine._forward, []

    def limited(self: Any, step: Any) -> torch.Tensor:
        sizes.append(step.ids.numel())
        if step.ids.numel() > 200:
            raise torch.cuda.OutOfMemoryError("full")
        return forward(self, step)

    monkeypatch.setattr(reward_model.Engine, "_forward", limited)
    quiet = {**quiet, "method": method, "shard_size": 50}
    store = embed(some_chats(), tmp_path / "out", **quiet, batch_tokens=1000)
    assert max(sizes) > 200 >= sizes[-1]
    assert distance(all_rows(store), plain_rows(Path(quiet["model"]), some_chats())) < 1e-5
    warnings = [line for line in caplog.messages if "memory is full" in line]
    lower = int(warnings[-1].split()[-1])  # as --batch-tokens in the warning
    smaller = embed(some_chats(), tmp_path / "smaller", **quiet, batch_tokens=lower)
    assert contents(store.folder) == contents(smaller.folder)
    long = [chat("Long " * 60, "end")]
    monkeypatch.setattr(reward_model.Engine, "_forward", limited)
    with pytest.raises(InputError, match="--max-length"):
        embed(long, tmp_path / "long", **quiet)


# ------------------------------------------------------------------------- On disk


def test_files_and_manifest(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    shards = shards_of(finished)
    assert [name[:17] for name in shards] == [f"embeddings-0000{i}-" for i in (1, 2, 3, 4)]
    files = {*shards, "index.safetensors", "head.safetensors"}
    assert set(contents(finished)) == {*files, "manifest.json"}
    assert {path: hashlib.sha256((finished / path).read_bytes()).hexdigest() for path in files} == (
        manifest["files"]
    )
    assert manifest["conversations_sha256"] == digest(some_chats())
    assert (manifest["num_features"], manifest["pool"]) == (32, "last")


def test_reading_maps_the_shards_and_takes_any_rows(finished):
    store = open_store(finished)
    assert (len(store), store.num_features) == (15, 32)
    index = torch.tensor([14, 0, 3, 3, 9])
    rows = store.rows(index)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, all_rows(store)[index])
    assert torch.equal(rows[0], rows[2])  # the duplicate
    assert store.rows(torch.tensor([], dtype=torch.long)).shape == (0, 32)
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert str(finished / shards_of(finished)[1]) in maps


def test_the_store_knows_its_conversations(finished):
    open_store(finished).check(digest(some_chats()))
    with pytest.raises(InputError, match="other conversations"):
        open_store(finished).check(digest(some_chats()[::-1]))


@pytest.mark.parametrize("name", ["second shard", "index", "head", "manifest"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_files_are_made_again(name, damage, finished, quiet):
    before = contents(finished)
    name = shards_of(finished)[1] if name == "second shard" else name
    name = next(file for file in before if file.startswith(name))
    data, path = before[name], finished / name
    path.unlink()
    if damage == "flip":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    message = "no finished" if (name, damage) == ("manifest.json", "remove") else name
    with pytest.raises(InputError, match=message):
        open_store(finished)
    embed(some_chats(), finished, **quiet)
    assert contents(finished) == before


def _other_template(folder: Path) -> Path:
    model = models.tiny_llama(folder)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + " ")
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: {"model": str(models.tiny_llama(folder, seed=1))}, "weights_sha256"),
        (lambda folder: {"tokenizer": str(_other_template(folder))}, "template_sha256"),
        (lambda folder: {"max_length": 30}, "max_length = 2048, but 30 is asked for"),
        (lambda folder: {"dtype": "bfloat16"}, "dtype = float32"),
        (lambda folder: {"pool": "mean"}, "pool = last, but mean is asked for"),
    ],
)
def test_a_store_of_something_else_is_refused(change, message, finished, quiet, tmp_path):
    before = contents(finished)
    with pytest.raises(InputError, match=message):
        embed(some_chats(), finished, **{**quiet, **change(tmp_path / "other")})
    (finished / "manifest.json").unlink()
    with pytest.raises(InputError, match="belongs to other embeddings"):
        embed(some_chats(), finished, **{**quiet, **change(tmp_path / "other")})
    del before["manifest.json"]
    assert contents(finished) == before


def test_foreign_shards_are_refused(finished, quiet, tmp_path):
    embed(some_chats(), tmp_path / "other", **quiet, max_length=30)
    name = shards_of(tmp_path / "other")[0]
    (tmp_path / "other" / name).replace(finished / name)
    with pytest.raises(InputError, match=name):
        embed(some_chats(), finished, **quiet)


# ----------------------------------------------------------------- Other conversations


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many conversations went through the model, each time that it was called."""
    counts, plain = [], reward_model.Engine.embed

    def counted(self: Any, tokens: list, *given: Any) -> torch.Tensor:
        counts.append(len(tokens))
        return plain(self, tokens, *given)

    monkeypatch.setattr(reward_model.Engine, "embed", counted)
    return counts


def test_a_row_more_embeds_its_texts_alone(quiet, finished, tmp_path, embedded, caplog):
    caplog.set_level(logging.INFO, logger="lore")
    before = contents(finished)
    more = [chat("Hello there", "yes, and no"), *some_chats(), chat("A new one", "yes")]
    store = embed(more, finished, **quiet)
    assert embedded == [2] and "14 of 16 distinct conversations are there and" in caplog.text
    after = contents(finished)
    assert {name: after[name] for name in shards_of(finished) if name in before} == {
        name: data for name, data in before.items() if name.startswith("embeddings-")
    }
    again = embed(more, tmp_path / "again", **quiet)
    assert embedded == [2, 4, 4, 4, 4]
    assert distance(all_rows(store), all_rows(again)) < 1e-5
    assert torch.equal(all_rows(store)[1:-1], all_rows(embed(some_chats(), finished, **quiet)))
    assert embedded == [2, 4, 4, 4, 4] and contents(finished) == after | {
        name: before[name] for name in ("index.safetensors", "manifest.json")
    }


def test_a_finished_run_other_order_and_fewer_texts_load_no_model(quiet, finished, monkeypatch):
    before, rows = contents(finished), all_rows(open_store(finished))
    monkeypatch.setattr(embeddings, "load_engine", lambda *_: pytest.fail("loaded a model"))
    assert len(embed(some_chats(), finished, **quiet)) == 15 and contents(finished) == before
    assert torch.equal(all_rows(embed(some_chats()[::-1], finished, **quiet)), rows.flip(0))
    store = embed(some_chats()[:3], finished, **quiet | {"shard_size": 9})
    assert torch.equal(all_rows(store), rows[:3]) and store.manifest["num_distinct"] == 3


def test_new_texts_take_a_killed_run_into_account(quiet, tmp_path, embedded, monkeypatch):
    more = [*some_chats(), *(chat("More", "yes " * i) for i in range(1, 7))]
    whole = tmp_path / "whole"
    for chats in (some_chats(), more):
        embed(chats, whole, **quiet)
    assert embedded == [4, 4, 4, 2, 4, 2]
    folder, plain = tmp_path / "killed", embeddings._write
    embed(some_chats(), folder, **quiet)

    def killed(path: Path, data: bytes) -> None:
        plain(path, data)
        if path.name.startswith("embeddings-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(more, folder, **quiet)
    assert len(open_store(folder)) == 15  # what was there is there still
    monkeypatch.setattr(embeddings, "_write", plain)
    embed(more, folder, **quiet)
    assert embedded[6:] == [4, 4, 4, 2, 4, 2] and contents(folder) == contents(whole)


def test_a_local_model_is_known_by_its_files_and_by_a_path_that_holds_everywhere(
    finished, quiet, tmp_path, llama, monkeypatch
):
    (tmp_path / "moved").symlink_to(llama)
    embed(some_chats(), finished, **{**quiet, "model": str(tmp_path / "moved")})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    near = {"model": os.path.relpath(llama), "tokenizer": os.path.relpath(llama)}
    manifest = embed(some_chats(), tmp_path / "out", **{**quiet, **near}).manifest
    assert (manifest["model"], manifest["tokenizer"]) == (str(llama), str(llama))


def test_two_processes_may_complete_the_manifest_at_once(tmp_path, quiet, finished, monkeypatch):
    whole, replace = contents(finished), os.replace

    def beaten(draft: Path, path: Path) -> None:
        if path.name == "manifest.json" and b'"complete": true' in draft.read_bytes():
            path.write_bytes(whole["manifest.json"])  # the other is done, and tidied up
            draft.unlink()
        replace(draft, path)

    monkeypatch.setattr(os, "replace", beaten)
    assert len(embed(some_chats(), tmp_path / "out", **quiet)) == 15
    assert contents(tmp_path / "out") == whole


def test_a_full_disk_keeps_what_is_done(tmp_path, quiet, finished, monkeypatch):
    synced, fsync = [], os.fsync

    def full(file: int) -> None:
        synced.append(file)
        if len(synced) > 4:  # manifest, head and two shards are done
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="embeddings-00003.* No space left on device"):
        embed(some_chats(), tmp_path / "out", **quiet)
    assert len(contents(tmp_path / "out")) == 4
    monkeypatch.undo()
    embed(some_chats(), tmp_path / "out", **quiet)
    assert contents(tmp_path / "out") == contents(finished)


# --------------------------------------------------------------- Killed, or in parts

FORKED = """
import os, signal, sys, threading
from functools import cache
import torch
from tqdm import tqdm
import test_store
from lore.embeddings import store as embeddings
from lore.embeddings import reward_model

for name in ("load_config", "load_tokenizer", "load_engine"):  # once for all children
    setattr(embeddings, name, cache(getattr(embeddings, name)))
folder, model, points = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)  # a forked child cannot use its parent's threads
tqdm.set_lock(threading.RLock())  # its own is shared by all children: who is killed keeps it
steps, limit = 0, None

def step(function):
    def counted(*arguments):
        global steps
        steps += 1
        if steps == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted

def run(out):
    embeddings.embed(test_store.some_chats(), out, model=model, shard_size=4, progress=False)

for owner, name in [(os, "fsync"), (os, "replace"), (reward_model.Engine, "_forward")]:
    setattr(owner, name, step(getattr(owner, name)))
run(folder + "/whole")
total = steps

def two(out, killed=None, point=0):
    # One is killed at a step, and then the other, as torchrun does.
    global steps, limit
    os.environ["WORLD_SIZE"], ranks = "2", []
    for rank in range(2):
        os.environ["RANK"] = str(rank)
        ranks.append(os.fork())
        if not ranks[-1]:
            steps, limit = 0, point if rank == killed else None
            run(out)
            open(f"{folder}/steps-{rank}", "w").write(str(steps))
            os._exit(0)
    del os.environ["WORLD_SIZE"], os.environ["RANK"]
    if killed is None:
        assert [os.waitpid(child, 0)[1] for child in ranks] == [0, 0]
        return
    assert os.waitstatus_to_exitcode(os.waitpid(ranks.pop(killed), 0)[1]) == -signal.SIGKILL
    os.kill(ranks[0], signal.SIGKILL)
    os.waitpid(ranks[0], 0)

two(folder + "/two")
both = [int(open(f"{folder}/steps-{rank}").read()) for rank in range(2)]
for point in range(points):  # who writes what both need is a race, so the last steps may not come
    killed = point % 2
    two(f"{folder}/both-{point}", killed, 1 + point * both[killed] * 2 // (3 * points))
    two(f"{folder}/both-{point}")
for point in range(points):
    steps, limit = 0, 1 + point * (total - 1) // (points - 1)
    child = os.fork()
    if not child:
        run(f"{folder}/killed-{point}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Embeddings of an undisturbed process, of two at a time, and of 20 of each that were killed;
    the pairs have gone on."""
    folder = tmp_path_factory.mktemp("forked")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
           "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    command = [sys.executable, "-c", FORKED, str(folder), str(llama), "20"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(forked, llama):
    whole, states = contents(forked / "whole"), set()
    for point in range(20):
        folder = forked / f"killed-{point}"
        states.add(len(list(folder.iterdir())))
        if point < 19:  # the last kill falls into the note on checksums, when all is written
            with pytest.raises(InputError, match="no finished embeddings"):
                open_store(folder)
        embed(some_chats(), folder, model=str(llama), shard_size=4, progress=False)
        assert contents(folder) == whole
    assert len(states) > 4


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_killed_or_not(forked, made):
    for name in ("two", *(f"both-{point}" for point in range(20))):
        assert contents(forked / name) == contents(made), name


def test_parts_of_a_job_array_complete_each_other(tmp_path, quiet, finished, monkeypatch):
    folder = tmp_path / "parts"
    assert embed(some_chats(), folder, **quiet, shard="2/3") is None
    assert shards_of(folder) == shards_of(finished)[1:2]
    with pytest.raises(InputError, match="no finished embeddings"):
        open_store(folder)
    assert embed(some_chats(), folder, **quiet, shard="3/3") is None
    monkeypatch.setenv("WORLD_SIZE", "2")  # two ranks in the last part: six workers in all
    monkeypatch.setenv("RANK", "0")
    assert embed(some_chats(), folder, **quiet, shard="1/3") is None
    monkeypatch.undo()
    assert len(embed(some_chats(), folder, **quiet, shard="1/3")) == 15
    assert contents(folder) == contents(finished)


# ------------------------------------------------------------------- The benchmark


@pytest.mark.slow
def test_the_benchmark_prints_its_cases(llama):
    sizes = ["--posts=2", "--dialogues=2", "--prompts=2", "--prism=2", "--parts=1"]
    done = running.invoke("benchmarks/embedding.py", {"model": llama}, *sizes)
    assert done.status == 0, done.err
    rows = [line.strip("|").split("|") for line in done.out.splitlines() if line.startswith("|")]
    cases = [row[0].strip()[:1] for row in rows]
    assert cases[:5] == ["", "-", "a", "b", "c"]
    assert cases[5:] in ([], ["d"])  # of people's data, where these are there
    names = [name.strip() for name in rows[0]]
    for row in rows[2:5]:
        number = dict(zip(names[1:], map(float, row[1:]), strict=True))
        assert number["given / computed"] == pytest.approx(
            number["given"] / number["computed"], rel=2e-3
        )
        assert number["given"] > number["computed"] > 0
        assert number["ours / floor"] > 0 and number["deviation"] < 1e-5


# --------------------------------------------------------------------- A real model


@pytest.mark.slow
def test_smollm2_rows_equal_one_at_a_time(tmp_path):
    model = models.smollm2(tmp_path / "model")
    store = embed(some_chats(), tmp_path / "out", model=str(model), progress=False)
    assert store.manifest["method"] == "tree"
    assert store.manifest["tokens_given"] > 2 * store.manifest["tokens_computed"]
    assert distance(all_rows(store), plain_rows(model, some_chats())) < 1e-5
    assert store.head is None  # it is no reward model, and has no reference


def edited(folder: Path, change: Any, **config: Any) -> Path:
    """A tiny Llama whose tensors, and config, are changed."""
    tensors = load_file(models.tiny_llama(folder) / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def few_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:120].clone()


REFUSED = {
    "fewer tokens than the tokenizer's": (
        lambda at: edited(at, few_rows, vocab_size=120), "the model knows 120 tokens only"
    ),
    "not finite": (
        lambda at: edited(at, lambda t: t["model.norm.weight"].fill_(math.nan)), "another --dtype"
    ),
    "another width": (
        lambda at: edited(at, lambda _: None, vocab_size=17),
        r"embed_tokens.weight is \[261, 32\], but \[17, 32\] by its config.json",
    ),
    "another head": (
        lambda at: edited(at, lambda t: t.update({"score.weight": torch.ones(1, 8)})),
        r"score.weight is \[1, 8\], but \[1, 32\] by its config.json",
    ),
    "fewer layers": (
        lambda at: edited(at, lambda _: None, num_hidden_layers=4),
        "its checkpoint lacks model.layers.3.input_layernorm.weight",
    ),
    "no folder": (lambda at: at / "missing", "there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_used_are_one_line(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        embed(some_chats(), tmp_path / "out", model=str(make(tmp_path / "model")), progress=False)


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["value_head.weight"] = tensors.pop("score.weight")


HEADS = {
    "none": (models.headless, "has no score head", "none"),
    "another name": (lambda at: edited(at, other_head), "value_head.weight is not used", "none"),
    "two outputs": (lambda at: models.tiny_llama(at, num_labels=2), "score head of 2 outputs",
                    "score head with 2 outputs"),
    "encoder": (lambda at: models.tiny_other(at, "Roberta"), "roberta models are encoders", "none"),
    "no sdpa": (lambda at: models.tiny_other(at, "Gemma2", sliding_window=8), "it takes eager",
                "score head with 1 outputs"),
    "fewer layers": (lambda at: edited(at, lambda _: None, num_hidden_layers=2),
                     "no place for: model.layers.2.input", "score head with 1 outputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_what_a_checkpoint_has_in_place_of_a_score_head_is_said(case, tmp_path, caplog, capfd):
    make, message, reference = HEADS[case]
    caplog.set_level("INFO")
    model = make(tmp_path / "model")
    capfd.readouterr()
    store = embed(some_chats(), tmp_path / "out", model=str(model), progress=False)
    assert message in caplog.text and store.manifest["reference"] == reference
    assert (store.head is None) == ("1" not in reference)
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err  # nor a bar in a file
    if case == "none":
        assert distance(all_rows(store), plain_rows(model, some_chats())) < 1e-5


@pytest.mark.slow
def test_a_read_only_disk_that_was_never_opened_is_read(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "embeddings"))
    (folder / embeddings.VERIFIED).unlink(missing_ok=True)
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount]).returncode:
        pytest.skip("read-only mounts cannot be made here")
    code = f"from lore.embeddings.store import *; print(len(open_store({str(folder)!r})))"
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    run = [*alone, f"{mount} && PYTHONPATH={ROOT} {sys.executable} {tmp_path}/script.py"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (str(len(some_chats())), 0), done.stderr
    assert not (folder / embeddings.VERIFIED).exists()
