"""Log-probs from a head that is frozen, with the gradient of hidden made in the same pass.

    ∂logp/∂hidden_i = Σ_j t_j (1[j = y] − p_j) weight_i[j]
                    = (1 − p_y) t_y weight_i[y] − Σ_{j ≠ y} p_j t_j weight_i[j],   t = ∂z/∂x

It does not depend on what is made of the log-probs, so that forward can take the sum while it has
the logits of a slice: with the maximum m of the z so far in place of their normaliser,

    sum ← e^{m − m'} sum + Σ_{j in slice, j ≠ y} e^{z_j − m'} t_j weight_i[j],   m' the new one

Backward multiplies each row by its incoming gradient. That is 4 N V H operations where two passes
take 6, and the memory of the sum is that of the gradient. The entropy's gradient has a sum of its
own, which would bring it to 6 again: a call that returns the entropy takes two passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable, needs_no_gradient
from ..._op import Op
from . import linear_rows
from .head_arguments import HeadInputs
from .linear_rows import OP, BackwardInputs, attach_blas


class Inputs(NamedTuple):
    rows: linear_rows.Inputs
    wanted: list[bool]  # whether to make the gradient of each hidden


class Outputs(NamedTuple):
    logp: Tensor  # [N], in the compute dtype
    logp_gradients: list[Tensor]  # ∂logp/∂hidden_i [N, H_i], in it too; empty if not wanted


def reference(x: Inputs) -> Outputs:
    """The specification: the gradient that two passes would give to log-probs that are summed."""
    logp, entropy, stats = linear_rows.reference(x.rows)
    ones = torch.ones_like(logp)
    found = linear_rows.reference_products(BackwardInputs(x.rows, ones, None, entropy, stats, []))
    gradients = found[: len(x.rows.hidden)]
    return Outputs(
        logp,
        [
            grad if want else grad.new_empty(0)
            for grad, want in zip(gradients, x.wanted, strict=True)
        ],
    )


def allocate(x: Inputs) -> Outputs:
    """Makes empty log-probs and gradients."""
    like = x.rows.temperature
    return Outputs(
        like.new_empty(x.rows.labels.shape),
        [
            like.new_empty(hidden.shape if want else 0)
            for hidden, want in zip(x.rows.hidden, x.wanted, strict=True)
        ],
    )


frozen_head_op = Op(
    "linear_token_logprobs_frozen",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
attach_blas(frozen_head_op, "forward")


class Saved(NamedTuple):
    """What backward multiplies, and what tells which rows are ignored."""

    logp_gradients: list[Tensor]
    labels: Tensor
    ignore_index: int
    wanted: list[bool]
    dtype: torch.dtype  # that of hidden


def _forward(x: Inputs) -> tuple[tuple[Tensor], Saved]:
    logp, logp_gradients = frozen_head_op(x)
    dtype = x.rows.hidden[0].dtype
    return (logp,), Saved(logp_gradients, x.rows.labels, x.rows.ignore_index, x.wanted, dtype)


def _backward(x: Saved, grad_logp: Tensor) -> tuple[list[Tensor | None]]:
    live = (x.labels != x.ignore_index) & (grad_logp != 0)
    return (
        [
            times_rows(grad, grad_logp, live, x.dtype) if want else None
            for grad, want in zip(x.logp_gradients, x.wanted, strict=True)
        ],
    )


def times_rows(gradient: Tensor, factor: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [N, H] times factor [N] in dtype; 0 in rows that are not live, whatever is in them.

    It is made in place if no second backward can ask for the gradient again.
    """
    if torch.compiler.is_compiling():
        return torch.where(live[:, None], gradient * factor[:, None], 0.0).to(dtype)
    out = gradient
    if torch._C._autograd._get_current_graph_task_keep_graph() or gradient.dtype is not dtype:
        out = gradient.new_empty(gradient.shape, dtype=dtype)
    torch.mul(gradient, factor[:, None], out=out)
    return out.masked_fill_(~live[:, None], 0.0)


_logprobs = Differentiable(
    OP,
    inputs=Inputs,
    saved=Saved,
    differentiable=("hidden",),
    forward=_forward,
    backward=_backward,
)


def serves(x: HeadInputs) -> bool:
    """Whether hidden alone wants a gradient.

    In fp16 two passes serve: they have the factor of a GradScaler before they round.
    """
    if not torch.is_grad_enabled() or x.group is not None or x.hidden[0].dtype is torch.float16:
        return False
    frozen = needs_no_gradient(*x.head_weight, x.bias)
    return frozen and any(hidden.requires_grad for hidden in x.hidden)


def logprobs(x: HeadInputs) -> Tensor:
    """The log-probs [N], where this page serves."""
    rows = linear_rows.inputs_of(x, x.labels, x.ignore_index)
    (logp,) = _logprobs(Inputs(rows, [hidden.requires_grad for hidden in x.hidden]))
    return logp
