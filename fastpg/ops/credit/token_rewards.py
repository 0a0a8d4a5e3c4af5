"""Rewards per token: a KL penalty at every token, and the score where the sequence ends.

r_t = −kl_coef · kl_t + [t is the last unmasked token] · score
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import (
    _C,
    DTYPE_CODE,
    address,
    contiguous,
    cpu_kernel,
    define,
    scalar,
    triton_kernels,
)
from ..common import checks
from ..common.autograd import once_differentiable


def reference(scores, kl, mask, cu_seqlens, kl_coef):
    """Rewards of the shape of mask and the dtype of scores."""
    checks.check_cu_seqlens("token_rewards", cu_seqlens, mask)
    last = checks.is_last(mask, cu_seqlens)
    rewards = torch.where(last, checks.to_tokens(scores, mask, cu_seqlens), 0.0)
    return rewards if kl is None else rewards - kl_coef * torch.where(mask, kl, 0.0)


def reference_backward(grad, scores, kl, mask, cu_seqlens, kl_coef):
    """Gradients of scores and of kl, empty if there is no kl."""
    at_last = torch.where(checks.is_last(mask, cu_seqlens), grad, 0.0)
    grad_scores = checks.to_sequences(at_last, cu_seqlens)
    if kl is None:
        return grad_scores, grad.new_empty(0)
    return grad_scores, torch.where(mask, -kl_coef * grad, 0.0).contiguous()


_INPUTS = "Tensor scores, Tensor? kl, Tensor mask, Tensor? cu_seqlens, float kl_coef"
_rewards = define(
    f"token_rewards({_INPUTS}) -> Tensor",
    fake=lambda scores, kl, mask, *_: scores.new_empty(mask.shape),
    reference=reference,
)
_backward = define(
    f"token_rewards_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)",
    fake=lambda grad, scores, kl, *_: (
        scores.new_empty(scores.shape),
        scores.new_empty(0 if kl is None else kl.shape),
    ),
    reference=reference_backward,
)


@cpu_kernel(_rewards)
def _rewards_cpu(scores, kl, mask, cu_seqlens, kl_coef):
    scores, kl, mask, cu_seqlens = contiguous(scores, kl, mask, cu_seqlens)
    out = scores.new_empty(mask.shape)
    _C.token_rewards(
        len(scores), mask.shape[-1], address(cu_seqlens), DTYPE_CODE[scores.dtype],
        scores.data_ptr(), address(kl), mask.data_ptr(), kl_coef, out.data_ptr(),
    )  # fmt: skip
    return out


@cpu_kernel(_backward)
def _backward_cpu(grad, scores, kl, mask, cu_seqlens, kl_coef):
    grad, mask, cu_seqlens = contiguous(grad, mask, cu_seqlens)
    grad_scores = scores.new_empty(scores.shape)
    grad_kl = scores.new_empty(0 if kl is None else kl.shape)
    _C.token_rewards_backward(
        len(scores), mask.shape[-1], address(cu_seqlens), DTYPE_CODE[grad.dtype], grad.data_ptr(),
        mask.data_ptr(), kl_coef, grad_scores.data_ptr(), 0 if kl is None else grad_kl.data_ptr(),
    )  # fmt: skip
    return grad_scores, grad_kl


triton_kernels(__name__, _rewards, _backward)


class _TokenRewards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.kl_coef = args
        ctx.save_for_backward(*tensors)
        return _rewards(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        grad_scores, grad_kl = _backward(grad, *saved, ctx.kl_coef)
        return grad_scores, None if saved[1] is None else grad_kl, None, None, None


def _penalty(kl, kl_coef, dtype):
    """(kl, kl_coef) for the op; no kl at coefficient 0, where an infinite one would make NaN."""
    checks.check_number("token_rewards", "kl_coef", kl_coef)
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"token_rewards: kl_coef must be finite and >= 0, got {kl_coef}")
    if kl is None and kl_coef != 0:
        raise ValueError(f"token_rewards: kl_coef={kl_coef} needs kl")
    if kl_coef == 0:
        return None, 0.0
    kl = checks.cast(kl, dtype)
    if torch.compiler.is_compiling():  # where a float of the op compiles anew for each value
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
    """The score [B] at the last unmasked token of each sequence, minus kl_coef * kl at every one.

    scores: [B], bf16, fp16, fp32 or fp64; differentiable.
    mask: [B, T], or packed [N] with cu_seqlens (int32 [B + 1]); bool or 0/1.
    kl: like mask; differentiable. Not read where masked, nor with kl_coef = 0, where it gets no
    gradient.
    kl_coef: finite and >= 0.
    Returns rewards like mask, 0 where masked; fp32 (fp64 if an input is fp64). A sequence with no
    unmasked token gets nothing.
    """
    op = "token_rewards"
    checks.check_tensor(op, "scores", scores)
    dtype = checks.compute_dtype(op, scores=scores, kl=kl)
    count = checks.sequence_count(op, "mask", mask, cu_seqlens)
    checks.check_shape(op, "scores", scores, mask, (count,))
    checks.check_shape(op, "kl", kl, mask, mask.shape)
    kl, kl_coef = _penalty(kl, kl_coef, dtype)
    scores, mask = checks.cast(scores, dtype), checks.as_bool(mask)
    args = scores, kl, mask, cu_seqlens, kl_coef
    return _rewards(*args) if checks.constant(scores, kl) else _TokenRewards.apply(*args)
