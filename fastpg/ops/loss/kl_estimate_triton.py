"""kl_estimate on the GPU: the maths of csrc/loss/kl_estimate.h, a block of tokens to a program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._record import contiguous
from ..common.log_ratio import BEYOND
from ..common.triton import (
    OPTIONS,
    block_offsets,
    blocks_of,
    bounded,
    exp_excess,
    held_log_ratio,
    jit,
    number,
)
from .kl_estimate import BackwardInputs, Gradient, Inputs, Outputs, allocate, allocate_gradient


@triton.jit
def estimate(
    logp: tl.tensor,
    ref_logp: tl.tensor,
    max_log_ratio: tl.tensor,
    max_kl: tl.tensor,
    beyond: tl.tensor,
    KIND: tl.constexpr,
):
    """The estimates of these tokens, and their derivatives by logp."""
    most = number(max_kl, logp)
    d, d_slope = held_log_ratio(logp, ref_logp, number(max_log_ratio, logp), number(beyond, logp))
    if KIND == "k1":
        value, slope = d, d_slope
    elif KIND == "k2":
        value, slope = d * d * 0.5, d * d_slope
    else:
        _, value = exp_excess(-d)
        slope = (d - value) * d_slope  # 1 - e^-d without its cancellation
    # A value beyond its bound does not move. NaN is not beyond, and stays NaN.
    return bounded(value, most), tl.where((value > most) | (value < -most), 0.0, slope)


@jit
def forward_kernel(
    logp: tl.tensor,
    ref_logp: tl.tensor,
    kl: tl.tensor,
    count: tl.int64,
    max_log_ratio: tl.float64,
    max_kl: tl.float64,
    beyond: tl.float64,
    KIND: tl.constexpr,
):
    """The estimates of a block."""
    offset = block_offsets()
    x = tl.load(logp + offset, mask=offset < count)
    ref = tl.load(ref_logp + offset, mask=offset < count)
    value, _ = estimate(x, ref, max_log_ratio, max_kl, beyond, KIND)
    tl.store(kl + offset, value, mask=offset < count)


@jit
def backward_kernel(
    grad_kl: tl.tensor,
    logp: tl.tensor,
    ref_logp: tl.tensor,
    grad_logp: tl.tensor,
    count: tl.int64,
    max_log_ratio: tl.float64,
    max_kl: tl.float64,
    beyond: tl.float64,
    KIND: tl.constexpr,
):
    """The gradient of a block, by logp."""
    offset = block_offsets()
    x = tl.load(logp + offset, mask=offset < count)
    ref = tl.load(ref_logp + offset, mask=offset < count)
    _, slope = estimate(x, ref, max_log_ratio, max_kl, beyond, KIND)
    grad = tl.load(grad_kl + offset, mask=offset < count)
    tl.store(grad_logp + offset, grad * slope, mask=offset < count)


def options_of(x: Inputs) -> dict[str, float | str]:
    """What the kernels take besides tensors."""
    bounds = {"max_log_ratio": x.max_log_ratio, "max_kl": x.max_kl}
    return bounds | {"beyond": float(BEYOND[x.beyond]), "KIND": x.kind}


def kl_estimate(x: Inputs) -> Outputs:
    """Launches a program for each block of tokens."""
    x, outputs = contiguous(x), allocate(x)
    if blocks := blocks_of(x.logp):
        forward_kernel[(blocks,)](
            x.logp, x.ref_logp, outputs.kl, count=x.logp.numel(), **options_of(x), **OPTIONS
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
            **options_of(inputs),
            **OPTIONS,
        )
    return gradient
