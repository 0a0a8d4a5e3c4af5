"""K labels of each row of logits: their log-probs, and the row's entropy and statistics.

    logp_k = z_{y_k} − logsumexp(z)        ∂/∂z_j Σ_k g_k logp_k = Σ_{k: y_k = j} g_k − p_j Σ_k g_k

At most one label can have a probability near 1. The one with the highest logit of the K, the lead,
is kept out of the sum, as row_softmax.py does with the only one; the gradient at a label is

    (1 − p_j) Σ_k g_k − Σ_{k: y_k ≠ j} g_k

which keeps its digits as p_j → 1. So the kernels are those of one label: forward takes the lead,
backward a label that is nowhere and the sum of g, and what the labels differ by is [..., K].
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._op import Op
from . import row_statistics
from . import token_logprobs as page
from .row_softmax import (
    OP,
    BackwardOutInputs,
    Gradient,
    NoOutputs,
    reference_backward,
)
from .row_softmax import BackwardInputs as RowBackwardInputs
from .row_softmax import Inputs as RowInputs
from .shards import NEVER, Statistics, label_logprob


class Inputs(NamedTuple):
    rows: RowInputs  # but labels are [..., K]; ignore_index: a log-prob of 0
    with_statistics: bool


class Outputs(NamedTuple):
    """In the compute dtype, but is_top1; what is not wanted has no elements.

    Of a row whose labels are all ignored everything is 0, and it is not read.
    """

    logp: Tensor  # [..., K]
    entropy: Tensor  # [...]
    stats: Tensor  # [2, ...], those of token_logprobs
    sum_p_squared: Tensor  # [...]
    is_top1: Tensor  # bool [..., K]
    mean_logit: Tensor  # [...]


class BackwardInputs(NamedTuple):
    inputs: RowInputs  # but labels are [..., K]
    grad_logp: Tensor  # [..., K]
    grad_entropy: Tensor | None  # [...]; None: 0
    logp: Tensor  # [..., K]
    entropy: Tensor | None  # [...]; None if there is no grad_entropy
    stats: Tensor  # [2, ...]


class GradientInputs(NamedTuple):
    backward: BackwardInputs
    out: Tensor  # for the gradient: like logits, contiguous. It may be the logits themselves.


def per_label(temperature: Tensor) -> Tensor:
    """The temperature of each row [...], or of all [], beside labels [..., K]."""
    return temperature[..., None] if temperature.dim() else temperature


def leading(score: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """The place [..., 1] of the kept label with the highest score [..., K], 0 if none is kept.

    Of equal ones it is the lowest label, which is the first in the row.
    """
    best = score.masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    highest = kept & ~(score < best)  # every kept one, if one is NaN
    return labels.masked_fill(~highest, torch.iinfo(labels.dtype).max).argmin(-1, keepdim=True)


def reference(x: Inputs) -> Outputs:
    """The specification: a call with each label alone."""
    rows, labels = x.rows._replace(with_entropy=True), x.rows.labels
    each = [row_statistics.reference(rows._replace(labels=label)) for label in labels.unbind(-1)]
    stacked = row_statistics.Outputs(*(torch.stack(field, -1) for field in zip(*each, strict=True)))
    # The label whose log sum keeps its digits; any that is kept gives the other results.
    lead = leading(stacked.logp, labels, labels != rows.ignore_index)

    def of_lead(field: Tensor) -> Tensor:
        return field.gather(-1, lead.expand(*field.shape[:-1], 1))[..., 0]

    logp, entropy, stats, sum_p_squared, _, mean_logit = map(of_lead, stacked)
    if not x.rows.with_entropy:
        entropy = logp.new_empty(0)
    statistics = sum_p_squared, stacked.is_top1, mean_logit
    if not x.with_statistics:
        statistics = no_statistics(logp)
    return Outputs(stacked.logp, entropy, stats, *statistics)


def no_statistics(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands for statistics that are not wanted."""
    return like.new_empty(0), like.new_empty(0, dtype=torch.bool), like.new_empty(0)


def reference_gradient(x: BackwardInputs) -> Tensor:
    """The specification: the gradients of such calls, added up in the compute dtype."""
    rows, labels = x.inputs, x.inputs.labels
    rows = rows._replace(logits=rows.logits.to(rows.temperature.dtype))

    def gradient(label: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
        of_label = rows._replace(labels=label)
        upstream = RowBackwardInputs(of_label, grad_logp, grad_entropy, x.entropy, x.stats)
        return reference_backward(upstream).grad_logits

    kept = labels != rows.ignore_index
    any_kept = labels.gather(-1, leading(x.logp, labels, kept))[..., 0]
    total = gradient(any_kept, torch.zeros_like(x.stats[0]), x.grad_entropy)
    for label, grad_logp in zip(labels.unbind(-1), x.grad_logp.unbind(-1), strict=True):
        total = total + gradient(label, grad_logp, None)
    return total


def reference_backward_out(x: GradientInputs) -> NoOutputs:
    """Writes the gradient to `out`."""
    x.out.copy_(reference_gradient(x.backward))
    return NoOutputs()


def forward(x: Inputs) -> Outputs:
    """The kernel: that of one label reads each row, with the lead for its label."""
    rows, labels = x.rows, x.rows.labels
    kept = labels != rows.ignore_index
    legal = kept & (labels >= 0) & (labels < rows.logits.shape[-1])
    found = rows.logits.gather(-1, torch.where(legal, labels, 0)).to(rows.temperature.dtype)
    # The kernel looks at no other label: if one is bad, it gets that, and raises or spoils the row.
    bad = kept & ~legal
    first_bad = bad.int().argmax(-1, keepdim=True)
    place = torch.where(bad.any(-1, keepdim=True), first_bad, leading(found, labels, legal))
    lead = labels.gather(-1, place)
    op = row_statistics.row_statistics_op if x.with_statistics else page.token_logprobs_op
    part = op(rows._replace(labels=lead[..., 0]))

    if rows.softcap:
        found = rows.softcap * torch.tanh(found / rows.softcap)
    top, log_sum = part.stats[..., None]
    logp = label_logprob(Statistics(found, top, log_sum, None), per_label(rows.temperature))
    is_lead = labels == lead
    logp = torch.where(kept, torch.where(is_lead, part.logp[..., None], logp), 0.0)
    statistics = no_statistics(logp)
    if x.with_statistics:
        is_top1 = kept & is_lead & part.is_top1[..., None]
        statistics = part.sum_p_squared, is_top1, part.mean_logit
    return Outputs(logp, part.entropy, part.stats, *statistics)


def sums_of_equals(labels: Tensor, g: Tensor) -> Tensor:
    """For each label of a row [..., K], the sum of g over all the labels that are equal to it."""
    labels, order = labels.contiguous().sort(-1)
    sums, step = g.gather(-1, order), 1
    while step < labels.shape[-1]:  # each sum grows to twice as many neighbours, if they are equal
        equal = labels[..., step:] == labels[..., :-step]
        if equal.is_cpu and not equal.any():  # a GPU would be waited for
            break
        before = torch.where(equal, sums[..., :-step], 0.0)
        sums = torch.cat([sums[..., :step], sums[..., step:] + before], -1)
        step *= 2
    last = torch.searchsorted(labels, labels, right=True) - 1
    return torch.empty_like(g).scatter_(-1, order, sums.gather(-1, last))


def label_gradients(
    labels: Tensor, g: Tensor, logp: Tensor, grad_entropy: Tensor | None, entropy: Tensor | None
) -> Tensor:
    """The gradient of z at each label [..., K], in fp64; a label that is ignored has g = 0."""
    g, log_p = g.double(), logp.double()
    total = g.sum(-1, keepdim=True)
    gradient = -log_p.expm1() * total - (total - sums_of_equals(labels, g))
    if grad_entropy is not None and entropy is not None:
        finite = torch.where(log_p == -math.inf, 0.0, log_p)
        weight = grad_entropy.double()[..., None] * log_p.exp()
        gradient = gradient - weight * (finite + entropy.double()[..., None])
    return gradient


def times_slope(
    gradient: Tensor, logits: Tensor, column: Tensor, temperature: Tensor, softcap: float
) -> Tensor:
    """The gradient of logits at columns [..., K], in fp64, from that of z there."""
    gradient, logits = gradient / per_label(temperature), logits.gather(-1, column).double()
    if not softcap:
        return gradient.masked_fill(logits == -math.inf, 0.0)
    return gradient * (1 - torch.tanh(logits / softcap) ** 2)


def write_at(out: Tensor, here: Tensor, column: Tensor, value: Tensor) -> None:
    """Writes values [..., K] to columns of out [..., V], where they are `here`; others are 0.

    Equal columns have equal values, so that the order does not matter. A column that is not here
    becomes one that is; a row without any keeps what it holds at 0.
    """
    first = here.int().argmax(-1, keepdim=True)
    column = torch.where(here, column, column.gather(-1, first))
    value = torch.where(here, value, value.gather(-1, first)).to(out.dtype)
    value = torch.where(here.any(-1, keepdim=True), value, out[..., :1])
    # A CPU's scatter_ takes a hundred times as long in bf16.
    flat, count = out.view(-1, out.shape[-1]), column.shape[-1]
    row = torch.arange(len(flat), device=out.device)[:, None]
    flat.index_put_((row, column.reshape(-1, count)), value.reshape(-1, count))


def backward_out(x: GradientInputs) -> NoOutputs:
    """The kernel: that of one label writes each row, with a label that is nowhere."""
    grad, rows, labels = x.backward, x.backward.inputs, x.backward.inputs.labels
    kept = labels != rows.ignore_index
    legal = kept & (labels >= 0) & (labels < rows.logits.shape[-1])
    column = torch.where(legal, labels, 0)
    g = torch.where(kept, grad.grad_logp, 0.0)
    at_labels = label_gradients(labels, g, grad.logp, grad.grad_entropy, grad.entropy)
    # The logits are read before `out`, which may be the same memory, is written.
    at_labels = times_slope(at_labels, rows.logits, column, rows.temperature, rows.softcap)
    nowhere = torch.where(kept.any(-1), -1, NEVER)
    upstream = RowBackwardInputs(
        rows._replace(labels=nowhere, ignore_index=NEVER),
        g.sum(-1, dtype=torch.float64).to(g.dtype),
        grad.grad_entropy,
        grad.entropy,
        grad.stats,
    )
    page.token_logprobs_backward_out_op(BackwardOutInputs(upstream, x.out))
    write_at(x.out, legal, column, at_labels)
    return NoOutputs()


def allocate(x: Inputs) -> Outputs:
    """Makes empty results."""
    labels, like = x.rows.labels, x.rows.temperature
    shape = labels.shape[:-1]

    def empty(wanted: bool, shape: torch.Size, dtype: torch.dtype = like.dtype) -> Tensor:
        return like.new_empty(shape if wanted else (0,), dtype=dtype)

    return Outputs(
        empty(True, labels.shape),
        empty(x.rows.with_entropy, shape),
        like.new_empty(2, *shape),
        empty(x.with_statistics, shape),
        empty(x.with_statistics, labels.shape, torch.bool),
        empty(x.with_statistics, shape),
    )


def allocate_nothing(x: GradientInputs) -> NoOutputs:
    """Makes nothing: `out` is there."""
    return NoOutputs()


several_labels_op = Op(
    "token_logprobs_several",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
several_labels_backward_op = Op(
    "token_logprobs_several_backward_out",
    GradientInputs,
    NoOutputs,
    page=__name__,
    reference=reference_backward_out,
    allocate=allocate_nothing,
    mutates="out",
)
several_labels_op.attach_everywhere("PyTorch", forward)
several_labels_backward_op.attach_everywhere("PyTorch", backward_out)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: RowInputs
    logp: Tensor
    entropy: Tensor
    stats: Tensor


def _forward(x: Inputs) -> tuple[tuple[Tensor, ...], Saved]:
    logp, entropy, stats, *statistics = several_labels_op(x)
    return (logp, entropy, *statistics), Saved(x.rows, logp, entropy, stats)


def _write_gradient(
    out: Tensor, x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> Gradient:
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.logp)
    if not x.inputs.with_entropy:
        grad_entropy = None  # a compiled graph gives one to the entropy without elements
    entropy = None if grad_entropy is None else x.entropy
    upstream = BackwardInputs(x.inputs, grad_logp, grad_entropy, x.logp, entropy, x.stats)
    several_labels_backward_op(GradientInputs(upstream, out))
    return Gradient(out)


def _backward(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradient:
    logits = x.inputs.logits
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return _write_gradient(out, x, grad_logp, grad_entropy)


def _backward_inplace(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradient:
    return _write_gradient(x.inputs.logits.detach(), x, grad_logp, grad_entropy)


_differentiable = partial(
    Differentiable,
    OP,
    inputs=Inputs,
    saved=Saved,
    differentiable=("logits",),
    forward=_forward,
    constants=3,
)
_several_labels = _differentiable(backward=_backward)
_several_labels_inplace = _differentiable(backward=_backward_inplace)


def logprobs(
    rows: RowInputs, labels: Tensor, *, with_statistics: bool, inplace: bool
) -> tuple[Tensor, ...]:
    """The fields of TokenLogprobs, for labels [..., K] or for one label a row, labels [...]."""
    if labels.dim() < rows.logits.dim():
        return row_statistics.logprobs(rows, inplace=inplace)
    x = Inputs(rows._replace(labels=labels.long()), with_statistics)
    return _several_labels_inplace(x) if inplace else _several_labels(x)
