"""Rewards per token: a KL penalty at every token, and the score where the sequence ends.

    r_t = −kl_coef · kl_t + [t is the last unmasked token of its sequence] · score

A masked token has reward 0. Backward sends ∂r at the last unmasked token to the score, and
−kl_coef · ∂r_t to kl_t.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like, scalar
from ..._op import Op
from ..common import checks
from ..common.sizes import SequenceSizes, sequence_sizes


class Inputs(NamedTuple):
    scores: Tensor  # [B], fp32 or fp64
    mask: Tensor  # bool [B, T], or packed [N] with cu_seqlens
    kl: Tensor | None  # like mask, in the dtype of scores; None: 0
    cu_seqlens: Tensor | None  # int32 [B + 1]; None: padded
    kl_coef: float


class Outputs(NamedTuple):
    rewards: Tensor  # like mask, in the dtype of scores


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_rewards: Tensor  # like rewards


class Gradients(NamedTuple):
    grad_scores: Tensor  # like scores
    grad_kl: Tensor  # like kl; empty, if there was none


def reference(x: Inputs) -> Outputs:
    """The specification: the formula at the top of this page."""
    checks.check_cu_seqlens("token_rewards", x.cu_seqlens, x.mask)
    last = checks.is_last(x.mask, x.cu_seqlens)
    rewards = torch.where(last, checks.to_tokens(x.scores, x.mask, x.cu_seqlens), 0.0)
    if x.kl is not None:
        rewards = rewards - x.kl_coef * torch.where(x.mask, x.kl, 0.0)
    return Outputs(rewards.contiguous())


def reference_backward(x: BackwardInputs) -> Gradients:
    """The adjoint of the formula."""
    inputs, grad = x.inputs, x.grad_rewards
    last = checks.is_last(inputs.mask, inputs.cu_seqlens)
    grad_scores = checks.to_sequences(torch.where(last, grad, 0.0), inputs.cu_seqlens)
    if inputs.kl is None:
        return Gradients(grad_scores, grad.new_empty(0))
    return Gradients(
        grad_scores, torch.where(inputs.mask, -inputs.kl_coef * grad, 0.0).contiguous()
    )


def allocate(x: Inputs) -> Outputs:
    """Makes empty rewards."""
    return Outputs(empty_like(x.mask, x.scores.dtype))


def allocate_gradients(x: BackwardInputs) -> Gradients:
    """Makes empty gradients; that of kl has no elements if there is no kl."""
    scores, kl = x.inputs.scores, x.inputs.kl
    return Gradients(empty_like(scores), scores.new_empty(0) if kl is None else empty_like(kl))


def sizes(x: Inputs) -> SequenceSizes:
    """Tells C++ the dtype, how many sequences there are, and their length."""
    return sequence_sizes(x.mask, x.cu_seqlens, x.scores)


def backward_sizes(x: BackwardInputs) -> SequenceSizes:
    """Tells C++ what the forward op does, for the backward op."""
    return sizes(x.inputs)


token_rewards_op = Op(
    "token_rewards",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
)
token_rewards_backward_op = Op(
    "token_rewards_backward",
    BackwardInputs,
    Gradients,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradients,
    sizes=backward_sizes,
)


def _forward(x: Inputs) -> tuple[Outputs, Inputs]:
    return token_rewards_op(x), x


def _backward(x: Inputs, grad_rewards: Tensor) -> Gradients:
    return token_rewards_backward_op(BackwardInputs(x, grad_rewards))


_token_rewards = Differentiable(
    "token_rewards",
    inputs=Inputs,
    saved=Inputs,
    differentiable=("scores", "kl"),
    forward=_forward,
    backward=_backward,
)


def penalty(kl: Tensor | None, kl_coef: float, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """Checks kl and kl_coef, and brings them into the form that the op takes.

    At coefficient 0 there is no kl, for an infinite one would make NaN.
    """
    checks.check_number("token_rewards", "kl_coef", kl_coef)
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"token_rewards: kl_coef must be finite and >= 0, got {kl_coef}")
    if kl is None and kl_coef != 0:
        raise ValueError(f"token_rewards: kl_coef={kl_coef} needs kl")
    if kl is None or kl_coef == 0:
        return None, 0.0
    kl = checks.cast(kl, dtype)
    if torch.compiler.is_compiling():  # There a float of an op compiles anew for each value.
        return kl * scalar(kl_coef, dtype, kl.device), 1.0
    return kl, float(kl_coef)


def token_rewards(
    scores: Tensor,
    mask: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The score of each sequence at its last token, minus a KL penalty at every token.

    r_t = −kl_coef · kl_t, plus the score where t is the last unmasked token of its sequence.

    Args:
        scores: [B], one score for each sequence, of any float dtype; differentiable. That of a
            sequence without an unmasked token is not read.
        mask: [B, T], or packed [N] with cu_seqlens; bool or 0/1. 1 marks a token of a completion.
        kl: Like mask, such as from kl_estimate, in nats; differentiable. It is not read where
            masked, nor at kl_coef = 0, where it has no gradient.
        kl_coef: The weight of the penalty, finite and >= 0.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.

    Returns:
        The reward of each token, like mask, 0 where masked; fp32, or fp64 if an input is fp64.

    Raises:
        TypeError: An argument is no tensor or number, or has a dtype that it cannot have.
        ValueError: A shape, a device or a value does not fit, or kl_coef is given without kl.

    Example:
        >>> mask, kl = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.full((2, 3), 0.5)
        >>> fastpg.token_rewards(torch.tensor([1.0, 2.0]), mask, kl=kl, kl_coef=0.1)
        tensor([[-0.0500,  0.9500,  0.0000],
                [-0.0500, -0.0500,  1.9500]])

    Reference:
        Ziegler et al. 2019, "Fine-tuning language models from human preferences",
        arXiv:1909.08593.
    """
    op = "token_rewards"
    checks.check_tensor(op, "scores", scores)
    dtype = checks.compute_dtype(op, scores=scores, kl=kl)
    count = checks.sequence_count(op, "mask", mask, cu_seqlens)
    checks.check_shape(op, "scores", scores, mask, (count,))
    checks.check_shape(op, "kl", kl, mask, mask.shape)
    kl, kl_coef = penalty(kl, kl_coef, dtype)
    scores, mask = checks.cast(scores, dtype), checks.as_bool(op, "mask", mask)
    return _token_rewards(Inputs(scores, mask, kl, cu_seqlens, kl_coef))[0]
