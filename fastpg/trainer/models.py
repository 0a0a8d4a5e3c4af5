"""The policy with its value head in one module, and the frozen reference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastpg.trainer.head import Head, TokenLoss, completion_logprobs, completion_loss
from fastpg.trainer.parsing import InputError


class PolicyWithValue(nn.Module):
    """A causal language model and, for algorithms with a critic, a value head on the same trunk.

    One module, so that one `accelerator.prepare` wraps it and one forward serves both losses.
    The head starts at zero: the first advantages are then those of no baseline, not of noise.
    """

    def __init__(self, policy: PreTrainedModel, critic: bool = True) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = None
        if not critic:
            return
        # Not hidden_size: some models project their last states before the LM head.
        self.value_head = nn.Linear(policy.get_output_embeddings().in_features, 1)
        self.value_head.to(policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        temperature: float,
        head: Head | None,
        token_loss: TokenLoss | None = None,
        level: str = "token",
    ) -> tuple[Tensor, Any, Tensor | None]:
        """input_ids, attention_mask: [B, P + T], completions in the last T slots. labels: [B, T].

        Returns log-probs and entropy of the completions, or their `token_loss` at a `level` and its
        statistics; and the values of the states they are drawn from, if any: float32 [B, T].
        Without a `head` they are made from the model's logits.
        """
        batch = self.policy, input_ids, attention_mask, labels, temperature, head
        if token_loss is None:
            *results, hidden = completion_logprobs(*batch)
        else:
            *results, hidden = completion_loss(*batch, token_loss, level)
        if self.value_head is None:
            return *results, None
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 values are too coarse
            values = self.value_head(hidden.float()).squeeze(-1)
        return *results, values


def load_policy(model: str | PreTrainedModel) -> PreTrainedModel:
    """A model directory or name, loaded in float32, or the module itself."""
    if not isinstance(model, str):
        return model
    with _refusing(f"Cannot load a causal language model from {model!r}"):
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def load_tokenizer(policy: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer saved with `policy`."""
    if not policy.name_or_path:
        raise InputError("A model built in code needs its tokenizer as processing_class.")
    with _refusing(f"Cannot load a tokenizer from {policy.name_or_path!r}"):
        return AutoTokenizer.from_pretrained(policy.name_or_path)


@contextmanager
def _refusing(sentence: str) -> Iterator[None]:
    """What `from_pretrained` says of a bad name or directory, as an `InputError` of one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{sentence}: {str(error).strip().splitlines()[0]}") from error


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """The reference of the KL penalty: a copy, so that nothing is loaded twice."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def disable_dropout(policy: PreTrainedModel) -> None:
    """Put `policy` in evaluation mode but let gradient checkpointing work.

    With dropout the same weights give different log-probabilities, and the first ratio is no
    longer 1. Layers that recompute themselves do so only in training mode, so they alone keep it,
    and the rates that they hand to a functional dropout become 0.
    """
    policy.eval()
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            _zero_rates(module)


def _zero_rates(module: nn.Module) -> None:
    for name in ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout"):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)
