"""Masked whitening over the whole batch.

    y = (x − μ) s,   s = (var + eps)^(−1/2),   var = M2 / (n − 1),   M2 = Σ (x − μ)²
    center=False:    y = (x − μ) s + μ

Blocks of x give (n, μ, M2) each, which merge in a fixed order (common/moments.py), never by
E[x²] − E[x]².

    ∂x_j = s (∂y_j − mean ∂y) − s³ (x_j − μ) Σ ∂y (x − μ) / (n − 1)      (center=False: + mean ∂y)

The op whiten takes the moments of x and scales by them; it is one op because a call costs as much
as whitening thousands of elements. Where the moments of other ranks are to be merged in, the op
whiten_moments gives those of this rank, and whiten is handed the merged ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..._op import Op
from ..common import checks
from ..common.moments import Moments, merge_moments, moments_of
from ..common.sizes import ElementSizes, element_sizes


class MomentsInputs(NamedTuple):
    x: Tensor  # any shape, fp32 or fp64
    mask: Tensor  # bool, like x


class MomentsOutputs(NamedTuple):
    moments: Tensor  # fp64 [3]: the fields of Moments


class Inputs(NamedTuple):
    x: Tensor  # any shape, fp32 or fp64
    mask: Tensor  # bool, like x
    moments: Tensor | None  # fp64 [3]: the fields of Moments; None: those of x
    center: bool
    eps: float


class Outputs(NamedTuple):
    y: Tensor  # like x
    moments_used: Tensor  # fp64 [3]: a copy of those given, or those of x


class BackwardInputs(NamedTuple):
    inputs: Inputs  # with moments
    grad_y: Tensor  # like x


class Gradient(NamedTuple):
    grad_x: Tensor  # like x, through the moments too


def reference_moments(inputs: MomentsInputs) -> MomentsOutputs:
    """The specification of the moments: the sums at the top of this page, in fp64."""
    return MomentsOutputs(torch.stack(moments_of(inputs.x, inputs.mask)))


def scale_of(moments: Moments, eps: float) -> Tensor:
    """s; 1 for a single value, which has no variance."""
    variance = moments.m2 / (moments.n - 1).clamp(min=1)
    return torch.where(moments.n > 1, torch.rsqrt(variance + eps), 1.0)


def reference(inputs: Inputs) -> Outputs:
    """The specification: the first pair of formulas at the top of this page, in fp64."""
    x = inputs.x
    if inputs.moments is None:
        used = reference_moments(MomentsInputs(x, inputs.mask)).moments
    else:
        used = inputs.moments.clone()
    moments = Moments._make(used.unbind())
    y = (x.double() - moments.mean) * scale_of(moments, inputs.eps)
    if not inputs.center:
        y = y + moments.mean
    return Outputs(torch.where(inputs.mask, y, 0.0).to(x.dtype).contiguous(), used)


def reference_backward(x: BackwardInputs) -> Gradient:
    """The specification of the gradient: the last formula at the top of this page, in fp64."""
    inputs = x.inputs
    assert inputs.moments is not None  # forward saved those that it used
    moments = Moments._make(inputs.moments.unbind())
    scale, n = scale_of(moments, inputs.eps), moments.n
    grad = torch.where(inputs.mask, x.grad_y, 0.0).double()
    deviation = torch.where(inputs.mask, inputs.x.double() - moments.mean, 0.0)
    mean_grad = grad.sum() / n.clamp(min=1)
    through_variance = scale**3 * deviation * (grad * deviation).sum() / (n - 1).clamp(min=1)
    grad_x = scale * (grad - mean_grad) - through_variance
    if not inputs.center:
        grad_x = grad_x + mean_grad
    return Gradient(torch.where(inputs.mask, grad_x, 0.0).to(inputs.x.dtype).contiguous())


def allocate_moments(inputs: MomentsInputs) -> MomentsOutputs:
    """Makes empty moments."""
    return MomentsOutputs(inputs.x.new_empty(3, dtype=torch.float64))


def allocate(inputs: Inputs) -> Outputs:
    """Makes an empty result, and empty moments."""
    return Outputs(empty_like(inputs.x), inputs.x.new_empty(3, dtype=torch.float64))


def allocate_gradient(x: BackwardInputs) -> Gradient:
    """Makes an empty gradient."""
    return Gradient(empty_like(x.inputs.x))


def sizes(inputs: MomentsInputs | Inputs) -> ElementSizes:
    """Tells C++ the dtype and the number of elements."""
    return element_sizes(inputs.x)


def backward_sizes(x: BackwardInputs) -> ElementSizes:
    """Tells C++ the dtype and the number of elements."""
    return element_sizes(x.inputs.x)


whiten_moments_op = Op(
    "whiten_moments",
    MomentsInputs,
    MomentsOutputs,
    page=__name__,
    reference=reference_moments,
    allocate=allocate_moments,
    sizes=sizes,
)
whiten_op = Op(
    "whiten",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
)
whiten_backward_op = Op(
    "whiten_backward",
    BackwardInputs,
    Gradient,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradient,
    sizes=backward_sizes,
)


def _forward(given: Inputs) -> tuple[tuple[Tensor], Inputs]:
    y, moments = whiten_op(given)
    return (y,), Inputs(given.x, given.mask, moments, given.center, given.eps)


def _backward(inputs: Inputs, grad_y: Tensor) -> Gradient:
    return whiten_backward_op(BackwardInputs(inputs, grad_y))


_whiten = Differentiable(
    "whiten",
    inputs=Inputs,
    saved=Inputs,
    differentiable=("x",),
    forward=_forward,
    backward=_backward,
)


def moments_of_ranks(x: Tensor, mask: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """The moments of every rank's values together; they have the same bits on each."""
    moments = whiten_moments_op(MomentsInputs(x, mask)).moments
    every_rank = [torch.empty_like(moments) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(every_rank, moments, group=process_group)
    merged = merge_moments(Moments._make(torch.stack(every_rank, 1).unbind()))
    return torch.stack(merged)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    center: bool = True,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """x with mean 0 and unbiased variance 1 over its unmasked elements.

    y = (x − μ) / √(var + eps), with var = Σ (x − μ)² / (n − 1).

    Args:
        x: Any shape, float dtype and strides, such as advantages [B, T]; differentiable.
        mask: Like x, bool or 0/1. A masked element is not read, and 0 in the result.
        center: False keeps the mean: only the deviations from it are scaled.
        eps: What is added to the variance, finite and > 0.
        process_group: Mean and variance are those of all its ranks together: each must call. It
            synchronises the ranks, and x must not require a gradient.

    Returns:
        y, like x; fp32, or fp64 if x is fp64. A single unmasked element has no variance: it is only
        centred.

    Raises:
        TypeError: An argument is no tensor or number, or x is not of a floating dtype.
        ValueError: The shapes or devices differ, eps is not finite and > 0, or x requires a
            gradient where there is a process_group.

    Example:
        >>> x, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])
        >>> fastpg.whiten(x, mask)
        tensor([[-0.7071,  0.7071,  0.0000]])

    Reference:
        Andrychowicz et al. 2021, "What matters for on-policy deep actor-critic methods?",
        arXiv:2006.05990. The moments: Chan, Golub and LeVeque 1983.
    """
    checks.check_tensors("whiten", x=x, mask=mask)
    dtype = checks.compute_dtype("whiten", x=x)
    checks.check_shape("whiten", "mask", mask, x, x.shape)
    checks.check_number("whiten", "eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"whiten: eps must be finite and > 0, got {eps}")
    x, mask = checks.cast(x, dtype), checks.as_bool("whiten", "mask", mask)
    if process_group is None:
        return _whiten(Inputs(x, mask, None, center, float(eps)))[0]
    if x.requires_grad:
        raise ValueError("whiten: x requires a gradient, which process_group does not support")
    moments = moments_of_ranks(x, mask, process_group)
    return whiten_op(Inputs(x, mask, moments, center, float(eps))).y
