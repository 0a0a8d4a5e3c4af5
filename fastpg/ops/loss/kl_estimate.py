"""Estimates of KL(policy ‖ reference) at each token sampled from the policy. d = logp − ref_logp.

    kind   value              dkl/dlogp = −dkl/dref_logp
    k1     d                  1                 unbiased; its expected gradient by logp is 0
    k2     d² / 2             d                 biased; its gradient is that of the KL
    k3     e^{−d} − 1 + d     1 − e^{−d}        unbiased, never negative

In k3 the log-ratio is clamped to ±20 before the exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import _C, DTYPE_CODE, cpu_kernel, define, triton_kernels
from ..common.autograd import once_differentiable
from ..common.checks import alike, check_choice, constant

KINDS = {"k1": 0, "k2": 1, "k3": 2}  # the codes of csrc/kl_estimate.h


def reference(logp, ref_logp, kind):
    """kl, of the shape of logp."""
    d = (logp - ref_logp).contiguous()
    if kind == "k1":
        return d
    return d * d / 2 if kind == "k2" else torch.expm1(-d.clamp(-20.0, 20.0)) + d


def reference_backward(grad, logp, ref_logp, kind):
    """dL/dlogp of k2 or k3; dL/dref_logp is its negative."""
    d = (logp - ref_logp).contiguous()
    return grad * (d if kind == "k2" else -torch.expm1(-d.clamp(-20.0, 20.0)))


def _fake(*args):
    return args[-2].new_empty(args[-2].shape)  # of ref_logp


_kl = define(
    "kl_estimate(Tensor logp, Tensor ref_logp, str kind) -> Tensor", fake=_fake, reference=reference
)
_backward = define(
    "kl_estimate_backward(Tensor grad, Tensor logp, Tensor ref_logp, str kind) -> Tensor",
    fake=_fake,
    reference=reference_backward,
)


@cpu_kernel(_kl)
def _kl_cpu(logp, ref_logp, kind):
    logp, ref_logp = logp.contiguous(), ref_logp.contiguous()
    kl = torch.empty_like(logp)
    _C.kl_estimate(
        DTYPE_CODE[kl.dtype], logp.numel(), KINDS[kind], logp.data_ptr(), ref_logp.data_ptr(),
        kl.data_ptr(),
    )  # fmt: skip
    return kl


@cpu_kernel(_backward)
def _backward_cpu(grad, logp, ref_logp, kind):
    grad, logp, ref_logp = grad.contiguous(), logp.contiguous(), ref_logp.contiguous()
    grad_logp = torch.empty_like(logp)
    _C.kl_estimate_backward(
        DTYPE_CODE[logp.dtype], logp.numel(), KINDS[kind], grad.data_ptr(), logp.data_ptr(),
        ref_logp.data_ptr(), grad_logp.data_ptr(),
    )  # fmt: skip
    return grad_logp


triton_kernels(__name__, _kl, _backward)


class _KlEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, ref_logp, kind):
        ctx.save_for_backward(logp, ref_logp)
        ctx.kind = kind
        return _kl(logp, ref_logp, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.kind != "k1":
            grad = _backward(grad, *ctx.saved_tensors, ctx.kind)
        return grad, -grad if ctx.needs_input_grad[1] else None, None


def kl_estimate(logp: Tensor, ref_logp: Tensor, *, kind: str = "k1") -> Tensor:
    """The KL of the policy from a reference policy, estimated at each sampled token.

    logp, ref_logp: tensors of one shape and any float dtype; both differentiable.
    Returns kl of the same shape, fp32 (fp64 if an input is fp64). Padding is yours to mask.
    """
    logp, ref_logp = alike("kl_estimate", logp=logp, ref_logp=ref_logp)
    check_choice("kl_estimate", "kind", kind, KINDS)
    if constant(logp, ref_logp):
        return _kl(logp, ref_logp, kind)
    return _KlEstimate.apply(logp, ref_logp, kind)
