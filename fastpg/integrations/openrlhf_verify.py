"""The cases of `fastpg verify openrlhf`: what OpenRLHF asks its functions for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .verifying import Case, Results, Sizes
from .verl_verify import (
    BATCH,
    GAMMA,
    LAM,
    LENGTH,
    SMALL,
    TEMPERATURE,
    exact_of_logits,
    forbidden,
    halved,
    heads,
    rollouts,
)


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """All of them: small ones whose errors are taken, and large ones that are timed."""
    small = rollouts(8, 50, device)
    holes = small | {"mask": small["mask"] & (small["rewards"] > -0.5)}
    yield Case("advantages, right-padded", small, call_of_gae, exact_gae)
    yield Case("advantages, holes", holes, call_of_gae, exact_gae)
    head = heads(SMALL, device)
    half = {name: halved(x) for name, x in head.items()}
    for name, given in ("", head), (", bf16", half), (", logits of -inf", forbidden(head)):
        yield Case(f"actor{name}", given, call_of_actor, exact_of_actor)
    yield Case(f"advantages, {BATCH} x {LENGTH}", rollouts(BATCH, LENGTH, device), call_of_gae)
    of_size = f"V={sizes.vocab}, H={sizes.hidden}, {sizes.tokens} tokens"
    large = heads(sizes, device)
    yield Case(f"actor, {of_size}", large, call_of_actor)
    large = {name: halved(x) for name, x in large.items()}
    yield Case(f"actor, bf16, {of_size}", large, call_of_actor)


def call_of_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Results:
    """Advantages and returns."""
    maker: Any = import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    return maker.get_advantages_and_returns(None, values, rewards, mask.float(), GAMMA, LAM)


def exact_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Results:
    """The same, token by token; a masked token is a step of time without reward and value."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    follows = advantage = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + GAMMA * follows - values[:, t] + GAMMA * LAM * advantage
        follows = values[:, t]
        advantages[:, t] = advantage
    return [advantages, advantages + values]


class Head(nn.Module):
    """A model that is its head: the hidden states of the tokens are given."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.hidden, self.weight, self.bias = hidden, weight, bias

    def forward(self, _sequences: Tensor, **_: object) -> Any:
        """The logits, where OpenRLHF looks for them."""
        outputs: Any = import_module("transformers.modeling_outputs")
        return outputs.CausalLMOutput(logits=self.hidden[None] @ self.weight.T + self.bias)


def call_of_actor(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """Log-probs and entropies of one sequence from OpenRLHF's actor."""
    actor: Any = import_module("openrlhf.models.actor").Actor(
        Head(hidden, weight, bias), temperature=TEMPERATURE
    )
    actor.packing_samples = False
    # The label of a position is the token after it, and the last position has none.
    sequence = labels.roll(1)[None]
    logp, output = actor(
        sequence,
        attention_mask=torch.ones_like(sequence),
        return_output=True,
        return_logprobs=True,
        return_entropy=True,
    )
    return [logp[0], output.entropy[0]]


def exact_of_actor(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """The same by a softmax."""
    return [x[:-1] for x in exact_of_logits(hidden, weight, bias, labels) if x is not None]
