"""token_rewards on the GPU: one program per sequence, which finds its last unmasked token first."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._record import contiguous
from ..common.triton import BLOCK, OPTIONS, jit, load_kept, load_mask, number, sequence_bounds
from .token_rewards import (
    BackwardInputs,
    Gradients,
    Inputs,
    Outputs,
    allocate,
    allocate_gradients,
)


@triton.jit
def last_kept(mask: tl.tensor, begin: tl.tensor, end: tl.tensor):
    """The last unmasked token of [begin, end), or -1."""
    last = tl.full([BLOCK], -1, tl.int64)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        # Tokens come in rising order, so the later one of a lane replaces the earlier.
        last = tl.where(load_mask(mask, token, token < end), token, last)
    return tl.max(last, 0)


@jit
def forward_kernel(
    scores: tl.tensor,
    mask: tl.tensor,
    kl: tl.tensor,
    cu_seqlens: tl.tensor,
    rewards: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
    kl_coef: tl.float64,
):
    """The rewards of a sequence."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    last = last_kept(mask, begin, end)
    # The score of a sequence without an unmasked token may be NaN, and nobody gets it.
    score = tl.load(scores + tl.program_id(0), mask=last >= 0, other=0.0)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        reward = tl.where(token == last, score, 0.0)
        if kl is not None:
            kept = load_mask(mask, token, token < end)
            reward -= number(kl_coef, score) * load_kept(kl, token, kept)
        tl.store(rewards + token, reward, mask=token < end)


@jit
def backward_kernel(
    grad_rewards: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    grad_scores: tl.tensor,
    grad_kl: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
    kl_coef: tl.float64,
):
    """The gradients of the score and of the KL of a sequence."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    last = last_kept(mask, begin, end)
    # Only the last unmasked token got the score; without one nothing goes back.
    grad_score = tl.load(grad_rewards + last, mask=last >= 0, other=0.0)
    tl.store(grad_scores + tl.program_id(0), grad_score)
    if grad_kl is not None:
        for start in range(begin, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            kept = load_mask(mask, token, token < end)
            grad = load_kept(grad_rewards, token, kept)
            tl.store(grad_kl + token, -number(kl_coef, grad_score) * grad, mask=token < end)


def token_rewards(x: Inputs) -> Outputs:
    """Launches a program for each sequence."""
    x, outputs = contiguous(x), allocate(x)
    if sequences := len(x.scores):
        forward_kernel[(sequences,)](
            scores=x.scores,
            mask=x.mask,
            kl=x.kl,
            cu_seqlens=x.cu_seqlens,
            rewards=outputs.rewards,
            length=x.mask.shape[-1],
            tokens=x.mask.numel(),
            kl_coef=x.kl_coef,
            **OPTIONS,
        )
    return outputs


def token_rewards_backward(x: BackwardInputs) -> Gradients:
    """Launches a program for each sequence."""
    inputs, gradients = x.inputs, allocate_gradients(x)
    mask, cu_seqlens = inputs.mask.contiguous(), inputs.cu_seqlens
    if sequences := len(inputs.scores):
        backward_kernel[(sequences,)](
            grad_rewards=x.grad_rewards.contiguous(),
            mask=mask,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
            grad_scores=gradients.grad_scores,
            grad_kl=None if inputs.kl is None else gradients.grad_kl,
            length=mask.shape[-1],
            tokens=mask.numel(),
            kl_coef=inputs.kl_coef,
            **OPTIONS,
        )
    return gradients
