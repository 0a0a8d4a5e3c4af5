"""gae on the GPU: one program per sequence, which scans it block by block, in fp64 as csrc/gae.cpp.

A block is one associative scan of x_t = b_t + a_t x_next; what lies beyond it is carried. A masked
token hands on what it gets: a = 1, b = 0. Blocks begin with the sequence, so that neither padding
nor packing moves a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._record import contiguous
from ..common.triton import OPTIONS, jit, number, sequence_bounds
from .gae import BackwardInputs, Gradients, Inputs, Outputs, allocate, allocate_gradients

BLOCK = 512  # tokens that are scanned at once


@triton.jit
def affine(a, b, a_then, b_then):
    """First b + a x, then b_then + a_then (...). A cut, a_then = 0, lets nothing through."""
    return a_then * a, tl.where(a_then == 0, b_then, b_then + a_then * b)


@triton.jit
def latest(given, x, given_then, x_then):
    """The one that came last of those that are given."""
    return given | given_then, tl.where(given_then != 0, x_then, x)


@triton.jit
def scan_affine(a, b, carry, REVERSE: tl.constexpr):
    a, b = tl.associative_scan((a, b), 0, affine, reverse=REVERSE)
    return tl.where(a == 0, b, b + a * carry)


@triton.jit
def scan_latest(given, x, carry, REVERSE: tl.constexpr):
    given, x = tl.associative_scan((given.to(tl.int32), x), 0, latest, reverse=REVERSE)
    return tl.where(given != 0, x, carry)


@triton.jit
def shifted(x, carry, BY: tl.constexpr, BLOCK: tl.constexpr):
    """x of the next token (BY = 1) or the one before (-1); the carry at the edge of the block."""
    source = tl.arange(0, BLOCK) + BY
    inside = (source >= 0) & (source < BLOCK)
    return tl.where(inside, tl.gather(x, tl.where(inside, source, 0), 0), carry)


@triton.jit
def at_place(x, at, place):
    """The x of one place."""
    return tl.sum(tl.where(at == place, x, 0.0), 0)


@triton.jit
def load_kept(x, at, kept):
    return tl.load(x + at, mask=kept, other=0).to(tl.float64)


@triton.jit
def flags(flag, at, kept):
    return (tl.load(flag + at, mask=kept, other=0) != 0) & kept


@triton.jit
def ones_or(x, at, kept):
    """A factor per token; 1 where there is none."""
    ones = tl.full(at.shape, 1.0, tl.float64)
    return ones if x is None else tl.where(kept, load_kept(x, at, kept), ones)


@triton.jit
def discount(x, scalar, at, kept, PER_TOKEN: tl.constexpr):
    """gamma or lam, given per token, per sequence, or as one number."""
    ones = tl.full(at.shape, 1.0, tl.float64)
    if x is None:
        return ones * number(scalar, ones)
    elif PER_TOKEN:
        return ones_or(x, at, kept)
    else:
        return ones * tl.load(x + tl.program_id(0)).to(tl.float64)


@triton.jit
def load_tokens(
    mask, gammas, lams, rho, c, terminated, truncated, gamma, lam, at, end,
    GAMMA_PER_TOKEN: tl.constexpr, LAM_PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Per token: kept; done; reads a bootstrap of its own; gamma; rho; the trace to the next one.

    The trace of a masked token is 1, of one that is done 0.
    """
    kept = at < end
    if mask is not None:
        kept = flags(mask, at, kept)
    never = at < 0
    terminal = never if terminated is None else flags(terminated, at, kept)
    cut = never if truncated is None else flags(truncated, at, kept)
    by_gamma = discount(gammas, gamma, at, kept, GAMMA_PER_TOKEN)
    trace = by_gamma * discount(lams, lam, at, kept, LAM_PER_TOKEN) * ones_or(c, at, kept)
    trace = tl.where(kept, tl.where(terminal | cut, 0.0, trace), 1.0)
    return kept, terminal | cut, cut & (terminal == 0), by_gamma, ones_or(rho, at, kept), trace


@jit
def forward_kernel(
    rewards, values, bootstrap, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens,
    advantages, returns, length: tl.int64, tokens: tl.int64, gamma: tl.float64, lam: tl.float64,
    GAMMA_PER_TOKEN: tl.constexpr, LAM_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the last block to the first; carried are the advantage and the value that follow."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    next_advantage = tl.full([], 0.0, tl.float64)
    next_value = tl.full([], 0.0, tl.float64)
    if bootstrap is not None and truncated is None:
        next_value += tl.load(bootstrap + tl.program_id(0)).to(tl.float64)
    blocks = (end - begin + BLOCK - 1) // BLOCK
    for i in range(0, blocks):
        start = begin + (blocks - 1 - i) * BLOCK
        at = start + tl.arange(0, BLOCK)
        kept, done, reads, by_gamma, by_rho, trace = load_tokens(
            mask, gammas, lams, rho, c, terminated, truncated, gamma, lam, at, end,
            GAMMA_PER_TOKEN, LAM_PER_TOKEN,
        )  # fmt: skip
        value, follows = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        if values is not None:
            value = load_kept(values, at, kept)
        if mask is None:
            value_from = tl.where(kept, value, next_value)
        else:
            value_from = scan_latest(kept, value, next_value, True)
        after = shifted(value_from, next_value, 1, BLOCK)
        if bootstrap is not None and truncated is not None:
            follows = load_kept(bootstrap, at, reads)
        after = tl.where(done, follows, after)
        delta = by_rho * (load_kept(rewards, at, kept) + by_gamma * after - value)
        advantage = scan_affine(trace, tl.where(kept, delta, 0.0), next_advantage, True)
        tl.store(advantages + at, tl.where(kept, advantage, 0.0), mask=at < end)
        tl.store(returns + at, tl.where(kept, advantage + value, 0.0), mask=at < end)
        next_advantage = at_place(advantage, at, start)
        next_value = at_place(value_from, at, start)


@jit
def backward_kernel(
    grad_advantages, grad_returns, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens,
    grad_rewards, grad_values, grad_bootstrap, length: tl.int64, tokens: tl.int64,
    gamma: tl.float64, lam: tl.float64,
    GAMMA_PER_TOKEN: tl.constexpr, LAM_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the first block to the last; carried are the gradient of the advantage before, how much
    of it goes on, and what goes to the value after it."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    grad_before = tl.full([], 0.0, tl.float64)
    trace_before = tl.full([], 0.0, tl.float64)
    sent_before = tl.full([], 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        last = tl.minimum(start + BLOCK, end) - 1
        kept, done, reads, by_gamma, by_rho, trace = load_tokens(
            mask, gammas, lams, rho, c, terminated, truncated, gamma, lam, at, end,
            GAMMA_PER_TOKEN, LAM_PER_TOKEN,
        )  # fmt: skip
        to_return = load_kept(grad_returns, at, kept)
        grad = load_kept(grad_advantages, at, kept) + to_return
        arriving = shifted(trace, trace_before, -1, BLOCK)
        grad = scan_affine(arriving, grad, grad_before, False)
        sent = tl.where(done, 0.0, by_gamma * (by_rho * grad))
        if mask is not None:
            sent = scan_latest(kept, sent, sent_before, False)
        reward = tl.where(kept, by_rho * grad, 0.0)
        tl.store(grad_rewards + at, reward, mask=at < end)
        if grad_values is not None:
            received = shifted(sent, sent_before, -1, BLOCK)
            value = tl.where(kept, to_return - reward + received, 0.0)
            tl.store(grad_values + at, value, mask=at < end)
        if grad_bootstrap is not None and truncated is not None:
            own = tl.where(reads, by_gamma * reward, 0.0)
            tl.store(grad_bootstrap + at, own, mask=at < end)
        grad_before, trace_before = at_place(grad, at, last), at_place(trace, at, last)
        sent_before = at_place(sent, at, last)
    if grad_bootstrap is not None and truncated is None:
        tl.store(grad_bootstrap + tl.program_id(0), sent_before)


def scalars_of(x: Inputs) -> dict[str, object]:
    """What both kernels take besides arrays."""
    shape = x.rewards.shape
    return {
        "length": shape[-1],
        "tokens": x.rewards.numel(),
        "gamma": x.gamma,
        "lam": x.lam,
        "GAMMA_PER_TOKEN": x.gammas is not None and x.gammas.shape == shape,
        "LAM_PER_TOKEN": x.lams is not None and x.lams.shape == shape,
        "BLOCK": BLOCK,
    }


def sequence_count(x: Inputs) -> int:
    return len(x.rewards) if x.cu_seqlens is None else len(x.cu_seqlens) - 1


def gae(x: Inputs) -> Outputs:
    """Launches a program for each sequence."""
    x, outputs = contiguous(x), allocate(x)
    if count := sequence_count(x):
        forward_kernel[(count,)](
            rewards=x.rewards,
            values=x.values,
            bootstrap=x.bootstrap,
            **options_of(x),
            advantages=outputs.advantages,
            returns=outputs.returns,
            **scalars_of(x),
            **OPTIONS,
        )
    return outputs


def options_of(x: Inputs) -> dict[str, Tensor | None]:
    """The arrays that no gradient goes to."""
    return {
        "mask": x.mask,
        "gammas": x.gammas,
        "lams": x.lams,
        "rho": x.rho,
        "c": x.c,
        "terminated": x.terminated,
        "truncated": x.truncated,
        "cu_seqlens": x.cu_seqlens,
    }


def gae_backward(x: BackwardInputs) -> Gradients:
    """Launches a program for each sequence."""
    gradients = allocate_gradients(x)
    inputs = contiguous(x.inputs)
    grad_values = None if inputs.values is None else gradients.grad_values
    grad_bootstrap = None if inputs.bootstrap is None else gradients.grad_bootstrap
    if count := sequence_count(inputs):
        backward_kernel[(count,)](
            grad_advantages=x.grad_advantages.contiguous(),
            grad_returns=x.grad_returns.contiguous(),
            **options_of(inputs),
            grad_rewards=gradients.grad_rewards,
            grad_values=grad_values,
            grad_bootstrap=grad_bootstrap,
            **scalars_of(inputs),
            **OPTIONS,
        )
    return gradients
