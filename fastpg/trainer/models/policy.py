"""The policy and what computes values, in one module."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastpg
from fastpg.trainer.models.forward import causal_lm, predicting_states
from fastpg.trainer.models.head import HeadTransform, Support, completion_logprobs, completion_loss
from fastpg.trainer.models.loading import as_input_error
from fastpg.trainer.models.objective import Objective, Targets
from fastpg.trainer.models.packing import Packing

VALUE_HEAD = "value_head.safetensors"
"""The file beside a saved policy that holds its value head."""

VALUE_MODEL = "value_model"
"""The directory beside a saved policy that holds its value model."""


@dataclass(frozen=True)
class CompletionBatch:
    """B prompts with their completions, and how the policy computes log-probs of them.

    Args:
        input_ids: int64 [B, P + T], prompts padded on the left, completions in the last T slots.
        attention_mask: int64 [B, P + T], 1 at real tokens.
        labels: int64 [B, T], the completion tokens, -100 where masked.
        temperature: Logits are divided by it, as when the completions were sampled.
        head: How the model makes logits from its last hidden states. None: the logits that the
            model computes itself are used.
        packing: How the episodes are packed into rows for the model. None: each is a row.
        value_packing: The same for a value model.
        support: The tokens that each completion token was drawn from. None: the whole vocabulary.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    temperature: float
    head: HeadTransform | None
    packing: Packing | None = None
    value_packing: Packing | None = None
    support: Support | None = None


class LossRequest:
    """The arguments of `PolicyWithValue.loss` as one object, for `forward`."""

    # This is neither a tuple nor a dataclass: wrappers move the tensors of those to another dtype
    # (FSDP with mixed precision does), and old log-probs must keep their bits.
    def __init__(self, batch: CompletionBatch, targets: Targets, objective: Objective) -> None:
        self.batch = batch
        self.targets = targets
        self.objective = objective


class ReferenceRequest:
    """Asks `PolicyWithValue.forward` for log-probs without the adapter of the policy."""

    def __init__(self, batch: CompletionBatch) -> None:
        self.batch = batch


Result = TypeVar("Result")


class PolicyRequest:
    """Asks `PolicyWithValue.forward` to call a function of the policy."""

    def __init__(self, function: Callable[[PreTrainedModel], Any]) -> None:
        self.function = function


class CompletionLogprobs(NamedTuple):
    """Log-probs, entropy and values of B completions, each float32 [B, T]."""

    logp: Tensor
    entropy: Tensor  # in nats
    values: Tensor | None  # None without a critic


class CompletionLoss(NamedTuple):
    """The share of B completions in the loss of an optimiser step, and its statistics."""

    loss: Tensor  # 0-d
    policy_stats: list[fastpg.PolicyStats]  # one for each chunk of tokens
    value_stats: fastpg.ValueStats | None  # None without a critic


class PolicyWithValue(nn.Module):
    """A causal language model and, for algorithms with a critic, what computes values.

    That is a value head on the same trunk, or a value model with a trunk of its own. All is one
    module, so that one `accelerator.prepare` wraps it and one forward serves both losses. The value
    head is the one that was saved with the model, if there is one. Otherwise it starts at zero: the
    first advantages are then those of no baseline, not of noise.

    Args:
        policy: The language model.
        critic: If True, there are values.
        value_model: A model with one output for each token, for `critic` only. None: there is a
            value head.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: bool = True,
        value_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        # accelerate reads here which layers FSDP shares out one by one.
        self._no_split_modules = sorted(
            {name for model in (policy, value_model) if model for name in _layers_of(model)}
        )
        self.value_head: nn.Linear | None = None
        if critic and value_model is None:
            self.value_head = _value_head(policy)

    def logprobs(self, batch: CompletionBatch) -> CompletionLogprobs:
        """Compute log-probs and entropy of completions, and their values if there is a critic.

        Args:
            batch: The completions.

        Returns:
            Log-probs, entropy and values, each float32 [B, T].
        """
        logp, entropy, hidden = policy_logprobs(self.policy, batch)
        return CompletionLogprobs(logp, entropy, self._values(batch, hidden))

    def loss(
        self, batch: CompletionBatch, targets: Targets, objective: Objective
    ) -> CompletionLoss:
        """Compute the loss of completions, without their log-probs ever leaving it.

        Args:
            batch: The completions.
            targets: What they are compared with.
            objective: The loss.

        Returns:
            The loss of policy and values together, 0-d and differentiable, and its statistics.
        """
        policy_loss, policy_stats, hidden = completion_loss(
            self.policy,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            batch.temperature,
            batch.head,
            objective.token_loss(targets),
            objective.level,
            batch.packing,
            batch.support,
        )
        values = self._values(batch, hidden)
        if values is None:
            return CompletionLoss(policy_loss, policy_stats, None)
        value_loss, value_stats = objective.value_loss(values, targets)
        return CompletionLoss(policy_loss + value_loss, policy_stats, value_stats)

    # DDP averages gradients, and FSDP gathers weights, only around `module(...)`, which calls
    # `forward`; autocast and torch.compile are put there by accelerate as well. Calling a method of
    # the unwrapped module would skip them all, so both methods are reached through here. The
    # functions `logprobs_through` and `loss_through` give the results their types back.
    def forward(
        self, request: CompletionBatch | LossRequest | ReferenceRequest | PolicyRequest
    ) -> Any:
        """Answer a request: `logprobs` of a batch alone, `loss` of a `LossRequest`."""
        if isinstance(request, PolicyRequest):
            return request.function(self.policy)
        if isinstance(request, LossRequest):
            return self.loss(request.batch, request.targets, request.objective)
        if isinstance(request, ReferenceRequest):
            # Only peft's models have this method.
            policy: Any = self.policy
            with policy.disable_adapter():
                logp, entropy, _ = policy_logprobs(policy, request.batch)
            # Values of a reference are of no use.
            return CompletionLogprobs(logp, entropy, None)
        return self.logprobs(request)

    def _values(self, batch: CompletionBatch, hidden: Tensor) -> Tensor | None:
        """Return the values, float32 [B, T]. `hidden` are the last states of the policy."""
        head: nn.Module | None = self.value_head
        if self.value_model is not None:
            hidden = predicting_states(
                self.value_model,
                batch.input_ids,
                batch.attention_mask,
                batch.labels.shape[1],
                batch.value_packing,
            )
            head = score_head(self.value_model)
        if head is None:
            return None
        # bf16 is too coarse for values, so the head computes in float32 whatever autocast says.
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.float()).squeeze(-1)


def _layers_of(model: PreTrainedModel) -> set[str]:
    """Return the names of the classes of a model's layers."""
    classes = {type(module).__name__ for module in model.modules()}
    return classes.intersection(model._no_split_modules or ())


def policy_logprobs(
    policy: PreTrainedModel, batch: CompletionBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probs of completions under a model.

    Args:
        policy: The model.
        batch: The completions.

    Returns:
        Log-probs and entropies, float32 [B, T], and the last hidden states [B, T, H].
    """
    return completion_logprobs(
        policy,
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        batch.temperature,
        batch.head,
        batch.packing,
        batch.support,
    )


def score_head(value_model: PreTrainedModel) -> nn.Module:
    """Return the linear head of a model that `AutoModelForSequenceClassification` loads."""
    model: Any = causal_lm(value_model)
    return model.score


def logprobs_through(wrapped: nn.Module, batch: CompletionBatch) -> CompletionLogprobs:
    """Call `PolicyWithValue.logprobs` through what wraps the module.

    Args:
        wrapped: A `PolicyWithValue`, or the DDP or FSDP module around one.
        batch: The completions.

    Returns:
        The result of `PolicyWithValue.logprobs`.
    """
    return wrapped(batch)


def reference_logprobs_through(wrapped: nn.Module, batch: CompletionBatch) -> Tensor:
    """Compute log-probs of a policy without its adapter, through what wraps the module.

    Args:
        wrapped: A `PolicyWithValue`, or the DDP or FSDP module around one.
        batch: The completions.

    Returns:
        The log-probs, float32 [B, T].
    """
    return wrapped(ReferenceRequest(batch)).logp


def loss_through(
    wrapped: nn.Module, batch: CompletionBatch, targets: Targets, objective: Objective
) -> CompletionLoss:
    """Call `PolicyWithValue.loss` through what wraps the module.

    Args:
        wrapped: A `PolicyWithValue`, or the DDP or FSDP module around one.
        batch: The completions.
        targets: What they are compared with.
        objective: The loss.

    Returns:
        The result of `PolicyWithValue.loss`.
    """
    return wrapped(LossRequest(batch, targets, objective))


def policy_through(wrapped: nn.Module, function: Callable[[PreTrainedModel], Result]) -> Result:
    """Call a function of the policy while all of its weights are here.

    Args:
        wrapped: The FSDP or DeepSpeed module around a `PolicyWithValue`.
        function: It gets the policy.

    Returns:
        What the function returns.
    """
    return wrapped(PolicyRequest(function))


def _value_head(policy: PreTrainedModel) -> nn.Linear:
    # Some models project their last states before the LM head: config.hidden_size can be wrong.
    width = policy.get_output_embeddings().in_features
    head = nn.Linear(width, 1).to(policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    # A model built in code has no path, and the empty one would be the working directory.
    trained = Path(policy.name_or_path or "", VALUE_HEAD)
    if policy.name_or_path and trained.is_file():
        with as_input_error(f"Cannot load the value head {trained}"):
            head.load_state_dict(load_file(trained))
    return head
