"""The function that a user gives to linear_token_loss: called, checked and differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable

OP = "linear_token_loss"

TokenLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, object]]


class LossAndGradients(NamedTuple):
    """What token_loss returned for some rows, and its derivatives."""

    loss: Tensor  # 0-d, without a graph
    stats: object
    grad_logp: Tensor
    grad_entropy: Tensor | None  # None: the loss does not look at the entropy


def checked(result: object) -> tuple[Tensor, object]:
    """Returns what token_loss returned, if it is a scalar and its stats."""
    loss = result[0] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        got = type(result).__name__ if loss is None else f"a loss {getattr(loss, 'shape', loss)}"
        raise TypeError(f"{OP}: token_loss must return (0-d tensor, stats), got {got}")
    return result  # type: ignore[return-value]  # it is one


def differentiated(
    token_loss: TokenLoss, logp: Tensor, entropy: Tensor, rows: Tensor
) -> LossAndGradients:
    """Calls token_loss for some rows, and differentiates its loss by logp and entropy."""
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss, stats = checked(token_loss(logp, entropy, rows))
        grad_logp, grad_entropy = None, None
        if loss.requires_grad:
            grad_logp, grad_entropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    if grad_logp is None and grad_entropy is None:
        raise ValueError(f"{OP}: token_loss returned a loss without a graph back to logp")
    if grad_logp is None:
        grad_logp = torch.zeros_like(logp)
    return LossAndGradients(loss.detach(), stats, grad_logp, grad_entropy)


class MadeLoss(NamedTuple):
    """A loss whose derivatives are made already. It looks at nothing else that has a gradient."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None


class MadeGradients(NamedTuple):
    """The derivatives of the loss."""

    grad_logp: Tensor
    grad_entropy: Tensor | None


def _forward_made(x: MadeLoss) -> tuple[tuple[Tensor], MadeGradients]:
    return (x.loss.clone(),), MadeGradients(x.grad_logp, x.grad_entropy)


def _backward_made(x: MadeGradients, grad_loss: Tensor) -> MadeGradients:
    grad_entropy = None if x.grad_entropy is None else x.grad_entropy * grad_loss
    return MadeGradients(x.grad_logp * grad_loss, grad_entropy)


made_loss = Differentiable(
    OP,
    inputs=MadeLoss,
    saved=MadeGradients,
    differentiable=("logp", "entropy"),
    forward=_forward_made,
    backward=_backward_made,
)
