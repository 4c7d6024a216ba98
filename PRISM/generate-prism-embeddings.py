"""Embed the conversations that prepare.py wrote; a killed run continues where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments
from cli import cli
from embeddings import embed

HERE = Path(__file__).resolve().parent


def main(data: Path = HERE / "data", **embedding: Any) -> None:
    """Embed a prepared dataset's conversations with a reward model.

    Args:
        data: folder that prepare.py wrote; the embeddings go to its subfolder embeddings.
    """
    experiments.read_info(data)  # shows a warning that prepare.py left
    conversations = experiments.read_conversations(data)
    embed(conversations, data / "embeddings", **embedding)
    print(f"embedded {len(conversations):,} conversations in {data / 'embeddings'}")


if __name__ == "__main__":
    cli(main)
