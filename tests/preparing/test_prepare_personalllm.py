"""PersonalLLM/prepare.py: score tensors, the rows they belong to, what both sides share."""

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
                name = f"response_{i + 1}"
                ask = {"role": "user", "content": row["prompt"]}
                assert talks[rows[prompt, i]] == [ask, {"role": "assistant", "content": row[name]}]
                expected = [np.float32(row[f"{name}_{scorer}"]) for scorer in worlds.SCORERS]
                assert scores[prompt, i].tolist() == expected
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
    first, second = worlds.read(source / "train.parquet")[:2]

    def share(rows):
        rows[2].update(prompt=first["prompt"], response_2="")
        rows[3].update(prompt=second["prompt"], response_2=second["response_7"])

    worlds.edit(source / "test.parquet", share)
    info = prepare(source, tmp_path / "data")
    assert info["counts"]["prompts on both sides"] == 2
    assert info["counts"]["test responses without text"] == 1
    assert "2  prompts on both sides" in capsys.readouterr().out
    sentence = info["overlap"].pop("sentence")
    assert info["overlap"] == {"held_out": 8, "prompt": 2, "response": 1}
    assert sentence.startswith("Of 8 held-out prompts, 2 are training prompts too, 1 of them with")


def test_an_empty_table_is_refused(tmp_path):
    source = worlds.personalllm(tmp_path / "raw")
    (source / "test.parquet").unlink()
    (source / "test.jsonl").touch()
    with pytest.raises(InputError, match="has no test rows"):
        prepare(source, tmp_path / "data")
