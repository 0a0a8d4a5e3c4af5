"""Several labels of each row, and row statistics, from hidden states and the LM head.

`several_labels.py` and `row_statistics.py` have the formulas, and `linear_rows.py` how the logits
are made: tile by tile. Of a row whose tiles r have the shares w_r of its mass and n_r tokens,

    sum_p_squared = Σ_r w_r² sum_p_squared_r          mean_logit = Σ_r n_r mean_logit_r / V

and the label that leads its tile leads the row if its tile is the first with the highest logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._op import Op
from . import several_labels
from .head_arguments import HeadInputs
from .linear_rows import OP, Inputs, Saved, attach_blas, backward, inputs_of, logits_of, rows_of
from .row_softmax import TokenLogprobs
from .several_labels import Outputs


def of_logits(x: Inputs, logits: Tensor) -> several_labels.Inputs:
    """The same labels of rows whose logits are known."""
    return several_labels.Inputs(rows_of(x, logits, x.labels), with_statistics=True)


def reference(x: Inputs) -> Outputs:
    """The specification: several_labels of all the logits."""
    return several_labels.reference(of_logits(x, logits_of(x)))


def allocate(x: Inputs) -> Outputs:
    """Makes empty results."""
    return several_labels.allocate(of_logits(x, x.hidden[0]))


linear_several_labels_op = Op(
    "linear_token_logprobs_several",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
attach_blas(linear_several_labels_op, "forward")


def _forward(x: HeadInputs) -> tuple[tuple[Tensor, ...], Saved]:
    found = linear_several_labels_op(inputs_of(x, x.labels[:, None], x.ignore_index))
    results = (found.logp[:, 0], found.entropy, found.sum_p_squared, found.is_top1[:, 0])
    rows = inputs_of(x, x.labels, x.ignore_index)
    return (*results, found.mean_logit), Saved(rows, found.entropy, found.stats, None)


def _backward(
    x: Saved,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    *_statistics: None,
    wanted: list[bool],
) -> tuple[list[Tensor | None]]:
    return backward(x, grad_logp, grad_entropy, wanted=wanted)


_with_statistics = Differentiable(
    OP,
    inputs=HeadInputs,
    saved=Saved,
    differentiable=("hidden", "head_weight", "bias"),
    forward=_forward,
    backward=_backward,
    constants=(2, 3, 4),
    selective=True,
)


def with_statistics(x: HeadInputs, shape: torch.Size) -> TokenLogprobs:
    """Log-probs, entropies and all statistics, in the shape of the labels."""
    return TokenLogprobs._make(result.view(shape) for result in _with_statistics(x))
