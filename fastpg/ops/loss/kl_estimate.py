"""Estimates of KL(policy ‖ reference) at each token sampled from the policy. d = logp − ref_logp.

    kind   value              dkl/dlogp = −dkl/dref_logp
    k1     d                  1                 unbiased; its expected gradient by logp is 0
    k2     d² / 2             d                 biased; on policy its gradient is that of the KL
    k3     e^{−d} − 1 + d     1 − e^{−d}        unbiased, never negative

d is clamped to ±max_log_ratio, which stops the gradient beyond or holds it, as `beyond` says; and
the value to ±max_kl, which stops it. d of two log-probs of −inf is 0, that of one alone is at its
bound; neither has a gradient.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..._op import Op
from ..common.checks import alike, check_choice, check_number
from ..common.log_ratio import (
    BEYOND,
    MAX_LOG_RATIO,
    Beyond,
    Moving,
    bounded,
    check_bound,
    held_log_ratio,
)
from ..common.sizes import ElementSizes, element_sizes

KINDS = {"k1": 0, "k2": 1, "k3": 2}  # the codes of csrc/loss/kl_estimate.h


class Inputs(NamedTuple):
    logp: Tensor  # any shape, fp32 or fp64
    ref_logp: Tensor  # like logp
    kind: str  # a key of KINDS
    max_log_ratio: float
    max_kl: float  # inf: no bound
    beyond: str  # a key of BEYOND


class Outputs(NamedTuple):
    kl: Tensor  # like logp


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_kl: Tensor  # like logp


class Gradient(NamedTuple):
    grad_logp: Tensor  # like logp; that of ref_logp is its negative


def estimate(x: Inputs) -> Moving:
    """The specification: the table at the top of this page, values and derivatives by logp."""
    d, d_slope = held_log_ratio(x.logp, x.ref_logp, x.max_log_ratio, float(BEYOND[x.beyond]))
    values = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}
    slopes = {"k1": torch.ones_like(d), "k2": d, "k3": -torch.expm1(-d)}
    value, slope = values[x.kind], slopes[x.kind] * d_slope
    slope = slope.masked_fill((value > x.max_kl) | (value < -x.max_kl), 0.0)
    return Moving(bounded(value, x.max_kl), slope)


def reference(x: Inputs) -> Outputs:
    """The estimates."""
    return Outputs(estimate(x).value.contiguous())


def reference_backward(x: BackwardInputs) -> Gradient:
    """Their gradient by logp."""
    return Gradient((x.grad_kl * estimate(x.inputs).slope).contiguous())


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
    codes={"kind": KINDS, "beyond": BEYOND},
)
kl_estimate_backward_op = Op(
    "kl_estimate_backward",
    BackwardInputs,
    Gradient,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradient,
    sizes=backward_sizes,
    codes={"kind": KINDS, "beyond": BEYOND},
)


class Gradients(NamedTuple):
    """What the public function gives back to autograd."""

    grad_logp: Tensor
    grad_ref_logp: Tensor | None


def _forward(x: Inputs) -> tuple[Outputs, Inputs]:
    return kl_estimate_op(x), x


def _backward(x: Inputs, grad_kl: Tensor) -> Gradients:
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
    logp: Tensor,
    ref_logp: Tensor,
    *,
    kind: Literal["k1", "k2", "k3"] = "k1",
    max_log_ratio: float = MAX_LOG_RATIO,
    max_kl: float | None = None,
    beyond: Beyond = "stop",
) -> Tensor:
    """The KL of the policy from a reference policy, estimated at each sampled token.

    With d = logp − ref_logp: "k1" is d, "k2" is d²/2, "k3" is e^{−d} − 1 + d.

    Args:
        logp: Log-probs of the sampled tokens under the policy, in nats. Any shape and float dtype;
            differentiable.
        ref_logp: The same under the reference policy, of the same shape; differentiable. Where both
            are −inf, as for a label outside a kept set, d is 0; where one is, d is at its bound;
            neither has a gradient.
        kind: "k1" is unbiased, but its expected gradient is 0; "k2" is biased, and its gradient, on
            policy, is that of the KL; "k3" is unbiased and never negative.
        max_log_ratio: The bound of d, > 0 and <= 40.
        max_kl: > 0: the estimate is clamped to ±max_kl, and has no gradient beyond. verl ("k3") and
            OpenRLHF have 10. None: it is bounded by d alone, and so unbiased within max_log_ratio.
        beyond: What the gradient is where d is beyond max_log_ratio: "stop": none, as where torch
            clamps (that of k3 would be 1 − e^20 for a single token); "hold": that at the bound.

    Returns:
        The estimate at each token, in nats, of the shape of logp; fp32, or fp64 if an input is
        fp64. Padding is the caller's to mask.

    Raises:
        TypeError: logp or ref_logp is no tensor, or not of a floating dtype; a bound is no number.
        ValueError: The shapes or devices differ, a string is unknown, or a bound is out of range.

    Example:
        >>> logp, ref_logp = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
        >>> fastpg.kl_estimate(logp, ref_logp, kind="k2")
        tensor([0.1250, 0.0000])

    Reference:
        Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    logp, ref_logp = alike("kl_estimate", logp=logp, ref_logp=ref_logp)
    check_choice("kl_estimate", "kind", kind, KINDS)
    check_bound("kl_estimate", max_log_ratio, beyond)
    most = math.inf
    if max_kl is not None:
        check_number("kl_estimate", "max_kl", max_kl)
        if not max_kl > 0:
            raise ValueError(f"kl_estimate: max_kl must be > 0, got {max_kl}")
        most = float(max_kl)
    return _kl_estimate(Inputs(logp, ref_logp, kind, float(max_log_ratio), most, beyond))[0]
