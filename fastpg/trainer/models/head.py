"""Log-probs and losses of completions: from the last hidden states, or from the model's own logits.

    logits = softcap(scale (h Wᵀ + b))

`find_head` reads W, b, scale and softcap off a model, and compares what they give with the logits
that the model computes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import fastpg
from fastpg.integrations.peft import UnknownHead, head_products
from fastpg.trainer.models.forward import causal_lm, is_sharded, plain_inputs, predicting_states
from fastpg.trainer.models.packing import Packing

_SCALES = {
    "logit_scale": lambda x: x,  # Cohere
    "logits_scaling": lambda x: 1 / x,  # Granite
    "lm_head_multiplier": lambda x: x,  # Falcon-H1
    "output_multiplier": lambda x: x,
}
"""What a model's logits are multiplied with, from the number of this name in its config."""

_LARGEST_LOGIT = 50.0
"""The comparison scales logits up to this: those of a small model would not show a softcap."""


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to the product of its last hidden states and its head's weight.

    Args:
        scale: What the product is multiplied with.
        softcap: The bound that the result is then brought to; None for no bound.
    """

    scale: float = 1.0
    softcap: float | None = None


Support = tuple[Tensor, Tensor]
"""Kept sets as `token_logprobs` takes them: the tokens of all sets, and where each set begins."""

TokenLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, fastpg.PolicyStats]]
"""What `linear_token_loss` takes: (logp, entropy, rows) -> (loss, stats)."""


def completion_logprobs(
    policy: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    temperature: float,
    head: HeadTransform | None,
    packing: Packing | None = None,
    support: Support | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of completions.

    Only the states that predict a completion token go through the LM head.

    Args:
        policy: The model.
        input_ids: [B, P + T], the completions in the last T slots.
        attention_mask: [B, P + T].
        labels: [B, T].
        temperature: That of the log-probs.
        head: How the model makes its logits. None: the model computes them, [B, T, V].
        packing: How episodes are packed into rows. None, or no head: each is a row.
        support: The tokens that each completion token was drawn from, as in `token_logprobs`. None:
            the whole vocabulary.

    Returns:
        Log-probs and entropies [B, T], and the last hidden states [B, T, H].
    """
    if head is None:
        inputs = plain_inputs(policy, input_ids, attention_mask)
        logits, hidden = _logits(policy, inputs, labels.shape[1])
        logp, entropy = fastpg.token_logprobs(
            logits, labels, temperature=temperature, return_entropy=True, support=support
        )
        return logp, entropy, hidden
    hidden = predicting_states(policy, input_ids, attention_mask, labels.shape[1], packing)
    operands = head_products(causal_lm(policy).get_output_embeddings(), hidden)
    logp, entropy = fastpg.linear_token_logprobs(
        operands.hidden,
        operands.head_weight,
        labels,
        bias=operands.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.scale,
        return_entropy=True,
        support=support,
    )
    return logp, entropy, hidden


def completion_loss(
    policy: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    temperature: float,
    head: HeadTransform | None,
    token_loss: TokenLoss,
    level: Literal["token", "sequence"],
    packing: Packing | None = None,
    support: Support | None = None,
) -> tuple[Tensor, list[fastpg.PolicyStats], Tensor]:
    """A loss of the log-probs of completions.

    Args:
        policy: As in `completion_logprobs`.
        input_ids: As in `completion_logprobs`.
        attention_mask: As in `completion_logprobs`.
        labels: As in `completion_logprobs`.
        temperature: As in `completion_logprobs`.
        head: As in `completion_logprobs`.
        token_loss: As in `linear_token_loss`. Without a `head` it is called once.
        level: As in `linear_token_loss`.
        packing: As in `completion_logprobs`.
        support: As in `completion_logprobs`. With it `token_loss` is called once.

    Returns:
        The loss, its statistics, and the last hidden states [B, T, H].
    """
    if head is None:
        logp, entropy, hidden = completion_logprobs(
            policy, input_ids, attention_mask, labels, temperature, head, support=support
        )
        rows = torch.arange(labels.numel(), device=labels.device)
        loss, stats = token_loss(logp.flatten(), entropy.flatten(), rows)
        return loss, [stats], hidden
    hidden = predicting_states(policy, input_ids, attention_mask, labels.shape[1], packing)
    operands = head_products(causal_lm(policy).get_output_embeddings(), hidden)
    loss, all_stats = fastpg.linear_token_loss(
        operands.hidden,
        operands.head_weight,
        labels,
        token_loss,
        bias=operands.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.scale,
        level=level,
        support=support,
    )
    return loss, all_stats, hidden


def _logits(policy: PreTrainedModel, inputs: dict, length: int) -> tuple[Tensor, Tensor]:
    """The model's logits [B, T, V], a strided view, and last hidden states [B, T, H]."""
    out = policy(**inputs, logits_to_keep=length + 1, output_hidden_states=True)
    return out.logits[:, :-1], out.hidden_states[-1][:, -length - 1 : -1]


def find_head(
    policy: PreTrainedModel, autocast: Callable[[], contextlib.AbstractContextManager]
) -> HeadTransform:
    """Finds how a causal language model makes its logits.

    Args:
        policy: The model.
        autocast: The context in which what was found is compared with the model's own logits.

    Raises:
        UnknownHead: The model computes its logits in another way; the message says why.
    """
    model = causal_lm(policy)
    if model.get_decoder() is model:
        raise UnknownHead(f"{type(model).__name__} has no decoder apart from its head")
    if is_sharded(policy):
        raise UnknownHead("the model's weights are sharded, and whole only within its own forward")
    config = model.config.get_text_config()
    head = HeadTransform(1.0, _positive(config, "final_logit_softcapping"))
    for name, factor in _SCALES.items():
        if (value := _positive(config, name)) is not None:
            head = replace(head, scale=head.scale * factor(value))
    with torch.no_grad(), autocast():
        _compare(policy, head)
    return head


def _positive(config: PretrainedConfig, name: str) -> float | None:
    """A number of the config; None if it has none of that name."""
    value = getattr(config, name, None)
    if not isinstance(value, (int, float)):
        return None
    if not value > 0:
        raise UnknownHead(f"{name} is {value} in the model's config, not a number > 0")
    return value


def _compare(policy: PreTrainedModel, head: HeadTransform) -> None:
    """Raises `UnknownHead` unless the head gives the log-probs of the model's logits."""
    model = causal_lm(policy)
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (2, 12), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    logits, _ = _logits(policy, plain_inputs(policy, ids, mask), 8)
    labels = ids[:, -8:] % logits.shape[-1]
    factor = _LARGEST_LOGIT / logits.abs().max().float().clamp(min=1e-3)
    with _hidden_states_times(factor, model.get_decoder()):
        actual, _, _ = completion_logprobs(policy, ids, mask, labels, 1.0, head)
        expected, _, _ = completion_logprobs(policy, ids, mask, labels, 1.0, None)
    # Two roundings, of the label's logit and of the largest; in float32 sums differ by more.
    tolerance = _LARGEST_LOGIT * max(2 * torch.finfo(logits.dtype).eps, 1e-5)
    error = (actual - expected).abs().max().item()
    if not error <= tolerance:
        raise UnknownHead(
            f"the head found in {type(model).__name__} gives log-probs that differ by {error:.2g} "
            f"(tolerance {tolerance:.2g})"
        )


@contextlib.contextmanager
def _hidden_states_times(factor: Tensor, decoder: nn.Module) -> Iterator[None]:
    """Multiplies the decoder's last hidden states."""

    def scale(module: nn.Module, inputs: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor.to(
            output.last_hidden_state.dtype
        )
        return output

    hook = decoder.register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()
