"""kl_estimate on the GPU: the maths of csrc/kl_estimate.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.triton import OPTIONS, block_offsets, blocks_of, exp_excess, jit, on_device


@triton.jit
def difference(logp, ref_logp, at, inside):
    return tl.load(logp + at, mask=inside) - tl.load(ref_logp + at, mask=inside)


@triton.jit
def clamped(d):
    """d within +-20; NaN passes through."""
    return tl.where(d > 20.0, 20.0, tl.where(d < -20.0, -20.0, d))


@jit
def forward_kernel(logp, ref_logp, kl, count: tl.int64, KIND: tl.constexpr):
    at = block_offsets()
    d = difference(logp, ref_logp, at, at < count)
    if KIND == "k2":
        d = d * d * 0.5
    if KIND == "k3":
        bounded = clamped(d)
        _, excess = exp_excess(-bounded)
        d = excess + (d - bounded)
    tl.store(kl + at, d, mask=at < count)


@jit
def backward_kernel(grad, logp, ref_logp, out, count: tl.int64, KIND: tl.constexpr):
    at = block_offsets()
    slope = difference(logp, ref_logp, at, at < count)
    if KIND == "k3":  # 1 - e^-d without its cancellation
        bounded = clamped(slope)
        _, excess = exp_excess(-bounded)
        slope = bounded - excess
    tl.store(out + at, tl.load(grad + at, mask=at < count) * slope, mask=at < count)


def launch(kernel, *tensors_and_kind):
    *tensors, kind = tensors_and_kind
    tensors = [x.contiguous() for x in tensors]
    out = torch.empty_like(tensors[-1])
    if count := out.numel():
        kernel[(blocks_of(out),)](*tensors, out, count, KIND=kind, **OPTIONS)
    return out


@on_device
def kl_estimate(*args):
    return launch(forward_kernel, *args)


@on_device
def kl_estimate_backward(*args):
    return launch(backward_kernel, *args)
