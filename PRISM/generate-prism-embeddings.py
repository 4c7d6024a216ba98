"""Embed the conversations that prepare.py wrote; a killed run goes on where it was."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.embeddings import store as embeddings
from lore.preparing import tables as preparing

HERE = Path(__file__).resolve().parent


def main(data: Path = HERE / "data", **embedding: Any) -> None:
    """Embed a prepared dataset's conversations with a reward model.

    Args:
        data: folder that prepare.py wrote; the embeddings lie in its subfolder embeddings.
    """
    preparing.read_info(data, HERE.name)  # shows a warning that prepare.py left
    conversations = preparing.read_conversations(data)
    embeddings.embed(conversations, data / "embeddings", **embedding)
    print(f"embedded {len(conversations):,} conversations in {data / 'embeddings'}")


if __name__ == "__main__":
    cli(main, kept="what is embedded already is kept")
