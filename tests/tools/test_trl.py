"""Exports in TRL, as its users call it: rewards of GRPO, and a start for RewardTrainer."""

from pathlib import Path

import pytest
from test_export import load_reward
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import models
from made_bases import CHATS, make_basis, scorer_of, stock_rewards
from tools import export

pytestmark = pytest.mark.slow
QUIET = {"report_to": "none", "logging_steps": 1, "use_cpu": True, "save_strategy": "no",
         "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
         "per_device_train_batch_size": 4}  # fmt: skip


def test_grpo_trains_on_two_users_rewards_of_one_model(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")  # take seconds
    path = make_basis(tmp_path, models.tiny_qwen(tmp_path / "model"))
    export.main(path, tmp_path / "out", users=("ann", "new"))
    reward, calls = load_reward(tmp_path / "out"), []

    def trl_reward(prompts, completions, user, **more):
        found = reward.trl_reward(prompts, completions, user=user, **more)
        calls.append((prompts, completions, user, found))
        return found

    rows = [{"prompt": [{"role": "user", "content": f"Say {i}!"}], "user": ("ann", "new")[i % 2]}
            for i in range(8)]  # fmt: skip
    policy = models.tiny_qwen(tmp_path / "policy", form="ForCausalLM")
    trainer = trl.GRPOTrainer(
        model=str(policy), reward_funcs=trl_reward, train_dataset=datasets.Dataset.from_list(rows),
        args=trl.GRPOConfig(str(tmp_path / "run"), max_steps=3, num_generations=2,
                            max_completion_length=6, **QUIET),
    )  # fmt: skip
    trainer.train()
    logged = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(logged) == 3 and len(calls) == 3
    assert {user for call in calls for user in call[2]} == {"ann", "new"}
    scorer = scorer_of(path)
    for prompts, completions, users, found in calls:
        rows = scorer.embed([p + c for p, c in zip(prompts, completions, strict=True)])
        for row, user, value in zip(rows, users, found, strict=True):
            assert value == pytest.approx(float(scorer.score(row[None], user)[0]), abs=1e-4)
    assert logged[0] == pytest.approx(sum(calls[0][3]) / len(calls[0][3]), abs=1e-4)


def test_reward_trainer_starts_from_an_export_at_its_own_loss(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    path = make_basis(tmp_path, models.tiny_qwen(tmp_path / "model"))
    export.main(path, tmp_path / "out", users=("ann",))
    places = {"chosen": (0, 2, 3, 5), "rejected": (1, 1, 4, 3)}
    rows = {name: [CHATS[i] for i in some] for name, some in places.items()}
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "out"),
        train_dataset=datasets.Dataset.from_dict(rows),
        args=trl.RewardConfig(str(tmp_path / "run"), max_steps=1, **QUIET),
    )
    trainer.train()
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    liked, other = (stock_rewards(tmp_path / "out", False, chats) for chats in rows.values())
    expected = float(-logsigmoid(liked - other).mean())
    assert loss == pytest.approx(expected, abs=1e-3) and loss < 2
