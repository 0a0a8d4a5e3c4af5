"""One step of the trainer after sampling: log-probs of policy and reference, loss, optimiser.

The model has the widths of Qwen2.5-0.5B (H = 896, V = 151936, tied), random weights and 2 of its 24
layers: the head is the same, the rest is less. With the linear head, and with the model's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastpg.bench.timing import Case
from fastpg.trainer import PPOConfig
from fastpg.trainer.learning.fast_paths import find_fast_paths
from fastpg.trainer.learning.learner import Learner
from fastpg.trainer.models.head import HeadTransform
from fastpg.trainer.models.modes import frozen_copy
from fastpg.trainer.models.policy import PolicyWithValue
from fastpg.trainer.rollouts.rollout import Rollout

LAYERS, EPISODES, PROMPT, COMPLETION = 2, 16, 32, 128


def make_learner() -> Learner:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    policy = Qwen2ForCausalLM(config).eval()
    args = PPOConfig(num_ppo_epochs=1, num_mini_batches=1, micro_batch_size=EPISODES)
    accelerator = Accelerator()
    paths = find_fast_paths(policy, accelerator)
    model = PolicyWithValue(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model, optimizer = accelerator.prepare(model, optimizer)
    reference = frozen_copy(policy).to(accelerator.device)
    return Learner(accelerator, model, reference, optimizer, args, paths)


def rollout(device: torch.device) -> Rollout:
    """Completions of full length."""
    ids = torch.randint(151936, (EPISODES, PROMPT + COMPLETION), device=device)
    mask = torch.ones(EPISODES, COMPLETION, dtype=torch.bool, device=device)
    return Rollout(ids, torch.ones_like(ids), mask, mask.any(-1))


def cases(device: str) -> Iterator[Case]:
    learner = make_learner()
    batch = rollout(learner.accelerator.device)
    scores = torch.randn(EPISODES)
    assert learner.paths.head == HeadTransform(), "the head was not recognised"

    def step(head):
        old = experience(head)
        return old, learner.update(old)

    def experience(head):
        learner.paths = replace(learner.paths, head=head)
        return learner.experience(batch, scores)[0]

    def gradient(head):
        """The loss of an update, and of what it changes one vector that all else leads through."""
        old = experience(head)
        loss, *_ = learner._loss(old, learner._targets(old, old.rollout.mask.sum()))
        norm = learner.accelerator.unwrap_model(learner.model).policy.model.norm.weight
        return loss.detach(), *torch.autograd.grad(loss, norm)

    def gate():
        torch.testing.assert_close(
            experience(HeadTransform()).logp, experience(None).logp, rtol=0, atol=1e-4
        )
        torch.testing.assert_close(gradient(HeadTransform()), gradient(None), rtol=1e-3, atol=1e-5)

    yield Case(
        "trainer_step",
        f"Qwen2.5-0.5B widths, {LAYERS} layers, {EPISODES} x ({PROMPT} + {COMPLETION}), fp32",
        gate,
        {"linear head": lambda: step(HeadTransform()), "the model's logits": lambda: step(None)},
        ours="linear head",
        device=device,
        least=2,
    )
