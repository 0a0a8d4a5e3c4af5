"""The two methods of `PolicyWithValue`, and the way to them through what wraps the module."""

import dataclasses

import pytest
import torch
from tiny_trainer import make_trainer

from fastpg.trainer.models.objective import Targets
from fastpg.trainer.models.policy import (
    CompletionLogprobs,
    CompletionLoss,
    LossRequest,
    PolicyWithValue,
    logprobs_through,
    loss_through,
)


@pytest.fixture
def setup(tmp_path):
    """A model with a critic, a batch of completions, their targets and the loss of PPO."""
    trainer = make_trainer(tmp_path, cliprange_value=0.1)
    learner = trainer.learner
    torch.nn.init.ones_(trainer.model.value_head.weight)
    rollout = trainer._sample(next(iter(trainer.loader)))
    old, _ = learner.experience(rollout, torch.linspace(-1, 1, len(rollout.mask)))
    targets = Targets(
        token_weight=rollout.mask / rollout.mask.sum(),
        advantages=old.advantages,
        returns=old.returns,
        old_logp=old.logp,
        ref_logp=old.ref_logp,
        old_values=old.values,
        new_logp=torch.zeros_like(old.logp),
    )
    return trainer.model, learner.batch(rollout), targets, learner.objective


class Wrapper(torch.nn.Module):
    """What DDP is to its module: only calls go through it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


@torch.no_grad()
def test_log_probs_through_a_wrapper_are_those_of_the_method(setup):
    model, batch, _, _ = setup
    wrapper = Wrapper(model)
    through = logprobs_through(wrapper, batch)
    assert wrapper.calls == 1
    assert type(through) is CompletionLogprobs
    for ours, expected in zip(through, model.logprobs(batch), strict=True):
        assert ours.shape == batch.labels.shape
        assert torch.equal(ours, expected)


def test_the_loss_through_a_wrapper_is_that_of_the_method(setup):
    model, batch, targets, objective = setup
    wrapper = Wrapper(model)
    through = loss_through(wrapper, batch, targets, objective)
    assert wrapper.calls == 1
    assert type(through) is CompletionLoss
    expected = model.loss(batch, targets, objective)
    assert torch.equal(through.loss, expected.loss)
    assert torch.equal(through.value_stats.values, expected.value_stats.values)
    gradients = [
        torch.autograd.grad(each.loss, list(model.parameters())) for each in (through, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_critic_there_are_no_values(setup):
    model, batch, targets, objective = setup
    policy_only = PolicyWithValue(model.policy, critic=False)
    result = policy_only.loss(batch, targets, objective)
    assert result.value_stats is None
    assert policy_only.logprobs(batch).values is None
    whole = model.loss(batch, targets, objective)
    value_loss, _ = objective.value_loss(model.logprobs(batch).values, targets)
    torch.testing.assert_close(result.loss + value_loss, whole.loss)


def test_wrappers_find_no_tensors_in_a_request(setup):
    """Those of tuples and dataclasses are cast by FSDP with mixed precision."""
    _, batch, targets, objective = setup
    request = LossRequest(batch, targets, objective)
    assert not isinstance(request, tuple | list | dict)
    assert not dataclasses.is_dataclass(request)
    assert not any(torch.is_floating_point(x) for x in vars(batch).values() if torch.is_tensor(x))
