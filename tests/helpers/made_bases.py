"""Files of users' rewards that nothing was learned for, and what their models make of texts."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lore.elicitation.scoring import Scorer
from lore.embeddings import store as embeddings
from lore.learning.basis import Basis, save_basis
from lore.methods.fitting.posterior import Evidence, Prior
from lore.methods.mixed_logit import MixedFit
from lore.methods.saved import load_learned


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHATS = [
    talk(question, answer)
    for question in ("Why is the sky blue?", "Sing!")
    for answer in ("Light scatters.", "No idea, sorry", "La la la la la la la la")
]


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def standard(K: int) -> Prior:
    """Tastes [K] that are standard normal."""
    return Prior(torch.zeros(K).double(), torch.eye(K).double())


def make_basis(
    folder: Path, model: Path | None, features: int = 32, rank: int = 3, **facts: str
) -> Path:
    """A basis file with two seen users and a new one; facts are what is known of the model."""
    rng = torch.Generator().manual_seed(1)
    V = torch.randn(features, rank, generator=rng)
    W = torch.rand(3, rank, generator=rng).softmax(1)
    settings = {"rank": rank, "estimator": "LoRe"} | facts
    settings |= {"model": str(model)} if model else {}
    basis = Basis(V, W[:2], V[:, 0], ["ann", "17"], W[2:], ["new"], settings)
    save_basis(folder / "basis.safetensors", basis)
    return folder / "basis.safetensors"


def make_mixed(folder: Path, model: Path | None, features: int = 32, known: bool = False) -> Path:
    """A mixed logit's file with the same people: tastes along two directions, half known.

    The file may have a center, and how well the tastes are known: those of ann not at all.
    """
    rng = torch.Generator().manual_seed(2)
    directions = torch.randn(features, 3, generator=rng).double() / 100
    states = torch.randn(3, 2, generator=rng).double()
    fit = MixedFit(directions[:, 0], directions[:, 1:], standard(2), {"chosen": {"rank": 2}})
    fit.users = states[:2]
    facts = {"users": ["ann", "17"], "users_unseen": ["new"]}
    facts |= {"model": str(model)} if model else {}
    if known:
        more = torch.tensor([[0.5, 0.1], [0.1, 0.2]]).inverse() - torch.eye(2)
        seen = Evidence(torch.linalg.cholesky(more).T, torch.tensor([0, 2]))
        unseen = Evidence((0.3**-1 - 1) ** 0.5 * torch.eye(2), torch.tensor([2]))
        facts |= {"known": seen, "known_unseen": unseen, "center": torch.ones(features)}
    fit.save(folder / "mixed_logit.safetensors", states[2:], facts)
    return folder / "mixed_logit.safetensors"


def scorer_of(path: Path, **given: Any) -> Scorer:
    """A file's users with the reward model loaded."""
    return Scorer(load_learned(path), path, **given)


def embed(model: Path, folder: Path, chats: list = CHATS, **given: Any) -> torch.Tensor:
    """Embeddings as a run has them [n, F]."""
    store = embeddings.embed(chats, folder, model=str(model), progress=False, **given)
    return store.rows(torch.arange(len(chats)))


def stock_rewards(folder: Path, batch: bool, chats: list = CHATS) -> torch.Tensor:
    """[n, labels], by nothing but what the model card says."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
    write = AutoTokenizer.from_pretrained(folder).apply_chat_template
    groups = [chats] if batch else [[chat] for chat in chats]
    given = {"return_tensors": "pt", "return_dict": True, "padding": batch}
    with torch.no_grad():
        return torch.cat([model(**write(group, **given)).logits for group in groups]).float()


def write_lines(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
