"""Squared-error value loss of tokens, optionally clipped around the old values.

    L = Σ_t w_t ½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)

    dL/dV = w (V − R), or 0 where the clipped error is the larger one: there V is held still

Forward writes one coefficient per token, dL/dV_t; backward multiplies it by the incoming scalar.
The statistics hold means and M2 = Σ (x − mean)², never Σ x²: returns near 1e4 lose no digits.
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
    cuda_kernel,
    define,
    scratch,
    triton_kernels,
)
from ..common.autograd import once_differentiable
from ..common.checks import alike, check_number, constant
from ..common.moments import moments_of
from ..common.stats import ValueStats


def reference(values, returns, weight, old_values, clip):
    """-> loss [], coefficient (dL/dV, of the shape of values), stats [8]."""
    kept = weight != 0
    values, returns, weight, old_values = (
        None if x is None else torch.where(kept, x, 0.0).contiguous()
        for x in (values, returns, weight, old_values)
    )
    error = values - returns
    held = error
    if old_values is not None:
        held = torch.clamp(values, old_values - clip, old_values + clip) - returns
    clipped = held**2 > error**2
    loss = (weight * 0.5 * torch.where(clipped, held, error) ** 2).sum(dtype=torch.float64)
    sums = [kept.sum(), weight.sum(dtype=torch.float64), loss, clipped.sum()]
    fields = [*sums, *moments_of(returns, kept)[1:], *moments_of(-error, kept)[1:]]
    stats = torch.stack([field.double() for field in fields])
    return loss.to(values.dtype), weight * torch.where(clipped, 0.0, error), stats


def _fake(values, *_):
    stats = values.new_empty(8, dtype=torch.float64)
    return values.new_empty(()), values.new_empty(values.shape), stats


_value_loss = define(
    "value_loss(Tensor values, Tensor returns, Tensor weight, Tensor? old_values, float clip) "
    "-> (Tensor loss, Tensor coefficient, Tensor stats)",
    fake=_fake,
    reference=reference,
)


def _launch(run, values, returns, weight, old_values, clip, *scratch):
    tensors = contiguous(values, returns, weight, old_values)
    out = _fake(values)
    sizes = DTYPE_CODE[values.dtype], values.numel()
    run(*sizes, *map(address, tensors), clip, *map(address, out), *scratch)
    return out


@cpu_kernel(_value_loss)
def _value_loss_cpu(*args):
    return _launch(_C.value_loss, *args)


@cuda_kernel(_value_loss)
def _value_loss_cuda(run, *args):
    room, _alive = scratch(args[0], fields=8)
    return _launch(run, *args, room)


triton_kernels(__name__, _value_loss)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, constants, clip):
        loss, coefficient, stats = _value_loss(values, *constants, clip)
        ctx.save_for_backward(coefficient)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # of stats: a launch on a GPU
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return None, None, None
        (coefficient,) = ctx.saved_tensors
        return grad_loss * coefficient, None, None


def value_loss(
    values: Tensor,
    returns: Tensor,
    weight: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
) -> tuple[Tensor, ValueStats]:
    """Σ weight · ½ (V − R)², the larger of that and its clipped form where clip is given.

    All tensors have the shape of values and any float dtype. values is differentiable, the others
    are constants. Weight 0 masks a token: not read, no gradient, not counted.
    old_values, clip: together or not at all; V is held within clip of the old one.
    Returns (loss, stats): a scalar, fp32 (fp64 if an input is fp64), and ValueStats.
    """
    values, *constants = alike(
        "value_loss", ("old_values",), values=values, returns=returns, weight=weight,
        old_values=old_values,
    )  # fmt: skip
    if (old_values is None) != (clip is None):
        missing = "old_values" if old_values is None else "clip"
        raise ValueError(f"value_loss: clip and old_values go together, {missing} is None")
    if clip is not None:
        check_number("value_loss", "clip", clip)
        if not 0 < clip < math.inf:
            raise ValueError(f"value_loss: clip must be finite and > 0, got {clip}")
    clip = 0.0 if clip is None else float(clip)
    if constant(values, *constants):
        loss, _, stats = _value_loss(values, *constants, clip)
    else:
        loss, stats = _ValueLoss.apply(values, constants, clip)
    return loss, ValueStats(stats)
