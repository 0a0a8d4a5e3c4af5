"""The learning half: credit for a rollout, then updates on it.

The maths is in the ops; `fastpg.algorithms` says which of them are called, and with what options.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastpg
from fastpg.trainer.learning.experience import Experience
from fastpg.trainer.learning.fast_paths import FastPaths
from fastpg.trainer.learning.micro_batches import cut_by_tokens, split_into
from fastpg.trainer.learning.mismatch import correct
from fastpg.trainer.learning.steps import Step, step_metrics
from fastpg.trainer.models.adapters import WithoutAdapter
from fastpg.trainer.models.memory import one_gradient
from fastpg.trainer.models.objective import Objective, Targets
from fastpg.trainer.models.policy import (
    CompletionBatch,
    CompletionLoss,
    logprobs_through,
    loss_through,
    policy_logprobs,
    reference_logprobs_through,
)
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.run.engine import synchronized_if
from fastpg.trainer.settings.config import PPOConfig


@dataclass
class Learner:
    """Turns scored rollouts into optimiser steps.

    Args:
        accelerator: The accelerator that prepared `model` and `optimizer`.
        model: A prepared `PolicyWithValue`.
        reference: The frozen policy of the KL penalty, if there is a penalty.
        optimizer: The optimiser of the model's parameters.
        args: The settings of the run.
        paths: How completions go through policy and reference.
    """

    accelerator: Accelerator
    model: nn.Module
    reference: PreTrainedModel | WithoutAdapter | None
    optimizer: torch.optim.Optimizer
    args: PPOConfig
    paths: FastPaths

    def __post_init__(self) -> None:
        self.resolved = self.args.resolved()
        self.algorithm = self.resolved.algorithm
        self.objective = Objective(
            algorithm=self.algorithm,
            entropy_coef=self.args.entropy_coef,
            vf_coef=self.args.vf_coef,
            cliprange_value=self.args.cliprange_value,
        )
        self.kl_controller: fastpg.AdaptiveKL | None = None
        if self.args.adaptive_kl_target is not None:
            self.kl_controller = fastpg.AdaptiveKL(
                self.algorithm.kl_coef,
                self.args.adaptive_kl_target,
                self.args.adaptive_kl_horizon,
            )

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
        mask, scores = rollout.mask, scores.to(rollout.mask.device)
        logp, values, ref_logp = self._before_update(rollout)
        metrics = {}
        # In the reward, k1 gives the gradient of the KL itself; k3 would give another.
        kl = None
        if logp is not None and ref_logp is not None:
            kl = fastpg.kl_estimate(logp, ref_logp, kind="k1")
            # This is the KL of whole completions, in nats: a sum over tokens, a mean over episodes.
            metrics["objective/kl"] = self.accelerator.reduce(kl.sum(-1).mean(), "mean").item()
        if self.kl_controller is not None:
            metrics["objective/kl_coef"] = self._adapt_penalty(metrics["objective/kl"], len(mask))
        if self.args.whiten_rewards:
            scores = fastpg.whiten(
                scores, torch.ones_like(scores), process_group=self.process_group
            )
        # The loader puts the completions of a prompt one after the other.
        group = torch.arange(len(mask), device=mask.device) // self.resolved.num_generations
        advantages, returns = self.algorithm.advantages(
            scores,
            mask,
            group=group,
            values=values,
            kl=kl,
            bootstrap=self.values_after(rollout) if self.args.bootstrap_truncated else None,
            process_group=self.process_group,
        )
        if values is not None:
            # These values were not yet fitted to the returns, so this says how well they foresee.
            _, stats = fastpg.value_loss(values, returns, fastpg.token_weights(mask))
            metrics["value/explained_variance"] = self._merge([stats])["explained_variance"]
        importance, mismatch = correct(rollout, logp, self.args, self.accelerator)
        credited = Experience(rollout, logp, values, ref_logp, advantages, returns, importance)
        return credited, metrics | mismatch

    def _adapt_penalty(self, kl: float, count: int) -> float:
        """Put the coefficient of the controller to use, and move it on for the next rollout."""
        assert self.kl_controller is not None
        coefficient = self.kl_controller.value
        self.algorithm = replace(self.algorithm, kl_coef=coefficient)
        self.objective = replace(self.objective, algorithm=self.algorithm)
        episodes = count * self.accelerator.num_processes
        self.kl_controller.update(kl, int(min(episodes, self.kl_controller.horizon)))
        return coefficient

    def values_after(self, rollout: Rollout) -> Tensor:
        """Return the values of what would follow unfinished episodes; 0 of others, float32 [B]."""
        # The value of one more token is that of the state before it. Finished episodes have a
        # forward too: processes that share a model must make the same number of them.
        longer = rollout.lengthened()
        values = [
            logprobs_through(self.model, self.batch(longer[rows])).values
            for rows in self._micro_batches(longer, torch.arange(len(rollout.mask)))
        ]
        ends = rollout.attended.sum(-1, keepdim=True)
        after = torch.cat([value for value in values if value is not None]).gather(1, ends)[:, 0]
        return after.where(~rollout.finished, 0.0)

    def _before_update(
        self, rollout: Rollout
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return log-probs, values and the log-probs of the reference, float32 [B, T], or None."""
        logp, values, ref_logp = [], [], []
        for minibatch in self.minibatches(torch.arange(len(rollout.mask))):
            # The same episodes share a forward as in the first pass of `update`: a matrix product
            # may round differently for another number of them.
            for rows in self._micro_batches(rollout, minibatch):
                batch = self.batch(rollout[rows])
                if self._needs_old_logp or rollout.behavior_logp is not None:
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
        adapts = self.kl_controller is not None
        return steps > 1 or self.algorithm.critic or kl_is_credit or adapts

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
        for rows in self._passes(count):
            steps.append(self._step(experience, rows))
            if self._has_moved_far(steps[-1]):
                break
        metrics = step_metrics(steps, self.process_group)
        if self.args.target_kl is not None:
            metrics["policy/optimizer_steps"] = float(len(steps))
        if experience.logp is None and self.reference is not None:
            metrics["objective/kl"] = self.accelerator.reduce(steps[0].kl / count, "mean").item()
        return metrics

    def _passes(self, count: int) -> Iterator[Tensor]:
        """Yield the rows of each optimiser step on a rollout of `count` episodes."""
        for epoch in range(self.resolved.num_ppo_epochs):
            # A rollout is in random order already; the first pass keeps the order in which
            # `experience` computed the old log-probs.
            order = torch.arange(count) if epoch == 0 else torch.randperm(count)
            yield from self.minibatches(order)

    def _has_moved_far(self, step: Step) -> bool:
        """Whether the policy was further than `target_kl` from the one that sampled, on average."""
        # Reading it waits for the device, so only who asks for it pays.
        if self.args.target_kl is None:
            return False
        return self._merge(step.policy_stats)["approx_kl"] > self.args.target_kl

    def minibatches(self, order: Tensor) -> tuple[Tensor, ...]:
        """Split `order`, int64 [B], into the rows of each optimiser step."""
        return order.tensor_split(self.resolved.num_mini_batches)

    def _micro_batches(self, rollout: Rollout, rows: Tensor) -> Sequence[Tensor]:
        """Cut the rows of an optimiser step, in their order, into those of each forward."""
        budget = self.args.micro_batch_tokens
        if budget is None:
            return rows.split(self.resolved.micro_batch_size)
        has_value_model = self.accelerator.unwrap_model(self.model).value_model is not None
        packing = self.paths.common_packing(has_value_model)
        parts = cut_by_tokens(rollout, rows, budget, packing)
        # Processes that share a model must make the same number of forwards.
        own = torch.tensor([len(parts)], device=self.accelerator.device)
        return split_into(parts, int(self.accelerator.gather(own).max()))

    def _step(self, experience: Experience, rows: Tensor) -> Step:
        """Make one optimiser step on the episodes `rows`."""
        step = self.accumulate(experience, rows)
        # Statistics stay on the device until the rollout is done: reading them here would wait for
        # it at every step.
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # DeepSpeed gives a number.
        grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=step.kl.device)
        return step._replace(grad_norm=grad_norm)

    def accumulate(self, experience: Experience, rows: Tensor) -> Step:
        """Add the gradient of an optimiser step to the weights; its micro-batches add up exactly.

        Args:
            experience: The credited episodes.
            rows: int64 [n], those of the step.

        Returns:
            Its statistics, with a gradient norm of 0: the gradient is not clipped yet.
        """
        # The denominator counts the whole step, on all processes: a micro-batch with fewer tokens
        # then weighs less, as it would if it were not split off.
        mask = self._trained(experience.rollout)[rows]
        count = self.algorithm.denom(mask, self.args.max_new_tokens)
        denom = self.accelerator.reduce(count, "sum")
        parts = self._micro_batches(experience.rollout, rows)
        policy_stats: list[fastpg.PolicyStats] = []
        value_stats: list[fastpg.ValueStats] = []
        kl = torch.zeros((), device=denom.device)
        for i, part in enumerate(parts, start=1):
            episodes = experience[part]
            targets = self._targets(episodes, denom)
            synchronized = synchronized_if(self.accelerator, self.model, i == len(parts))
            with synchronized, one_gradient(self.accelerator, self.model):
                result = self._loss(episodes, targets)
                # Processes average their gradients, but the losses are parts of a sum.
                self.accelerator.backward(result.loss * self.accelerator.num_processes)
            policy_stats += result.policy_stats
            if result.value_stats is not None:
                value_stats.append(result.value_stats)
            if targets.ref_logp is not None:
                kl += fastpg.kl_estimate(targets.new_logp, targets.ref_logp, kind="k1").sum()
        return Step(policy_stats, value_stats, kl, grad_norm=torch.zeros_like(kl))

    def _trained(self, rollout: Rollout) -> Tensor:
        """Return which tokens count in the loss, bool [B, T]."""
        if self.args.mask_truncated_completions:
            return rollout.mask & rollout.finished[:, None]
        return rollout.mask

    def _targets(self, experience: Experience, denom: Tensor) -> Targets:
        """Return what these episodes aim at in a step whose losses are divided by `denom`."""
        weight = self.algorithm.weights(self._trained(experience.rollout), denom)
        return Targets(
            token_weight=weight,
            advantages=experience.advantages,
            returns=experience.returns,
            old_logp=experience.logp,
            ref_logp=experience.ref_logp,
            old_values=experience.values,
            new_logp=torch.zeros_like(weight),
            importance=experience.importance,
        )

    def _loss(self, experience: Experience, targets: Targets) -> CompletionLoss:
        return loss_through(self.model, self.batch(experience.rollout), targets, self.objective)

    def _reference_logp(
        self, reference: PreTrainedModel | WithoutAdapter, batch: CompletionBatch
    ) -> Tensor:
        if isinstance(reference, WithoutAdapter):
            return reference_logprobs_through(self.model, batch)
        # The reference is not prepared, so nothing else puts its forward under autocast.
        with self.accelerator.autocast():
            logp, _, _ = policy_logprobs(reference, batch)
        return logp

    @torch.no_grad()
    def logprobs_of(self, ids: Sequence[int]) -> Tensor:
        """Return the log-probs of the tokens after the first, as in training: float32 [1, T]."""
        tokens = torch.tensor([list(ids)], device=self.accelerator.device)
        rollout = Rollout(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mask=torch.ones_like(tokens[:, 1:], dtype=torch.bool),
            finished=torch.ones(1, dtype=torch.bool, device=tokens.device),
        )
        return logprobs_through(self.model, self.batch(rollout)).logp

    def batch(self, rollout: Rollout) -> CompletionBatch:
        """Return episodes with all that decides how their log-probs are computed."""
        # The head, the temperature and the kept sets go along, so that old, new and reference
        # log-probs cannot be computed in different ways.
        return CompletionBatch(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            labels=rollout.labels,
            temperature=self.args.temperature,
            head=self.paths.head,
            packing=self.paths.packing,
            value_packing=self.paths.value_packing,
            support=None if rollout.kept is None else rollout.kept.support,
        )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes of the run, if there are several."""
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def _merge(self, stats: Sequence[fastpg.PolicyStats | fastpg.ValueStats]) -> dict[str, float]:
        return fastpg.merge_stats(stats, process_group=self.process_group)


def _concatenated(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
