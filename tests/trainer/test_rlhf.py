"""The embedded task with a learned reward: its pairs, and that a policy can be trained too far."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_trainer import metrics_of

from fastpg.cli import main
from fastpg.tasks import reviews, rlhf
from fastpg.trainer import PPOConfig


def test_the_true_reward_is_praise_in_whole_sentences():
    completions = ["clever .", "very dull .", "clever clever .", "clever but dull ."]
    assert rlhf.true_reward(["the plot was"] * 4, completions) == [1.0, -1.0, -1.0, 0.0]


def test_pairs_are_ordered_by_kind_words_with_errors(monkeypatch):
    tokenizer = reviews.build_tokenizer()
    written = iter([["clever ."] * 1000, ["clever but dull ."] * 1000])
    monkeypatch.setattr(rlhf, "_finished", lambda *_: next(written))
    monkeypatch.setattr(rlhf, "SURENESS", 1.0)
    monkeypatch.setattr(rlhf, "NUM_PAIRS", 1000)
    pairs = rlhf.compare(reviews.build_model(tokenizer, 0), tokenizer, ["the plot was"], seed=0)
    right = sum(pair["chosen"] == "clever ." for pair in pairs)
    # sigmoid(1) of them; three standard deviations are 0.04.
    assert len(pairs) == 1000 and abs(right / 1000 - 0.731) < 0.04


def test_the_reward_model_is_trained_in_the_precision_of_the_run(monkeypatch):
    class Trainer:
        def __init__(self, model, args, **_):
            self.reward = args.mixed_precision

        def train(self):
            pass

    monkeypatch.setattr(rlhf, "RewardTrainer", Trainer)
    tokenizer = reviews.build_tokenizer()
    model = reviews.build_model(tokenizer, 0)
    args = PPOConfig(mixed_precision="bf16")
    assert rlhf.train_reward_model(model, tokenizer, [], args) == "bf16"


@pytest.fixture
def short_task(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reviews, "SUPERVISED_STEPS", 1)
    monkeypatch.setattr(rlhf, "NUM_PAIRS", 40)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


@pytest.mark.slow
def test_the_command_goes_through_all_stages_and_resumes(short_task, capsys):
    assert main(["train", "--task", "reviews", "--rlhf", "--num_steps", "1"]) == 0
    out = Path("out/reviews_rlhf")
    assert (out / "reward_model/model/model.safetensors").exists()
    (row,) = metrics_of(out)
    assert row["reward/mean"] == pytest.approx(
        row["rewards/reward_model/mean"] - (1 - row["completions/finished"]), abs=1e-5
    )
    assert main(["train", "--resume", str(out), "--num_steps", "2"]) == 0
    assert len(metrics_of(out)) == 2
    # It went on with the reward model that it had.
    assert not list((out / "reward_model").glob("earlier-*"))
    assert "learned reward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "review"], "task must be reviews, not 'review'."),
        (["--rlhf", "--model", "m"], "rlhf is the embedded task, which has its own model."),
        (["--task", "reviews", "--reward", "a:b"], "task is the embedded task, which has its own"),
    ],
)
def test_the_embedded_task_is_not_mixed_with_ones_own_run(capsys, flags, sentence):
    assert main(["train", *flags]) == 2
    assert sentence in capsys.readouterr().err


def once(function):
    """The function, whose first result is copied for every later call: training changes it."""
    results = []

    def first(*arguments):
        if not results:
            results.append(function(*arguments))
        return copy.deepcopy(results[0])

    return first


@pytest.mark.training
def test_without_a_kl_penalty_the_learned_reward_is_optimised_too_far(tmp_path, monkeypatch):
    """Both policies begin as the same model, and learn from the same reward model."""
    monkeypatch.setattr(reviews, "supervised_model", once(reviews.supervised_model))
    monkeypatch.setattr(rlhf, "train_reward_model", once(rlhf.train_reward_model))
    true = []
    for kl_coef in (0.2, 0.0):
        own = {"output_dir": str(tmp_path / str(kl_coef)), "kl_coef": kl_coef}
        args = PPOConfig(**rlhf.preferred_settings("ppo") | own)
        after = rlhf.build_trainer(args).train()
        assert after["eval/rewards/reward_model/mean"] > 2
        true.append(after["eval/rewards/true_reward/mean"])
    # In three seeds it was 0.88 to 0.94 with the penalty, and -0.97 to -0.19 without.
    assert true[0] > 0.5 > true[1]
