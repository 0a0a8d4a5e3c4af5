"""Schedules, decay, adaptive KL, early stop, the best model, truncated completions, scores."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from resumable_run import assert_same_run, trained
from safetensors.torch import load_file
from tiny_trainer import make_trainer, metrics_of, share_of_praise, tiny_model

import fastpg
from fastpg.trainer import InputError, PPOConfig
from fastpg.trainer.learning.optimizer import rate_factor
from fastpg.trainer.run.files import StorageError
from fastpg.trainer.saver import Progress, Saver


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 1, [0.5, 1, 2 / 3, 1 / 3, 0]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1]),
        ("cosine", 0, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 0.5, 0]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_it_should(kind, warmup, expected):
    factors = [rate_factor(kind, step, warmup, total=4) for step in range(5)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_both_rates_follow_the_schedule(tmp_path):
    trainer = make_trainer(tmp_path, num_steps=3, lr_scheduler_type="cosine", warmup_steps=1)
    trainer.train()
    rates = [row["learning_rate"] for row in metrics_of(tmp_path)]
    assert rates == pytest.approx([5e-4, 1e-3, 5e-4])
    ratio = {group["initial_lr"] for group in trainer.learner.optimizer.param_groups}
    assert ratio == {1e-3}


def test_weight_decay_shrinks_matrices_alone(tmp_path):
    def constant(completions):
        return [0.0] * len(completions)

    # Equal rewards have no gradient, so nothing but the decay moves a weight.
    settings = {"algorithm": "dapo", "num_generations": 2, "num_steps": 1, "weight_decay": 0.5}
    trainer = make_trainer(tmp_path, constant, learning_rate=0.1, num_ppo_epochs=1, **settings)
    before = {name: p.clone() for name, p in trainer.policy.named_parameters()}
    trainer.train()
    for name, weight in trainer.policy.named_parameters():
        steps = 2 if weight.dim() > 1 else 0
        expected = before[name] * (1 - 0.1 * 0.5) ** steps
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=0)


ADAPTIVE = {"adaptive_kl_target": 0.05, "adaptive_kl_horizon": 20, "kl_coef": 0.3}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_penalty_follows_the_kl(tmp_path, algorithm):
    settings = {"algorithm": algorithm, "num_steps": 4, "num_generations": 2, **ADAPTIVE}
    trainer = make_trainer(tmp_path, learning_rate=1e-2, **settings)
    trainer.train()
    rows = metrics_of(tmp_path)
    controller = fastpg.AdaptiveKL(0.3, 0.05, 20)
    for row in rows:
        assert row["objective/kl_coef"] == controller.value
        controller.update(row["objective/kl"], 10)
    assert rows[1]["objective/kl_coef"] < 0.3 < controller.value
    assert trainer.learner.algorithm.kl_coef == rows[-1]["objective/kl_coef"]
    assert trainer.learner.objective.algorithm is trainer.learner.algorithm


@pytest.mark.slow
def test_schedule_and_controller_resume_to_the_last_bit(tmp_path):
    settings = {
        **ADAPTIVE, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
        "whiten_rewards": True, "bootstrap_truncated": True, "save_best_model": True,
        "eval_steps": 1, "target_kl": 1e-4, "learning_rate": 1e-2,
    }  # fmt: skip
    trained(tmp_path / "whole", **settings)
    trained(tmp_path / "part", **settings)
    (tmp_path / "part/LATEST").write_text("checkpoint-2")
    resumed = trained(tmp_path / "part", resume=True, **settings)
    assert_same_run(tmp_path / "part", tmp_path / "whole")
    assert resumed.learner.kl_controller.value != 0.3
    best = [(tmp_path / run / "best_model/model.safetensors") for run in ("part", "whole")]
    assert best[0].read_bytes() == best[1].read_bytes()


@pytest.mark.parametrize(("target_kl", "steps"), [(1e-9, 2), (100.0, 8)])
def test_a_rollout_is_left_once_the_policy_has_moved_too_far(tmp_path, target_kl, steps):
    # The first of four passes times two steps sees a ratio of 1, the second no more.
    make_trainer(tmp_path, num_steps=1, target_kl=target_kl).train()
    (row,) = metrics_of(tmp_path)
    assert row["policy/optimizer_steps"] == steps


def test_a_best_model_that_could_not_be_saved_is_not_what_others_have_to_beat(
    tmp_path, monkeypatch
):
    saver = SimpleNamespace(
        args=SimpleNamespace(save_best_model=True),
        accelerator=SimpleNamespace(num_processes=1),
        log=SimpleNamespace(directory=tmp_path, say=lambda text: None),
        progress=Progress(best_reward=1.0),
        model_writer=lambda: None,
    )
    saved = []

    def full_at_first(directory, write):
        saved.append(directory.name)
        if len(saved) == 1:
            raise StorageError("full")

    monkeypatch.setattr("fastpg.trainer.saver.write_model", full_at_first)
    for reward in (3.0, 2.0, 1.5):
        Saver.keep_best(saver, {"reward/mean": reward})
    assert saved == ["best_model"] * 2 and saver.progress.best_reward == 2.0


def test_the_best_model_is_that_of_the_best_evaluation(tmp_path):
    scores = iter([0.0, 9.0, 1.0, 5.0])  # at the start, after both steps, at the end

    def reward(completions):
        return [next(scores) if len(completions) == 2 else 0.0] * len(completions)

    settings = {"eval_steps": 1, "save_steps": 1, "save_total_limit": None}
    make_trainer(tmp_path, reward, save_best_model=True, **settings).train()
    best, first = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("best_model", "checkpoint-1/model")
    )
    assert all(torch.equal(best[name], first[name]) for name in first)
    assert "best_model" in (tmp_path / "summary.md").read_text()
    state = json.loads((tmp_path / "checkpoint-2/state.json").read_text())
    assert state["best_reward"] == 9.0


def test_truncated_completions_are_left_out_of_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, max_new_tokens=20)
    rollout = trainer._sample(trainer.train_dataset)
    assert 0 < rollout.finished.sum() < len(rollout.finished)
    scores = torch.zeros(len(rollout.mask))
    old, _ = trainer.learner.experience(rollout, scores)
    weights = []
    original = trainer.learner.objective.token_loss
    object.__setattr__(
        trainer.learner.objective,
        "token_loss",
        lambda targets: (weights.append(targets.token_weight), original(targets))[1],
    )
    trainer.learner._step(old, torch.arange(len(scores)))
    weight = torch.cat(weights)
    kept = rollout.mask & rollout.finished[:, None]
    torch.testing.assert_close(weight, kept / kept.sum())


def test_a_step_of_truncated_completions_alone_moves_nothing(tmp_path):
    settings = {"mask_truncated_completions": True, "max_new_tokens": 1, "num_steps": 1}
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # EOS is never the one token that there is room for
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(43))
        model.lm_head.bias[1] = -1e4
    trainer = make_trainer(tmp_path, model=model, **settings)
    before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).clone()
    trainer.train()
    after = torch.nn.utils.parameters_to_vector(trainer.model.parameters())
    assert torch.equal(before, after)


def test_unfinished_completions_are_credited_with_what_would_follow(tmp_path):
    settings = {"kl_coef": 0.0, "max_new_tokens": 20, "gamma": 0.9, "lam": 0.8}
    trainer = make_trainer(tmp_path, bootstrap_truncated=True, **settings)
    learner, policy = trainer.learner, trainer.policy
    head = trainer.model.value_head
    torch.nn.init.normal_(head.weight)
    torch.nn.init.ones_(head.bias)
    rollout = trainer._sample(trainer.train_dataset)
    scores = torch.linspace(-1, 1, len(rollout.mask))
    experience, _ = learner.experience(rollout, scores)
    # By hand: the state after the last token of each episode, without padding.
    bootstrap = []
    for ids, kept, finished in zip(
        rollout.input_ids, rollout.attention_mask, rollout.finished, strict=True
    ):
        with torch.no_grad():
            hidden = policy.model(ids[kept.bool()][None]).last_hidden_state[:, -1]
        bootstrap.append(0.0 if finished else head(hidden).item())
    assert 0 < rollout.finished.sum() < len(rollout.finished)
    rewards = fastpg.token_rewards(scores, rollout.mask)
    expected, _ = fastpg.gae(
        rewards, experience.values, rollout.mask, gamma=0.9, lam=0.8,
        bootstrap=torch.tensor(bootstrap),
    )  # fmt: skip
    expected = fastpg.whiten(expected, rollout.mask)
    torch.testing.assert_close(experience.advantages, expected, rtol=1e-4, atol=1e-5)


def test_scores_are_clipped_before_the_penalty_for_a_missing_end(tmp_path):
    def large(completions):
        return [100.0, -100.0] * (len(completions) // 2)

    settings = {"reward_clip": 3.0, "missing_eos_penalty": 1.0, "num_eval_samples": 8}
    episodes = make_trainer(tmp_path, large, **settings)._play_evaluation()
    missing = 1 - episodes.finished
    assert torch.equal(episodes.scores, torch.tensor([3.0, -3.0] * 4) - missing)
    assert episodes.rewards["large"].tolist() == [100.0, -100.0] * 4


def test_scores_are_whitened_over_the_step(tmp_path):
    settings = {"algorithm": "reinforce", "whiten_rewards": True, "kl_coef": 0.0}
    trainer = make_trainer(tmp_path, share_of_praise, **settings)
    rollout = trainer._sample(trainer.train_dataset)
    scores = torch.linspace(5, 9, len(rollout.mask))
    experience, _ = trainer.learner.experience(rollout, scores)
    expected = (scores - scores.mean()) / scores.std()
    torch.testing.assert_close(experience.advantages[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_rollout_may_be_larger_than_the_horizon_of_a_penalty_that_stays():
    assert PPOConfig(rollout_batch_size=16384).adaptive_kl_target is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type must be linear, cosine or constant"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, not -1."),
        ({"reward_clip": 0}, "reward_clip must be positive, not 0.0."),
        ({"adaptive_kl_target": 1.0, "kl_coef": 0.0}, "adaptive_kl_target needs a kl_coef"),
        (
            {"adaptive_kl_target": 1.0, "adaptive_kl_horizon": 3},
            "adaptive_kl_horizon=3 is less than rollout_batch_size=10.",
        ),
        (
            {"bootstrap_truncated": True, "algorithm": "grpo", "num_generations": 2},
            "bootstrap_truncated needs a critic, which algorithm=grpo has not.",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make_trainer(tmp_path, **settings)
