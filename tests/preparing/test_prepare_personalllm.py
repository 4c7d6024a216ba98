"""PersonalLLM/prepare.py: score tensors, the rows they belong to, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import worlds
from lore.common.files import InputError


def prepare(source: Path, out: Path) -> dict:
    """Run the script's main without embedding; what prepare.json says."""
    return worlds.prepare("PersonalLLM", source, out, embed=False)


def test_scores_lie_with_their_conversations(tmp_path):
    source = worlds.personalllm(tmp_path / "raw", train=10, test=4)
    info = prepare(source, tmp_path / "data")
    tensors = load_file(tmp_path / "data" / "scores.safetensors")
    talks = pq.read_table(tmp_path / "data" / "conversations.parquet")["messages"].to_pylist()
    for split, prompts in {"train": 10, "test": 4}.items():
        scores, rows = tensors[f"{split}.scores"], tensors[f"{split}.rows"]
        assert (scores.shape, scores.dtype) == ((prompts, 8, 10), np.float32)
        assert (rows.shape, rows.dtype) == ((prompts, 8), np.int64)
        raw = {row["prompt"]: row for row in worlds.read(source / f"{split}.parquet")}
        for prompt in range(prompts):
            row = raw.pop(talks[rows[prompt, 0]][0]["content"])
            for i in range(8):
                ask = {"role": "user", "content": row["prompt"]}
                answer = {"role": "assistant", "content": row[f"response_{i + 1}"]}
                assert talks[rows[prompt, i]] == [ask, answer]
                for m, scorer in enumerate(worlds.SCORERS):
                    assert scores[prompt, i, m] == np.float32(row[f"response_{i + 1}_{scorer}"])
        assert not raw
    assert len(talks) == info["counts"]["distinct conversations"] == 14 * 8


def test_equal_responses_are_one_conversation(tmp_path):
    source = worlds.personalllm(tmp_path / "raw", train=3, test=1)
    worlds.edit(
        source / "train.parquet", lambda rows: rows[0].update(response_8=rows[0]["response_1"])
    )
    assert prepare(source, tmp_path / "data")["counts"]["distinct conversations"] == 4 * 8 - 1
    rows = load_file(tmp_path / "data" / "scores.safetensors")["train.rows"]
    assert sorted(len(set(prompt)) for prompt in rows.tolist()) == [7, 8, 8]


def test_prompts_on_both_sides_and_empty_responses_are_counted(tmp_path, capsys):
    source = worlds.personalllm(tmp_path / "raw")
    prompt = worlds.read(source / "train.parquet")[0]["prompt"]
    worlds.edit(source / "test.parquet", lambda rows: rows[2].update(prompt=prompt, response_2=""))
    info = prepare(source, tmp_path / "data")
    assert info["counts"]["prompts on both sides"] == 1
    assert info["counts"]["test responses without text"] == 1
    assert "1  prompts on both sides" in capsys.readouterr().out
    assert {**info["overlap"], "sentence": ""} == {
        "held_out": 8,
        "prompt": 1,
        "response": 0,
        "sentence": "",
    }
    assert info["overlap"]["sentence"].startswith("Of 8 held-out prompts, 1 are training prompts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "row 3 has an empty prompt"),
        ({"prompt": None}, "row 3 has an empty prompt"),
        ({"response_5": None}, "row 3 has no response_5: eight responses are expected"),
        ({"response_5": ["a"]}, "row 3: response_5 must be text, not a list"),
        ({"response_9": "one more"}, "row 3 has response_9: eight responses are expected"),
        ({"response_2_beaver_7b": None}, "row 3: response_2_beaver_7b must be a number, not None"),
        (
            {"response_2_beaver_7b": "0.5"},
            "row 3: response_2_beaver_7b must be a number, not '0.5'",
        ),
        ({"response_2_beaver_7b": float("nan")}, "response_2_beaver_7b must be a number, not nan"),
        ({"response_2_beaver_7b": True}, "response_2_beaver_7b must be a number, not True"),
        ({"response_2_beaver_7b": 1e39}, "response_2_beaver_7b must be a number, not 1e\\+39"),
        ({"response_2_beaver_7b": -(10**400)}, "response_2_beaver_7b must be a number, not -1000"),
    ],
)
def test_a_bad_row_is_refused_by_number(tmp_path, change, message):
    source = worlds.personalllm(tmp_path / "raw")
    rows = worlds.read(source / "train.parquet")
    rows[2].update(change)
    (source / "train.parquet").unlink()
    worlds.write(source / "train.jsonl", rows)
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("column", ["prompt", "response_8", "response_3_mistral_ray"])
def test_a_missing_column_is_refused_by_name(tmp_path, column):
    source = worlds.personalllm(tmp_path / "raw")
    worlds.edit(source / "test.parquet", lambda rows: [row.pop(column) for row in rows])
    with pytest.raises(InputError, match=f"test.parquet row 1 has no column {column}"):
        prepare(source, tmp_path / "data")


def test_an_empty_table_is_refused(tmp_path):
    source = worlds.personalllm(tmp_path / "raw")
    (source / "test.parquet").unlink()
    (source / "test.jsonl").touch()
    with pytest.raises(InputError, match="has no test rows"):
        prepare(source, tmp_path / "data")
