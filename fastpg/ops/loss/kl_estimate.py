"""Estimates of KL(policy ‖ reference) at each token sampled from the policy. d = logp − ref_logp.

    kind   value              dkl/dlogp = −dkl/dref_logp
    k1     d                  1                 unbiased; its expected gradient by logp is 0
    k2     d² / 2             d                 biased; its gradient is that of the KL
    k3     e^{−d} − 1 + d     1 − e^{−d}        unbiased, never negative

In k3 the log-ratio is clamped to ±20 before the exponential.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..._op import Op
from ..common.checks import alike, check_choice
from ..common.log_ratio import MAX_LOG_RATIO
from ..common.sizes import ElementSizes, element_sizes

KINDS = {"k1": 0, "k2": 1, "k3": 2}  # the codes of csrc/loss/kl_estimate.h


class Inputs(NamedTuple):
    logp: Tensor  # any shape, fp32 or fp64
    ref_logp: Tensor  # like logp
    kind: str  # a key of KINDS


class Outputs(NamedTuple):
    kl: Tensor  # like logp


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_kl: Tensor  # like logp


class Gradient(NamedTuple):
    grad_logp: Tensor  # like logp; that of ref_logp is its negative


def reference(x: Inputs) -> Outputs:
    """The specification: the table at the top of this page."""
    d = (x.logp - x.ref_logp).contiguous()
    if x.kind == "k1":
        return Outputs(d)
    if x.kind == "k2":
        return Outputs(d * d / 2)
    return Outputs(torch.expm1(-d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + d)


def reference_backward(x: BackwardInputs) -> Gradient:
    """The gradient of k2 or k3."""
    d = (x.inputs.logp - x.inputs.ref_logp).contiguous()
    if x.inputs.kind == "k2":
        return Gradient(x.grad_kl * d)
    return Gradient(x.grad_kl * -torch.expm1(-d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)))


def allocate(x: Inputs) -> Outputs:
    """Makes empty estimates."""
    return Outputs(empty_like(x.logp))


def allocate_gradient(x: BackwardInputs) -> Gradient:
    """Makes an empty gradient."""
    return Gradient(empty_like(x.inputs.logp))


def sizes(x: Inputs) -> ElementSizes:
    """Tells C++ the dtype and the number of tokens."""
    return element_sizes(x.logp)


def backward_sizes(x: BackwardInputs) -> ElementSizes:
    """Tells C++ the dtype and the number of tokens."""
    return element_sizes(x.inputs.logp)


kl_estimate_op = Op(
    "kl_estimate",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    codes={"kind": KINDS},
)
kl_estimate_backward_op = Op(
    "kl_estimate_backward",
    BackwardInputs,
    Gradient,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradient,
    sizes=backward_sizes,
    codes={"kind": KINDS},
)


class Gradients(NamedTuple):
    """What the public function gives back to autograd."""

    grad_logp: Tensor
    grad_ref_logp: Tensor | None


def _forward(x: Inputs) -> tuple[Outputs, Inputs]:
    return kl_estimate_op(x), x


def _backward(x: Inputs, grad_kl: Tensor) -> Gradients:
    # The derivative of k1 is 1: no kernel is needed.
    grad_logp = grad_kl
    if x.kind != "k1":
        grad_logp = kl_estimate_backward_op(BackwardInputs(x, grad_kl)).grad_logp
    return Gradients(grad_logp, -grad_logp if x.ref_logp.requires_grad else None)


_kl_estimate = Differentiable(
    "kl_estimate",
    inputs=Inputs,
    saved=Inputs,
    differentiable=("logp", "ref_logp"),
    forward=_forward,
    backward=_backward,
)


def kl_estimate(
    logp: Tensor, ref_logp: Tensor, *, kind: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """The KL of the policy from a reference policy, estimated at each sampled token.

    With d = logp − ref_logp: "k1" is d, "k2" is d²/2, "k3" is e^{−d} − 1 + d.

    Args:
        logp: Log-probs of the sampled tokens under the policy, in nats. Any shape and float dtype;
            differentiable.
        ref_logp: The same under the reference policy, of the same shape; differentiable.
        kind: "k1" is unbiased, but its expected gradient is 0; "k2" is biased, and its gradient is
            that of the KL; "k3" is unbiased and never negative.

    Returns:
        The estimate at each token, in nats, of the shape of logp; fp32, or fp64 if an input is
        fp64. Padding is the caller's to mask.

    Raises:
        TypeError: logp or ref_logp is no tensor, or not of a floating dtype.
        ValueError: The shapes or devices differ, or kind is unknown.

    Example:
        >>> logp, ref_logp = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
        >>> fastpg.kl_estimate(logp, ref_logp, kind="k2")
        tensor([0.1250, 0.0000])

    Reference:
        Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    logp, ref_logp = alike("kl_estimate", logp=logp, ref_logp=ref_logp)
    check_choice("kl_estimate", "kind", kind, KINDS)
    return _kl_estimate(Inputs(logp, ref_logp, kind))[0]
