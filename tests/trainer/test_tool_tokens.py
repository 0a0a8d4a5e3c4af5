"""Completions with tokens of a tool: seen by the policy, and no part of what it learns."""

import dataclasses

import pytest
import torch
from plain_loop import plain_loop
from played_episodes import as_rollout, played_episodes
from recorded_runs import moved_trainer, trained_parameters
from tiny_trainer import make_trainer

from fastpg.tasks import reviews
from fastpg.trainer.rewards.columns import reward_columns
from fastpg.trainer.rewards.episodes import score_rollout
from fastpg.trainer.settings.config import PPOConfig

SCORES = torch.linspace(-1, 1, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(2))]


def test_the_episodes_have_tools_in_every_place():
    rollout = as_rollout(played_episodes())
    mask, attended = rollout.mask, rollout.attended
    last = attended.sum(-1) - 1
    assert len(set(map(tuple, rollout.input_ids[:, :4].tolist()))) == 3
    assert (~mask[:, 0]).any() and mask[:, 0].any()
    assert (~mask.gather(1, last[:, None])).any()
    interior = ~mask & attended & (mask.cumsum(-1) > 0) & (mask.flip(1).cumsum(-1).flip(1) > 0)
    assert interior.any()
    assert (mask == attended).all(-1).any()
    assert 0 < rollout.finished.sum() < 12


def learned(folder, algorithm, packed=True, **changes):
    """A trainer after one rollout, its plain loop after the same, and the metrics of both."""
    sizes = {"num_ppo_epochs": 1, "max_grad_norm": 1e3, **changes}
    trainer, settings = moved_trainer(folder, algorithm, **sizes)
    loop, learner = plain_loop(trainer, settings), trainer.learner
    assert learner.paths.packing is not None
    if not packed:
        learner.paths = dataclasses.replace(learner.paths, packing=None)
    experience, credit = learner.experience(as_rollout(played_episodes()), SCORES)
    metrics = credit | learner.update(experience)
    batches = [batch.tolist() for batch in learner.minibatches(torch.arange(12))]
    return trainer, loop, metrics, loop.step(played_episodes(), SCORES.double(), batches)


@pytest.mark.parametrize(
    ("algorithm", "packed", "changes"),
    [
        ("ppo", True, {}),
        ("ppo", False, {}),
        ("grpo", True, {"micro_batch_size": None, "micro_batch_tokens": 60}),
        ("grpo", False, {}),
        pytest.param("gspo", True, {}, marks=pytest.mark.slow),
        pytest.param("rloo", False, {}, marks=pytest.mark.slow),
        pytest.param("dr_grpo", True, {}, marks=pytest.mark.slow),
    ],
)
def test_steps_and_metrics_are_those_of_a_plain_loop(tmp_path, algorithm, packed, changes):
    trainer, loop, metrics, expected = learned(tmp_path, algorithm, packed, **changes)
    torch.testing.assert_close(
        trained_parameters(trainer).double(), loop.parameters(), rtol=0, atol=3e-6
    )
    actual = {name: metrics[name] for name in expected if name != "learning_rate"}
    del expected["learning_rate"]
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics["policy/count"] == sum(sum(e.sampled) for e in played_episodes())
    assert metrics["policy/first_ratio_deviation"] == 0.0


@pytest.mark.parametrize("packed", [True, False])
def test_an_unfinished_completion_is_worth_what_follows_its_last_token(tmp_path, packed):
    trainer = make_trainer(tmp_path, bootstrap_truncated=True)
    torch.nn.init.normal_(trainer.model.value_head.weight)
    if not packed:
        trainer.learner.paths = dataclasses.replace(trainer.learner.paths, packing=None)
    episodes = played_episodes()
    with torch.no_grad():
        values = trainer.learner.values_after(as_rollout(episodes))
        for value, episode in zip(values, episodes, strict=True):
            ids = torch.tensor([episode.prompt + episode.completion])
            state = trainer.policy.model(ids).last_hidden_state[0, -1]
            expected = 0.0 if episode.finished else trainer.model.value_head(state).item()
            assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_completion_without_an_end_is_left_out_whole(tmp_path):
    trainer, _ = moved_trainer(tmp_path, "grpo", mask_truncated_completions=True)
    rollout = as_rollout(played_episodes())
    trained = trainer.learner._trained(rollout)
    assert torch.equal(trained[rollout.finished], rollout.mask[rollout.finished])
    assert not trained[~rollout.finished].any()


def test_texts_hold_the_words_of_the_tool_and_lengths_do_not():
    episodes, tokenizer = played_episodes(), reviews.build_tokenizer()
    rollout = as_rollout(episodes)
    examples = [{"prompt": tokenizer.decode(e.prompt)} for e in episodes]
    seen = {}

    def reward(prompts, completions, completion_ids, texts):
        seen.update(completion_ids=completion_ids, texts=texts)
        return [0.0] * len(completions)

    scored = score_rollout(rollout, examples, [reward], tokenizer, PPOConfig())
    assert seen["completion_ids"] == [e.completion for e in episodes]
    expected = [tokenizer.decode(e.completion, skip_special_tokens=True) for e in episodes]
    assert scored.completions == expected
    columns = reward_columns(examples, rollout, expected, tokenizer)
    assert columns["texts"] == seen["texts"]
    for text, example, completion in zip(seen["texts"], examples, expected, strict=True):
        assert text.split() == [*example["prompt"].split(), *completion.split()]
    assert scored.lengths.tolist() == [sum(e.sampled) for e in episodes]
