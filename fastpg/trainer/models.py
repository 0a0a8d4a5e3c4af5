"""The policy with its value head in one module, and the frozen reference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fastpg
from fastpg.trainer.head import HeadTransform, completion_logprobs, completion_loss
from fastpg.trainer.objective import Objective, Targets
from fastpg.trainer.parsing import InputError

VALUE_HEAD = "value_head.safetensors"
"""The file beside a saved policy that holds its value head."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
"""A directory with a tokenizer has one of these."""


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
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    temperature: float
    head: HeadTransform | None


class LossRequest:
    """The arguments of `PolicyWithValue.loss` as one object, for `forward`."""

    # This is neither a tuple nor a dataclass: wrappers move the tensors of those to another dtype
    # (FSDP with mixed precision does), and old log-probs must keep their bits.
    def __init__(self, batch: CompletionBatch, targets: Targets, objective: Objective) -> None:
        self.batch = batch
        self.targets = targets
        self.objective = objective


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
    """A causal language model and, for algorithms with a critic, a value head on the same trunk.

    It is one module, so that one `accelerator.prepare` wraps it and one forward serves both losses.
    The value head is the one that was saved with the model, if there is one. Otherwise it starts at
    zero: the first advantages are then those of no baseline, not of noise.

    Args:
        policy: The language model.
        critic: If True, there is a value head.
    """

    def __init__(self, policy: PreTrainedModel, critic: bool = True) -> None:
        super().__init__()
        self.policy = policy
        self.value_head: nn.Linear | None = None
        if critic:
            self.value_head = _value_head(policy)

    def logprobs(self, batch: CompletionBatch) -> CompletionLogprobs:
        """Compute log-probs and entropy of completions, and their values if there is a critic.

        Args:
            batch: The completions.

        Returns:
            Log-probs, entropy and values, each float32 [B, T].
        """
        logp, entropy, hidden = completion_logprobs(
            self.policy,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            batch.temperature,
            batch.head,
        )
        return CompletionLogprobs(logp, entropy, self._values(hidden))

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
        )
        values = self._values(hidden)
        if values is None:
            return CompletionLoss(policy_loss, policy_stats, None)
        value_loss, value_stats = objective.value_loss(values, targets)
        return CompletionLoss(policy_loss + value_loss, policy_stats, value_stats)

    # DDP averages gradients, and FSDP gathers weights, only around `module(...)`, which calls
    # `forward`; autocast and torch.compile are put there by accelerate as well. Calling a method of
    # the unwrapped module would skip them all, so both methods are reached through here. The
    # functions `logprobs_through` and `loss_through` give the results their types back.
    def forward(
        self, request: CompletionBatch | LossRequest
    ) -> CompletionLogprobs | CompletionLoss:
        """Answer a request: `logprobs` of a batch alone, `loss` of a `LossRequest`."""
        if isinstance(request, LossRequest):
            return self.loss(request.batch, request.targets, request.objective)
        return self.logprobs(request)

    def _values(self, hidden: Tensor) -> Tensor | None:
        """Return the values of the last hidden states, float32 [B, T]."""
        if self.value_head is None:
            return None
        # bf16 is too coarse for values, so the head computes in float32 whatever autocast says.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)


def logprobs_through(wrapped: nn.Module, batch: CompletionBatch) -> CompletionLogprobs:
    """Call `PolicyWithValue.logprobs` through what wraps the module.

    Args:
        wrapped: A `PolicyWithValue`, or the DDP or FSDP module around one.
        batch: The completions.

    Returns:
        The result of `PolicyWithValue.logprobs`.
    """
    return wrapped(batch)


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


def _value_head(policy: PreTrainedModel) -> nn.Linear:
    # Some models project their last states before the LM head: config.hidden_size can be wrong.
    width = policy.get_output_embeddings().in_features
    head = nn.Linear(width, 1).to(policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    # A model built in code has no path, and the empty one would be the working directory.
    trained = Path(policy.name_or_path or "", VALUE_HEAD)
    if policy.name_or_path and trained.is_file():
        with _as_input_error(f"Cannot load the value head {trained}"):
            head.load_state_dict(load_file(trained))
    return head


def load_policy(model: str | PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """Load a causal language model in float32.

    Args:
        model: A directory or name for `from_pretrained`. A module is returned as it is.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model.

    Raises:
        InputError: There is no such model, or its files are damaged, lack weights or are those of
            a reward model.
    """
    if not isinstance(model, str):
        return model
    sentence = f"Cannot load a causal language model from {model!r}"
    path = Path(model)
    if path.is_file():
        raise InputError(f"{sentence}: it is a file, and the directory around it is meant.")
    if not path.exists() and (path.is_absolute() or model.startswith(".") or model.endswith("/")):
        raise InputError(f"{sentence}: there is no such directory.")
    with _as_input_error(sentence):
        # Its type does not know of the second result.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    policy, loading = loaded
    if any(name.startswith("score.") for name in loading["unexpected_keys"]):
        raise InputError(f"{sentence}: it holds a reward model.")
    # transformers makes up weights that it does not find.
    missing = sorted(loading["missing_keys"])
    missing += sorted(mismatch[0] for mismatch in loading["mismatched_keys"])
    if missing:
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise InputError(f"{sentence}: it lacks {missing[0]}{more}.")
    return policy


def load_tokenizer(policy: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with a model.

    Args:
        policy: A model that came from a directory or name.
        trust_remote_code: Whether code that comes with the tokenizer may run.

    Returns:
        Its tokenizer.

    Raises:
        InputError: The model was built in code, or no tokenizer was saved with it.
    """
    if not policy.name_or_path:
        raise InputError("A model built in code needs its tokenizer as processing_class.")
    path = Path(policy.name_or_path)
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        # transformers would make up an empty one for some families.
        raise InputError(f"There is no tokenizer in {policy.name_or_path!r}.")
    with _as_input_error(f"Cannot load a tokenizer from {policy.name_or_path!r}"):
        return AutoTokenizer.from_pretrained(
            policy.name_or_path, trust_remote_code=trust_remote_code
        )


@contextmanager
def _as_input_error(sentence: str) -> Iterator[None]:
    """Turn what reading a bad name or directory raises into an `InputError`."""
    try:
        yield
    except Exception as error:
        # Damaged files raise errors of safetensors, pickle, JSON and others. The first line of the
        # message says what is wrong; more are advice about the hub.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which only trust_remote_code lets run."
        raise InputError(f"{sentence}: {reason}") from error


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Copy a model as the reference of the KL penalty.

    Args:
        policy: The model. Copying it spares loading it twice.

    Returns:
        A copy in evaluation mode, whose parameters require no gradient.
    """
    reference = copy.deepcopy(policy)
    reference.requires_grad_(False)
    return reference.eval()


def disable_dropout(policy: PreTrainedModel) -> None:
    """Put a model in evaluation mode but let gradient checkpointing work.

    With dropout the same weights give different log-probabilities, and the first ratio is no
    longer 1.

    Args:
        policy: The model, changed in place.
    """
    policy.eval()
    for module in policy.modules():
        # Layers recompute themselves in training mode only, so those that checkpoint stay in it.
        # Their dropout modules are in evaluation mode, but they also hand rates to functions.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            _zero_rates(module)


def _zero_rates(module: nn.Module) -> None:
    """Set the rates that a layer hands to a functional dropout to 0."""
    for name in ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout"):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)
