"""One policy-gradient step of a small Hugging Face model: forward, loss, backward, optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastpg import linear_token_loss, policy_loss, token_logprobs, token_weights

from . import baselines, peers
from .inputs import log_ratios
from .problem import COMPILED, LEAST_ROUNDS, OURS, PLAIN, Solution
from .problems import Settings
from .running import Row, run
from .timing import Case

WIDTH, LAYERS, VOCAB = 256, 2, 32768
LOGITS = "fastpg, from the model's logits"

OF_TOKENS = ("advantages", "weight", "old_logp")

TokenLoss = Callable[[Tensor, dict[str, Tensor]], Tensor]
StepLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def make_model(device: str) -> nn.Module:
    """A Qwen2 of random weights with the widths of a toy and the vocabulary of a real model."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        raise peers.LeftOutError("transformers is not installed") from None
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: nn.Module = Qwen2ForCausalLM(config)
    return model.to(device)


def make_batch(model: nn.Module, device: str, batch: int, length: int) -> dict[str, Tensor]:
    """Tokens [B, T + 1] of which the last T are the completion."""
    tokens = torch.randint(VOCAB, (batch, length + 1), device=device)
    with torch.no_grad():
        logp = token_logprobs(model(tokens[:, :-1]).logits, tokens[:, 1:])
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    mask[-1, length // 2 :] = False
    return {
        "tokens": tokens,
        "labels": tokens[:, 1:],
        "advantages": torch.randn(batch, length, device=device),
        "weight": token_weights(mask),
        "old_logp": logp - log_ratios(batch, length).to(device),
    }


def fused_loss(logp: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """PPO's loss by fastpg."""
    advantages, weight, old_logp = (batch[name].to(logp) for name in OF_TOKENS)
    return policy_loss(logp, advantages, weight, old_logp=old_logp)[0]


def plain_loss(logp: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The same as people write it."""
    return baselines.clipped_surrogate(logp, *(batch[name].to(logp) for name in OF_TOKENS))


def from_hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """fastpg from the last hidden states: the logits are never all there."""
    hidden = model.model(batch["tokens"][:, :-1]).last_hidden_state
    tokens = {name: batch[name].flatten() for name in OF_TOKENS}

    def token_loss(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, None]:
        return fused_loss(logp, {name: x[rows] for name, x in tokens.items()}), None

    return linear_token_loss(hidden, model.lm_head.weight, batch["labels"], token_loss)[0]


def from_logits(log_probs: Solution, loss: TokenLoss) -> StepLoss:
    """The loss of a model from its logits, by a function for the log-probs of rows."""

    def of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["tokens"][:, :-1]).logits
        labels = batch["labels"]
        logp = log_probs(logits.flatten(0, 1), labels.flatten())
        assert isinstance(logp, Tensor)
        return loss(logp.view_as(labels), batch)

    return of


def step(model: nn.Module, loss: StepLoss, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step, at a learning rate of 0: so every candidate finds the same model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def take() -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


def gate(
    model: nn.Module, loss: StepLoss, batch: dict[str, Tensor], exact: list[Tensor]
) -> Callable[[], None]:
    """The loss, and the gradient of the first layer, which all else leads through."""

    def check() -> None:
        for got, want in zip(loss_and_gradient(model, loss, batch), exact, strict=True):
            error = ((got.double() - want).norm() / want.norm()).item()
            assert error < 1e-3, f"off by a relative {error:.2g}"

    return check


def loss_and_gradient(model: Any, loss: StepLoss, batch: dict[str, Tensor]) -> list[Tensor]:
    """What a gate compares."""
    value = loss(model, batch)
    first = model.model.layers[0].self_attn.q_proj.weight
    return [value.detach(), *torch.autograd.grad(value, first)]


def rows(settings: Settings) -> Iterator[list[Row]]:
    """The rows of the suite; none, with a reason, where there is no model to be had."""
    try:
        model = make_model(settings.device)
    except peers.LeftOutError as error:
        settings.left_out["step"] = str(error)
        return
    size = (2, 64) if settings.quick else (8, 128)
    batch = make_batch(model, settings.device, *size)
    plain = from_logits(baselines.log_probs, plain_loss)
    losses: dict[str, StepLoss] = {OURS: from_hidden, PLAIN: plain}
    if not settings.quick:
        losses[LOGITS] = from_logits(token_logprobs, fused_loss)
        losses[COMPILED] = from_logits(
            torch.compile(baselines.log_probs), torch.compile(plain_loss)
        )
    for name, log_probs in settings.peers({"TRL": peers.trl_log_probs}).items():
        losses[f"{name}'s log-probs"] = from_logits(log_probs, plain_loss)
    exact = loss_and_gradient(copy.deepcopy(model).double(), plain, batch)
    gates = {name: gate(model, loss, batch, exact) for name, loss in losses.items()}
    case = Case(
        "step",
        f"Qwen2, {LAYERS} layers of {WIDTH}, V={VOCAB}, {size[0]} x {size[1]} tokens, fp32",
        gates.pop(OURS),
        {name: step(model, loss, batch) for name, loss in losses.items()},
        device=settings.device,
        gates=gates,
        least=LEAST_ROUNDS,
    )
    yield run(case, settings.seconds)
