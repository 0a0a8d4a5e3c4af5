"""The policy with its value head in one module, and the frozen reference."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastpg.trainer.config import InputError


class PolicyWithValue(nn.Module):
    """A causal language model and a linear value head on the same trunk.

    One module, so that one `accelerator.prepare` wraps it and one forward serves both losses.
    The head starts at zero: the first advantages are then those of no baseline, not of noise.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        # Not hidden_size: some models project their last states before the LM head.
        self.value_head = nn.Linear(policy.get_output_embeddings().in_features, 1)
        self.value_head.to(policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_length: int
    ) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask: [B, P + T], the completions in the last T slots.

        Returns the logits [B, T, V] that predict each completion token, a strided view, and
        the values [B, T] of the states they are drawn from, float32.
        """
        logits, hidden = completion_logits(
            self.policy, input_ids, attention_mask, completion_length
        )
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 values are too coarse
            values = self.value_head(hidden.float()).squeeze(-1)
        return logits, values


def completion_logits(
    policy: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and last hidden states [B, T, H] at the slots that predict completions.

    Only these slots, and the last one, go through the LM head: prompts cost no logits.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(policy.forward).parameters:
        # generate() counts positions from the first real token; so must every other forward.
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    out = policy(
        **inputs,
        logits_to_keep=completion_length + 1,
        output_hidden_states=True,
        use_cache=False,
    )
    return out.logits[:, :-1], out.hidden_states[-1][:, -completion_length - 1 : -1]


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
