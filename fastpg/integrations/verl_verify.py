"""The cases of `fastpg verify verl`: what verl asks its functions for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .verifying import Case, Results, Sizes

CORE = "verl.trainer.ppo.core_algos"
LOGITS = "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional"

SMALL = Sizes(vocab=1000, hidden=64, tokens=48)
TEMPERATURE, GAMMA, LAM, CLIP = 0.7, 0.99, 0.95, 0.2
BATCH, LENGTH = 64, 8192  # of the batch whose advantages are timed


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """All of them: small ones whose errors are taken, and large ones that are timed."""
    small = rollouts(8, 50, device)
    holes = small | {"mask": small["mask"] & (small["rewards"] > -0.5)}
    yield Case("advantages, right-padded", small, call_of_gae, exact_gae)
    yield Case("advantages, holes", holes, call_of_gae, exact_gae)
    yield Case("value loss, holes", differentiable(holes), call_of_value_loss, exact_value_loss)
    head = heads(SMALL, device)
    half = {name: halved(x) for name, x in head.items()}
    for name, given in ("", head), (", bf16", half), (", logits of -inf", forbidden(head)):
        yield Case(f"logits{name}", given, call_of_logits, exact_of_logits)
    for name, given in ("", head), (", bf16", half):
        yield Case(f"fused head{name}", given, call_of_fused_head, exact_of_head)
    yield Case(f"advantages, {BATCH} x {LENGTH}", rollouts(BATCH, LENGTH, device), call_of_gae)
    of_size = f"V={sizes.vocab}, H={sizes.hidden}, {sizes.tokens} tokens"
    large = heads(sizes, device)
    yield Case(f"logits, {of_size}", large, call_of_logits)
    yield Case(f"fused head, {of_size}", large, call_of_fused_head)


def rollouts(batch: int, length: int, device: str) -> dict[str, Tensor]:
    """Rewards, values and a mask: sequences of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, batch, length, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return {"rewards": rewards.to(device), "values": values.to(device), "mask": mask.to(device)}


def differentiable(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rollouts whose values have a gradient."""
    return given | {"values": given["values"].detach().requires_grad_()}


def heads(sizes: Sizes, device: str) -> dict[str, Tensor]:
    """Hidden states, the head that makes logits of them, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.vocab, sizes.hidden, generator=generator) / sizes.hidden**0.5 * 2
    labels = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator)
    bias = torch.zeros(sizes.vocab)
    return {
        "hidden": hidden.to(device).requires_grad_(),
        "weight": weight.to(device).requires_grad_(),
        "bias": bias.to(device),
        "labels": labels.to(device),
    }


def halved(x: Tensor) -> Tensor:
    """A tensor in bf16, if it is one of numbers."""
    if not x.is_floating_point():
        return x
    return x.detach().bfloat16().requires_grad_(x.requires_grad)


def forbidden(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with labels of which none is one of the first ten, which a mask forbids."""
    bias = given["bias"].clone()
    bias[:10] = -torch.inf
    return given | {"bias": bias, "labels": given["labels"].clamp(min=10)}


def call_of_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Results:
    """Advantages and returns of the unmasked tokens; verl leaves numbers at the others."""
    core: Any = import_module(CORE)
    results = core.compute_gae_advantage_return(rewards, values, mask.float(), GAMMA, LAM)
    return [torch.where(mask, x, 0.0) for x in results]


def exact_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Results:
    """The same, token by token; a masked token is no step of time."""
    follows = advantage = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + GAMMA * follows - values[:, t]
        advantage = torch.where(mask[:, t], error + GAMMA * LAM * advantage, advantage)
        follows = torch.where(mask[:, t], values[:, t], follows)
        advantages[:, t] = advantage
    kept = advantages[mask]
    whitened = (advantages - kept.mean()) / (kept.var() + 1e-8).sqrt()
    return [torch.where(mask, whitened, 0.0), torch.where(mask, advantages + values, 0.0)]


def call_of_value_loss(rewards: Tensor, values: Tensor, mask: Tensor) -> Results:
    """The loss of values around returns and old values."""
    core: Any = import_module(CORE)
    old = values.detach() + 0.3 * rewards.flip(0)
    return [core.compute_value_loss(values, rewards, old, mask, CLIP)[0]]


def exact_value_loss(rewards: Tensor, values: Tensor, mask: Tensor) -> Results:
    """The same from its formula."""
    old = values.detach() + 0.3 * rewards.flip(0)
    clipped = values.clamp(min=old - CLIP, max=old + CLIP)
    error = torch.maximum((values - rewards) ** 2, (clipped - rewards) ** 2)
    return [0.5 * error[mask].mean()]


def call_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """Log-probs and entropies of logits, as verl's engine asks for them with an entropy."""
    functions: Any = import_module(LOGITS)
    logits = (hidden @ weight.T + bias) / TEMPERATURE
    entropy = functions.entropy_from_logits(logits)
    logp = functions.logprobs_from_logits(logits, labels, inplace_backward=False)
    return [logp, entropy]


def exact_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """The same by a softmax; what is forbidden adds nothing to an entropy."""
    logp = ((hidden @ weight.T + bias) / TEMPERATURE).log_softmax(-1)
    plogp = torch.where(logp == -torch.inf, 0.0, logp).mul(logp.exp())
    return [logp.gather(-1, labels[:, None])[:, 0], -plogp.sum(-1)]


def call_of_fused_head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """Log-probs and entropies of hidden states. There is no bias in verl's head."""
    fused: Any = import_module(FUSED)
    return fused.FusedLinearForPPO()(hidden, weight, labels, temperature=TEMPERATURE)


exact_of_head = exact_of_logits
