"""The learning half of PPO: credit for a rollout, then clipped updates. The maths is in the ops."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastpg
from fastpg.integrations.peft import UnknownHead
from fastpg.trainer.config import PPOConfig
from fastpg.trainer.head import completion_logprobs, find_head
from fastpg.trainer.rollout import Rollout

logger = get_logger(__name__)


@dataclass(frozen=True)
class Experience:
    """What the optimiser learns from: a rollout and, for each of its tokens, float32 [B, T]."""

    rollout: Rollout
    logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __getitem__(self, rows: Tensor) -> "Experience":
        """The episodes `rows`, int64 [n], in that order."""
        return Experience(*(getattr(self, f.name)[rows] for f in fields(self)))


class Step(NamedTuple):
    """One optimiser step: the statistics of its micro-batches, the norm of its gradient."""

    policy: tuple[fastpg.PolicyStats, ...]
    value: tuple[fastpg.ValueStats, ...]
    grad_norm: Tensor


@dataclass
class Learner:
    """Turns scored rollouts into optimiser steps."""

    accelerator: Accelerator
    model: nn.Module
    """A prepared `PolicyWithValue`."""
    reference: PreTrainedModel
    """The frozen policy of the KL penalty."""
    optimizer: torch.optim.Optimizer
    args: PPOConfig

    def __post_init__(self) -> None:
        try:
            self.head = find_head(self.reference, self.accelerator.autocast)
        except UnknownHead as reason:
            logger.warning(f"Log-probs come from the model's logits, for {reason}.")
            self.head = None

    @torch.no_grad()
    def experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, dict[str, float]]:
        """Credit every token of `rollout`, whose episodes scored `scores`, float32 [B].

        The old log-probs come from the training forward, in the micro-batches of the first pass,
        and not from `generate`: the first ratio is then exactly 1, in bf16 too.
        """
        args, mask = self.args, rollout.mask
        logp, values, kl = self._before_update(rollout)
        rewards = fastpg.token_rewards(scores.to(kl.device), mask, kl=kl, kl_coef=args.kl_coef)
        advantages, returns = fastpg.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        whitened = fastpg.whiten(advantages, mask, process_group=self._process_group)
        # How well the values foresaw returns that they were not fitted to yet.
        _, foresight = fastpg.value_loss(values, returns, fastpg.token_weights(mask))
        metrics = {
            "objective/kl": self.accelerator.reduce(kl.sum(-1).mean(), "mean").item(),
            "value/explained_variance": self._merge([foresight])["explained_variance"],
        }
        return Experience(rollout, logp, values, whitened, returns), metrics

    def _before_update(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, values and KL to the reference of every token, float32 [B, T]."""
        parts = [
            (*self._policy(rollout[rows]), self._reference_logp(rollout[rows]))
            for minibatch in self._minibatches(torch.arange(len(rollout.mask)))
            for rows in minibatch.split(self.args.micro_batch_size)
        ]
        logp, _, values, ref_logp = (torch.cat(column) for column in zip(*parts, strict=True))
        return logp, values, fastpg.kl_estimate(logp, ref_logp, kind="k1")

    def update(self, experience: Experience) -> dict[str, float]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimiser steps. Returns metrics."""
        count = len(experience.logp)
        steps = []
        for epoch in range(self.args.num_ppo_epochs):
            # A rollout is in random order already; the first pass keeps the one of `experience`.
            order = torch.randperm(count) if epoch else torch.arange(count)
            steps += [self._step(experience, rows) for rows in self._minibatches(order)]
        first = self._merge(steps[0].policy)
        policy = self._merge([part for step in steps for part in step.policy])
        value = self._merge([part for step in steps for part in step.value])
        return {
            **{f"policy/{name}": x for name, x in policy.items()},
            "policy/loss": policy["loss"] / len(steps),
            "policy/clip_frac": policy["clip_frac_low"] + policy["clip_frac_high"],
            "policy/first_ratio_deviation": max(first["ratio_max"] - 1, 1 - first["ratio_min"]),
            "value/loss": value["loss"] / len(steps),
            "value/clip_frac": value["clip_frac"],
            "grad_norm": torch.stack([step.grad_norm for step in steps]).mean().item(),
        }

    def _minibatches(self, order: Tensor) -> Iterator[Tensor]:
        return iter(order.tensor_split(self.args.num_mini_batches))

    def _step(self, experience: Experience, rows: Tensor) -> Step:
        """One optimiser step on the episodes `rows`, whose micro-batches add up exactly."""
        tokens = self.accelerator.reduce(experience.rollout.mask[rows].sum(), "sum")
        parts = rows.split(self.args.micro_batch_size)
        stats = []
        for i, part in enumerate(parts, start=1):
            with self._synchronized_if(i == len(parts)):
                loss, *part_stats = self._loss(experience[part], tokens)
                # Processes average their gradients; the losses are parts of a sum.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            stats.append(part_stats)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(*zip(*stats, strict=True), norm)

    def _loss(
        self, experience: Experience, tokens: Tensor
    ) -> tuple[Tensor, fastpg.PolicyStats, fastpg.ValueStats]:
        """The share of these episodes in the loss of an optimiser step over `tokens` tokens."""
        args = self.args
        logp, entropy, values = self._policy(experience.rollout)
        weight = fastpg.token_weights(experience.rollout.mask, denom=tokens)
        policy_loss, policy_stats = fastpg.policy_loss(
            logp,
            experience.advantages,
            weight,
            old_logp=experience.logp,
            clip=(args.cliprange, args.cliprange),
            entropy=entropy,
            entropy_coef=args.entropy_coef,
        )
        clip = args.cliprange_value
        old_values = None if clip is None else experience.values
        value_loss, value_stats = fastpg.value_loss(
            values, experience.returns, weight, old_values=old_values, clip=clip
        )
        return policy_loss + args.vf_coef * value_loss, policy_stats, value_stats

    def _policy(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropy of the completion tokens, and values: float32 [B, T]."""
        return self.model(*self._batch(rollout))

    def _reference_logp(self, rollout: Rollout) -> Tensor:
        with self.accelerator.autocast():
            return completion_logprobs(self.reference, *self._batch(rollout))[0]

    def _batch(self, rollout: Rollout) -> tuple[Any, ...]:
        """What both forwards take."""
        ids, mask = rollout.input_ids, rollout.attention_mask
        return ids, mask, rollout.labels, self.args.temperature, self.head

    def _synchronized_if(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    @property
    def _process_group(self) -> Any:
        return torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None

    def _merge(self, stats: Sequence[Any]) -> dict[str, float]:
        return fastpg.merge_stats(stats, process_group=self._process_group)
