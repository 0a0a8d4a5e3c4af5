"""Log-probs and entropies over kept sets, from logits.

`support.py` has the formulas. The logits of the entries are gathered, and no others are read; the
gradient is 0 elsewhere. Rows of an empty set go through token_logprobs.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._op import Op
from ..common.checks import check_label_values
from . import token_logprobs as page
from .head import reached
from .sparse_products import lengths
from .support import (
    Entries,
    RowOptions,
    Support,
    check_support_values,
    checked_support,
    entries_of,
    kept_gradient,
    kept_softmax,
    mask_of,
    masked_logits,
)

OP = page.OP


class Inputs(NamedTuple):
    rows: page.Inputs  # in one axis: logits [N, V]; with an entropy
    support: Support

    @property
    def options(self) -> RowOptions:
        """What the softmax needs."""
        return RowOptions(self.rows.labels, self.rows.temperature, self.rows.softcap)


class Outputs(NamedTuple):
    logp: Tensor  # [N], in the compute dtype
    entropy: Tensor  # [N]


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_logp: Tensor  # [N]
    grad_entropy: Tensor | None  # [N]; None: 0


class Gradient(NamedTuple):
    grad_logits: Tensor  # [N, V], like logits


def masked_rows(x: Inputs) -> page.Inputs:
    """The rows after softcap, with -inf for what is not kept, as token_logprobs takes them."""
    rows = x.rows
    check_support_values(OP, x.support, rows.logits.shape[1])
    logits = rows.logits.to(rows.temperature.dtype)
    return rows._replace(logits=masked_logits(logits, rows.softcap, x.support), softcap=0.0)


def reference(x: Inputs) -> Outputs:
    """The specification: token_logprobs of logits with -inf for what is not kept."""
    logp, entropy, _ = page.reference(masked_rows(x))
    return Outputs(logp, entropy)


def reference_backward(x: BackwardInputs) -> Gradient:
    """The specification: its gradient; a label outside its set has none."""
    inputs, rows = x.inputs, masked_rows(x.inputs)
    label = torch.where(rows.labels == rows.ignore_index, 0, rows.labels)[:, None]
    inside = mask_of(inputs.support, rows.logits.shape[1]).gather(1, label)[:, 0]
    _, entropy, stats = page.reference(rows)
    grad_logp = torch.where(inside, x.grad_logp, 0.0)
    upstream = page.BackwardInputs(rows, grad_logp, x.grad_entropy, entropy, stats)
    grad = page.reference_backward(upstream).grad_logits
    if inputs.rows.softcap:
        grad = torch.where(grad == 0, 0.0, grad * (1 - (rows.logits / inputs.rows.softcap) ** 2))
    return Gradient(grad.to(inputs.rows.logits.dtype))


def whole_rows(x: Inputs, some: Tensor) -> tuple[Tensor, page.Inputs]:
    """The places of those of some rows whose set is empty, and these over the whole vocabulary."""
    places, t = (some & (lengths(x.support.offsets) == 0)).nonzero()[:, 0], x.rows.temperature
    rows = x.rows._replace(
        logits=x.rows.logits[places],
        labels=x.rows.labels[places],
        temperature=t[places] if t.dim() else t,
    )
    return places, rows


def logits_of_entries(x: Inputs, entries: Entries) -> Tensor:
    """The logits of the entries, [E']."""
    return x.rows.logits[entries.rows, entries.token_ids]


def forward(x: Inputs) -> Outputs:
    """The kernel: what is kept alone is read."""
    labels, t, vocab = x.rows.labels, x.rows.temperature, x.rows.logits.shape[1]
    kept = labels != x.rows.ignore_index
    legal = kept & (labels >= 0) & (labels < vocab)
    check_label_values(OP, labels, legal, kept, vocab, x.rows.ignore_index, t)
    check_support_values(OP, x.support, vocab)
    entries = entries_of(x.support, kept)
    found = kept_softmax(logits_of_entries(x, entries), entries, x.options)
    logp, entropy = (
        torch.where(kept, torch.where(legal, value, torch.nan), 0.0).to(t.dtype)
        for value in (found.logp, found.entropy)
    )
    places, rows = whole_rows(x, kept)
    if len(places):
        logp[places], entropy[places], _ = page.token_logprobs_op(rows)
    return Outputs(logp, entropy)


def backward(x: BackwardInputs) -> Gradient:
    """The kernel: zeros, and the gradient of the entries."""
    inputs = x.inputs
    live = (inputs.rows.labels != inputs.rows.ignore_index) & reached(x.grad_logp, x.grad_entropy)
    entries = entries_of(inputs.support, live)
    found = kept_softmax(logits_of_entries(inputs, entries), entries, inputs.options)
    g = kept_gradient(found, entries, inputs.options, x.grad_logp, x.grad_entropy)
    grad = inputs.rows.logits.new_zeros(inputs.rows.logits.shape)
    grad[entries.rows, entries.token_ids] = g.to(grad.dtype)
    places, rows = whole_rows(inputs, live)
    if len(places):
        _, entropy, stats = page.token_logprobs_op(rows)
        grad_entropy = None if x.grad_entropy is None else x.grad_entropy[places]
        upstream = page.BackwardInputs(rows, x.grad_logp[places], grad_entropy, entropy, stats)
        (grad[places],) = page.token_logprobs_backward_op(upstream)
    return Gradient(grad)


def allocate(x: Inputs) -> Outputs:
    """Makes empty log-probs and entropies."""
    like, shape = x.rows.temperature, x.rows.labels.shape
    return Outputs(like.new_empty(shape), like.new_empty(shape))


def allocate_gradient(x: BackwardInputs) -> Gradient:
    """Makes an empty gradient."""
    return Gradient(x.inputs.rows.logits.new_empty(x.inputs.rows.logits.shape))


token_support_op = Op(
    "token_logprobs_support",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
token_support_backward_op = Op(
    "token_logprobs_support_backward",
    BackwardInputs,
    Gradient,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradient,
)
token_support_op.attach_everywhere("PyTorch", forward)
token_support_backward_op.attach_everywhere("PyTorch", backward)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs


def _forward(x: Inputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    logp, entropy = token_support_op(x)
    return (logp, entropy), Saved(x)


def _backward(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradient:
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.inputs.rows.labels, dtype=x.inputs.rows.temperature.dtype)
    return token_support_backward_op(BackwardInputs(x.inputs, grad_logp, grad_entropy))


_token_support = Differentiable(
    OP,
    inputs=Inputs,
    saved=Saved,
    differentiable=("logits",),
    forward=_forward,
    backward=_backward,
)


def logprobs(
    x: page.Inputs, support: object, group: object, *, inplace: bool
) -> tuple[Tensor, Tensor]:
    """The log-prob and the entropy of each row over its kept set, in the shape of the labels."""
    if inplace:
        raise ValueError(f"{OP}: inplace_backward must be False with support, got True")
    shape, t = x.labels.shape, x.temperature
    sets = checked_support(OP, support, x.labels, group)
    rows = x._replace(
        logits=x.logits.reshape(-1, x.logits.shape[-1]),
        labels=x.labels.reshape(-1),
        temperature=t.reshape(-1) if t.dim() else t,
        with_entropy=True,
    )
    logp, entropy = _token_support(Inputs(rows, sets))
    return logp.view(shape), entropy.view(shape)
