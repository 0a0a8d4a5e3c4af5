"""Squared-error value loss of tokens, optionally clipped around the old values.

    L = Σ_t w_t ½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)

    dL/dV = w (V − R), or 0 where the clipped error is the larger one: there V is held still

Forward writes one coefficient per token, dL/dV_t; backward multiplies it by the incoming scalar.
The statistics hold means and M2 = Σ (x − mean)², never Σ x²: returns near 1e4 lose no digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..._op import Op
from ..common.checks import alike, check_number, where_kept
from ..common.moments import moments_of
from ..common.sizes import ElementSizes, element_sizes
from ..common.stats import ValueStats


class Inputs(NamedTuple):
    values: Tensor  # V, any shape, fp32 or fp64
    returns: Tensor  # R, like values
    weight: Tensor  # like values; 0 masks a token
    old_values: Tensor | None  # like values; None: the loss is not clipped
    clip: float  # > 0; not read without old_values


class Outputs(NamedTuple):
    loss: Tensor  # [], in the dtype of values
    coefficient: Tensor  # dL/dV, like values
    stats: Tensor  # fp64, in the order of ValueStats.FIELDS


class Saved(NamedTuple):
    """What backward needs."""

    coefficient: Tensor


class Gradients(NamedTuple):
    grad_values: Tensor


def reference(x: Inputs) -> Outputs:
    """The specification: the formulas at the top of this page."""
    kept = x.weight != 0
    values, returns = where_kept(x.values, kept), where_kept(x.returns, kept)
    weight = where_kept(x.weight, kept)
    error = values - returns
    held_error = error
    if x.old_values is not None:
        old_values = where_kept(x.old_values, kept)
        held_error = torch.clamp(values, old_values - x.clip, old_values + x.clip) - returns
    clipped = held_error**2 > error**2
    loss = (weight * 0.5 * torch.where(clipped, held_error, error) ** 2).sum(dtype=torch.float64)
    # The explained variance compares the spread of R − V with that of R.
    returned, residual = moments_of(returns, kept), moments_of(-error, kept)
    fields = {
        "count": kept.sum(),
        "weight": weight.sum(dtype=torch.float64),
        "loss": loss,
        "clipped": clipped.sum(),
        "return_mean": returned.mean,
        "return_m2": returned.m2,
        "residual_mean": residual.mean,
        "residual_m2": residual.m2,
    }
    return Outputs(
        loss.to(values.dtype),
        weight * torch.where(clipped, 0.0, error),
        torch.stack([fields[name].double() for name in ValueStats.FIELDS]),
    )


def allocate(x: Inputs) -> Outputs:
    """Makes an empty loss, empty coefficients and empty statistics."""
    return Outputs(
        x.values.new_empty(()),
        empty_like(x.values),
        x.values.new_empty(len(ValueStats.FIELDS), dtype=torch.float64),
    )


def sizes(x: Inputs) -> ElementSizes:
    """Tells C++ the dtype and the number of tokens."""
    return element_sizes(x.values)


value_loss_op = Op(
    "value_loss",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    statistics=len(ValueStats.FIELDS),
)


def _forward(x: Inputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    outputs = value_loss_op(x)
    return (outputs.loss, outputs.stats), Saved(outputs.coefficient)


def _backward(saved: Saved, grad_loss: Tensor) -> Gradients:
    return Gradients(grad_loss * saved.coefficient)


_value_loss = Differentiable(
    "value_loss",
    inputs=Inputs,
    saved=Saved,
    differentiable=("values",),
    forward=_forward,
    backward=_backward,
    constants=1,
)


def value_loss(
    values: Tensor,
    returns: Tensor,
    weight: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
) -> tuple[Tensor, ValueStats]:
    """The squared error of the values, weighted and summed, and clipped where clip is given.

    L = Σ weight · ½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²). Where the clipped error is
    the larger one, the gradient is 0.

    Args:
        values: V, of any shape and float dtype; differentiable.
        returns: R, of the shape of values; a constant.
        weight: w, of the shape of values; a constant. Weight 0 masks a token: it is not read, gets
            no gradient and is not counted.
        old_values: V_old, the values of the rollout, of the shape of values; a constant. It goes
            together with clip.
        clip: c > 0, how far from V_old the clipped value may be, in units of the return. None: the
            loss is not clipped.

    Returns:
        (loss, stats): a scalar, fp32, or fp64 if an input is fp64; and `ValueStats`.

    Raises:
        TypeError: An argument is no tensor or number, or not of a floating dtype.
        ValueError: A shape or device differs from that of values, only one of old_values and clip
            is given, or clip is not finite and > 0.

    Example:
        >>> values, returns = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
        >>> loss, stats = fastpg.value_loss(values, returns, torch.tensor([0.5, 0.5]))
        >>> loss
        tensor(0.3125)

    Reference:
        Schulman et al. 2017, "Proximal policy optimization algorithms", arXiv:1707.06347. The
        clipping is that of OpenAI baselines (Engstrom et al. 2020, arXiv:2005.12729).
    """
    values, returns, weight, old_values = alike(
        "value_loss",
        ("old_values",),
        values=values,
        returns=returns,
        weight=weight,
        old_values=old_values,
    )
    if (old_values is None) != (clip is None):
        missing = "old_values" if old_values is None else "clip"
        raise ValueError(f"value_loss: clip and old_values go together, {missing} is None")
    if clip is not None:
        check_number("value_loss", "clip", clip)
        if not 0 < clip < math.inf:
            raise ValueError(f"value_loss: clip must be finite and > 0, got {clip}")
    bound = 0.0 if clip is None else float(clip)
    loss, stats = _value_loss(Inputs(values, returns, weight, old_values, bound))
    return loss, ValueStats(stats)
