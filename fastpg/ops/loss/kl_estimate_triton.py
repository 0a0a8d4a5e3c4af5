"""kl_estimate on the GPU: the maths of csrc/loss/kl_estimate.h, a block of tokens to a program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._record import contiguous
from ..common.triton import OPTIONS, block_offsets, blocks_of, bounded, exp_excess, jit
from .kl_estimate import BackwardInputs, Gradient, Inputs, Outputs, allocate, allocate_gradient


@triton.jit
def difference(logp: tl.tensor, ref_logp: tl.tensor, offset: tl.tensor, inside: tl.tensor):
    """logp - ref_logp of these tokens."""
    return tl.load(logp + offset, mask=inside) - tl.load(ref_logp + offset, mask=inside)


@jit
def forward_kernel(
    logp: tl.tensor, ref_logp: tl.tensor, kl: tl.tensor, count: tl.int64, KIND: tl.constexpr
):
    """The estimates of a block."""
    offset = block_offsets()
    value = difference(logp, ref_logp, offset, offset < count)
    if KIND == "k2":
        value = value * value * 0.5
    if KIND == "k3":
        d = bounded(value)
        _, excess = exp_excess(-d)
        value = excess + (value - d)  # Only the exponent is bounded; the term d of k3 is not.
    tl.store(kl + offset, value, mask=offset < count)


@jit
def backward_kernel(
    grad_kl: tl.tensor,
    logp: tl.tensor,
    ref_logp: tl.tensor,
    grad_logp: tl.tensor,
    count: tl.int64,
    KIND: tl.constexpr,
):
    """The gradient of a block, by logp, for k2 or k3."""
    offset = block_offsets()
    slope = difference(logp, ref_logp, offset, offset < count)
    if KIND == "k3":  # 1 - e^-d without its cancellation
        d = bounded(slope)
        _, excess = exp_excess(-d)
        slope = d - excess
    grad = tl.load(grad_kl + offset, mask=offset < count)
    tl.store(grad_logp + offset, grad * slope, mask=offset < count)


def kl_estimate(x: Inputs) -> Outputs:
    """Launches a program for each block of tokens."""
    x, outputs = contiguous(x), allocate(x)
    if blocks := blocks_of(x.logp):
        forward_kernel[(blocks,)](
            x.logp, x.ref_logp, outputs.kl, count=x.logp.numel(), KIND=x.kind, **OPTIONS
        )
    return outputs


def kl_estimate_backward(x: BackwardInputs) -> Gradient:
    """Launches a program for each block of tokens."""
    inputs, gradient = contiguous(x.inputs), allocate_gradient(x)
    if blocks := blocks_of(inputs.logp):
        backward_kernel[(blocks,)](
            x.grad_kl.contiguous(),
            inputs.logp,
            inputs.ref_logp,
            gradient.grad_logp,
            count=inputs.logp.numel(),
            KIND=inputs.kind,
            **OPTIONS,
        )
    return gradient
