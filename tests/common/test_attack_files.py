"""Files that are damaged, cut, of another form or edited by hand: one line, nothing changed."""

import functools
import json
import math
import operator
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

import running
import utils
import worlds
from lore.common.files import InputError, file_sha256, lock_folder
from lore.embeddings import store as embeddings
from lore.experiments import splits
from lore.learning.comparisons import Comparisons
from lore.learning.training import Checkpoint

Change = Callable[[Path], Any]
GONE = object()  # in place of a value that is taken out


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


def put(found: Any, changes: dict[Any, Any]) -> Any:
    """A dict with other values, some of them functions of what stood there."""
    new = {key: edit(found[key]) if callable(edit) else edit for key, edit in changes.items()}
    return {key: value for key, value in {**found, **new}.items() if value is not GONE}


def facts(**changes: Any) -> Change:
    """Other values in a JSON object."""
    return lambda path: path.write_text(json.dumps(put(json.loads(path.read_text()), changes)))


def parts(trusted: bool = True, **changes: Any) -> Change:
    """Other values in every row of a table, or other tensors; trusted: with the hash of it."""

    def change(path: Path) -> None:
        if path.suffix == ".parquet":
            worlds.write(path, [put(row, changes) for row in worlds.read(path)])
        else:
            note, found = safe_open(path, "pt").metadata(), load(path.read_bytes())
            found = put(found, {name.replace("__", "."): edit for name, edit in changes.items()})
            found = {name: tensor.contiguous() for name, tensor in found.items()}
            save_file(found or {"other": torch.zeros(2)}, path, note)
        if trusted:
            trust(path)

    return change


def state(edit: Any, *keys: Any) -> Change:
    """Something else at a place in the state of a training."""

    def change(path: Path) -> None:
        found = torch.load(path, weights_only=True)
        holder = functools.reduce(operator.getitem, keys[:-1], found)
        holder[keys[-1]] = edit(holder[keys[-1]]) if callable(edit) else edit
        if edit is GONE:
            del holder[keys[-1]]
        torch.save(found, path)

    return change


def trust(path: Path) -> None:
    """Take a file as it is for the one that was written."""
    says = path.with_name("manifest.json" if path.parent.name == "embeddings" else "prepare.json")
    known = json.loads(says.read_text())
    known["files"][path.name] = file_sha256(path)
    says.write_text(json.dumps(known))


to_nan = functools.partial(torch.full_like, fill_value=math.nan)
fewer = operator.itemgetter(slice(-1))

# --------------------------------------------------------------------- Prepared and embedded data

TALKS, SCORES = "conversations.parquet", "scores.safetensors"
SHARD = "embeddings/embeddings-00001-*.safetensors"
GARBAGE, FIRST = b"{" * 500, torch.tensor(0)
DAMAGED: dict[str, Change] = {"cut": cut, "garbage": content(GARBAGE), "missing": Path.unlink,
                              "flipped": flip}  # fmt: skip
BAD_JSON = {"a list": content(b"[1]"), "empty": content(b"{}"), "binary": content(b"\xff\x00\x01"),
            "cut": cut, "deep": content(b"[" * 10**5)}  # fmt: skip
CASES: dict[str, dict[str, Change]] = {
    "prepare.json": {
        **BAD_JSON, "a path as name": facts(dataset="../../x"), "no files": facts(files={}),
        "other files": facts(files={"../x": "0"}), "settings": facts(settings=[1]),
        "counts": facts(counts=GONE), "warning": facts(warning=5), "overlap": facts(overlap="x"),
        "kinds": facts(kinds={"sentence": 5}), "retest": facts(retest=[1]),
        "other conversations": facts(conversations_sha256="0" * 64),
        "hash": facts(data_sha256=5), "dataset": facts(dataset=GONE),
    },
    TALKS: {
        **DAMAGED,
        "other columns": parts(messages=GONE, x=[]),
        # By its hash: whoever edits that as well is believed, as for figures within their range
        "another text": parts(False, messages=[{"role": "user", "content": "?"}]),
    },
    "comparisons.parquet": {
        **DAMAGED, "other seen users": parts(False, seen=operator.not_),
        "negative": parts(chosen=-1), "past the end": parts(rejected=10**6),
        "text for a number": parts(chosen=str), "half a row": parts(chosen=0.5),
        "no weight": parts(weight=GONE), "NaN weight": parts(weight=math.nan),
        "huge weight": parts(weight=1e30), "negative weight": parts(weight=-1.0),
        "another split": parts(split="dev"), "no user": parts(user_id=None),
        "seen as text": parts(seen="yes"),
    },
    "embeddings/manifest.json": {
        **BAD_JSON, "missing": Path.unlink, "unfinished": facts(complete=False),
        "no count": facts(num_distinct=GONE), "count as text": facts(num_distinct="x"),
        "more": facts(num_distinct=10**9), "none": facts(num_distinct=0),
        "another width": facts(num_features=31), "another model": facts(weights_sha256="0" * 64),
        "another type": facts(dtype="bfloat16"), "no type": facts(dtype="load"),
        "other rows": facts(num_conversations=3), "fewer": facts(num_distinct=3),
        "other files": facts(files={}), "a path": facts(files={"../x.safetensors": "0"}),
        "truth": facts(max_length=True),
    },
    "embeddings/index.safetensors": {
        **DAMAGED, "reversed": parts(False, rows=lambda t: t.flip(0)),
        "another tensor": parts(rows=GONE), "floats": parts(rows=Tensor.float),
        "past the end": parts(rows=lambda t: t.index_fill(0, FIRST, 10**6)),
        "negative": parts(rows=lambda t: t.index_fill(0, FIRST, -1)),
        "fewer": parts(rows=fewer), "one": parts(rows=torch.zeros_like),
    },
    SHARD: {
        **DAMAGED, "NaN": parts(False, embeddings=to_nan),
        "fewer rows": parts(embeddings=fewer),
        "fewer columns": parts(embeddings=lambda t: t[:, 1:]),
        "another type": parts(embeddings=Tensor.double),
        "another tensor": parts(embeddings=GONE), "no keys": parts(keys=GONE),
        "fewer keys": parts(keys=fewer),
    },
    "embeddings/head.safetensors": {
        **DAMAGED, "negated": parts(False, head=Tensor.neg), "NaN": parts(head=to_nan),
        "another width": parts(head=lambda t: t[:, 1:]),
        "one dimension": parts(head=lambda t: t[0]),
    },
    SCORES: {
        **DAMAGED, "negated": parts(False, train__scores=Tensor.neg),
        "NaN": parts(test__scores=to_nan), "fewer": parts(train__scores=fewer),
        "negative rows": parts(train__rows=lambda t: -t - 1),
        "rows past the end": parts(test__rows=lambda t: t + 10**6),
        "no rows": parts(test__rows=GONE), "no scores": parts(train__scores=GONE),
        "no prompts": parts(train__scores=lambda t: t[:0], train__rows=lambda t: t[:0]),
        "flat": parts(train__scores=lambda t: t[..., 0]),
        "whole numbers": parts(train__scores=Tensor.long),
        "fewer models": parts(test__scores=lambda t: t[..., 1:]),
    },
}  # fmt: skip


@pytest.fixture
def copied(dataset, tmp_path) -> Callable[[str], Path]:
    """A copy of a prepared and embedded dataset."""
    return lambda name: shutil.copytree(dataset(name).data, tmp_path / "data")


def opened(data: Path) -> splits.Tasks:
    """What a train script reads first."""
    if (data / SCORES).exists() or SCORES in (data / "prepare.json").read_text(errors="replace"):
        return splits.simulated_users(data, 0.1, 4, 4, 5, 5)
    return splits.given_split(data)


def all_bytes(folder: Path) -> dict[Path, bytes]:
    """Everything in a folder but the note on what was verified."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != embeddings.VERIFIED]
    return {path: path.read_bytes() for path in files}


@contextmanager
def refused(folder: Path, *words: str) -> Iterator[pytest.ExceptionInfo]:
    """An InputError of one line that has these words; the folder stays as it is."""
    before = all_bytes(folder)
    with pytest.raises(InputError) as error:
        yield error
    said = str(error.value)
    assert "\n" not in said and len(said) < 600 and "weights_only" not in said
    assert [word for word in words if word not in said] == [], said
    assert all_bytes(folder) == before and not Path("ran").exists()


def every(cases: dict[str, dict[str, Change]]) -> pytest.MarkDecorator:
    """The test is made for each file and each thing done to it."""
    names = [(name, what) for name, some in cases.items() for what in some]
    return pytest.mark.parametrize(("name", "what"), names)


@pytest.mark.slow
@every(CASES)
def test_a_file_that_is_not_as_written_is_named_and_left_alone(copied, name, what):
    data = copied("PersonalLLM" if name == SCORES else "PRISM")
    opened(data)
    (path,) = data.glob(name)
    CASES[name][what](path)
    said = {"flipped": "is not the file that prepare.py", "missing": "not there; run prepare"}
    with refused(data, said.get(what, "") if name == TALKS else "") as error:
        opened(data)
    assert any(str(where) in str(error.value) for where in (path, data / "embeddings"))


def test_a_folder_as_prepared_is_opened_twice_and_verified_once(copied, monkeypatch):
    data, hashed = copied("PRISM"), mock.Mock(side_effect=file_sha256)
    monkeypatch.setattr(embeddings, "file_sha256", hashed)
    store, first = opened(data).store, hashed.call_count
    assert first == len(store.manifest["files"])
    opened(data)
    assert hashed.call_count == first + 2  # the index and the head, and no shard
    store.verify()
    assert hashed.call_count == 2 * first + 2


def test_a_bit_that_flips_under_the_same_time_is_found_by_verify(copied, tmp_path):
    data = copied("PRISM")
    store = opened(data).store
    (path,) = data.glob(SHARD)
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(embeddings.Store(data / "embeddings")) == len(store)  # what --verify is for
    with pytest.raises(InputError, match=f"{path.name} is not the file that was embedded"):
        store.verify()
    settings = {"data": data, "results": tmp_path, "ranks": 1, "iterations": 2, "verify": "true"}
    outcome = running.invoke("PRISM/train_basis.py", settings)
    assert outcome.status == 2 and path.name in outcome.err.splitlines()[-1]
    assert not (tmp_path / "PRISM").exists()


# ----------------------------------------------------------------------- States of a training


class Trap:
    """Makes a file if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def flip_inside(path: Path) -> None:
    """One bit of a number of the greatest tensor."""
    basis = torch.load(path, weights_only=True)["V"].numpy().tobytes()
    flip(path, path.read_bytes().index(basis))


def another_step(step: str) -> Change:
    """The same beside it, named after another step."""
    return lambda path: shutil.copy(path, path.with_name(f"state.0.{step}.pt"))


MOMENT = ("optimizers", 0, "state", 0, "exp_avg")
STATES: dict[str, Change] = {
    "cut": cut, "garbage": content(GARBAGE), "empty": content(b""), "flipped bit": flip_inside,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "pickled": lambda path: torch.save(Trap(), path),
    "a list": lambda path: torch.save([1, 2], path),
    "pickled plainly": content(pickle.dumps(Trap(), protocol=2)),
    "no identity": state(GONE, "identity"), "no optimisers": state(GONE, "optimizers"),
    "fewer optimisers": state([], "optimizers"), "an empty optimiser": state({}, "optimizers", 0),
    "no moments": state({}, "optimizers", 0, "state"), "NaN moments": state(to_nan, *MOMENT),
    "moments of another size": state(lambda t: t[:1], *MOMENT),
    "another rate": state(5.0, "optimizers", 0, "param_groups", 0, "lr"),
    "NaN in the basis": state(to_nan, "V"), "fewer columns": state(lambda V: V[:, :1], "V"),
    "a text for weights": state("x", "logits"), "fewer losses": state(lambda x: x[:1], "losses"),
    "another step": state(3, "step"), "named after another step": another_step("21"),
    "named past the end": another_step("9999"), "of no checksum": state(GONE, "sha256"),
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
    last = max(folder.iterdir(), key=lambda path: int(path.name.split(".")[2]))
    with refused(folder, str(last), "remove it"):
        trained(folder)


def test_an_earlier_state_is_gone_on_from_and_other_files_are_none(kept_states, tmp_path):
    folder = shutil.copytree(kept_states, tmp_path / "states")
    (folder / "state.0.20.pt").unlink()
    for name in ("state.0.abc.pt", "state.0.\u00b2.pt", "state.0..pt", "state.0.pt"):
        (folder / name).write_bytes(GARBAGE)
    assert all(map(torch.equal, trained(folder), trained(kept_states)))


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
    with refused(tmp_path, str(folder)):
        embeddings.embed([talk], tmp_path / "out", model=str(folder), progress=False)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- Two at once


def test_whoever_comes_second_is_told_the_firsts_process(tmp_path):
    folder = tmp_path / "out"
    said = f"{folder}: process {os.getpid()} "
    with lock_folder(folder), refused(tmp_path, said), lock_folder(folder):
        pass
    with lock_folder(folder, "1/2"), lock_folder(folder, "2/2"), lock_folder(folder):
        assert not folder.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_runs_of_a_command_on_one_folder_do_not_mix(dataset, model, tmp_path):
    made, data = dataset("PRISM"), tmp_path / "data"
    train = {"data": made.data, "results": tmp_path, "name": "a", "ranks": 1, "iterations": 2}
    for script, settings, folder in (
        ("prepare", {"source": made.source, "out": data}, data),
        ("generate-prism-embeddings", {"data": data, "model": model}, data / "embeddings"),
        ("train_basis", train, tmp_path / "PRISM" / "a"),
    ):
        with lock_folder(folder):
            found = running.invoke(f"PRISM/{script}.py", settings)
        assert found.status == 2 and not folder.exists()
        assert f"process {os.getpid()} works on it" in found.err.splitlines()[-1]
        if script == "prepare":  # which the next one needs
            assert running.invoke(f"PRISM/{script}.py", settings).status == 0
