"""Statistics of rows of logits besides their log-probs and entropies, from the same pass.

    sum_p_squared = Σ_j p_j²        mean_logit = Σ_j z_j / V
    is_top1       : x_y is the highest logit of its row, of equal ones the first

They have no gradient. z are the logits after softcap and temperature, so that a -inf logit, such as
those that pad a vocabulary, makes mean_logit -inf. Where the row is all -inf no label is top1 and
sum_p_squared is 0; where it is NaN, is_top1 is False and the others are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from . import token_logprobs as page
from .logit_rows import RowsOp
from .row_softmax import OP, Gradient, Inputs, TokenLogprobs
from .token_logprobs import Saved


class Outputs(NamedTuple):
    """The results of token_logprobs, and the statistics; all but is_top1 in the compute dtype."""

    logp: Tensor  # [...]
    entropy: Tensor  # [...]; without elements, if it is not wanted
    stats: Tensor  # [2, ...]
    sum_p_squared: Tensor  # [...]
    is_top1: Tensor  # bool [...]
    mean_logit: Tensor  # [...]


def reference(x: Inputs) -> Outputs:
    """The specification: the formulas at the top of this page, in fp64."""
    logp, entropy, stats = page.reference(x)
    kept, log_sum = x.labels != x.ignore_index, stats[1]
    t = x.temperature.double()[..., None]
    logits = torch.where(kept[..., None], x.logits, 0.0)
    z = logits.double()
    if x.softcap:
        z = x.softcap * torch.tanh(z / x.softcap)
    z = z / t
    is_nan = log_sum.isnan()
    sum_p_squared = torch.where(z.amax(-1) == -math.inf, 0.0, z.softmax(-1).square().sum(-1))
    label_is_possible = kept & (logp != -math.inf) & ~is_nan
    return Outputs(
        logp,
        entropy,
        stats,
        torch.where(kept, torch.where(is_nan, math.nan, sum_p_squared), 0.0).to(logp.dtype),
        label_is_possible & (logits.argmax(-1) == x.labels),
        torch.where(kept, torch.where(is_nan, math.nan, z.mean(-1)), 0.0).to(logp.dtype),
    )


def allocate(x: Inputs) -> Outputs:
    """Makes empty results."""
    logp, entropy, stats = page.allocate(x)
    is_top1 = torch.empty_like(logp, dtype=torch.bool)
    return Outputs(logp, entropy, stats, torch.empty_like(logp), is_top1, torch.empty_like(logp))


row_statistics_op = RowsOp(
    "token_logprobs_statistics",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=page.sizes,
)


def check_whole_rows(op: str, names: Collection[str], support: object, group: object) -> None:
    """Refuses what gives a row less than its whole vocabulary."""
    if support is not None or group is not None:
        other = "support" if support is not None else "process_group"
        what = "row_statistics" if names else "several labels a row"
        raise ValueError(f"{op}: {what} need the whole vocabulary, {other} must be None")


def _forward(x: Inputs) -> tuple[tuple[Tensor, ...], Saved]:
    logp, entropy, stats, sum_p_squared, is_top1, mean_logit = row_statistics_op(x)
    return (logp, entropy, sum_p_squared, is_top1, mean_logit), Saved(x, entropy, stats)


def _backward(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradient:
    return page.backward(x, grad_logp, grad_entropy)


def _backward_inplace(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradient:
    return page.backward_inplace(x, grad_logp, grad_entropy)


_differentiable = partial(
    Differentiable,
    OP,
    inputs=Inputs,
    saved=Saved,
    differentiable=("logits",),
    forward=_forward,
    constants=3,
)
_with_statistics = _differentiable(backward=_backward)
_with_statistics_inplace = _differentiable(backward=_backward_inplace)


def as_asked(
    results: tuple[Tensor, ...], names: Collection[str], *, return_entropy: bool
) -> Tensor | tuple[Tensor, Tensor] | TokenLogprobs:
    """What a public function returns, of the results in the order of TokenLogprobs."""
    logp, entropy, *_ = results
    if not names:
        return (logp, entropy) if return_entropy else logp
    asked = {"logp", *names} | ({"entropy"} if return_entropy else set())
    named = zip(TokenLogprobs._fields, results, strict=True)
    return TokenLogprobs(**{name: value for name, value in named if name in asked})


def logprobs(x: Inputs, *, inplace: bool) -> tuple[Tensor, ...]:
    """Log-probs, entropies and all statistics, in the order of TokenLogprobs."""
    rows = x._replace(with_entropy=True)
    return _with_statistics_inplace(rows) if inplace else _with_statistics(rows)
