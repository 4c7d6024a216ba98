"""Embeddings equal those of plain transformers, whatever computes, kills or shares the run."""

import errno
import hashlib
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
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

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


def all_rows(store: embeddings.Store) -> torch.Tensor:
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
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Finished embeddings, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    embed(some_chats(), folder, model=str(llama), shard_size=4, progress=False)
    return folder


@pytest.fixture
def finished(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "finished"))


@pytest.fixture
def make(tmp_path: Path, llama: Path) -> Callable[..., embeddings.Store | None]:
    """Embeds some conversations in a folder of the test: in several shards, without a bar."""

    def run(name: str = "out", chats: list | None = None, **settings: Any) -> Any:
        settings = {"model": llama, "shard_size": 4, "progress": False, **settings}
        settings["model"] = str(settings["model"])
        return embed(chats or some_chats(), tmp_path / name, **settings)

    return run


# ------------------------------------------------------------------- The same rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_method_gives_the_rows_of_plain_transformers(kind, tmp_path, make):
    model = MODELS[kind](tmp_path / "model")
    expected = plain_rows(model, some_chats())
    for name, settings in METHODS.items():
        store = make(name, model=model, **settings)
        assert distance(all_rows(store), expected) < 1e-5, name


def test_batching_adds_no_error_to_bfloat16s_own(llama, make):
    exact = plain_rows(llama, some_chats())
    own = distance(plain_rows(llama, some_chats(), torch.bfloat16), exact)
    for method in ("tree", "sorted"):
        store = make(method, method=method, dtype="bfloat16", shard_size=512)
        assert store.manifest["dtype"] == "bfloat16"
        assert 1e-3 < distance(all_rows(store), exact) < 1.5 * own


def test_head_is_the_models_own_and_gives_its_logits(llama, finished):
    store = Store(finished)
    model = AutoModelForSequenceClassification.from_pretrained(llama)
    assert torch.equal(store.head, model.score.weight[0])
    assert torch.equal(store.last_linear, model.model.layers[-1].mlp.down_proj.weight[:, 0])
    ids = torch.tensor([render(AutoTokenizer.from_pretrained(llama), some_chats()[2])])
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


def _infinite(self: Any, step: Any, right: Any = Engine._forward) -> torch.Tensor:
    rows = right(self, step)
    rows[0] /= 0  # not the one that is checked with the score head
    return rows


FORWARD = "transformers.LlamaForSequenceClassification.forward"


@pytest.mark.parametrize(
    ("what", "wrong", "message"),
    [
        (FORWARD, _first_token, "pools token 1 of"),
        (FORWARD, _squashed, "score head times the last hidden state"),
        ("lore.embeddings.reward_model.tree_mask", _causal, "--method single"),
        ("lore.embeddings.reward_model.Engine._forward", _infinite, "--dtype"),
    ],
)
def test_another_pooling_head_or_mask_stops_the_run(what, wrong, message, monkeypatch, make):
    monkeypatch.setattr(what, wrong)
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.slow
def test_smollm2_rows_equal_one_at_a_time(tmp_path, make):
    model = models.smollm2(tmp_path / "model")
    store = make(model=model, shard_size=512)
    assert store.manifest["method"] == "tree"
    assert store.manifest["tokens_given"] > 2 * store.manifest["tokens_computed"]
    assert distance(all_rows(store), plain_rows(model, some_chats())) < 1e-5
    assert store.head is None  # it is no reward model, and has no reference


@pytest.mark.parametrize(("pool", "layer"), [("mean", -1), ("layer:2", 2)])
def test_the_mean_over_the_response_is_that_of_plain_transformers(pool, layer, llama, make, caplog):
    expected = plain_rows(llama, some_chats(), layer=layer, mean=True)
    for name in ("auto", "tree, small rows", "sorted", "single"):
        store = make(name, pool=pool, **METHODS[name])
        assert distance(all_rows(store), expected) < 1e-5, name
    assert store.manifest["pool"] == pool and store.manifest["reference"] == "none"
    assert store.head is None and store.last_linear is None
    assert f"--pool {pool}: a score head reads the last token" in caplog.text


def test_the_same_tokens_with_another_response_are_another_row(llama, make):
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    chats = [chat("Hi", f"yes{header}no"), [*chat("Hi", "yes"), *chat("", "no")[1:]]]
    rows = all_rows(make("mean", chats, pool="mean"))
    assert distance(rows, plain_rows(llama, chats, mean=True)) < 1e-5
    assert not torch.allclose(rows[0], rows[1])
    last = all_rows(make("last", chats))
    assert torch.equal(last[0], last[1])


def test_long_conversations_are_cut_on_either_side_and_counted(llama, make):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    chats = [chat("Short", "one"), chat("Hello " * 9, "no " * 20)]
    ids = [render(tokenizer, each) for each in chats]
    body = AutoModelForSequenceClassification.from_pretrained(llama).base_model
    last = body(torch.tensor([ids[1][:40]])).last_hidden_state[:, -1].detach()
    for pool in ("last", "mean"):
        expected = plain_rows(llama, chats, mean=pool == "mean", most=40)
        left = make(f"left, {pool}", chats, max_length=40, pool=pool)
        assert distance(all_rows(left), expected) < 1e-5
        right = make(f"right, {pool}", chats, max_length=40, pool=pool, truncation_side="right")
        assert distance(all_rows(right)[1:], last) < 1e-5  # nothing is left of the response
        for store in (left, right):
            assert store.manifest["num_truncated"] == 1
            assert store.manifest["tokens_given"] == len(ids[0]) + 40


def test_one_bos_whether_template_or_tokenizer_writes_it(llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    text = reward_model.render_text(tokenizer, chat("Hi"))
    assert text == expected
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2  # the trap
    template, ids = tokenizer.chat_template, render(tokenizer, chat("Hi"))
    assert tokenizer.decode(ids) == expected
    for number in (0, 3):
        tokenizer.chat_template = template.replace("{{ bos_token }}", "{{ bos_token }}" * number)
        assert render(tokenizer, chat("Hi")) == ids
    without = AutoTokenizer.from_pretrained(models.tiny_qwen(tmp_path))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n"
    assert without.decode(render(without, chat("Hi", "you"))) == expected


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
def test_what_is_not_text_is_refused_by_row(bad, message, tmp_path, make):
    with pytest.raises(InputError, match=message):
        make("out", [chat("a", "b"), bad])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, "no/such-model cannot be loaded"),
        ({"tokenizer": "no/such-model"}, "no/such-model cannot be loaded"),
        ({"device": "cuda:99"}, "--device cuda:99: not available here"),
        ({"shard": "3/2"}, "--shard 3/2"),
        ({"shard": "one"}, "--shard one"),
        *(({"pool": pool}, f"--pool {pool}: .* has layers 1 to 3")
          for pool in ("layer:4", "layer:0", "layer:x", "first:1", "median")),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_and_before_data_are_read(
    settings, message, make, llama, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        make(**settings)
    with pytest.raises(InputError, match=message):
        embeddings.check_model({"model": str(llama), **settings})


NAN, FEW = torch.full((32,), math.nan), torch.zeros(120, 32)
SCORE, EMBED = "score.weight", "model.embed_tokens.weight"
REFUSED = {  # settings, or what makes a model; what is said
    "no tokens": ({"max_length": 0}, "positive"),
    "no batches": ({"batch_tokens": -1}, "positive"),
    "no template": (lambda at: templated(at, ""), "--tokenizer"),
    "a refusing template": (lambda at: templated(at, "{{ raise_exception('odd roles') }}"),
                            "odd roles"),
    "fewer tokens than the tokenizer's": (lambda at: edited(at, {EMBED: FEW}, vocab_size=120),
                                          "the model knows 120 tokens only"),
    "not finite": (lambda at: edited(at, {"model.norm.weight": NAN}), "another --dtype"),
    "another width": (lambda at: edited(at, {}, vocab_size=17),
                      r"embed_tokens.weight is \[261, 32\], but \[17, 32\] by its config.json"),
    "another head": (lambda at: edited(at, {SCORE: torch.ones(1, 8)}),
                     r"score.weight is \[1, 8\], but \[1, 32\] by its config.json"),
    "fewer layers": (lambda at: edited(at, {}, num_hidden_layers=4),
                     "its checkpoint lacks model.layers.3.input_layernorm.weight"),
    "no folder": (lambda at: at / "missing", "there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_and_models_that_cannot_be_used_are_one_line(case, tmp_path, make):
    given, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        make(**given if isinstance(given, dict) else {"model": given(tmp_path / "model")})


OTHER_HEAD = {SCORE: None, "value_head.weight": torch.ones(1, 32)}
HEADS = {
    "none": (models.headless, "has no score head", "none"),
    "another name": (lambda at: edited(at, OTHER_HEAD), "value_head.weight is not used", "none"),
    "two outputs": (lambda at: models.tiny_llama(at, num_labels=2), "score head of 2 outputs",
                    "score head with 2 outputs"),
    "encoder": (lambda at: models.tiny_other(at, "Roberta"), "roberta models are encoders", "none"),
    "no sdpa": (lambda at: models.tiny_other(at, "Gemma2", sliding_window=8), "it takes eager",
                "score head with 1 outputs"),
    "fewer layers": (lambda at: edited(at, {}, num_hidden_layers=2),
                     "no place for: model.layers.2.input", "score head with 1 outputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_what_a_checkpoint_has_in_place_of_a_score_head_is_said(
    case, tmp_path, make, caplog, capfd
):
    build, message, reference = HEADS[case]
    caplog.set_level("INFO")
    model = build(tmp_path / "model")
    capfd.readouterr()
    store = make(model=model)
    assert message in caplog.text and store.manifest["reference"] == reference
    assert (store.head is None) == ("1" not in reference)
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err  # nor a bar in a file
    if case == "none":
        assert distance(all_rows(store), plain_rows(model, some_chats())) < 1e-5


# ------------------------------------------------------------------- Once, not twice


def test_shared_tokens_and_duplicates_are_computed_once_and_counted(llama, make, caplog):
    caplog.set_level(logging.INFO, logger="lore")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = [tuple(render(tokenizer, each)) for each in some_chats()]
    prefixes = {each[: i + 1] for each in ids for i in range(len(each))}
    manifest = make(batch_tokens=10**6, shard_size=512).manifest
    assert manifest["tokens_given"] == sum(map(len, ids))
    assert manifest["tokens_computed"] == len(prefixes)
    assert (manifest["num_conversations"], manifest["num_distinct"]) == (15, 14)
    expected = f"15 conversations, 14 distinct, 0 cut, {manifest['tokens_given']} tokens; "
    expected += f"now {manifest['tokens_computed']} tokens computed"
    assert caplog.messages[-1].startswith(expected)


ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("build", "method", "why"),
    [
        (models.tiny_llama, "tree", "shared prefixes"),
        (models.sliding_window, "sorted", "sliding window"),
        (partial(models.tiny_llama, rope_parameters=ROPE), "single", "depends on the batch"),
    ],
)
def test_method_is_chosen_by_architecture_and_said(build, method, why, tmp_path, make, caplog):
    caplog.set_level(logging.INFO)
    model = build(tmp_path / "model")
    assert make(model=model).manifest["method"] == method
    assert why in caplog.text
    if method != "tree":
        with pytest.raises(InputError, match=why):
            make("forced", model=model, method="tree")


@pytest.mark.parametrize("method", ["tree", "sorted"])
def test_full_gpu_memory_halves_the_batches(method, llama, make, monkeypatch, caplog):
    forward, sizes = Engine._forward, []

    def limited(self: Any, step: Any) -> torch.Tensor:
        sizes.append(step.ids.numel())
        if step.ids.numel() > 200:
            raise torch.cuda.OutOfMemoryError("full")
        return forward(self, step)

    monkeypatch.setattr(Engine, "_forward", limited)
    store = make(method=method, shard_size=50, batch_tokens=1000)
    assert max(sizes) > 200 >= sizes[-1]
    assert distance(all_rows(store), plain_rows(llama, some_chats())) < 1e-5
    warnings = [line for line in caplog.messages if "memory is full" in line]
    lower = int(warnings[-1].split()[-1])  # as --batch-tokens in the warning
    smaller = make("smaller", method=method, shard_size=50, batch_tokens=lower)
    assert contents(store.folder) == contents(smaller.folder)
    with pytest.raises(InputError, match="--max-length"):
        make("long", [chat("Long " * 60, "end")], method=method)


# ------------------------------------------------------------------------- On disk


def test_files_and_manifest(finished):
    manifest, files = json.loads((finished / "manifest.json").read_text()), contents(finished)
    shards = [f"embeddings-0000{i}-" for i in (1, 2, 3, 4)]
    assert [name[:17] for name in files][:4] == shards
    assert list(files)[4:] == ["head.safetensors", "index.safetensors", "manifest.json"]
    del files["manifest.json"]
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert sums == manifest["files"]
    assert manifest["conversations_sha256"] == digest(some_chats())
    assert (manifest["num_features"], manifest["pool"]) == (32, "last")


def test_reading_maps_the_shards_and_takes_any_rows(finished):
    store = Store(finished)
    assert (len(store), store.num_features) == (15, 32)
    index = torch.tensor([14, 0, 3, 3, 9])
    rows = store.rows(index)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, all_rows(store)[index])
    assert torch.equal(rows[0], rows[2])  # the duplicate
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
    path.unlink()
    if damage == "flip":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    message = "no finished" if (name, damage) == ("manifest.json", "remove") else name
    with pytest.raises(InputError, match=message):
        Store(finished)
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


@pytest.mark.slow
def test_a_read_only_disk_that_was_never_opened_is_read(finished, tmp_path):
    (finished / embeddings.VERIFIED).unlink(missing_ok=True)
    mount = f"mount --bind {finished} {finished} && mount -o remount,bind,ro {finished}"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount]).returncode:
        pytest.skip("read-only mounts cannot be made here")
    code = f"from lore.embeddings.store import *; print(len(Store({str(finished)!r})))"
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    run = [*alone, f"{mount} && PYTHONPATH={ROOT} {sys.executable} {tmp_path}/script.py"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (str(len(some_chats())), 0), done.stderr
    assert not (finished / embeddings.VERIFIED).exists()


# ----------------------------------------------------------------- Other conversations


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many conversations went through the model, each time that it was called."""
    counts, plain = [], Engine.embed

    def counted(self: Any, tokens: list, *given: Any) -> torch.Tensor:
        counts.append(len(tokens))
        return plain(self, tokens, *given)

    monkeypatch.setattr(Engine, "embed", counted)
    return counts


def test_a_row_more_embeds_its_texts_alone(finished, make, embedded, caplog):
    caplog.set_level(logging.INFO, logger="lore")
    before, shards = contents(finished), shards_of(finished)
    more = [chat("Hello there", "yes, and no"), *some_chats(), chat("A new one", "yes")]
    store = make("finished", more)
    assert embedded == [2] and "14 of 16 distinct conversations are there and" in caplog.text
    after = contents(finished)
    assert len(shards_of(finished)) == len(shards) + 1
    assert {name: after[name] for name in shards} == shards
    again = make("again", more)
    assert embedded == [2, 4, 4, 4, 4]
    assert distance(all_rows(store), all_rows(again)) < 1e-5
    assert torch.equal(all_rows(store)[1:-1], all_rows(make("finished")))
    assert embedded == [2, 4, 4, 4, 4] and contents(finished) == after | {
        name: before[name] for name in ("index.safetensors", "manifest.json")
    }


def test_a_finished_run_other_order_and_fewer_texts_load_no_model(make, finished, monkeypatch):
    before, rows = contents(finished), all_rows(Store(finished))
    monkeypatch.setattr(reward_model, "load_engine", lambda *_: pytest.fail("loaded a model"))
    assert len(make("finished")) == 15 and contents(finished) == before
    assert torch.equal(all_rows(make("finished", some_chats()[::-1])), rows.flip(0))
    store = make("finished", some_chats()[:3], shard_size=9)
    assert torch.equal(all_rows(store), rows[:3]) and store.manifest["num_distinct"] == 3


def test_new_texts_take_a_killed_run_into_account(make, tmp_path, finished, embedded, monkeypatch):
    more = [*some_chats(), *(chat("More", "yes " * i) for i in range(1, 7))]
    shutil.copytree(finished, tmp_path / "whole")
    make("whole", more)
    assert embedded == [4, 2]
    plain = embeddings._write

    def killed(path: Path, data: bytes) -> None:
        plain(path, data)
        if path.name.startswith("embeddings-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        make("finished", more)
    assert len(Store(finished)) == 15  # what was there is there still
    monkeypatch.setattr(embeddings, "_write", plain)
    make("finished", more)
    assert embedded[2:] == [4, 2] and contents(finished) == contents(tmp_path / "whole")


def test_a_local_model_is_known_by_its_files_and_by_a_path_that_holds_everywhere(
    finished, make, tmp_path, llama, monkeypatch
):
    (tmp_path / "moved").symlink_to(llama)
    make("finished", model=tmp_path / "moved")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    near = os.path.relpath(llama)
    manifest = make(model=near, tokenizer=near).manifest
    assert (manifest["model"], manifest["tokenizer"]) == (str(llama), str(llama))


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


def test_a_full_disk_keeps_what_is_done(tmp_path, make, finished, monkeypatch):
    synced, fsync = [], os.fsync

    def full(file: int) -> None:
        synced.append(file)
        if len(synced) > 4:  # manifest, head and two shards are done
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="embeddings-00003.* No space left on device"):
        make()
    assert len(contents(tmp_path / "out")) == 4
    monkeypatch.undo()
    make()
    assert contents(tmp_path / "out") == contents(finished)


# --------------------------------------------------------------- Killed, or in parts

POINTS = 20


def kill_at_steps(folder: str, model: str) -> None:
    """Embed in forked processes, which are killed at steps that write or compute."""
    for name in ("load_config", "load_tokenizer", "load_engine"):  # once for all children
        setattr(reward_model, name, cache(getattr(reward_model, name)))
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.set_lock(threading.RLock())  # its own is shared by all children: who is killed keeps it
    steps, limit = 0, None

    def step(function: Callable) -> Callable:
        def counted(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted

    for owner, name in [(os, "fsync"), (os, "replace"), (Engine, "_forward")]:
        setattr(owner, name, step(getattr(owner, name)))

    def run(out: str) -> int:
        nonlocal steps
        steps = 0
        embed(some_chats(), Path(folder, out), model=model, shard_size=4, progress=False)
        return steps

    def fork(out: str, processes: int, killed: int | None = None, point: int = 0) -> list[int]:
        """The steps of each process; one may be killed at a step, and then the other, as torchrun
        does."""
        nonlocal limit
        children, counts = [], [Path(folder, f"steps-{rank}") for rank in range(processes)]
        for rank, count in enumerate(counts):
            os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank)}
            children.append(os.fork())
            if not children[-1]:
                limit = point if rank == killed else None
                count.write_text(str(run(out)))
                os._exit(0)
        if killed is None:
            assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
            return [int(count.read_text()) for count in counts]
        _, status = os.waitpid(children.pop(killed), 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return []

    total, both = run("whole"), fork("two", 2)
    for point in range(POINTS):
        fork(f"killed-{point}", 1, 0, 1 + point * (total - 1) // (POINTS - 1))
        killed = point % 2  # who writes what both need is a race, so the last steps may not come
        fork(f"both-{point}", 2, killed, 1 + point * both[killed] * 2 // (3 * POINTS))
        fork(f"both-{point}", 2)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Embeddings of an undisturbed process, of two at a time, and of 20 of each that were killed;
    the pairs have gone on."""
    folder = tmp_path_factory.mktemp("forked")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)])
    env = {**running.ENV, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    code = "import sys, test_store; test_store.kill_at_steps(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), str(llama)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(forked, llama, made):
    assert contents(forked / "whole") == contents(made)
    states = set()
    for point in range(POINTS):
        folder = forked / f"killed-{point}"
        states.add(len(list(folder.iterdir())))
        if point < POINTS - 1:  # the last falls into the note on checksums, when all is written
            with pytest.raises(InputError, match="no finished embeddings"):
                Store(folder)
        embed(some_chats(), folder, model=str(llama), shard_size=4, progress=False)
        assert contents(folder) == contents(made)
    assert len(states) > 4


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_killed_or_not(forked, made):
    for name in ("two", *(f"both-{point}" for point in range(POINTS))):
        assert contents(forked / name) == contents(made), name


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
def test_the_benchmark_prints_its_cases(llama):
    sizes = ["--posts=2", "--dialogues=2", "--prompts=2", "--prism=2", "--parts=1"]
    done = running.invoke("benchmarks/embedding.py", {"model": llama}, *sizes)
    assert done.status == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("|")]
    table = running.table("\n" + "\n".join(lines))
    cases = "".join(name[0] for name in table)
    assert cases in ("abc", "abcd")  # d is of people's data, where these are there
    for row in list(table.values())[:3]:
        number = {name: float(cell) for name, cell in row.items()}
        ratio = number["given"] / number["computed"]
        assert ratio > 1 and number["given / computed"] == pytest.approx(ratio, rel=2e-3)
        assert number["ours / floor"] > 0 and number["deviation"] < 1e-5
