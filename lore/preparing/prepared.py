"""A prepared folder as it is read: nothing in it is believed that prepare.py did not write."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lore.common.files import InputError, file_sha256, first_line, read_json, require
from lore.common.tensors import expect, read_tensors, require_finite
from lore.preparing.tables import (
    COLUMNS,
    HEAVIEST,
    LIGHTEST,
    MESSAGES,
    TABLES,
    TOLD,
    VALIDATION,
    Conversation,
)

log = logging.getLogger(__name__)

AGAIN = "run prepare.py again"
SPLITS = ("train", "test")
INFO = {"dataset": str, "settings": dict, "counts": dict, "overlap": dict | None,
        "warning": str | None, "split": dict | None, "kinds": dict | None, "retest": dict | None,
        "conversations_sha256": str, "data_sha256": str,
        "files": dict}  # fmt: skip


def read_info(folder: Path, dataset: str | None = None) -> dict[str, Any]:
    """What prepare.json says of a prepared dataset; a warning in it is logged.

    Args:
        folder: the prepared folder.
        dataset: whose script asks, which is also the name of that script's folder; None for any.

    Raises:
        InputError: the folder is not prepared, its prepare.json is of another form, or it holds
            another dataset.
    """
    path = folder / "prepare.json"
    info = read_json(path)
    require(info is not None, f"{folder} is not a prepared dataset; run prepare.py first")
    require(isinstance(info, dict), f"{path} is not as expected; {AGAIN}")
    for key, kind in INFO.items():
        right = isinstance(info.get(key), kind)
        require(right, f"{path} is not as expected: {key} is {info.get(key)!r:.40}; {AGAIN}")
    named = re.fullmatch(r"[\w-]+", info["dataset"])
    require(bool(named), f"{path} is not as expected: dataset is no name; {AGAIN}")
    found = info["dataset"]
    own = dataset in (None, found)
    require(own, f"{folder} holds {found}, not {dataset}: use the scripts in the folder {found}")
    for key in ("overlap", *TOLD):
        told = isinstance((info.get(key) or {}).get("sentence", ""), str)
        require(told, f"{path} is not as expected: {key}; {AGAIN}")
    require(set(info["files"]) in TABLES, f"{path} is not as expected: files; {AGAIN}")
    if info.get("warning"):
        log.warning("WARNING: %s", info["warning"])
    return info


def check_files(folder: Path, info: Mapping[str, Any]) -> None:
    """Raise InputError if a table is not the one that prepare.json was written with."""
    for file, sha256 in info["files"].items():
        path = folder / file
        require(path.is_file(), f"{path}: not there; {AGAIN}")
        if file_sha256(path) != sha256:
            raise InputError(f"{path} is not the file that prepare.py wrote; run it again")


def read_conversations(folder: Path) -> list[Conversation]:
    """The conversations of a prepared dataset, row i being embedding i.

    Raises:
        InputError: the table is missing, damaged or of another form.
    """
    check_conversations(folder)
    return _read_table(folder / "conversations.parquet")["messages"].to_pylist()


def check_conversations(folder: Path) -> None:
    """Raise InputError if the conversations are missing, damaged or of another form; reads none."""
    path = folder / "conversations.parquet"
    schema = _read_table(path, pq.read_schema)
    require(schema.equals(MESSAGES), f"{path}: has other columns than messages; {AGAIN}")


def read_comparisons(folder: Path, num_rows: int) -> pd.DataFrame:
    """The table of comparisons of a prepared folder.

    Raises:
        InputError: it is missing, damaged, lacks a column, or a cell holds what cannot be.
    """
    path = folder / "comparisons.parquet"
    table = _read_table(path).to_pandas()
    missing = [column for column in COLUMNS if column not in table]
    require(not missing, f"{path}: lacks the columns {', '.join(missing)}; {AGAIN}")
    require(not table.empty, f"{path}: has no rows; {AGAIN}")
    for column, kind in COLUMNS.items():
        right = table[column].dtype == kind if kind is not str else _are_texts(table[column])
        require(right, f"{path}: {column} is not all {_kind(kind)}; {AGAIN}")
    numbers = table[["chosen", "rejected"]]
    inside = ((numbers >= 0) & (numbers < num_rows)).all(axis=1)
    _need(inside, path, f"has rows that are none of the {num_rows} embeddings")
    known = (*SPLITS, VALIDATION)
    _need(table.split.isin(known), path, f"has a split that is none of {', '.join(known)}")
    weights = table.weight.between(LIGHTEST / 1e3, HEAVIEST * 1e3)  # shared by a row's pairs
    _need(weights, path, "has a weight that is not a number above 0, or is far from 1")
    return table


def read_scores(folder: Path, num_rows: int) -> dict[str, Tensor]:
    """The score tensors of a prepared folder.

    Returns:
        train.scores and test.scores [P, R, M] in float32, train.rows and test.rows [P, R].

    Raises:
        InputError: the file is missing, damaged or of another form.
    """
    path = folder / "scores.safetensors"
    tensors = read_tensors(path, AGAIN)[1]
    found = {}
    for split in SPLITS:
        scores = expect(path, tensors, AGAIN, f"{split}.scores", torch.float32, None, None, None)
        prompts, responses, _ = scores.shape
        require(prompts > 0, f"{path}: {split}.scores has no prompt; {AGAIN}")
        rows = expect(path, tensors, AGAIN, f"{split}.rows", torch.int64, prompts, responses)
        inside = bool(((rows >= 0) & (rows < num_rows)).all())
        require(inside, f"{path}: {split}.rows are none of the {num_rows} embeddings; {AGAIN}")
        found |= {f"{split}.scores": scores, f"{split}.rows": rows}
    require_finite(path, found, AGAIN)
    scorers = {found[f"{split}.scores"].shape[2] for split in SPLITS}
    require(len(scorers) == 1, f"{path}: train and test have other reward models; {AGAIN}")
    return found


def _read_table(path: Path, read: Callable[[Path], Any] = pq.read_table) -> Any:
    require(path.is_file(), f"{path}: not there; {AGAIN}")
    try:
        return read(path)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); {AGAIN}") from error


def _are_texts(column: pd.Series) -> bool:
    return bool(column.map(lambda cell: isinstance(cell, str)).all())


def _kind(kind: Any) -> str:
    return {str: "text", bool: "true or false"}.get(kind, str(kind))


def _need(good: pd.Series, path: Path, message: str) -> None:
    """Raise InputError naming the first row that is not good."""
    if not good.all():
        row = int((~good).to_numpy().argmax()) + 1
        raise InputError(f"{path} row {row}: {message}; {AGAIN}")
