"""Several labels of each row, and row statistics, from hidden states and the LM head.

`several_labels.py` and `row_statistics.py` have the formulas, and `linear_rows.py` how the logits
are made: tile by tile. Of a row whose tiles r have the shares w_r of its mass and n_r tokens,

    sum_p_squared = Σ_r w_r² sum_p_squared_r          mean_logit = Σ_r n_r mean_logit_r / V

and the label that leads its tile leads the row if its tile is the first with the highest logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._op import Op
from . import linear_rows, several_labels
from .head_arguments import HeadInputs, legal_labels
from .linear_rows import OP, Gradients, Inputs, attach_blas, inputs_of, logits_of, rows_of
from .several_labels import Outputs, per_label
from .shards import LocalLabels


class BackwardInputs(NamedTuple):
    inputs: Inputs  # but labels are [N, K]
    grad_logp: Tensor  # [N, K]
    grad_entropy: Tensor | None  # [N]; None: 0
    logp: Tensor  # [N, K]
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N]
    wanted: list[bool]  # whether to make the gradient of each hidden, each head_weight and bias


def of_logits(x: Inputs, logits: Tensor) -> several_labels.Inputs:
    """The inputs of several_labels: the labels of x, beside the logits of its rows."""
    return several_labels.Inputs(rows_of(x, logits, x.labels), with_statistics=True)


def checked_labels(x: Inputs) -> LocalLabels:
    """What is known of labels [N, K]; raises for a bad one, and for a bad temperature."""
    return legal_labels(
        OP, x.labels, len(x.head_weight[0]), per_label(x.temperature), x.ignore_index
    )


def reference(x: Inputs) -> Outputs:
    """The specification: several_labels of all the logits."""
    checked_labels(x)
    return several_labels.reference(of_logits(x, logits_of(x)))


def reference_backward(x: BackwardInputs) -> Gradients:
    """The specification: the products with the gradient of all the logits."""

    def gradient(logits: Tensor) -> Tensor:
        rows = of_logits(x.inputs, logits).rows
        upstream = x.grad_logp, x.grad_entropy, x.logp, x.entropy, x.stats
        return several_labels.reference_gradient(several_labels.BackwardInputs(rows, *upstream))

    kept = (x.inputs.labels != x.inputs.ignore_index).any(1)
    products = linear_rows.products_of_rows(x.inputs, kept, gradient)
    return linear_rows.rounded(products, x.inputs, x.wanted)


def allocate(x: Inputs) -> Outputs:
    """Makes empty results."""
    return several_labels.allocate(of_logits(x, x.hidden[0]))


def allocate_gradients(x: BackwardInputs) -> Gradients:
    """Makes empty gradients."""
    return linear_rows.allocate_wanted(x.inputs, x.wanted)


linear_several_labels_op = Op(
    "linear_token_logprobs_several",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
linear_several_labels_backward_op = Op(
    "linear_token_logprobs_several_backward",
    BackwardInputs,
    Gradients,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradients,
)
attach_blas(linear_several_labels_op, "forward")
attach_blas(linear_several_labels_backward_op, "backward")


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs  # but labels are [N, K]
    logp: Tensor
    entropy: Tensor
    stats: Tensor


def _forward(x: HeadInputs) -> tuple[tuple[Tensor, ...], Saved]:
    inputs = inputs_of(x, x.labels, x.ignore_index)
    logp, entropy, stats, *statistics = linear_several_labels_op(inputs)
    return (logp, entropy, *statistics), Saved(inputs, logp, entropy, stats)


def _backward(
    x: Saved,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    wanted: list[bool],
) -> tuple[list[Tensor | None]]:
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.logp)
    labels = x.inputs.labels
    if labels.shape[1] == 1:  # the op of one label has no other gradient, and costs less
        rows = x.inputs._replace(labels=labels[:, 0])
        saved = linear_rows.Saved(rows, x.entropy, x.stats, None)
        return linear_rows.backward(saved, grad_logp[:, 0], grad_entropy, wanted=wanted)
    (found,) = linear_several_labels_backward_op(
        BackwardInputs(x.inputs, grad_logp, grad_entropy, x.logp, x.entropy, x.stats, wanted)
    )
    return ([grad if want else None for grad, want in zip(found, wanted, strict=True)],)


_several_labels = Differentiable(
    OP,
    inputs=HeadInputs,
    saved=Saved,
    differentiable=("hidden", "head_weight", "bias"),
    forward=_forward,
    backward=_backward,
    constants=3,
    selective=True,
)


def logprobs(x: HeadInputs, labels: Tensor, *, several: bool) -> tuple[Tensor, ...]:
    """The fields of TokenLogprobs, for labels [..., K] if there are several, else [...]."""
    of_rows = labels.long().reshape(-1, labels.shape[-1] if several else 1)
    found = _several_labels(x._replace(labels=of_rows))
    shape = labels.shape[:-1] if several else labels.shape
    return tuple(y.view(labels.shape if y.dim() == 2 else shape) for y in found)
