"""Rewards of conversations for every user of a file, from one forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from lore.common.files import require
from lore.common.settings import NonNegativeInt, PositiveInt
from lore.embeddings import reward_model as models
from lore.embeddings.reward_model import OF_BASIS, Conversation, ModelChoice
from lore.methods.saved import Learned

SAID = "\N{WHITE SQUARE}"  # stands for what is said where a template's own end is looked for


class Scorer:
    """A file's users with the reward model loaded."""

    def __init__(
        self, learned: Learned, basis: Path, max_length: PositiveInt = 4096,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto", device: str = "auto",
        batch_tokens: NonNegativeInt = 0, lm: ModelChoice = OF_BASIS,
    ) -> None:  # fmt: skip
        """Load the model; InputError for a model other than the file's.

        Args:
            learned: what ``load_learned`` gives of the file.
            basis: basis file of a run, or mixed_logit file.
            max_length: most tokens of a conversation; of longer ones the end is kept.
            dtype: of arithmetic; auto is bfloat16 on a GPU and float32 on a CPU.
            device: auto (a GPU if there is one), cpu, cuda, or one GPU such as cuda:1.
            batch_tokens: most tokens in one forward pass; 0 means 1024 on a CPU, 4096 on a GPU.
            lm: the reward model.
        """
        source = lm.of_basis(learned.settings, basis, len(learned.direction()))
        pooled = f"{basis} reads {source.pool} states: tools/rank_responses.py ranks by these"
        require(source.pool == "last", f"{pooled}, but texts are scored by the last token's alone")
        device, dtype = models.device_and_dtype(device, dtype)
        batch_tokens = batch_tokens or (1024 if device == "cpu" else 4096)
        self.learned, self.max_length = learned, max_length
        self.engine = models.load_engine(source, dtype, device, "sdpa", "auto", batch_tokens)
        self.tokenizer = models.load_tokenizer(source)
        chat = [{"role": role, "content": SAID} for role in ("user", "assistant")]
        self.end = self._write(chat).rpartition(SAID)[2]

    def embed(self, texts: Sequence[str | Conversation], progress: bool = False) -> Tensor:
        """Embeddings [n, F], minus the center where the file has it. A text is a conversation, or
        what the chat template makes of one, whose end is mended where it was stripped. InputError
        for an empty one, or where the template refuses."""
        bos = self.tokenizer.bos_token_id
        written = models.tokenize(self.tokenizer, [self._write(text) for text in texts])
        cut = [models.cut_tokens(ids, bos, self.max_length, "left") for ids in written]
        keys = [tuple(ids.tolist()) for ids in cut]
        places = {key: place for place, key in enumerate(sorted(set(keys)))}
        total = sum(map(len, places))
        with tqdm(total=total, unit="token", disable=None if progress else True) as bar:
            found = self.engine.embed(list(map(np.array, places)), bar).float()
        center = self.learned.center
        return found[[places[key] for key in keys]] - (0 if center is None else center)

    def _write(self, text: str | Conversation) -> str:
        if not isinstance(text, str):
            return models.render_text(self.tokenizer, text)
        text = text.rstrip()
        require(bool(text), "a text is empty")
        return text.removesuffix(self.end.rstrip()) + self.end

    def score(self, rows: Tensor, user: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Rewards [n] in log odds of embeddings [n, F], and standard deviations where known, of a
        user of the file, else InputError, or of the average user, None."""
        return rows @ self.learned.direction(user, "--user"), self.learned.deviations(rows, user)
