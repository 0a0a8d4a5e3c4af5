"""Generalised advantage estimation: one reverse affine scan.

    δ_t = ρ_t (r_t + γ_t (1 − terminated_t) V_next − V_t)
    A_t = δ_t + γ_t λ_t c_t (1 − done_t) A_next         done = terminated | truncated
    R_t = A_t + V_t

Terminated cuts the bootstrap, done cuts the trace. V_next and A_next belong to the next unmasked
token of the sequence. V_next of a truncated token is the bootstrap there; that of the last unmasked
token is the bootstrap of the sequence, or 0. With ρ and c, clipped importance ratios, R_t is the
V-trace target (Espeholt et al. 2018, arXiv:1802.01561); without them both are 1.

Backward is the adjoint, a forward scan, with p the unmasked token before t; a done p sends nothing:

    G_t = ∂A_t + ∂R_t + γ_p λ_p c_p G_p     ∂r_t = ρ_t G_t     ∂V_t = ∂R_t − ρ_t G_t + γ_p ρ_p G_p

and γ_t ρ_t G_t for the bootstrap that t read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import DTYPE_CODE, address, contiguous, cpp_kernels, define, triton_kernels
from ..common import checks
from ..common.autograd import once_differentiable
from . import gae_options as _options


def _grid(x, default, tokens, cu_seqlens):
    """x as double [B, T] (packed: [1, N]): given per token, per sequence, or not at all."""
    if x is None:
        x = torch.full(tokens.shape, default, dtype=torch.float64, device=tokens.device)
    elif x.shape != tokens.shape:
        x = checks.to_tokens(x, tokens, cu_seqlens)
    return x.double() if cu_seqlens is None else x.double()[None]


def _tokens(rewards, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens, gamma, lam):
    """Per token: not masked; last of its sequence, masked or not; done; followed by a bootstrap;
    gamma; rho; and the trace in A_t = δ_t + trace_t A_{t+1}: a masked token hands on what follows.
    """
    options = (mask, 1.0), (terminated, 0.0), (truncated, 0.0), (gammas, gamma), (lams, lam)
    options = *options, (rho, 1.0), (c, 1.0)
    grids = [_grid(*option, rewards, cu_seqlens) for option in options]
    kept, terminal, cut = (flag != 0 for flag in grids[:3])
    gamma, lam, rho, c = (torch.where(kept, x, 1.0) for x in grids[3:])
    length = rewards.shape[-1]
    stop = length if cu_seqlens is None else checks.to_tokens(cu_seqlens[1:], rewards, cu_seqlens)
    ends = (torch.arange(1, length + 1, device=rewards.device) == stop).expand_as(kept)
    done = kept & (terminal | cut)
    reads = ends & ~done if truncated is None else done & ~terminal
    return kept, ends, done, reads, gamma, rho, torch.where(ends | done, 0.0, gamma * lam * c)


def _scan(a, b):
    """x_t = b_t + a_t x_{t+1}, along T."""
    out, x = torch.empty_like(b), b.new_zeros(len(b))
    for t in reversed(range(b.shape[1])):
        x = torch.where(a[:, t] == 0, b[:, t], b[:, t] + a[:, t] * x)
        out[:, t] = x
    return out


def reference(
    rewards, values, bootstrap, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens,
    gamma, lam,
):  # fmt: skip
    """Advantages and returns, of the shape and dtype of rewards; the scan itself is double."""
    checks.check_cu_seqlens("gae", cu_seqlens, rewards)
    kept, ends, done, reads, gamma, rho, trace = _tokens(
        rewards, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens, gamma, lam
    )
    if bootstrap is not None and truncated is None:
        bootstrap = checks.to_tokens(bootstrap, rewards, cu_seqlens)
    r, v, follows = (_grid(x, 0.0, rewards, cu_seqlens) for x in (rewards, values, bootstrap))
    v, follows = torch.where(kept, v, 0.0), torch.where(reads, follows, 0.0)
    hands_on = (~(kept | ends)).double()
    value_from = _scan(hands_on, torch.where(kept, v, follows))
    next_value = torch.where(ends | done, follows, value_from.roll(-1, 1))
    delta = torch.where(kept, rho * (r + gamma * next_value - v), 0.0)
    advantages = torch.where(kept, _scan(trace, delta), 0.0)
    return tuple(x.reshape(rewards.shape).to(rewards.dtype) for x in (advantages, advantages + v))


def reference_backward(
    grad_advantages, grad_returns, rewards, values, bootstrap,
    mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens, gamma, lam,
):  # fmt: skip
    """Gradients of rewards, values and bootstrap; empty for one that is absent."""
    kept, ends, done, reads, gamma, rho, trace = _tokens(
        rewards, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens, gamma, lam
    )
    grads = (_grid(x, 0.0, rewards, cu_seqlens) for x in (grad_advantages, grad_returns))
    ga, gr = (torch.where(kept, x, 0.0) for x in grads)
    grad = _scan(trace.roll(1, 1).flip(1), (ga + gr).flip(1)).flip(1)
    grad = torch.where(kept, rho * grad, 0.0)
    hands_on = (~(kept | ends.roll(1, 1))).double()
    sent = torch.where(done, 0.0, gamma * grad)
    sent = _scan(hands_on.flip(1), sent.flip(1)).flip(1)  # to the value that follows
    received = torch.where(ends, 0.0, sent).roll(1, 1)  # nothing wraps: the last token is an end
    grad_values = torch.where(kept, gr - grad + received, 0.0)
    if truncated is not None:
        grad_bootstrap = torch.where(reads, gamma * grad, 0.0)
    else:
        final = torch.where(ends, sent, 0.0).reshape(rewards.shape)
        grad_bootstrap = checks.to_sequences(final, cu_seqlens)
    outs = zip((rewards, values, bootstrap), (grad, grad_values, grad_bootstrap), strict=True)
    return tuple(rewards.new_empty(0) if x is None else g.reshape(x.shape).to(x) for x, g in outs)


_INPUTS = (
    "Tensor rewards, Tensor? values, Tensor? bootstrap, Tensor? mask, Tensor? gammas, Tensor? lams,"
    " Tensor? rho, Tensor? c, Tensor? terminated, Tensor? truncated, Tensor? cu_seqlens,"
    " float gamma, float lam"
)


def _new(rewards, *like):
    return tuple(rewards.new_empty(0 if x is None else x.shape) for x in like)


_gae = define(
    f"gae({_INPUTS}) -> (Tensor, Tensor)",
    fake=lambda rewards, *_: _new(rewards, rewards, rewards),
    reference=reference,
)
_backward = define(
    f"gae_backward(Tensor grad_advantages, Tensor grad_returns, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda *args: _new(args[2], *args[2:5]),
    reference=reference_backward,
)


def _inputs(*args):
    """GaeTuple of csrc/bind.h, and the tensors that must outlive the call."""
    tensors = contiguous(*args[:11])
    rewards, gammas, lams, cu_seqlens = (tensors[i] for i in (0, 4, 5, 10))
    shape = rewards.shape
    sizes = shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, shape[0])
    per_token = (x is not None and x.shape == shape for x in (gammas, lams))
    addresses = [address(x) for x in tensors]
    return (*sizes, DTYPE_CODE[rewards.dtype], *per_token, *args[11:], addresses), tensors


def _launch(run, *args):
    inputs, (rewards, *_alive) = _inputs(*args)
    out = torch.empty_like(rewards), torch.empty_like(rewards)
    run(inputs, *map(address, out))
    return out


def _launch_backward(run, grad_advantages, grad_returns, *args):
    inputs, (rewards, *rest) = _inputs(*args)
    grads = grad_advantages.contiguous(), grad_returns.contiguous()  # sum() hands expanded ones
    out = _new(rewards, rewards, *rest[:2])
    run(inputs, *map(address, grads + out))
    return out


cpp_kernels(_gae, _launch)
cpp_kernels(_backward, _launch_backward)
triton_kernels(__name__, _gae, _backward)


class _Gae(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:11])
        ctx.scalars = args[11:]
        return _gae(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = *ctx.saved_tensors, *ctx.scalars
        out = _backward(*grads, *inputs)
        grads = (None if x is None else g for x, g in zip(inputs, out, strict=False))
        return *grads, *[None] * (len(inputs) - len(out))


def gae(
    rewards: Tensor,
    values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    rho: Tensor | None = None,
    c: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns.

    rewards, values: [B, T], or packed [N] with cu_seqlens (int32 [B + 1]); bf16, fp16, fp32 or
    fp64, any strides; differentiable. values=None is 0: both outputs are the reward-to-go.
    mask: like rewards, bool or 0/1. A masked token is never read, its outputs are 0, and the
    others are what they would be without it.
    gamma, lam: floats, or constant tensors [B] or like rewards.
    terminated: bool or 0/1, [B] (the last unmasked token) or like rewards. None: the last unmasked
    token is terminal, unless `truncated` marks it or, without `truncated`, a bootstrap is given.
    truncated: the same shapes; needs a bootstrap of its shape. A token that is both is terminated.
    bootstrap: the value after each sequence's last unmasked token [B], read where that is not
    terminated; or, with truncated like rewards, the value after each truncated token.
    rho, c: constants like rewards, 1 where None: they weigh the error and the trace of each token.
    With clipped importance ratios the returns are the V-trace targets.
    Where N = B, a packed tensor is read per token, a bootstrap without `truncated` per sequence.
    Returns (advantages, returns) like rewards, fp32 (fp64 if an input is fp64), scanned in double.
    """
    dtype = checks.compute_dtype("gae", rewards=rewards, values=values, bootstrap=bootstrap)
    count = checks.sequence_count("gae", "rewards", rewards, cu_seqlens)
    checks.check_shape("gae", "values", values, rewards, rewards.shape)
    checks.check_shape("gae", "mask", mask, rewards, rewards.shape)
    mask = checks.as_bool(mask)
    gammas, gamma = _options.discount("gamma", gamma, rewards, mask, count, dtype)
    lams, lam = _options.discount("lam", lam, rewards, mask, count, dtype)
    ratios = _options.ratios(rewards, dtype, rho=rho, c=c)
    if not (terminated is None and truncated is None and bootstrap is None):
        bootstrap, terminated, truncated = _options.endings(
            rewards, bootstrap, mask, terminated, truncated, cu_seqlens, count
        )
    inputs = [checks.cast(x, dtype) for x in (rewards, values, bootstrap)]
    options = mask, gammas, lams, *ratios, terminated, truncated, cu_seqlens, gamma, lam
    if checks.constant(*inputs):
        return _gae(*inputs, *options)
    return _Gae.apply(*inputs, *options)
