"""The learning half: credit for a rollout, then updates on it.

The maths is in the ops; `fastpg.algorithms` says which of them are called, and with what options.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastpg
from fastpg.integrations.peft import UnknownHead
from fastpg.trainer.adapters import WithoutAdapter
from fastpg.trainer.config import PPOConfig
from fastpg.trainer.head import HeadTransform, completion_logprobs, find_head
from fastpg.trainer.models import (
    CompletionBatch,
    CompletionLoss,
    PolicyWithValue,
    logprobs_through,
    loss_through,
    reference_logprobs_through,
)
from fastpg.trainer.objective import Objective, Targets
from fastpg.trainer.packable import CannotPack, find_packing
from fastpg.trainer.packing import Packing
from fastpg.trainer.rollout import Rollout

logger = get_logger(__name__)

Stats = fastpg.PolicyStats | fastpg.ValueStats


@dataclass(frozen=True)
class Experience:
    """A rollout with the data of its updates: a number for each token, float32 [B, T].

    Args:
        rollout: The B episodes.
        logp: Log-probs before the first update. None: that of the update itself, whose ratio is 1.
        values: Values before the first update, if there is a critic.
        ref_logp: Log-probs under the reference, if there is one.
        advantages: The credit of each token.
        returns: The targets of the values.
    """

    rollout: Rollout
    logp: Tensor | None
    values: Tensor | None
    ref_logp: Tensor | None
    advantages: Tensor
    returns: Tensor

    def __getitem__(self, rows: Tensor) -> "Experience":
        """Return the episodes `rows`, int64 [n], in that order."""
        return Experience(
            rollout=self.rollout[rows],
            logp=None if self.logp is None else self.logp[rows],
            values=None if self.values is None else self.values[rows],
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            advantages=self.advantages[rows],
            returns=self.returns[rows],
        )


class Step(NamedTuple):
    """One optimiser step: the statistics of its parts, and the norm of its gradient."""

    policy_stats: list[fastpg.PolicyStats]
    value_stats: list[fastpg.ValueStats]  # empty without a critic
    kl: Tensor  # 0-d, the sum of k1 to the reference; 0 without one
    grad_norm: Tensor  # 0-d, before clipping


@dataclass
class Learner:
    """Turns scored rollouts into optimiser steps.

    Args:
        accelerator: The accelerator that prepared `model` and `optimizer`.
        model: A prepared `PolicyWithValue`.
        reference: The frozen policy of the KL penalty, if there is a penalty.
        optimizer: The optimiser of the model's parameters.
        args: The settings of the run.
    """

    accelerator: Accelerator
    model: nn.Module
    reference: PreTrainedModel | WithoutAdapter | None
    optimizer: torch.optim.Optimizer
    args: PPOConfig

    def __post_init__(self) -> None:
        self.resolved = self.args.resolved()
        self.algorithm = self.resolved.algorithm
        self.objective = Objective(
            algorithm=self.algorithm,
            entropy_coef=self.args.entropy_coef,
            vf_coef=self.args.vf_coef,
            cliprange_value=self.args.cliprange_value,
        )
        self.head = self._find_head()
        self.packing = self._find_packing()

    def _find_head(self) -> HeadTransform | None:
        """Return how the model makes logits; None, with a warning, if that is not understood."""
        unwrapped: PolicyWithValue = self.accelerator.unwrap_model(self.model)
        try:
            return find_head(unwrapped.policy, self.accelerator.autocast)
        except UnknownHead as reason:
            logger.warning(f"Log-probs come from the model's logits, for {reason}.")
            return None

    def _find_packing(self) -> Packing | None:
        """Return how episodes are packed into rows; None, with a warning, if they cannot be."""
        if self.head is None:
            return None
        unwrapped: PolicyWithValue = self.accelerator.unwrap_model(self.model)
        try:
            return find_packing(unwrapped.policy)
        except CannotPack as reason:
            logger.warning(
                f"Every completion goes through the model with its prompt, for {reason}."
            )
            return None

    @torch.no_grad()
    def experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, dict[str, float]]:
        """Credit every token of a rollout.

        The old log-probs come from the training forward, in the micro-batches of the first pass,
        and not from `generate`: the first ratio is then exactly 1, in bf16 too. On a GPU this
        also needs a BLAS that rounds alike for any number of tokens. Where one optimiser step is
        made of a rollout, and nothing else asks for them, they are those of that step.

        Args:
            rollout: B episodes, the completions of a prompt one after the other.
            scores: float32 [B], what each episode earned.

        Returns:
            The experience, and metrics of it over all processes.
        """
        mask = rollout.mask
        logp, values, ref_logp = self._before_update(rollout)
        # In the reward, k1 gives the gradient of the KL itself; k3 would give another.
        kl = None
        if logp is not None and ref_logp is not None:
            kl = fastpg.kl_estimate(logp, ref_logp, kind="k1")
        # The loader puts the completions of a prompt one after the other.
        group = torch.arange(len(mask), device=mask.device) // self.resolved.num_generations
        advantages, returns = self.algorithm.advantages(
            scores.to(mask.device),
            mask,
            group=group,
            values=values,
            kl=kl,
            process_group=self._process_group,
        )
        metrics = {}
        if kl is not None:
            # This is the KL of whole completions, in nats: a sum over tokens, a mean over episodes.
            metrics["objective/kl"] = self.accelerator.reduce(kl.sum(-1).mean(), "mean").item()
        if values is not None:
            # These values were not yet fitted to the returns, so this says how well they foresee.
            _, stats = fastpg.value_loss(values, returns, fastpg.token_weights(mask))
            metrics["value/explained_variance"] = self._merge([stats])["explained_variance"]
        return Experience(rollout, logp, values, ref_logp, advantages, returns), metrics

    def _before_update(
        self, rollout: Rollout
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return log-probs, values and the log-probs of the reference, float32 [B, T], or None."""
        logp, values, ref_logp = [], [], []
        for minibatch in self._minibatches(torch.arange(len(rollout.mask))):
            # The same episodes share a forward as in the first pass of `update`: a matrix product
            # may round differently for another number of them.
            for rows in minibatch.split(self.args.micro_batch_size):
                batch = self._batch(rollout[rows])
                if self._needs_old_logp:
                    results = logprobs_through(self.model, batch)
                    logp.append(results.logp)
                    if results.values is not None:
                        values.append(results.values)
                if self.reference is not None:
                    ref_logp.append(self._reference_logp(self.reference, batch))
        return _concatenated(logp), _concatenated(values), _concatenated(ref_logp)

    @property
    def _needs_old_logp(self) -> bool:
        """Whether log-probs are needed before the update, or values, which come with them."""
        steps = self.resolved.num_ppo_epochs * self.resolved.num_mini_batches
        kl_is_credit = self.reference is not None and self.algorithm.kl != "loss"
        return steps > 1 or self.algorithm.critic or kl_is_credit

    def update(self, experience: Experience) -> dict[str, float]:
        """Make `num_ppo_epochs` passes of `num_mini_batches` optimiser steps each.

        Args:
            experience: What `experience` returned for a rollout.

        Returns:
            Metrics over all steps and processes: "policy/...", "value/..." with a critic,
            "grad_norm", and "objective/kl" if `experience` left it to the update.
        """
        count = len(experience.rollout.mask)
        steps: list[Step] = []
        for epoch in range(self.resolved.num_ppo_epochs):
            # A rollout is in random order already; the first pass keeps the order in which
            # `experience` computed the old log-probs.
            order = torch.arange(count) if epoch == 0 else torch.randperm(count)
            for rows in self._minibatches(order):
                steps.append(self._step(experience, rows))
        metrics = self._metrics(steps)
        if experience.logp is None and self.reference is not None:
            metrics["objective/kl"] = self.accelerator.reduce(steps[0].kl / count, "mean").item()
        return metrics

    def _metrics(self, steps: list[Step]) -> dict[str, float]:
        """Merge the statistics of the steps on a rollout into numbers, over all processes."""
        # A ratio of the first step that is not 1 shows that sampling and training disagree.
        first = self._merge(steps[0].policy_stats)
        policy = self._merge([part for step in steps for part in step.policy_stats])
        metrics = {f"policy/{name}": value for name, value in policy.items()}
        # A loss is a sum over the parts of a step, so its mean is over steps and not over parts.
        metrics["policy/loss"] = policy["loss"] / len(steps)
        metrics["policy/clip_frac"] = policy["clip_frac_low"] + policy["clip_frac_high"]
        deviation = max(first["ratio_max"] - 1, 1 - first["ratio_min"])
        metrics["policy/first_ratio_deviation"] = deviation
        metrics["grad_norm"] = torch.stack([step.grad_norm for step in steps]).mean().item()
        if self.algorithm.critic:
            value = self._merge([part for step in steps for part in step.value_stats])
            metrics["value/loss"] = value["loss"] / len(steps)
            metrics["value/clip_frac"] = value["clip_frac"]
        return metrics

    def _minibatches(self, order: Tensor) -> tuple[Tensor, ...]:
        """Split `order`, int64 [B], into the rows of each optimiser step."""
        return order.tensor_split(self.resolved.num_mini_batches)

    def _step(self, experience: Experience, rows: Tensor) -> Step:
        """Make one optimiser step on the episodes `rows`, whose micro-batches add up exactly."""
        # The denominator counts the whole step, on all processes: a micro-batch with fewer tokens
        # then weighs less, as it would if it were not split off.
        count = self.algorithm.denom(experience.rollout.mask[rows], self.args.max_new_tokens)
        denom = self.accelerator.reduce(count, "sum")
        parts = rows.split(self.args.micro_batch_size)
        policy_stats: list[fastpg.PolicyStats] = []
        value_stats: list[fastpg.ValueStats] = []
        kl = torch.zeros((), device=denom.device)
        for i, part in enumerate(parts, start=1):
            episodes = experience[part]
            targets = self._targets(episodes, denom)
            with self._synchronized_if(i == len(parts)):
                result = self._loss(episodes, targets)
                # Processes average their gradients, but the losses are parts of a sum.
                self.accelerator.backward(result.loss * self.accelerator.num_processes)
            policy_stats += result.policy_stats
            if result.value_stats is not None:
                value_stats.append(result.value_stats)
            if targets.ref_logp is not None:
                kl += fastpg.kl_estimate(targets.new_logp, targets.ref_logp, kind="k1").sum()
        # Statistics stay on the device until the rollout is done: reading them here would wait for
        # it at every step.
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(policy_stats, value_stats, kl, norm)

    def _targets(self, experience: Experience, denom: Tensor) -> Targets:
        """Return what these episodes aim at in a step whose losses are divided by `denom`."""
        weight = self.algorithm.weights(experience.rollout.mask, denom)
        return Targets(
            token_weight=weight,
            advantages=experience.advantages,
            returns=experience.returns,
            old_logp=experience.logp,
            ref_logp=experience.ref_logp,
            old_values=experience.values,
            new_logp=torch.zeros_like(weight),
        )

    def _loss(self, experience: Experience, targets: Targets) -> CompletionLoss:
        batch = self._batch(experience.rollout)
        return loss_through(self.model, batch, targets, self.objective)

    def _reference_logp(
        self, reference: PreTrainedModel | WithoutAdapter, batch: CompletionBatch
    ) -> Tensor:
        if isinstance(reference, WithoutAdapter):
            return reference_logprobs_through(self.model, batch)
        # The reference is not prepared, so nothing else puts its forward under autocast.
        with self.accelerator.autocast():
            logp, _, _ = completion_logprobs(
                reference,
                batch.input_ids,
                batch.attention_mask,
                batch.labels,
                batch.temperature,
                batch.head,
                batch.packing,
            )
        return logp

    def logprobs_of(self, ids: Sequence[int]) -> Tensor:
        """Return the log-probs of the tokens after the first, as in training: float32 [1, T]."""
        tokens = torch.tensor([list(ids)], device=self.accelerator.device)
        rollout = Rollout(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mask=torch.ones_like(tokens[:, 1:], dtype=torch.bool),
            finished=torch.ones(1, dtype=torch.bool, device=tokens.device),
        )
        return logprobs_through(self.model, self._batch(rollout)).logp.detach()

    def _batch(self, rollout: Rollout) -> CompletionBatch:
        # The head and the temperature go along, so that old, new and reference log-probs cannot be
        # computed in different ways.
        return CompletionBatch(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            labels=rollout.labels,
            temperature=self.args.temperature,
            head=self.head,
            packing=self.packing,
        )

    def _synchronized_if(self, last: bool) -> contextlib.AbstractContextManager:
        """Let processes exchange gradients in the last micro-batch of a step only."""
        # Gradients of the micro-batches before add up on each process; one exchange is enough.
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    @property
    def _process_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def _merge(self, stats: Sequence[Stats]) -> dict[str, float]:
        return fastpg.merge_stats(stats, process_group=self._process_group)


def _concatenated(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
