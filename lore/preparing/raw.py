"""Raw tables as they come, from files or the hub: their rows, and what a cell may hold."""

import codecs
import csv
import gzip
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lore.common.files import InputError, first_line, require

log = logging.getLogger(__name__)

Rows = Iterator[tuple[str, dict[str, Any]]]
Numbered = Iterator[tuple[int, dict[str, Any]]]

EMPTY = "EMPTY STRING"  # what some published tables write in a cell without text
FILES = ("{}.jsonl", "{}.jsonl.gz", "{}.parquet", "{}-*.parquet", "data/{}-*.parquet")
LARGEST = float(np.finfo(np.float32).max)  # numbers are kept as float32
DAMAGE = (OSError, EOFError, UnicodeError, zlib.error, csv.Error, pa.ArrowException)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Cell(str):
    """A cell of a .csv or .tsv, where lists and messages can only stand as text."""


def read_rows(source: str, table: str, columns: Iterable[str], **hub: Any) -> Rows:
    """Rows of a raw table, each with its place for messages, such as "train.jsonl row 12".

    The source is a folder with table.jsonl, .jsonl.gz or .parquet, or a hub dataset, for which
    ``hub`` holds arguments of ``datasets.load_dataset``, or files (a pattern) and revision.
    InputError where there is nothing to read, a file is damaged or a row lacks one of the columns.
    """
    require(bool(source), "--source is empty; name a folder or a hub dataset")
    require(not os.path.isfile(source), f"--source {source} is a file; name its folder")
    advice = f"give a folder with {table}.jsonl or {table}.parquet"
    if os.path.isdir(source):
        names = [pattern.format(table) for pattern in FILES]
        found = (sorted(Path(source).glob(name)) for name in names)
        files = next(filter(None, found), [])  # those of the first format that is there
        require(bool(files), f"--source {source} has none of {', '.join(names)}")
        rows = chain.from_iterable(map(read_file, files))
    elif pattern := hub.get("files"):  # `datasets` would not find these in its cache offline
        from huggingface_hub import snapshot_download

        wanted = {"repo_type": "dataset", "revision": hub["revision"], "allow_patterns": pattern}
        with _one_line(source, advice):
            folder = Path(snapshot_download(source, **wanted))
        files = sorted(folder.glob(pattern))
        none = f"--source {source} has no {pattern} at revision {hub['revision']}; {advice}"
        require(bool(files), none)
        rows = chain.from_iterable(map(read_file, files))
    else:
        loaded = enumerate(_load_hub(source, advice, **hub), start=1)
        rows = ((f"{source} {table} row {number}", row) for number, row in loaded)
    yield from check_columns(rows, columns)


def check_columns(rows: Rows, columns: Iterable[str]) -> Rows:
    """The rows; InputError at one that lacks a column."""
    for place, row in rows:
        missing = [name for name in columns if name not in row]
        require(not missing, f"{place} has no column {', '.join(missing)}")
        yield place, row


def read_all(source: str) -> Rows:
    """Rows of a file, of all files of a folder, or of a hub dataset, of which several splits get a
    column split, unless they have one.
    """
    require(bool(source), "--source is empty; name a file, a folder or a hub dataset")
    path, endings = Path(source), ", ".join(READERS)
    if path.is_file():
        yield from read_file(path)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
        require(bool(files), f"--source {source} has no file that ends in {endings}")
        yield from chain.from_iterable(map(read_file, files))
    else:
        require(not source.endswith(ENDINGS), f"--source {source}: there is no such file")
        splits = _load_hub(source, f"give a file that ends in {endings}")
        for split, rows in splits.items():
            more = {"split": split} if len(splits) > 1 else {}
            for number, row in enumerate(rows, start=1):
                yield f"{source} {split} row {number}", {**more, **row}


def read_file(file: Path) -> Rows:
    """Rows of a file, each with its place; InputError for an ending that is not in READERS, damage,
    or a name twice in a row. Text is UTF-8, or UTF-16 with its byte order mark.
    """
    name, where = file.name.removesuffix(".gz"), ""
    read = next((read for ending, read in READERS.items() if name.endswith(ending)), None)
    if read is None:
        raise InputError(f"{file}: a file's name must end in {', '.join(READERS)}")
    log.info("reading %s", file)
    try:
        for number, row in read(file):
            yield f"{file} row {number}", row
            where = f" after row {number}"
    except DAMAGE as error:
        raise InputError(f"{file} cannot be read{where}: {first_line(error)}") from error


def _parquet_rows(file: Path) -> Numbered:
    with pq.ParquetFile(file) as table:
        _refuse_twins(table.schema_arrow.names, str(file), "columns")
        batches = (batch.to_pylist() for batch in table.iter_batches())
        yield from enumerate(chain.from_iterable(batches), start=1)


def _json_rows(file: Path) -> Numbered:
    """Rows of a file with an object a line, or with one list of objects."""
    with _open(file) as lines:
        is_list = ".jsonl" not in file.name and lines.read(4096).lstrip().startswith("[")
        lines.seek(0)
        if is_list:
            numbered = enumerate(_read_json(lines.read(), str(file)), start=1)
        else:
            filled = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
            numbered = ((i, _read_json(line, f"{file} row {i}")) for i, line in filled)
        for number, row in numbered:
            require(isinstance(row, dict), f"{file} row {number} is not a JSON object")
            yield number, row


def _read_json(text: str, place: str) -> Any:
    """What a JSON text says; InputError at the place where it says nothing or a name twice."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            _refuse_twins([key for key, _ in pairs], place, "keys")
        return found

    try:
        return json.loads(text, object_pairs_hook=no_twins)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise InputError(f"{place} is not valid JSON: {first_line(error)}") from error


def _csv_rows(file: Path) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # dialogues are longer than the 128 KB that are usual
    with _open(file, newline="") as lines:
        head = next((line for line in lines if line.strip()), "")
        separator = usual = "\t" if ".tsv" in file.name else ","
        with suppress(csv.Error):  # of a single column
            separator = csv.Sniffer().sniff(head, "".join(SEPARATORS)).delimiter
        if separator != usual:
            log.info("%s: cells are separated by %s", file, SEPARATORS[separator])
        lines.seek(0)
        rows = csv.reader(lines, delimiter=separator, strict=True)
        names = next(filter(None, rows), [])
        if separator not in head and separator == "\t":  # a first line set with blanks to be read
            names, rows = re.split(r"\s{2,}", head.strip()), csv.reader(lines, "excel-tab")
        _refuse_twins(filter(None, names), str(file), "columns")
        for number, cells in enumerate(filter(None, rows), start=1):
            require(len(cells) <= len(names), f"{file} row {number} has {len(cells)} cells, the "
                    f"first line {len(names)}; cells were taken to be separated by "
                    f"{SEPARATORS[separator]}")  # fmt: skip
            filled = zip_longest(names, cells, fillvalue="")  # empty ones at the end may be missing
            yield number, {name: Cell(cell) for name, cell in filled}


def _open(file: Path, newline: str | None = None) -> TextIO:
    """A text file, compressed or not, in the encoding that its first bytes say."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rb") as binary:
        is_wide = binary.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if is_wide else "utf-8-sig"  # spreadsheets write a byte order mark
    return opened(file, "rt", encoding=encoding, newline=newline)


def _refuse_twins(names: Iterable[str], place: str, what: str) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1]
    require(not twins, f"{place} has two {what} {', '.join(twins[:3])}; leave one of each")


READERS = dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_rows)
READERS |= {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
ENDINGS = (*READERS, *(f"{ending}.gz" for ending in READERS if ending != ".parquet"))


def _load_hub(source: str, advice: str, **hub: Any) -> Any:
    """A hub dataset, which is downloaded once and then read from a cache."""
    import datasets  # takes seconds, and local files do without

    with _one_line(source, advice):
        return datasets.load_dataset(source, **hub)


@contextmanager
def _one_line(source: str, advice: str) -> Iterator[None]:
    """Any error of the hub as one line; its own have no common class."""
    try:
        yield
    except Exception as error:
        if "gated" in str(error):
            advice = "ask for access on its page, then log in with `hf auth login`"
        if "connection" in str(error):
            advice = "run it again, the download goes on where it was"
        why = f"is no folder here and does not load from the hub ({first_line(error)})"
        raise InputError(f"--source {source} {why}; {advice}") from error


def text(value: Any, place: str, what: str) -> str:
    """A cell's text, "" if empty in a usual way; InputError for what is no text or bad Unicode."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} must be text, not a {type(value).__name__}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{place}: {what} holds half a surrogate pair; clean the text")
    return "" if value.strip() in ("", EMPTY) else value


def name(value: Any, place: str, what: str) -> str:
    """A cell that names a user or dialogue: text or a whole number, and not empty."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with gaps is read as floats
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    found = text(value, place, what)
    require(bool(found), f"{place} has an empty {what}")
    return found


def number(value: Any, place: str, what: str) -> float:
    """A cell's number, which is finite and not too large for float32."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST:
        raise InputError(f"{place}: {what} must be a number, not {value!r:.40}")
    return float(value)
