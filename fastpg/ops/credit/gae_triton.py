"""gae on the GPU: one program per sequence, which scans it block by block, in fp64 as in C++.

A block is one associative scan of x_t = b_t + a_t x_next; what lies beyond it is carried. A masked
token hands on what it gets: a = 1, b = 0. Blocks begin with the sequence, so that neither padding
nor packing moves a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._record import contiguous
from ..common.triton import OPTIONS, jit, load_kept, load_mask, number, sequence_bounds
from .gae import BackwardInputs, Gradients, Inputs, Outputs, allocate, allocate_gradients

BLOCK = 512  # So many tokens are scanned at once.


@triton.jit
def affine(a: tl.tensor, b: tl.tensor, a_then: tl.tensor, b_then: tl.tensor):
    """Composes b + a x, then b_then + a_then x. A cut, a_then = 0, lets nothing through."""
    return a_then * a, tl.where(a_then == 0, b_then, b_then + a_then * b)


@triton.jit
def latest(given: tl.tensor, x: tl.tensor, given_then: tl.tensor, x_then: tl.tensor):
    """Of two x, the later one that is given."""
    return given | given_then, tl.where(given_then != 0, x_then, x)


@triton.jit
def scan_affine(a: tl.tensor, b: tl.tensor, carry: tl.tensor, REVERSE: tl.constexpr):
    """x = b + a x_before at each token of a block, with x_before = carry at its edge."""
    a, b = tl.associative_scan((a, b), 0, affine, reverse=REVERSE)
    # The carry has passed through every factor of the block so far. Where one was 0 it is cut
    # off, and not multiplied: it may be infinite.
    return tl.where(a == 0, b, b + a * carry)


@triton.jit
def scan_latest(given: tl.tensor, x: tl.tensor, carry: tl.tensor, REVERSE: tl.constexpr):
    """At each token of a block the last x that is given there or before, else the carry."""
    given, x = tl.associative_scan((given.to(tl.int32), x), 0, latest, reverse=REVERSE)
    return tl.where(given != 0, x, carry)


@triton.jit
def shifted(x: tl.tensor, carry: tl.tensor, DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """x of the next token (1) or of the one before (-1); the carry at the edge of the block."""
    # gather must not read outside the block, so the token at its edge reads place 0 in vain.
    source = tl.arange(0, BLOCK) + DISTANCE
    inside = (source >= 0) & (source < BLOCK)
    return tl.where(inside, tl.gather(x, tl.where(inside, source, 0), 0), carry)


@triton.jit
def pick(x: tl.tensor, token: tl.tensor, picked: tl.tensor):
    """The x of the one token that is picked."""
    return tl.sum(tl.where(token == picked, x, 0.0), 0)


@triton.jit
def load_number(x: tl.tensor, token: tl.tensor, kept: tl.tensor):
    """Numbers in fp64; 0, and nothing read, where a token is not kept."""
    return load_kept(x, token, kept).to(tl.float64)


@triton.jit
def load_or_zero(x: tl.tensor, token: tl.tensor, kept: tl.tensor):
    """Numbers in fp64, as `load_number` gives them; 0 everywhere if there is no x."""
    zeros = tl.full(token.shape, 0.0, tl.float64)
    return zeros if x is None else load_number(x, token, kept)


@triton.jit
def load_factor(x: tl.tensor, token: tl.tensor, kept: tl.tensor):
    """A factor per token; 1 where a token is not kept, or where there is no x."""
    ones = tl.full(token.shape, 1.0, tl.float64)
    return ones if x is None else tl.where(kept, load_number(x, token, kept), ones)


@triton.jit
def load_discount(
    x: tl.tensor, scalar: tl.tensor, token: tl.tensor, kept: tl.tensor, PER_TOKEN: tl.constexpr
):
    """gamma or lam, given per token, per sequence, or as one number."""
    ones = tl.full(token.shape, 1.0, tl.float64)
    if x is None:
        return ones * number(scalar, ones)
    elif PER_TOKEN:
        return load_factor(x, token, kept)
    else:
        return ones * tl.load(x + tl.program_id(0)).to(tl.float64)


@triton.jit
def load_tokens(
    mask: tl.tensor,
    gammas: tl.tensor,
    lams: tl.tensor,
    rho: tl.tensor,
    c: tl.tensor,
    terminated: tl.tensor,
    truncated: tl.tensor,
    gamma: tl.tensor,
    lam: tl.tensor,
    token: tl.tensor,
    end: tl.tensor,
    GAMMA_PER_TOKEN: tl.constexpr,
    LAM_PER_TOKEN: tl.constexpr,
):
    """Per token: kept; done; reads a bootstrap of its own; gamma; rho; the trace to the next one.

    The trace of a masked token is 1, that of one that is done 0.
    """
    kept = token < end
    if mask is not None:
        kept = load_mask(mask, token, kept)
    never = token < 0
    terminal = never if terminated is None else load_mask(terminated, token, kept)
    cut = never if truncated is None else load_mask(truncated, token, kept)
    token_gamma = load_discount(gammas, gamma, token, kept, GAMMA_PER_TOKEN)
    token_lam = load_discount(lams, lam, token, kept, LAM_PER_TOKEN)
    trace = token_gamma * token_lam * load_factor(c, token, kept)
    trace = tl.where(kept, tl.where(terminal | cut, 0.0, trace), 1.0)
    token_rho = load_factor(rho, token, kept)
    return kept, terminal | cut, cut & (terminal == 0), token_gamma, token_rho, trace


@jit
def forward_kernel(
    rewards: tl.tensor,
    values: tl.tensor,
    bootstrap: tl.tensor,
    mask: tl.tensor,
    gammas: tl.tensor,
    lams: tl.tensor,
    rho: tl.tensor,
    c: tl.tensor,
    terminated: tl.tensor,
    truncated: tl.tensor,
    cu_seqlens: tl.tensor,
    advantages: tl.tensor,
    returns: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    GAMMA_PER_TOKEN: tl.constexpr,
    LAM_PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scans from the last block to the first; it carries the advantage and value that follow."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    next_advantage, next_value = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if bootstrap is not None and truncated is None:
        # Without truncation there is one bootstrap a sequence, the value after its last token.
        next_value += tl.load(bootstrap + tl.program_id(0)).to(tl.float64)
    blocks = (end - begin + BLOCK - 1) // BLOCK  # The last may be part empty, never the first.
    for i in range(0, blocks):
        start = begin + (blocks - 1 - i) * BLOCK
        token = start + tl.arange(0, BLOCK)
        kept, done, reads, token_gamma, token_rho, trace = load_tokens(
            mask=mask,
            gammas=gammas,
            lams=lams,
            rho=rho,
            c=c,
            terminated=terminated,
            truncated=truncated,
            gamma=gamma,
            lam=lam,
            token=token,
            end=end,
            GAMMA_PER_TOKEN=GAMMA_PER_TOKEN,
            LAM_PER_TOKEN=LAM_PER_TOKEN,
        )
        value, follows = load_or_zero(values, token, kept), tl.zeros([BLOCK], tl.float64)
        if mask is None:
            value_from = tl.where(kept, value, next_value)  # A scan would find the same.
        else:
            # A masked token has no value of its own, but that of the next token that is kept.
            value_from = scan_latest(kept, value, next_value, True)
        after = shifted(value_from, next_value, 1, BLOCK)
        if bootstrap is not None and truncated is not None:
            follows = load_number(bootstrap, token, reads)
        after = tl.where(done, follows, after)
        delta = token_rho * (load_number(rewards, token, kept) + token_gamma * after - value)
        advantage = scan_affine(trace, tl.where(kept, delta, 0.0), next_advantage, True)
        tl.store(advantages + token, tl.where(kept, advantage, 0.0), mask=token < end)
        tl.store(returns + token, tl.where(kept, advantage + value, 0.0), mask=token < end)
        next_advantage = pick(advantage, token, start)
        next_value = pick(value_from, token, start)  # The block before goes on from there.


@jit
def backward_kernel(
    grad_advantages: tl.tensor,
    grad_returns: tl.tensor,
    mask: tl.tensor,
    gammas: tl.tensor,
    lams: tl.tensor,
    rho: tl.tensor,
    c: tl.tensor,
    terminated: tl.tensor,
    truncated: tl.tensor,
    cu_seqlens: tl.tensor,
    grad_rewards: tl.tensor,
    grad_values: tl.tensor,
    grad_bootstrap: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    GAMMA_PER_TOKEN: tl.constexpr,
    LAM_PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scans from the first block to the last.

    It carries the gradient of the advantage before, how much of it goes on, and what goes to the
    value after it.
    """
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    zero = tl.full([], 0.0, tl.float64)
    grad_before, trace_before, sent_before = zero, zero, zero
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        last = tl.minimum(start + BLOCK, end) - 1  # The carries come from it, not from padding.
        kept, done, reads, token_gamma, token_rho, trace = load_tokens(
            mask=mask,
            gammas=gammas,
            lams=lams,
            rho=rho,
            c=c,
            terminated=terminated,
            truncated=truncated,
            gamma=gamma,
            lam=lam,
            token=token,
            end=end,
            GAMMA_PER_TOKEN=GAMMA_PER_TOKEN,
            LAM_PER_TOKEN=LAM_PER_TOKEN,
        )
        to_return = load_number(grad_returns, token, kept)
        grad = load_number(grad_advantages, token, kept) + to_return
        grad = scan_affine(shifted(trace, trace_before, -1, BLOCK), grad, grad_before, False)
        sent = tl.where(done, 0.0, token_gamma * (token_rho * grad))
        if mask is not None:
            sent = scan_latest(kept, sent, sent_before, False)
        reward = tl.where(kept, token_rho * grad, 0.0)
        tl.store(grad_rewards + token, reward, mask=token < end)
        if grad_values is not None:
            # A value is taken off in its own delta, and added in that of the token before.
            value = to_return - reward + shifted(sent, sent_before, -1, BLOCK)
            tl.store(grad_values + token, tl.where(kept, value, 0.0), mask=token < end)
        if grad_bootstrap is not None and truncated is not None:
            own = tl.where(reads, token_gamma * reward, 0.0)
            tl.store(grad_bootstrap + token, own, mask=token < end)
        grad_before, trace_before = pick(grad, token, last), pick(trace, token, last)
        sent_before = pick(sent, token, last)
    if grad_bootstrap is not None and truncated is None:
        tl.store(grad_bootstrap + tl.program_id(0), sent_before)


def constants_of(x: Inputs) -> dict[str, Tensor | None]:
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
    """How many sequences there are, padded or packed."""
    return len(x.rewards) if x.cu_seqlens is None else len(x.cu_seqlens) - 1


def gae(x: Inputs) -> Outputs:
    """Launches a program for each sequence."""
    x, outputs = contiguous(x), allocate(x)
    if count := sequence_count(x):
        forward_kernel[(count,)](
            rewards=x.rewards,
            values=x.values,
            bootstrap=x.bootstrap,
            **constants_of(x),
            advantages=outputs.advantages,
            returns=outputs.returns,
            **scalars_of(x),
            **OPTIONS,
        )
    return outputs


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
            **constants_of(inputs),
            grad_rewards=gradients.grad_rewards,
            grad_values=grad_values,
            grad_bootstrap=grad_bootstrap,
            **scalars_of(inputs),
            **OPTIONS,
        )
    return gradients
