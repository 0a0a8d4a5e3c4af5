"""Masked whitening over the whole batch.

    y = (x − μ) s,   s = (var + eps)^(−1/2),   var = M2 / (n − 1),   M2 = Σ (x − μ)²
    center=False:    y = (x − μ) s + μ

Blocks of x give (n, μ, M2) each, which merge in a fixed order, never by E[x²] − E[x]²:

    d = μ_b − μ_a    n = n_a + n_b    μ = μ_a + d n_b / n    M2 = M2_a + M2_b + d² n_a n_b / n

    ∂x_j = s (∂y_j − mean ∂y) − s³ (x_j − μ) Σ ∂y (x − μ) / (n − 1)      (center=False: + mean ∂y)
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..._library import _C, DTYPE_CODE, cpu_kernel, define, triton_kernels
from ..common import checks
from ..common.autograd import once_differentiable


def reference_moments(x, mask):
    """(n, mean, M2) as fp64 [3]."""
    n = mask.sum().double()
    mean = torch.where(mask, x, 0.0).double().sum() / n.clamp(min=1)
    squares = torch.where(mask, x.double() - mean, 0.0).square().sum()
    return torch.stack([n, mean, squares])


def _scale(moments, eps):
    """s; 1 for a single value, which has no variance."""
    n, _, squares = moments.unbind()
    return torch.where(n > 1, torch.rsqrt(squares / (n - 1).clamp(min=1) + eps), 1.0)


def reference(x, mask, moments, center, eps):
    """y, of the shape and dtype of x."""
    mean = moments[1]
    y = (x.double() - mean) * _scale(moments, eps)
    return torch.where(mask, y if center else y + mean, 0.0).to(x.dtype).contiguous()


def reference_backward(grad, x, mask, moments, center, eps):
    """dL/dx, of the shape and dtype of x."""
    n, mean, _ = moments.unbind()
    s, n = _scale(moments, eps), n.clamp(min=1)
    g = torch.where(mask, grad, 0.0).double()
    d = torch.where(mask, x.double() - mean, 0.0)
    dx = s * (g - g.sum() / n) - s**3 * d * (g * d).sum() / (n - 1).clamp(min=1)
    dx = dx if center else dx + g.sum() / n
    return torch.where(mask, dx, 0.0).to(x.dtype).contiguous()


_moments = define(
    "whiten_moments(Tensor x, Tensor mask) -> Tensor",
    fake=lambda x, _: x.new_empty(3, dtype=torch.float64),
    reference=reference_moments,
)
_whiten = define(
    "whiten(Tensor x, Tensor mask, Tensor moments, bool center, float eps) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    reference=reference,
)
_backward = define(
    "whiten_backward(Tensor grad, Tensor x, Tensor mask, Tensor moments, bool center, float eps)"
    " -> Tensor",
    fake=lambda _, x, *__: x.new_empty(x.shape),
    reference=reference_backward,
)


@cpu_kernel(_moments)
def _moments_cpu(x, mask):
    x, mask, out = x.contiguous(), mask.contiguous(), x.new_empty(3, dtype=torch.float64)
    _C.whiten_moments(x.numel(), DTYPE_CODE[x.dtype], x.data_ptr(), mask.data_ptr(), out.data_ptr())
    return out


@cpu_kernel(_whiten)
def _whiten_cpu(x, mask, moments, center, eps):
    x, mask, out = x.contiguous(), mask.contiguous(), x.new_empty(x.shape)
    _C.whiten(
        x.numel(), DTYPE_CODE[x.dtype], x.data_ptr(), mask.data_ptr(), moments.data_ptr(), center,
        eps, out.data_ptr(),
    )  # fmt: skip
    return out


@cpu_kernel(_backward)
def _backward_cpu(grad, x, mask, moments, center, eps):
    grad, x, mask, out = grad.contiguous(), x.contiguous(), mask.contiguous(), x.new_empty(x.shape)
    _C.whiten_backward(
        x.numel(), DTYPE_CODE[x.dtype], grad.data_ptr(), x.data_ptr(), mask.data_ptr(),
        moments.data_ptr(), center, eps, out.data_ptr(),
    )  # fmt: skip
    return out


triton_kernels(__name__, _moments, _whiten, _backward)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, center, eps):
        moments = _moments(x, mask)
        ctx.save_for_backward(x, mask, moments)
        ctx.options = center, eps
        return _whiten(x, mask, moments, center, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _merge_ranks(moments, group):
    """The moments of every rank's values together, with the same bits on every rank."""
    each = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, moments, group=group)
    total, mean, squares = torch.zeros_like(moments).unbind()
    for n, mean_b, squares_b in each:
        d, share = mean_b - mean, n / (total + n).clamp(min=1)
        squares = squares + squares_b + d * d * total * share
        total, mean = total + n, mean + d * share
    return torch.stack([total, mean, squares])


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    center: bool = True,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """x with mean 0 and unbiased variance 1 over the unmasked elements.

    x: any shape, bf16, fp16, fp32 or fp64, any strides; differentiable.
    mask: like x, bool or 0/1. Masked elements are not read, and 0 in the output.
    center=False scales the deviations and keeps the mean.
    process_group: mean and variance are those of all ranks together. It synchronises the ranks, and
    x must not require a gradient.
    Returns y like x, fp32 (fp64 for fp64). One unmasked element is only centred: its scale is 1.
    """
    checks.check_tensors("whiten", x=x, mask=mask)
    dtype = checks.compute_dtype("whiten", x=x)
    checks.check_shape("whiten", "mask", mask, x, x.shape)
    checks.check_number("whiten", "eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"whiten: eps must be finite and > 0, got {eps}")
    x, mask = checks.cast(x, dtype), checks.as_bool(mask)
    if process_group is None and not checks.constant(x):
        return _Whiten.apply(x, mask, center, float(eps))
    if x.requires_grad:
        raise ValueError("whiten: x requires a gradient, which process_group does not support")
    moments = _moments(x, mask)
    if process_group is not None:
        moments = _merge_ranks(moments, process_group)
    return _whiten(x, mask, moments, center, float(eps))
