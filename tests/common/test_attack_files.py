"""Files that are damaged, cut, of another form or edited by hand: one line, nothing changed."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import running
import utils
import worlds
from lore.common.files import InputError, file_sha256, lock_folder
from lore.embeddings import store as embeddings
from lore.embeddings.store import open_store
from lore.experiments import splits
from lore.experiments.splits import Tasks
from lore.learning.comparisons import Comparisons
from lore.learning.training import Checkpoint

Change = Callable[[Path], Any]


# ------------------------------------------------------------------------ What is done to a file


def content(data: bytes) -> Change:
    """Other bytes."""
    return lambda path: path.write_bytes(data)


def cut(path: Path) -> None:
    """The first half alone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, place: int = -1) -> None:
    """One bit of a byte, by default of the last number."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_inside(path: Path) -> None:
    """One bit of a number of the greatest tensor."""
    basis = torch.load(path, weights_only=True)["V"].numpy().tobytes()
    flip(path, path.read_bytes().index(basis))


def facts(**changes: Any) -> Change:
    """Other values in a JSON object; those that are None go."""

    def change(path: Path) -> None:
        found = json.loads(path.read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in found.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return change


def rows(edit: Callable[[dict[str, Any]], Any], trusted: bool = True) -> Change:
    """Every row of a parquet table changed; trusted: with the hash that prepare.json has of it."""

    def change(path: Path) -> None:
        worlds.edit(path, lambda table: [edit(row) for row in table])
        if trusted:
            trust(path)

    return change


def tensors(trusted: bool = True, **changes: Callable[[Tensor], Tensor | None]) -> Change:
    """Other tensors in a safetensors file, whose note stays; None takes one out."""

    def change(path: Path) -> None:
        with safe_open(path, "pt") as file:
            note, found = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        for name, edit in changes.items():
            name = name.replace("__", ".")
            edited = edit(found.pop(name).clone())
            found |= {} if edited is None else {name: edited.contiguous()}
        found = found or {"other": torch.zeros(2)}
        path.unlink()  # what is mapped must not change
        save_file(found, path, note)
        if trusted:
            trust(path)

    return change


def gone(_: Any) -> None:
    """Nothing."""


def trust(path: Path) -> None:
    """Take a file as it is for the one that was written."""
    says = path.with_name("manifest.json" if path.parent.name == "embeddings" else "prepare.json")
    known = json.loads(says.read_text())
    known["files"][path.name] = file_sha256(path)
    says.write_text(json.dumps(known))


def set_one(number: float) -> Callable[[Tensor], Tensor]:
    """The first number of a tensor."""
    return lambda t: t.index_put((torch.tensor(0),), torch.tensor(number).to(t))


# --------------------------------------------------------------------- Prepared and embedded data

TALKS, TABLE, SCORES = "conversations.parquet", "comparisons.parquet", "scores.safetensors"
MANIFEST, INDEX, HEAD = (f"embeddings/{n}" for n in ("manifest.json", "index.safetensors",
                                                     "head.safetensors"))  # fmt: skip
SHARD = "embeddings/shard"  # the first one, whatever its name
GARBAGE = b"{" * 500
BAD_JSON = {"a list": content(b"[1]"), "empty": content(b"{}"), "binary": content(b"\xff\x00\x01"),
            "cut": cut, "deep": content(b"[" * 10**5)}  # fmt: skip
CASES: dict[str, dict[str, Change]] = {
    "prepare.json": {
        **BAD_JSON, "a path as name": facts(dataset="../../x"), "no files": facts(files={}),
        "other files": facts(files={"../x": "0"}), "settings": facts(settings=[1]),
        "counts": facts(counts=None), "warning": facts(warning=5), "overlap": facts(overlap="x"),
        "kinds": facts(kinds={"sentence": 5}), "retest": facts(retest=[1]),
        "other conversations": facts(conversations_sha256="0" * 64),
        "hash": facts(data_sha256=5), "dataset": facts(dataset=None),
    },
    TALKS: {
        "cut": cut, "garbage": content(GARBAGE), "flipped": flip, "missing": Path.unlink,
        "other columns": rows(lambda row: row.update(x=row.pop("messages"))),
        # By its hash: whoever edits that as well is believed, as for figures within their range
        "another text": rows(lambda row: row["messages"][0].update(content="?"), False),
    },
    TABLE: {
        "cut": cut, "garbage": content(GARBAGE), "flipped": flip, "missing": Path.unlink,
        "swapped": rows(lambda r: r.update(chosen=r["rejected"], rejected=r["chosen"]), False),
        "negative": rows(lambda row: row.update(chosen=-1)),
        "past the end": rows(lambda row: row.update(rejected=10**6)),
        "text for a number": rows(lambda row: row.update(chosen=str(row["chosen"]))),
        "half a row": rows(lambda row: row.update(chosen=row["chosen"] + 0.5)),
        "no weight": rows(lambda row: row.pop("weight")),
        "NaN weight": rows(lambda row: row.update(weight=math.nan)),
        "huge weight": rows(lambda row: row.update(weight=1e30)),
        "negative weight": rows(lambda row: row.update(weight=-1.0)),
        "another split": rows(lambda row: row.update(split="dev")),
        "no user": rows(lambda row: row.update(user_id=None)),
        "seen as text": rows(lambda row: row.update(seen="yes")),
    },
    MANIFEST: {
        **BAD_JSON, "missing": Path.unlink, "unfinished": facts(complete=False),
        "no count": facts(num_distinct=None), "count as text": facts(num_distinct="x"),
        "more": facts(num_distinct=10**9), "none": facts(num_distinct=0),
        "another width": facts(num_features=31), "another model": facts(weights_sha256="0" * 64),
        "another type": facts(dtype="bfloat16"), "no type": facts(dtype="load"),
        "other rows": facts(num_conversations=3), "fewer": facts(num_distinct=3),
        "other files": facts(files={}), "a path": facts(files={"../x.safetensors": "0"}),
        "truth": facts(max_length=True),
    },
    INDEX: {
        "cut": cut, "garbage": content(GARBAGE), "missing": Path.unlink, "flipped bit": flip,
        "reversed": tensors(False, rows=lambda t: t.flip(0)),
        "another tensor": tensors(rows=gone), "floats": tensors(rows=lambda t: t.float()),
        "past the end": tensors(rows=set_one(10**6)), "negative": tensors(rows=set_one(-1)),
        "fewer": tensors(rows=lambda t: t[:-1]), "one": tensors(rows=lambda t: 0 * t),
    },
    SHARD: {
        "cut": cut, "garbage": content(GARBAGE), "missing": Path.unlink, "flipped bit": flip,
        "NaN": tensors(False, embeddings=lambda t: t * math.nan),
        "fewer rows": tensors(embeddings=lambda t: t[:-1]),
        "fewer columns": tensors(embeddings=lambda t: t[:, 1:]),
        "another type": tensors(embeddings=lambda t: t.double()),
        "another tensor": tensors(embeddings=gone), "no keys": tensors(keys=gone),
        "fewer keys": tensors(keys=lambda t: t[:-1]),
    },
    HEAD: {
        "cut": cut, "garbage": content(GARBAGE), "missing": Path.unlink, "flipped bit": flip,
        "negated": tensors(False, head=lambda t: -t),
        "NaN": tensors(head=lambda t: t * math.nan),
        "another width": tensors(head=lambda t: t[:, 1:]),
        "one dimension": tensors(head=lambda t: t[0]),
    },
    SCORES: {
        "cut": cut, "garbage": content(GARBAGE), "missing": Path.unlink, "flipped bit": flip,
        "negated": tensors(False, train__scores=lambda t: -t),
        "NaN": tensors(test__scores=lambda t: t * math.nan),
        "negative rows": tensors(train__rows=lambda t: -t - 1),
        "rows past the end": tensors(test__rows=lambda t: t + 10**6),
        "no rows": tensors(test__rows=gone), "no scores": tensors(train__scores=gone),
        "fewer": tensors(train__scores=lambda t: t[:-1]),
        "no prompts": tensors(train__scores=lambda t: t[:0], train__rows=lambda t: t[:0]),
        "flat": tensors(train__scores=lambda t: t[..., 0]),
        "whole numbers": tensors(train__scores=lambda t: t.long()),
        "fewer models": tensors(test__scores=lambda t: t[..., 1:]),
    },
}  # fmt: skip


@pytest.fixture
def copied(dataset, tmp_path) -> Callable[[str], Path]:
    """A copy of a prepared and embedded dataset."""
    return lambda name: shutil.copytree(dataset(name).data, tmp_path / "data")


def opened(data: Path) -> Tasks:
    """What a train script reads first."""
    if (data / SCORES).exists() or SCORES in (data / "prepare.json").read_text(errors="replace"):
        return splits.simulated_users(data, 0.1, 4, 4, 5, 5)
    return splits.given_split(data)


def path_of(data: Path, name: str) -> Path:
    """A file by its name in the table."""
    shards = sorted((data / "embeddings").glob("embeddings-*"))
    return shards[0] if name == SHARD else data / name


def all_bytes(folder: Path) -> dict[Path, bytes]:
    """Everything in a folder but the note on what was verified."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != embeddings.VERIFIED]
    return {path: path.read_bytes() for path in files}


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    said = str(error.value)
    assert "\n" not in said and len(said) < 600
    for word in words:
        assert word in said, said


def every(cases: dict[str, dict[str, Change]]) -> pytest.MarkDecorator:
    """The test is made for each file and each thing done to it."""
    names = [(name, what) for name, some in cases.items() for what in some]
    return pytest.mark.parametrize(("name", "what"), names)


@every(CASES)
def test_a_file_that_is_not_as_written_is_named_and_left_alone(copied, name, what):
    data = copied("PersonalLLM" if name == SCORES else "PRISM")
    opened(data)
    path = path_of(data, name)
    CASES[name][what](path)
    before = all_bytes(data)
    with pytest.raises(InputError) as error:
        opened(data)
    one_line(error)
    assert any(str(where) in str(error.value) for where in (path, data / "embeddings"))
    if name == TALKS and what in ("flipped", "missing"):
        said = "is not the file that prepare.py" if what == "flipped" else "not there; run prepare"
        one_line(error, said)
    assert all_bytes(data) == before


def test_a_folder_as_prepared_is_opened_twice_and_verified_once(copied, monkeypatch):
    data = copied("PRISM")
    read: list[str] = []

    def note(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(embeddings, "file_sha256", note)
    first, second = opened(data), len(read)
    opened(data)
    shards = [name for name in read if name.startswith("embeddings-")]
    assert len(shards) == len(first.store.manifest["files"]) - 2 and len(read) == second + 2
    first.store.verify()
    assert len([name for name in read if name.startswith("embeddings-")]) == 2 * len(shards)


def test_a_bit_that_flips_under_the_same_time_is_found_by_verify(copied, tmp_path):
    data = copied("PRISM")
    store = opened(data).store
    path, times = path_of(data, SHARD), path_of(data, SHARD).stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(open_store(data / "embeddings")) == len(store)  # which is what --verify is for
    with pytest.raises(InputError, match=f"{path.name} is not the file that was embedded"):
        store.verify()
    settings = {"data": data, "results": tmp_path, "ranks": 1, "iterations": 2, "verify": "true"}
    outcome = running.invoke("PRISM/train_basis.py", settings)
    assert outcome.status == 2 and path.name in outcome.err.splitlines()[-1]
    assert not (tmp_path / "PRISM").exists()


@pytest.mark.parametrize(("number", "word"), [(0.0, "is zero"), (0.5, "is 0.5 in every feature")])
def test_a_reference_that_says_nothing_is_warned_of(copied, caplog, number, word):
    data = copied("PRISM")
    tensors(head=lambda t: torch.full_like(t, number))(data / HEAD)
    opened(data).reference("head")
    assert word in caplog.text and caplog.text.count("WARNING: the reference") == 1


# ----------------------------------------------------------------------- States of a training


def state(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Something else in a state of a training."""

    def change(path: Path) -> None:
        found = torch.load(path, weights_only=True)
        torch.save(edit(found) or found, path)

    return change


def optimizer(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Something else in the first optimiser's state; what ``edit`` returns is ignored."""

    def change(found: dict[str, Any]) -> None:
        edit(found["optimizers"][0])

    return state(change)


def first_moment(edit: Callable[[Tensor], Tensor]) -> Change:
    def change(found: dict[str, Any]) -> None:
        found["state"][0]["exp_avg"] = edit(found["state"][0]["exp_avg"])

    return optimizer(change)


def another_step(step: str) -> Change:
    """Another number in the file's name, and the same beside it."""
    return lambda path: shutil.copy(path, path.with_name(f"state.0.{step}.pt"))


class Trap:
    """Makes a file if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


STATES: dict[str, Change] = {
    "cut": cut, "garbage": content(GARBAGE), "empty": content(b""), "flipped bit": flip_inside,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "pickled": lambda path: torch.save(Trap(), path), "a list": state(lambda found: [1, 2]),
    "pickled plainly": content(pickle.dumps(Trap())),
    "no identity": state(lambda found: found.pop("identity") and None),
    "no optimisers": state(lambda found: found.pop("optimizers") and None),
    "fewer optimisers": state(lambda found: found.update(optimizers=[])),
    "an empty optimiser": optimizer(dict.clear),
    "no moments": optimizer(lambda found: found["state"].clear()),
    "NaN moments": first_moment(lambda t: t * math.nan),
    "moments of another size": first_moment(lambda t: t[:1]),
    "another rate": optimizer(lambda found: found["param_groups"][0].update(lr=5.0)),
    "NaN in the basis": state(lambda found: found.update(V=found["V"] * math.nan)),
    "fewer columns": state(lambda found: found.update(V=found["V"][:, :1])),
    "a text for weights": state(lambda found: found.update(logits="x")),
    "fewer losses": state(lambda found: found.update(losses=found["losses"][:1])),
    "another step": state(lambda found: found.update(step=3)),
    "named after another step": another_step("21"), "named past the end": another_step("9999"),
    "of no checksum": state(lambda found: found.pop("sha256") and None),
}  # fmt: skip


def trained(folder: Path) -> tuple[Tensor, Tensor]:
    """A training that keeps its state every ten steps, and goes on from there."""
    g = torch.Generator().manual_seed(0)
    data = Comparisons.from_list([torch.randn(5, 6, generator=g) for _ in range(4)])
    model = utils.LoRe(torch.ones(6), 0.1, 4, 6, 2, 24, generator=0)
    return utils.train_together([model], data, Checkpoint(folder / "state", 10))[0]


@pytest.fixture(scope="module")
def kept_states(tmp_path_factory) -> Path:
    """The states after 10 and 20 steps of 24."""
    folder = tmp_path_factory.mktemp("states")
    trained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["state.0.10.pt", "state.0.20.pt"]
    return folder


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_is_not_as_written_is_named_and_left_alone(
    kept_states, tmp_path, monkeypatch, what
):
    folder = shutil.copytree(kept_states, tmp_path / "states")
    monkeypatch.chdir(tmp_path)
    STATES[what](folder / "state.0.20.pt")
    before = all_bytes(folder)
    last = max(folder.iterdir(), key=lambda path: int(path.name.split(".")[2]))
    with pytest.raises(InputError) as error:
        trained(folder)
    one_line(error, str(last), "remove it")
    assert all_bytes(folder) == before and not Path("ran").exists()


def test_an_earlier_state_is_gone_on_from_and_other_files_are_none(kept_states, tmp_path):
    folder = shutil.copytree(kept_states, tmp_path / "states")
    whole = trained(kept_states)
    (folder / "state.0.20.pt").unlink()
    for name in ("state.0.abc.pt", "state.0.\u00b2.pt", "state.0..pt", "state.0.pt"):
        (folder / name).write_bytes(GARBAGE)
    for mine, theirs in zip(trained(folder), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# --------------------------------------------------------------------------- A model's folder

WEIGHTS, CONFIG, TEMPLATE = "model.safetensors", "config.json", "chat_template.jinja"
MODELS: dict[str, dict[str, Change]] = {
    WEIGHTS: {
        "cut": cut, "garbage": content(GARBAGE), "missing": Path.unlink,
        "pickled": lambda path: torch.save(Trap(), path.rename(path.parent / "pytorch_model.bin")),
    },
    CONFIG: {
        "cut": cut, "a list": content(b"[]"), "another width": facts(hidden_size=31),
        "no heads": facts(num_attention_heads=0), "no room": facts(max_position_embeddings=-1),
        "width as text": facts(hidden_size="x"), "no type": facts(dtype="load"),
    },
    "tokenizer.json": {"cut": cut, "empty": content(b"{}"), "missing": Path.unlink},
    "tokenizer_config.json": {"a list": content(b"[]")},
    TEMPLATE: {
        "a billion": content(b"{% for i in range(10**9) %}x{% endfor %}"),
        "no template": content(b"{% for %}"), "division": content(b"{{ 1 // 0 }}"),
        "text and number": content(b"{{ 'x' + 1 }}"), "nothing": content(b"{# #}"),
        "a refusal": content(b"{{ raise_exception('no') }}"),
        "for ever": content(b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "the inside of Python": content(b"{{ ''.__class__.__mro__ }}"),
    },
}  # fmt: skip


@every(MODELS)
def test_a_damaged_model_is_named_and_claims_no_folder(model, tmp_path, monkeypatch, name, what):
    folder = shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    MODELS[name][what](folder / name)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError) as error:
        embeddings.embed([talk], tmp_path / "out", model=str(folder), progress=False)
    one_line(error, str(folder))
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "out").exists() and not Path("ran").exists()


# ------------------------------------------------------------------------------- Two at once


def test_whoever_comes_second_is_told_the_firsts_process(tmp_path):
    folder = tmp_path / "out"
    with lock_folder(folder), pytest.raises(InputError) as error, lock_folder(folder):
        pass
    one_line(error, str(folder), f"process {os.getpid()} ")
    with lock_folder(folder, "1/2"), lock_folder(folder, "2/2"), lock_folder(folder):
        assert not folder.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_runs_of_a_command_on_one_folder_do_not_mix(dataset, model, tmp_path):
    prism, data = dataset("PRISM"), tmp_path / "data"
    prepare = {"source": prism.source, "out": data}
    with lock_folder(data):
        refused = running.invoke("PRISM/prepare.py", prepare)
    assert refused.status == 2 and not data.exists()
    assert running.invoke("PRISM/prepare.py", prepare).status == 0
    embed = {"data": data, "model": model, "progress": "false"}
    with lock_folder(data / "embeddings"):
        refused_too = running.invoke("PRISM/generate-prism-embeddings.py", embed)
    assert refused_too.status == 2 and not (data / "embeddings").exists()
    train = {"data": prism.data, "results": tmp_path, "name": "a", "ranks": 1, "iterations": 2}
    with lock_folder(tmp_path / "PRISM" / "a"):
        last = running.invoke("PRISM/train_basis.py", train)
    assert last.status == 2 and not (tmp_path / "PRISM" / "a").exists()
    for outcome in (refused, refused_too, last):
        said = outcome.err.strip().splitlines()[-1]
        assert said.startswith("error: ") and f"process {os.getpid()} works on it" in said
