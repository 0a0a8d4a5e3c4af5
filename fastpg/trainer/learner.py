"""The learning half: credit for a rollout, then updates on it. The maths is in the ops, and which
of them are called with what is a row of fastpg.algorithms."""

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
from fastpg.trainer.head import TokenLoss, completion_logprobs, find_head
from fastpg.trainer.rollout import Rollout

logger = get_logger(__name__)


@dataclass(frozen=True)
class Experience:
    """What the optimiser learns from: a rollout and, for each of its tokens, float32 [B, T].

    values: of algorithms with a critic. ref_logp: where there is a reference.
    """

    rollout: Rollout
    logp: Tensor
    values: Tensor | None
    ref_logp: Tensor | None
    advantages: Tensor
    returns: Tensor

    def __getitem__(self, rows: Tensor) -> "Experience":
        """The episodes `rows`, int64 [n], in that order."""
        columns = (getattr(self, f.name) for f in fields(self))
        return Experience(*(None if x is None else x[rows] for x in columns))


class Step(NamedTuple):
    """One optimiser step: the statistics of its parts, and the norm of its gradient."""

    policy: list[fastpg.PolicyStats]
    value: list[fastpg.ValueStats | None]
    grad_norm: Tensor


@dataclass
class Learner:
    """Turns scored rollouts into optimiser steps."""

    accelerator: Accelerator
    model: nn.Module
    """A prepared `PolicyWithValue`."""
    reference: PreTrainedModel | None
    """The frozen policy of the KL penalty, if there is a penalty."""
    optimizer: torch.optim.Optimizer
    args: PPOConfig

    def __post_init__(self) -> None:
        self.resolved = self.args.resolved()
        self.row = self.resolved.algorithm
        try:
            policy = self.accelerator.unwrap_model(self.model).policy
            self.head = find_head(policy, self.accelerator.autocast)
        except UnknownHead as reason:
            logger.warning(f"Log-probs come from the model's logits, for {reason}.")
            self.head = None

    @torch.no_grad()
    def experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, dict[str, float]]:
        """Credit every token of `rollout`, whose episodes scored `scores`, float32 [B].

        The old log-probs come from the training forward, in the micro-batches of the first pass,
        and not from `generate`: the first ratio is then exactly 1, in bf16 too; on a GPU as far as
        its BLAS rounds alike for any number of rows.
        """
        mask = rollout.mask
        logp, values, ref_logp = self._before_update(rollout)
        kl = None if ref_logp is None else fastpg.kl_estimate(logp, ref_logp, kind="k1")
        group = torch.arange(len(mask), device=mask.device) // self.resolved.num_generations
        advantages, returns = self.row.advantages(
            scores.to(mask.device),
            mask,
            group=group,
            values=values,
            kl=kl,
            process_group=self._process_group,
        )
        metrics = {}
        if kl is not None:
            metrics["objective/kl"] = self.accelerator.reduce(kl.sum(-1).mean(), "mean").item()
        if values is not None:
            # How well the values foresaw returns that they were not fitted to yet.
            _, foresight = fastpg.value_loss(values, returns, fastpg.token_weights(mask))
            metrics["value/explained_variance"] = self._merge([foresight])["explained_variance"]
        return Experience(rollout, logp, values, ref_logp, advantages, returns), metrics

    def _before_update(self, rollout: Rollout) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, values if any, and those of the reference if any: float32 [B, T]."""
        parts = [
            (*self._policy(rollout[rows]), self._reference_logp(rollout[rows]))
            for minibatch in self._minibatches(torch.arange(len(rollout.mask)))
            for rows in minibatch.split(self.args.micro_batch_size)
        ]
        logp, _, values, ref_logp = (
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        )
        return logp, values, ref_logp

    def update(self, experience: Experience) -> dict[str, float]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimiser steps. Returns metrics."""
        count = len(experience.logp)
        steps = []
        for epoch in range(self.resolved.num_ppo_epochs):
            # A rollout is in random order already; the first pass keeps the one of `experience`.
            order = torch.randperm(count) if epoch else torch.arange(count)
            steps += [self._step(experience, rows) for rows in self._minibatches(order)]
        first = self._merge(steps[0].policy)
        policy = self._merge([part for step in steps for part in step.policy])
        metrics = {
            **{f"policy/{name}": x for name, x in policy.items()},
            "policy/loss": policy["loss"] / len(steps),
            "policy/clip_frac": policy["clip_frac_low"] + policy["clip_frac_high"],
            "policy/first_ratio_deviation": max(first["ratio_max"] - 1, 1 - first["ratio_min"]),
            "grad_norm": torch.stack([step.grad_norm for step in steps]).mean().item(),
        }
        if self.row.critic:
            value = self._merge([part for step in steps for part in step.value])
            metrics["value/loss"] = value["loss"] / len(steps)
            metrics["value/clip_frac"] = value["clip_frac"]
        return metrics

    def _minibatches(self, order: Tensor) -> Iterator[Tensor]:
        return iter(order.tensor_split(self.resolved.num_mini_batches))

    def _step(self, experience: Experience, rows: Tensor) -> Step:
        """One optimiser step on the episodes `rows`, whose micro-batches add up exactly."""
        count = self.row.denom(experience.rollout.mask[rows], self.args.max_new_tokens)
        denom = self.accelerator.reduce(count, "sum")
        parts = rows.split(self.args.micro_batch_size)
        policy, value = [], []
        for i, part in enumerate(parts, start=1):
            with self._synchronized_if(i == len(parts)):
                loss, policy_stats, value_stats = self._loss(experience[part], denom)
                # Processes average their gradients; the losses are parts of a sum.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            policy += policy_stats
            value.append(value_stats)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(policy, value, norm)

    def _loss(
        self, experience: Experience, denom: Tensor
    ) -> tuple[Tensor, list[fastpg.PolicyStats], fastpg.ValueStats | None]:
        """The share of these episodes in the loss of an optimiser step with that denominator."""
        args = self.args
        weight = self.row.weights(experience.rollout.mask, denom)
        level = self.row.surrogate.get("level", "token")
        token_loss = self._token_loss(experience, weight, level)
        batch = *self._batch(experience.rollout), token_loss, level
        loss, policy_stats, values = self.model(*batch)
        if values is None:
            return loss, policy_stats, None
        clip = args.cliprange_value
        old_values = None if clip is None else experience.values
        value_loss, value_stats = fastpg.value_loss(
            values, experience.returns, weight, old_values=old_values, clip=clip
        )
        return loss + args.vf_coef * value_loss, policy_stats, value_stats

    def _token_loss(self, experience: Experience, weight: Tensor, level: str) -> TokenLoss:
        """The policy loss of `rows` of all tokens, flat; at level "sequence" of all as [B, T]."""
        shape = weight.shape if level == "sequence" else (-1,)

        def token_loss(logp: Tensor, entropy: Tensor, rows: Tensor):
            def of_rows(x: Tensor | None) -> Tensor | None:
                return None if x is None else x.flatten()[rows].view(shape)

            return self.row.loss(
                logp.view(shape),
                of_rows(experience.advantages),
                of_rows(weight),
                old_logp=of_rows(experience.logp),
                ref_logp=of_rows(experience.ref_logp),
                entropy=entropy.view(shape),
                entropy_coef=self.args.entropy_coef,
            )

        return token_loss

    def _policy(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropy of the completion tokens, and values, if any: float32 [B, T]."""
        return self.model(*self._batch(rollout))

    def _reference_logp(self, rollout: Rollout) -> Tensor | None:
        if self.reference is None:
            return None
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
