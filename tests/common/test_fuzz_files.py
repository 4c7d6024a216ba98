"""Whatever a file or a raw row becomes, it is read, or refused as a mistake of the user."""

import copy
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attack_files import all_bytes, opened, trust

import worlds
from lore.common.files import InputError
from lore.preparing.own_rows import USUAL
from lore.preparing.tables import Funnel

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
BYTES = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "zero"]), st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=20),
)  # fmt: skip
KEYS = st.sampled_from(["turn", "role", "content", "from", "value", "text", "id", "post",
                        "if_chosen"])  # fmt: skip
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["\ud800", 10**400, "EMPTY STRING", "response_a", "model", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def mutated(data: bytes, how: str, place: float, more: bytes) -> bytes:
    """The bytes with a bit flipped, the rest cut off, some put in, or some made zero."""
    before, after = data[: int(place * len(data))], data[int(place * len(data)) :]
    flipped = bytes([after[0] ^ (1 << more[0] % 8)]) + after[1:]
    zero = bytes(len(more)) + after[len(more) :]
    return before + {"flip": flipped, "cut": b"", "insert": more + after, "zero": zero}[how]


@pytest.fixture(scope="module", params=["PRISM", "PersonalLLM"])
def copied(request, dataset, tmp_path_factory) -> Path:
    """A prepared folder to damage and mend."""
    data = tmp_path_factory.mktemp("fuzz") / "data"
    return shutil.copytree(dataset(request.param).data, data)


@pytest.mark.slow
@EXAMPLES
@given(change=BYTES, which=st.integers(0, 30), trusted=st.booleans())
def test_mutated_files_are_read_or_refused(copied, change, which, trusted):
    whole = all_bytes(copied)
    path = sorted(whole)[which % len(whole)]
    path.unlink()
    path.write_bytes(mutated(whole[path], *change))
    if trusted and path.suffix != ".json":  # so that not only the checksum is tried
        trust(path)
    try:
        opened(copied)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        for file, content in whole.items():
            file.unlink()
            file.write_bytes(content)


# Dataset -> the table that is changed, and what the script's ``read`` takes after the source.
RAW: dict[str, tuple[str, tuple[Any, ...]]] = {
    "RedditTLDR": ("train", ()), "PRISM": ("conversations", ("each",)),
    "PersonalLLM": ("train", ("train",)), "CommunityAlignment": ("train", ("en",)),
    "PersonalRewardBench": ("train", ()), "OwnData": ("mine", (USUAL,)),
    "OwnData votes": ("mine", (USUAL,)),
}  # fmt: skip


@cache
def raw_source(name: str, folder: Path) -> tuple[Any, Path]:
    """A dataset's script, and its raw tables as jsonl."""
    for table, rows in worlds.small(name).items():
        worlds.write(folder / name / f"{table}.jsonl", rows)
    return worlds.script(f"{name.split()[0]}/prepare.py"), folder / name


@pytest.mark.slow
@pytest.mark.parametrize("name", RAW)
@EXAMPLES
@given(cell=CELLS, column=st.integers(0, 100), deep=st.booleans())
def test_mutated_raw_rows_are_read_or_refused(tmp_path_factory, name, cell, column, deep):
    script, source = raw_source(name, tmp_path_factory.getbasetemp())
    table, more = RAW[name]
    first, *rows = worlds.small(name)[table]
    row, file = copy.deepcopy(first), source / f"{table}.jsonl"
    key = sorted(row)[column % len(row)]
    inner = row[key][0] if deep and isinstance(row[key], list) and row[key] else row[key]
    if deep and isinstance(inner, dict):
        inner[sorted(inner)[column % len(inner)]] = cell
    else:
        row[key] = cell
    worlds.write(file, [row, *rows])
    try:
        script.read(str(source), *more, Funnel())
    except InputError as error:
        assert "\n" not in str(error)
        assert str(file) in str(error) or "language" in str(error)
