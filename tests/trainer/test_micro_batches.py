"""Micro-batches cut by tokens: within their budget, and gradients of the whole optimiser step."""

import pytest
import torch
from test_packing import WHOLE, batch
from test_trainer import tiny_gpt2
from tiny_trainer import make_trainer, metrics_of, tiny_model

from fastpg.cli import main
from fastpg.trainer import InputError, PPOConfig
from fastpg.trainer.learning.micro_batches import cut_by_tokens, split_into
from fastpg.trainer.models.packing import pack
from fastpg.trainer.rollouts.rollout import Rollout

NONE_IS_PACKED = None
PACKINGS = [WHOLE, NONE_IS_PACKED]


def rollout_of(ids, mask):
    return Rollout(ids, mask, mask[:, -5:].bool(), mask[:, -1] == 0)


def forward_size(rollout, rows, packing):
    """The tokens of the forward that `predicting_states` makes."""
    ids, mask = rollout.input_ids[rows], rollout.attention_mask[rows]
    return ids.numel() if packing is None else pack(ids, mask, 5, packing).source.numel()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("budget", [1, 12, 20, 35, 1000])
def test_parts_are_as_large_as_the_budget_allows(packing, budget):
    rollout = rollout_of(*batch())
    rows = torch.tensor([8, 0, 1, 2, 3, 4, 6, 7, 5])
    parts = cut_by_tokens(rollout, rows, budget, packing)
    assert torch.equal(torch.cat(parts), rows)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert len(part) == 1 or forward_size(rollout, part, packing) <= budget
        if following is not None:
            longer = torch.cat([part, following[:1]])
            assert forward_size(rollout, longer, packing) > budget
    assert (len(parts) == 9) == (budget == 1 or (packing is None and budget < 22))
    assert (len(parts) == 1) == (budget == 1000)


def test_a_shared_prompt_counts_once():
    ids, mask = batch()
    # Six tokens of a prompt, and of four completions all but their last: 6 + 4 + 0 + 2 + 1.
    (part,) = cut_by_tokens(rollout_of(ids, mask), torch.arange(4), 13, WHOLE)
    assert part.tolist() == [0, 1, 2, 3]
    assert len(cut_by_tokens(rollout_of(ids, mask), torch.arange(4), 12, WHOLE)) == 2


def test_processes_make_the_same_number_of_parts():
    parts = [torch.arange(5), torch.tensor([5]), torch.arange(6, 10)]
    for count in (3, 4, 7, 10):
        more = split_into(parts, count)
        assert len(more) == count
        assert torch.equal(torch.cat(more), torch.arange(10))
        assert max(map(len, more)) == {3: 5, 4: 4, 7: 2, 10: 1}[count]


def gradient(folder, make_model, algorithm, **settings):
    """The gradient of an optimiser step, in fp64, and the number of forwards that it took."""
    trainer = make_trainer(
        folder, model=make_model().double(), algorithm=algorithm, num_ppo_epochs=1,
        num_mini_batches=1, kl_coef=0.1, max_grad_norm=1e9, **settings,
    )  # fmt: skip
    learner = trainer.learner
    torch.manual_seed(5)
    rollout = trainer._sample(next(iter(trainer.loader)))
    experience, _ = learner.experience(rollout, torch.linspace(-1, 1, len(rollout.mask)))
    # The policy has moved since, so that ratios and KL have gradients of their own.
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    calls, gradients = [], {}
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    learner.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
    )
    learner._step(experience, torch.arange(len(rollout.mask)))
    return gradients, len(calls)


# GPT-2's norms compute in fp64; those of Qwen3 in float32 whatever the dtype is, and values too.
@pytest.mark.parametrize(
    ("make_model", "algorithm", "rtol"),
    [(tiny_gpt2, "dr_grpo", 1e-9), (tiny_gpt2, "grpo", 1e-9), (tiny_model, "ppo", 1e-4)],
)
def test_gradients_are_those_of_the_whole_step(tmp_path, make_model, algorithm, rtol):
    group = {"num_generations": 5} if algorithm != "ppo" else {}
    settings = {"micro_batch_size": None, "max_new_tokens": 8, **group}
    whole, one = gradient(
        tmp_path / "whole", make_model, algorithm, **settings, micro_batch_tokens=10_000
    )
    split, several = gradient(
        tmp_path / "split", make_model, algorithm, **settings, micro_batch_tokens=24
    )
    assert one == 1 and 3 <= several < 10
    assert any(x.abs().max() > 1e-3 for x in whole.values())
    for name, expected in whole.items():
        scale = expected.norm().item()
        assert (split[name] - expected).norm().item() <= rtol * max(scale, 1e-6), name


def test_the_first_ratio_is_one_in_parts_too(tmp_path):
    settings = {"micro_batch_size": None, "micro_batch_tokens": 30, "num_steps": 1}
    make_trainer(tmp_path, bootstrap_truncated=True, **settings).train()
    (row,) = metrics_of(tmp_path)
    assert row["policy/first_ratio_deviation"] == 0.0


def test_a_micro_batch_is_cut_by_rows_or_by_tokens():
    assert PPOConfig().resolved().micro_batch_size == 16
    assert PPOConfig(micro_batch_tokens=100).micro_batch_size is None
    with pytest.raises(InputError, match="micro_batch_size=4 and micro_batch_tokens=100 both say"):
        PPOConfig(micro_batch_size=4, micro_batch_tokens=100)
    with pytest.raises(InputError, match="micro_batch_tokens must be positive, not 0"):
        PPOConfig(micro_batch_tokens=0)


def test_the_embedded_task_leaves_its_own_size_for_tokens(capsys):
    # It gets as far as the next mistake.
    flags = ["--micro_batch_tokens", "500", "--algorithm", "grpo", "--num_generations", "1"]
    assert main(["train", *flags]) == 2
    assert "needs num_generations of 2 or more" in capsys.readouterr().err
