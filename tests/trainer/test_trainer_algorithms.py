"""What `--algorithm` makes of the trainer: groups, critics, references, denominators, settings."""

import dataclasses
import doctest
import re

import pytest
import torch
from recorded_runs import recording, trained_parameters
from test_trainer import by_hand, parameters_after_a_step, perturb
from tiny_trainer import make_trainer, metrics_of

from fastpg.algorithms import ALGORITHMS
from fastpg.trainer import InputError, PPOConfig
from fastpg.trainer.learning.learner import Learner
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.run.run_files import save_config
from fastpg.trainer.settings import config
from fastpg.trainer.settings.config import from_mapping
from fastpg.trainer.settings.parsing import load_yaml


# RLOO takes one step on a rollout, the others eight.
@pytest.mark.parametrize(
    "algorithm, rate",
    [
        ("grpo", 1e-2),
        pytest.param("rloo", 2e-2, marks=pytest.mark.slow),
        pytest.param("gspo", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_a_group_algorithm_learns_without_a_critic(tmp_path, algorithm, rate):
    trainer = make_trainer(
        tmp_path,
        algorithm=algorithm,
        num_steps=20,
        rollout_batch_size=32,
        micro_batch_size=16,
        learning_rate=rate,
    )
    trainer.train()
    rows = metrics_of(tmp_path)
    assert rows[0]["reward/mean"] < 0.4
    assert rows[-1]["reward/mean"] > 0.8
    assert rows[0]["policy/first_ratio_deviation"] == 0.0
    assert not any(name.startswith("value/") for name in rows[0])
    assert not (tmp_path / "model" / "value_head.safetensors").exists()


def test_without_a_penalty_there_is_no_reference(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="dapo", num_generations=5)
    trainer.train()
    assert trainer.learner.reference is None
    assert "objective/kl" not in metrics_of(tmp_path)[0]


def test_completions_of_a_prompt_are_a_group(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="dr_grpo", num_generations=5)
    rows = next(iter(trainer.loader))
    assert [row["prompt"] for row in rows[:5]] == [rows[0]["prompt"]] * 5
    assert rows[5]["prompt"] != rows[0]["prompt"]
    rollout = trainer._sample(rows)
    scores = torch.arange(10.0) ** 2
    experience, _ = trainer.learner.experience(rollout, scores)
    expected = scores - scores.view(2, 5).mean(1).repeat_interleave(5)
    torch.testing.assert_close(experience.advantages[:, 0], expected)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_micro_batches_of_sequences_add_up(tmp_path, algorithm):
    settings = {"algorithm": algorithm, "num_generations": 5, "kl_coef": 0.1}
    whole = parameters_after_a_step(tmp_path / "whole", micro_batch_size=10, **settings)
    split = parameters_after_a_step(tmp_path / "split", micro_batch_size=2, **settings)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_a_loss_of_groups_against_a_computation_by_hand(tmp_path, algorithm):
    """One update, of a policy that is neither the one that sampled nor the reference."""
    settings = {"num_generations": 5, "kl_coef": 0.3, "num_ppo_epochs": 2, "num_mini_batches": 1}
    settings |= {"learning_rate": 0.0}  # so that both passes have the same loss
    trainer = make_trainer(tmp_path, algorithm=algorithm, max_new_tokens=16, **settings)
    perturb(trainer.model, 0.1)
    rollout = trainer._sample(next(iter(trainer.loader)))
    # One slot less: T is below max_new_tokens, as where every completion ended before.
    ids, seen, mask = (x[:, :-1] for x in (rollout.input_ids, rollout.attention_mask, rollout.mask))
    rollout = Rollout(ids, seen, mask, rollout.finished)
    old, _ = trainer.learner.experience(rollout, torch.linspace(-1, 2, 10))
    perturb(trainer.model, 0.02)
    unused = torch.nn.Linear(32, 1)
    with torch.no_grad():
        own = by_hand(trainer.policy, unused, rollout, 1.0)
        ref = by_hand(trainer.learner.reference, unused, rollout, 1.0)
    expected = 0.0
    for i, kept in enumerate(mask):
        (logp, *_), (ref_logp, *_) = own[i], ref[i]
        ratio, d, a = (logp - old.logp[i][kept]).exp(), logp - ref_logp, old.advantages[i][kept]
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        terms = -surrogate + 0.3 * ratio * ((-d).exp() - 1 + d)
        expected += terms.sum() / (kept.sum() if algorithm == "grpo" else 16) / 10
    loss = trainer.learner.update(old)["policy/loss"]
    assert loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "cispo", "rloo"])
def test_a_rollout_of_one_step_needs_no_log_probs_beforehand(tmp_path, monkeypatch, algorithm):
    """Weights and metrics are as with them, without a forward of the policy."""
    settings = {"num_generations": 5, "kl_coef": 0.3, "num_ppo_epochs": 1, "num_mini_batches": 1}
    results = []
    for is_asked in (False, True):
        if is_asked:
            monkeypatch.setattr(Learner, "_needs_old_logp", True)
        folder = tmp_path / f"{is_asked}"
        trainer = make_trainer(folder, algorithm=algorithm, micro_batch_size=4, **settings)
        with recording(trainer) as rounds:
            trainer.train()
        # The penalty of RLOO is taken off scores, for which the log-probs are needed at once.
        assert [len(played.looks) for played in rounds[1:-1]] == (
            [3, 3] if is_asked or algorithm == "rloo" else [0, 0]
        )
        rows = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_second"))}
            for row in metrics_of(folder)
        ]
        results.append((rows, trained_parameters(trainer)))
    (rows, parameters), (rows_asked, parameters_asked) = results
    assert rows[1]["objective/kl"] != 0
    assert rows == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in rows_asked]
    torch.testing.assert_close(parameters, parameters_asked, rtol=0, atol=1e-6)


def resolved_algorithm(**settings):
    return PPOConfig(**settings).resolved().algorithm


def test_settings_take_the_place_of_the_algorithms_own():
    assert resolved_algorithm(algorithm="dapo").surrogate["clip"] == (0.2, 0.28)
    assert resolved_algorithm(algorithm="dapo", cliprange=0.1).surrogate["clip"] == (0.1, 0.1)
    assert resolved_algorithm(cliprange_high=4.0).surrogate["clip"] == (0.2, 4.0)
    grpo = resolved_algorithm(algorithm="grpo", cliprange_high=0.3, kl_coef=0.5, gamma=0.9)
    assert grpo.surrogate == {"surrogate": "ppo", "clip": (0.2, 0.3), "kl": "k3"}
    assert (grpo.kl_coef, grpo.gae) == (0.5, {"gamma": 0.9, "lam": 1.0})
    for name, own in ALGORITHMS.items():
        assert resolved_algorithm(algorithm=name) == own


@pytest.mark.parametrize("other", ALGORITHMS)
@pytest.mark.parametrize("first", ["ppo", "grpo"])
def test_saved_settings_of_one_algorithm_do_for_another(tmp_path, first, other):
    given = PPOConfig(algorithm=first, learning_rate=1e-4)
    save_config(given, tmp_path / "config.yaml")
    saved = from_mapping(PPOConfig, {**load_yaml(tmp_path / "config.yaml"), "algorithm": other})
    assert saved == dataclasses.replace(given, algorithm=other)
    assert saved.resolved() == PPOConfig(algorithm=other, learning_rate=1e-4).resolved()
    assert saved.resolved().algorithm == ALGORITHMS[other]


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "vpg"])
def test_without_a_bound_on_the_ratio_a_rollout_is_one_step(tmp_path, algorithm):
    trainer = make_trainer(tmp_path, algorithm=algorithm, rollout_batch_size=16)
    trainer.train()
    assert all(row["policy/ratio_max"] == 1.0 for row in metrics_of(tmp_path))
    assert PPOConfig(algorithm=algorithm, num_ppo_epochs=2).resolved().num_ppo_epochs == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"algorithm": "rlo"}, "Unknown algorithm 'rlo'; did you mean 'rloo'?"),
        (
            {"algorithm": "grpo", "rollout_batch_size": 10, "num_generations": 4},
            "rollout_batch_size=10 must be a multiple of num_generations=4.",
        ),
        (
            {"algorithm": "rloo", "num_generations": 1},
            "algorithm=rloo needs num_generations of 2 or more.",
        ),
        ({"algorithm": "sapo", "cliprange": 0.2}, "cliprange means nothing to algorithm=sapo."),
        ({"algorithm": "grpo", "lam": 0.9}, "lam needs a critic, which algorithm=grpo has not."),
        (
            {"algorithm": "reinforce++", "cliprange_value": 0.2},
            "cliprange_value needs a critic, which algorithm=reinforce++ has not.",
        ),
        ({"cliprange": 1.0}, "cliprange must be between 0 and 1, and neither, not 1.0."),
        ({"num_generations": 0}, "num_generations must be positive, not 0."),
    ],
)
def test_settings_that_do_not_fit_the_algorithm_are_refused(settings, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        PPOConfig(**settings)


def test_the_example_of_the_settings_runs():
    assert doctest.testmod(config).failed == 0
