"""Embeddings equal those of plain transformers, whatever computes, kills or shares the run."""

import errno
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import killed
import models
import running
from lore.common.files import InputError, digest
from lore.embeddings import reward_model
from lore.embeddings import store as embeddings
from lore.embeddings.reward_model import Engine, render
from lore.embeddings.store import Store, embed

ROOT = Path(__file__).resolve().parents[2]
MODELS = models.TREE_KINDS | {
    "llama, pad is eos": partial(models.tiny_llama, pad_is_eos=True),
    "sliding window": models.sliding_window,
    "SmolLM2": partial(models.smollm2, layers=6),
}
METHODS = {
    "auto": {"shard_size": 512},
    "tree, small rows": {"batch_tokens": 120, "shard_size": 5},
    "tree, eager": {"attention": "eager", "shard_size": 512},
    "sorted": {"method": "sorted", "shard_size": 512},
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


def plain_rows(
    model: Path, chats: list, dtype: torch.dtype = torch.float32,
    layer: int = -1, mean: bool = False, most: int = 10**6,
) -> torch.Tensor:  # fmt: skip
    """One conversation at a time through transformers alone: the last token's state, or the mean
    over the response, of conversations cut on the left."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    body = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).base_model
    rows = []
    for each in chats:
        ids = tokenizer.apply_chat_template(each)["input_ids"]
        before = tokenizer.apply_chat_template(each[:-1], add_generation_prompt=True)["input_ids"]
        gone = max(len(ids) - most, 0)
        ids = torch.tensor([ids[:1] + ids[1 + gone :]])
        with torch.inference_mode():
            states = body(ids, output_hidden_states=True).hidden_states[layer][0]
        rows.append(states[max(len(before) - gone, 1) :].mean(0) if mean else states[-1])
    return torch.stack(rows).float()


def distance(rows: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two rows, as a share of the row."""
    return float(((rows - other).norm(dim=1) / other.norm(dim=1)).max())


def all_rows(store: Store) -> torch.Tensor:
    return store.rows(torch.arange(len(store)))


def contents(folder: Path) -> dict[str, bytes]:
    """Its files, but for the note on when they were written."""
    files = [path for path in sorted(folder.iterdir()) if embeddings.VERIFIED not in path.name]
    return {path.name: path.read_bytes() for path in files}


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("embeddings-")}


def edited(folder: Path, changes: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """A tiny Llama with other tensors, without those that are None, and with another config."""
    tensors = load_file(models.tiny_llama(folder) / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def templated(folder: Path, template: str) -> Path:
    """A tiny Llama with another chat template, or none."""
    path = models.tiny_llama(folder) / "chat_template.jinja"
    path.write_text(template) if template else path.unlink()
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the subprocesses: sums may differ in the last bit with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Finished embeddings, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    embed(some_chats(), folder, model=str(model), shard_size=4, progress=False)
    return folder


@pytest.fixture
def finished(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "finished"))


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., Store | None]:
    """Embeds some conversations in a folder of the test: in several shards, without a bar."""

    def run(name: str = "out", chats: list | None = None, **given: Any) -> Any:
        settings = {"shard_size": 4, "progress": False, **given}
        settings["model"] = str(given.get("model", model))
        return embed(chats or some_chats(), tmp_path / name, **settings)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_method_gives_the_rows_of_plain_transformers(kind, tmp_path, make):
    model = MODELS[kind](tmp_path / "model")
    expected = plain_rows(model, some_chats())
    for name, settings in METHODS.items():
        store = make(name, model=model, **settings)
        assert distance(all_rows(store), expected) < 1e-5, name


def test_batching_adds_no_error_to_bfloat16s_own(model, make):
    exact = plain_rows(model, some_chats())
    own = distance(plain_rows(model, some_chats(), torch.bfloat16), exact)
    for method in ("tree", "sorted"):
        store = make(method, method=method, dtype="bfloat16", shard_size=512)
        assert 1e-3 < distance(all_rows(store), exact) < 1.5 * own


def forward(read: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., SimpleNamespace]:
    """A model's forward pass that scores what is read of the last hidden state."""

    def run(self: Any, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.score(read(self.model(input_ids).last_hidden_state)))

    return run


FORWARD = "transformers.LlamaForSequenceClassification.forward"


def infinite(self: Any, step: Any, right: Any = Engine._forward) -> torch.Tensor:
    """Another row than that which is checked with the score head."""
    return right(self, step).index_fill(0, torch.tensor(0), math.inf)


@pytest.mark.parametrize(
    ("what", "wrong", "message"),
    [
        (FORWARD, forward(lambda states: states[:, 0]), "pools token 1 of"),
        (FORWARD, forward(lambda states: states[:, -1].tanh()), "score head times the last"),
        ("lore.embeddings.reward_model.Engine._forward", infinite, "--dtype"),
    ],
)
def test_another_pooling_or_head_stops_the_run(what, wrong, message, monkeypatch, make):
    monkeypatch.setattr(what, wrong)
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(("pool", "layer"), [("mean", -1), ("layer:2", 2)])
def test_the_mean_over_the_response_is_that_of_plain_transformers(pool, layer, model, make, caplog):
    expected = plain_rows(model, some_chats(), layer=layer, mean=True)
    for name in ("auto", "tree, small rows", "sorted", "single"):
        store = make(name, pool=pool, **METHODS[name])
        assert distance(all_rows(store), expected) < 1e-5, name
    assert store.manifest["pool"] == pool and store.manifest["reference"] == "none"
    assert store.head is None and store.last_linear is None
    assert f"--pool {pool}: a score head reads the last token" in caplog.text


def test_the_same_tokens_with_another_response_are_another_row(model, make):
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    chats = [chat("Hi", f"yes{header}no"), [*chat("Hi", "yes"), *chat("", "no")[1:]]]
    rows = all_rows(make("mean", chats, pool="mean"))
    assert distance(rows, plain_rows(model, chats, mean=True)) < 1e-5
    assert not torch.allclose(rows[0], rows[1])
    last = all_rows(make("last", chats))
    assert torch.equal(last[0], last[1])


def test_long_conversations_are_cut_on_either_side_and_counted(model, make):
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [chat("Short", "one"), chat("Hello " * 9, "no " * 20)]
    ids = [render(tokenizer, each) for each in chats]
    body = AutoModelForSequenceClassification.from_pretrained(model).base_model
    last = body(torch.tensor([ids[1][:40]])).last_hidden_state[:, -1].detach()
    for pool in ("last", "mean"):
        expected = plain_rows(model, chats, mean=pool == "mean", most=40)
        left = make(f"left, {pool}", chats, max_length=40, pool=pool)
        assert distance(all_rows(left), expected) < 1e-5
        right = make(f"right, {pool}", chats, max_length=40, pool=pool, truncation_side="right")
        assert distance(all_rows(right)[1:], last) < 1e-5  # nothing is left of the response
        for store in (left, right):
            assert store.manifest["num_truncated"] == 1
            assert store.manifest["tokens_given"] == len(ids[0]) + 40


def test_one_bos_whether_template_or_tokenizer_writes_it(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert tokenizer(expected)["input_ids"].count(tokenizer.bos_token_id) == 2  # the trap
    template = tokenizer.chat_template
    for number in (1, 0, 3):
        tokenizer.chat_template = template.replace("{{ bos_token }}", "{{ bos_token }}" * number)
        assert tokenizer.decode(render(tokenizer, chat("Hi"))) == expected
    without = AutoTokenizer.from_pretrained(models.tiny_qwen(tmp_path))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n"
    assert without.decode(render(without, chat("Hi", "you"))) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{"role": "user", "content": ["a", "b"]}], "conversation 1, message 0: content .* list"),
        ([*chat("a"), {"content": "a"}], "conversation 1, message 1: role .* NoneType"),
        (["a"], "conversation 1, message 0: expected role and content"),
        ("text", "conversation 1: expected a list"),
        (None, "conversation 1: expected a list"),
        ([], "conversation 1 has no messages"),
        (chat("\ud83d"), "conversation 1, message 0: content .* surrogate"),
    ],
)
def test_what_is_not_text_is_refused_by_row(bad, message, tmp_path, make):
    with pytest.raises(InputError, match=message):
        make("out", [chat("a", "b"), bad])
    assert not (tmp_path / "out").exists()


NAN, FEW = torch.full((32,), math.nan), torch.zeros(120, 32)
SCORE, EMBED = "score.weight", "model.embed_tokens.weight"
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
dynamic = partial(models.tiny_llama, rope_parameters=ROPE)
EARLY = [  # before data are read; settings, or what makes a model; what is said
    ({"model": "no/such-model"}, "no/such-model cannot be loaded"),
    ({"tokenizer": "no/such-model"}, "no/such-model cannot be loaded"),
    ({"device": "cuda:99"}, "--device cuda:99: not available here"),
    *(({"shard": part}, f"--shard {part}") for part in ("3/2", "one")),
    *(({"pool": pool}, f"--pool {pool}: .* has layers 1 to 3")
      for pool in ("layer:4", "layer:0", "layer:x", "first:1", "median")),
    (lambda at: templated(at, ""), "has no chat template: name one with --tokenizer"),
    (lambda at: at / "missing", "there is no such folder"),
]  # fmt: skip
LATE = [
    ({"max_length": 0}, "positive"),
    ({"batch_tokens": -1}, "positive"),
    (lambda at: templated(at, "{{ raise_exception('odd roles') }}"), "odd roles"),
    (lambda at: edited(at, {EMBED: FEW}, vocab_size=120), "the model knows 120 tokens only"),
    (lambda at: edited(at, {"model.norm.weight": NAN}), "another --dtype"),
    (lambda at: edited(at, {SCORE: torch.ones(1, 8)}),
     r"score.weight is \[1, 8\], but \[1, 32\] by its config.json"),
    (lambda at: edited(at, {}, num_hidden_layers=4),
     "its checkpoint lacks model.layers.3.input_layernorm.weight"),
    (lambda at: {"model": models.sliding_window(at), "method": "tree"}, "sliding"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message", "is_early"),
    [(*case, is_early) for is_early, cases in ((True, EARLY), (False, LATE)) for case in cases],
)
def test_settings_and_models_that_cannot_be_used_are_one_line(
    given, message, is_early, tmp_path, make, model, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = given(tmp_path / "model") if callable(given) else given
    given = given if isinstance(given, dict) else {"model": str(given)}
    with pytest.raises(InputError, match=message):
        make(**given)
    if is_early:
        with pytest.raises(InputError, match=message):
            embeddings.check_model({"model": str(model), **given})


ONE, TWO = (f"score head with {number} outputs" for number in (1, 2))
OTHER_HEAD = {SCORE: None, "value_head.weight": torch.ones(1, 32)}
SAID = [  # a model; what is said of it; what the manifest has
    (models.headless, "has no score head", "none"),
    (lambda at: edited(at, OTHER_HEAD), "value_head.weight is not used", "none"),
    (lambda at: models.tiny_llama(at, num_labels=2), "head of 2 outputs", TWO),
    (lambda at: models.tiny(at, "Roberta"), "roberta models are encoders", "none"),
    (lambda at: models.tiny(at, "Gemma2", sliding_window=8), "takes eager", "sorted"),
    (lambda at: edited(at, {}, num_hidden_layers=2), "no place for: model.layers.2.input", ONE),
    (models.tiny_llama, "tree (shared prefixes are computed once)", "tree"),
    (models.sliding_window, "sorted (this mistral model's attention has a", "sorted"),
    (dynamic, "single (its dynamic position embedding depends on the batch)", "single"),
]


@pytest.mark.parametrize(("build", "message", "noted"), SAID)
def test_what_a_checkpoint_lacks_and_which_method_it_takes_is_said(
    build, message, noted, tmp_path, make, caplog, capfd
):
    caplog.set_level("INFO")
    model = build(tmp_path / "model")
    capfd.readouterr()
    store = make(model=model)
    reference = store.manifest["reference"]
    assert message in caplog.text and noted in (reference, store.manifest["method"])
    assert (store.head is None) == (reference != ONE)
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err  # nor a bar in a file


def test_shared_tokens_and_duplicates_are_computed_once_and_counted(model, make, caplog):
    caplog.set_level(logging.INFO, logger="lore")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tuple(render(tokenizer, each)) for each in some_chats()]
    prefixes = {each[: i + 1] for each in ids for i in range(len(each))}
    manifest = make(batch_tokens=10**6, shard_size=512).manifest
    given, computed = manifest["tokens_given"], manifest["tokens_computed"]
    assert (given, computed) == (sum(map(len, ids)), len(prefixes))
    assert (manifest["num_conversations"], manifest["num_distinct"]) == (15, 14)
    said = f"15 conversations, 14 distinct, 0 cut, {given} tokens; now {computed} tokens computed"
    assert caplog.messages[-1].startswith(said)


@pytest.mark.parametrize("method", ["tree", "sorted"])
def test_full_gpu_memory_halves_the_batches(method, model, make, monkeypatch, caplog):
    forward, sizes = Engine._forward, []

    def limited(self: Any, step: Any) -> torch.Tensor:
        sizes.append(step.given["input_ids"].numel())
        if sizes[-1] > 200:
            raise torch.cuda.OutOfMemoryError("full")
        return forward(self, step)

    monkeypatch.setattr(Engine, "_forward", limited)
    store = make(method=method, shard_size=50, batch_tokens=1000)
    assert max(sizes) > 200 >= sizes[-1]
    assert distance(all_rows(store), plain_rows(model, some_chats())) < 1e-5
    warnings = [line for line in caplog.messages if "memory is full" in line]
    lower = int(warnings[-1].split()[-1])  # as --batch-tokens in the warning
    smaller = make("smaller", method=method, shard_size=50, batch_tokens=lower)
    assert contents(store.folder) == contents(smaller.folder)


def test_reading_maps_the_shards_and_takes_any_rows_and_the_models_own_head(finished, model):
    store, own = Store(finished), AutoModelForSequenceClassification.from_pretrained(model)
    assert (len(store), store.num_features) == (15, 32)
    assert torch.equal(store.head, own.score.weight[0])
    assert torch.equal(store.last_linear, own.model.layers[-1].mlp.down_proj.weight[:, 0])
    index = torch.tensor([14, 0, 3, 3, 9])
    assert torch.equal(store.rows(index), all_rows(store)[index])
    assert store.same(index[:3], index[2:]).tolist() == [True, False, False]
    assert store.rows(torch.tensor([], dtype=torch.long)).shape == (0, 32)
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert str(finished / list(shards_of(finished))[1]) in maps
    store.check(digest(some_chats()))
    with pytest.raises(InputError, match="other conversations"):
        store.check(digest(some_chats()[::-1]))


@pytest.mark.parametrize("name", ["second shard", "index", "head", "manifest"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_files_are_made_again(name, damage, finished, make):
    before = contents(finished)
    name = list(shards_of(finished))[1] if name == "second shard" else name
    name = next(file for file in before if file.startswith(name))
    data, path = before[name], finished / name
    left = {"flip": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], "cut": data[: len(data) // 2]}
    path.write_bytes(left[damage]) if damage in left else path.unlink()
    make("finished")
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: {"model": models.tiny_llama(at, seed=1)}, "weights_sha256"),
        (lambda at: {"tokenizer": str(templated(at, models.LLAMA_TEMPLATE + " "))},
         "template_sha256"),
        (lambda at: {"max_length": 30}, "max_length = 2048, but 30 is asked for"),
        (lambda at: {"dtype": "bfloat16"}, "dtype = float32"),
        (lambda at: {"pool": "mean"}, "pool = last, but mean is asked for"),
    ],
)  # fmt: skip
def test_a_store_of_something_else_is_refused(change, message, finished, make, tmp_path):
    before = contents(finished)
    with pytest.raises(InputError, match=message):
        make("finished", **change(tmp_path / "other"))
    (finished / "manifest.json").unlink()
    with pytest.raises(InputError, match="belongs to other embeddings"):
        make("finished", **change(tmp_path / "other"))
    del before["manifest.json"]
    assert contents(finished) == before


def test_a_read_only_disk_that_was_never_opened_is_read(finished, monkeypatch):
    (finished / embeddings.VERIFIED).unlink(missing_ok=True)
    refused = mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(Path, "write_bytes", refused)
    assert len(Store(finished)) == 15 and refused.called
    assert not (finished / embeddings.VERIFIED).exists()


@pytest.fixture
def embedded() -> Iterator[Callable[[], list[int]]]:
    """How many conversations went through the model, each time that it was called."""
    with mock.patch.object(Engine, "embed", autospec=True, side_effect=Engine.embed) as spy:
        yield lambda: [len(call.args[1]) for call in spy.call_args_list]


def test_a_row_more_embeds_its_texts_alone(finished, make, embedded, caplog):
    caplog.set_level(logging.INFO, logger="lore")
    before, shards = contents(finished), shards_of(finished)
    more = [chat("Hello there", "yes, and no"), *some_chats(), chat("A new one", "yes")]
    store = make("finished", more)
    assert embedded() == [2] and "14 of 16 distinct conversations are there and" in caplog.text
    after = contents(finished)
    assert len(shards_of(finished)) == len(shards) + 1
    assert {name: after[name] for name in shards} == shards
    again = make("again", more)
    assert embedded() == [2, 4, 4, 4, 4]
    assert distance(all_rows(store), all_rows(again)) < 1e-5
    assert torch.equal(all_rows(store)[1:-1], all_rows(make("finished")))
    old = {name: before[name] for name in ("index.safetensors", "manifest.json")}
    assert embedded() == [2, 4, 4, 4, 4] and contents(finished) == after | old


def test_a_finished_run_other_order_and_fewer_texts_load_no_model(make, finished, monkeypatch):
    before, rows = contents(finished), all_rows(Store(finished))
    monkeypatch.setattr(reward_model, "load_engine", lambda *_: pytest.fail("loaded a model"))
    assert len(make("finished")) == 15 and contents(finished) == before
    assert torch.equal(all_rows(make("finished", some_chats()[::-1])), rows.flip(0))
    store = make("finished", some_chats()[:3], shard_size=9)
    assert torch.equal(all_rows(store), rows[:3]) and store.manifest["num_distinct"] == 3


def test_a_full_disk_keeps_what_is_done(make, tmp_path, finished, embedded, monkeypatch):
    more = [*some_chats(), *(chat("More", "yes " * i) for i in range(1, 7))]
    shutil.copytree(finished, tmp_path / "whole")
    make("whole", more)
    assert embedded() == [4, 2]
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=[None, None, full]))  # head, a shard
    with pytest.raises(InputError, match="embeddings-.* No space left on device"):
        make("finished", more)
    monkeypatch.undo()
    assert len(Store(finished)) == 15  # what was there is there still
    make("finished", more)
    assert embedded()[2:] == [4, 2, 2]  # the second shard was lost
    assert contents(finished) == contents(tmp_path / "whole")


def test_a_local_model_is_known_by_its_files_and_by_a_path_that_holds_everywhere(
    finished, make, tmp_path, model, monkeypatch
):
    (tmp_path / "moved").symlink_to(model)
    make("finished", model=tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    near = os.path.relpath(model)
    manifest = make(model=near, tokenizer=near).manifest
    assert (manifest["model"], manifest["tokenizer"]) == (str(model), str(model))


def test_two_processes_may_complete_the_manifest_at_once(tmp_path, make, finished, monkeypatch):
    whole, replace = contents(finished), os.replace

    def beaten(draft: Path, path: Path) -> None:
        if path.name == "manifest.json" and b'"complete": true' in draft.read_bytes():
            path.write_bytes(whole["manifest.json"])  # the other is done, and tidied up
            draft.unlink()
        replace(draft, path)

    monkeypatch.setattr(os, "replace", beaten)
    assert len(make()) == 15
    assert contents(tmp_path / "out") == whole


class Embedding(killed.Job):
    """Embeds with the model in ``case``; what a killed run leaves is whole or not read."""

    def work(self, folder: Path) -> None:
        embed(some_chats(), folder, model=self.case, shard_size=4, progress=False)

    def be(self, name: str, rank: int, meeting: str, limit: tuple[str, float] | None) -> None:
        super().be(name, rank, meeting, limit)
        if limit and limit[1] < math.inf:  # who of two writes what both need is a race: the last
            os.kill(os.getpid(), signal.SIGKILL)  # calls may not come

    def run(self, name: str, limits: Any) -> None:
        super().run(name, limits)
        try:
            Store(Path(self.folder, name))
        except InputError as error:
            assert "no finished embeddings" in str(error)


def kill_at_moments(folder: str, model: str) -> None:
    """Embed undisturbed, and killed at many moments and resumed, in one process and in two."""
    for name in ("load_config", "load_tokenizer", "load_engine"):  # once for all children
        setattr(reward_model, name, cache(getattr(reward_model, name)))
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.set_lock(threading.RLock())  # its own is shared by all children: who is killed keeps it
    embed(some_chats(), Path(folder, "first"), model=model, progress=False)
    for processes in (1, 2):
        Path(folder, str(processes)).mkdir()
        moments = Embedding(model, processes, str(Path(folder, str(processes)))).answer()
        assert len(set(moments)) == killed.MOMENTS


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path, model, made):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)])
    env = {**running.ENV, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    code = "import sys, test_store; test_store.kill_at_moments(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path), str(model)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for processes in "12":
        for name in ("whole", *map(str, range(killed.MOMENTS))):
            assert contents(tmp_path / processes / name) == contents(made), (processes, name)


def test_parts_of_a_job_array_complete_each_other(tmp_path, make, finished, monkeypatch):
    folder = tmp_path / "parts"
    assert make("parts", shard="2/3") is None
    assert list(shards_of(folder)) == list(shards_of(finished))[1:2]
    with pytest.raises(InputError, match="no finished embeddings"):
        Store(folder)
    assert make("parts", shard="3/3") is None
    monkeypatch.setenv("WORLD_SIZE", "2")  # two ranks in the last part: six workers in all
    monkeypatch.setenv("RANK", "0")
    assert make("parts", shard="1/3") is None
    monkeypatch.undo()
    assert len(make("parts", shard="1/3")) == 15
    assert contents(folder) == contents(finished)


@pytest.mark.slow
def test_the_benchmark_prints_its_cases(model):
    sizes = ["--posts=2", "--dialogues=2", "--prompts=2", "--prism=2", "--parts=1"]
    done = running.invoke("benchmarks/embedding.py", {"model": model}, *sizes)
    assert done.status == 0, done.err
    rows = running.table(f"\n{done.out}")
    assert "".join(name[0] for name in rows) in ("abc", "abcd")  # d is of people's data, if there
    for row in rows.values():
        given, computed, deviation = (float(row[n]) for n in ("given", "computed", "deviation"))
        assert given / computed == pytest.approx(float(row["given / computed"]), rel=2e-3)
        assert given > computed and deviation < 1e-5
