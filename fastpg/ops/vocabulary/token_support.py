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
)

OP = page.OP


class Inputs(NamedTuple):
    """The fields of token_logprobs' Inputs with the rows in one axis, and the kept sets."""

    logits: Tensor  # [N, V]
    labels: Tensor  # int64 [N]
    temperature: Tensor  # [N] or [], in the compute dtype
    softcap: float  # 0: none
    ignore_index: int
    token_ids: Tensor  # int64 [E]
    offsets: Tensor  # int64 [N + 1]

    @property
    def support(self) -> Support:
        """The sets."""
        return Support(self.token_ids, self.offsets)

    @property
    def options(self) -> RowOptions:
        """What the softmax needs."""
        return RowOptions(self.labels, self.temperature, self.softcap)


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
    check_support_values(OP, x.support, x.logits.shape[1])
    logits = x.logits.to(x.temperature.dtype)
    if x.softcap:
        logits = x.softcap * torch.tanh(logits / x.softcap)
    logits = logits.masked_fill(~mask_of(x.support, logits.shape[1]), -torch.inf)
    return page.Inputs(logits, x.labels, x.temperature, 0.0, x.ignore_index, with_entropy=True)


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
    if inputs.softcap:
        grad = torch.where(grad == 0, 0.0, grad * (1 - (rows.logits / inputs.softcap) ** 2))
    return Gradient(grad.to(inputs.logits.dtype))


def whole_rows(x: Inputs, rows: Tensor) -> tuple[Tensor, page.Inputs]:
    """The places of those of some rows whose set is empty, and these over the whole vocabulary."""
    places = (rows & (lengths(x.offsets) == 0)).nonzero()[:, 0]
    t = x.temperature if x.temperature.dim() == 0 else x.temperature[places]
    inputs = page.Inputs(
        x.logits[places], x.labels[places], t, x.softcap, x.ignore_index, with_entropy=True
    )
    return places, inputs


def logits_of_entries(x: Inputs, entries: Entries) -> Tensor:
    """The logits of the entries, [E']."""
    return x.logits[entries.rows, entries.token_ids]


def forward(x: Inputs) -> Outputs:
    """The kernel: what is kept alone is read."""
    vocab = x.logits.shape[1]
    kept = x.labels != x.ignore_index
    legal = kept & (x.labels >= 0) & (x.labels < vocab)
    check_label_values(OP, x.labels, legal, kept, vocab, x.ignore_index, x.temperature)
    check_support_values(OP, x.support, vocab)
    entries = entries_of(x.support, kept)
    found = kept_softmax(logits_of_entries(x, entries), entries, x.options)
    logp, entropy = (
        torch.where(kept, torch.where(legal, value, torch.nan), 0.0).to(x.temperature.dtype)
        for value in (found.logp, found.entropy)
    )
    places, rows = whole_rows(x, kept)
    if len(places):
        logp[places], entropy[places], _ = page.token_logprobs_op(rows)
    return Outputs(logp, entropy)


def backward(x: BackwardInputs) -> Gradient:
    """The kernel: zeros, and the gradient of the entries."""
    inputs = x.inputs
    live = (inputs.labels != inputs.ignore_index) & reached(x.grad_logp, x.grad_entropy)
    entries = entries_of(inputs.support, live)
    found = kept_softmax(logits_of_entries(inputs, entries), entries, inputs.options)
    g = kept_gradient(found, entries, inputs.options, x.grad_logp, x.grad_entropy)
    grad = inputs.logits.new_zeros(inputs.logits.shape)
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
    like, shape = x.temperature, x.labels.shape
    return Outputs(like.new_empty(shape), like.new_empty(shape))


def allocate_gradient(x: BackwardInputs) -> Gradient:
    """Makes an empty gradient."""
    return Gradient(x.inputs.logits.new_empty(x.inputs.logits.shape))


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
for device in ("CPU", "CUDA"):
    token_support_op.attach(device, "PyTorch", forward)
    token_support_backward_op.attach(device, "PyTorch", backward)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs


def _forward(x: Inputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    logp, entropy = token_support_op(x)
    return (logp, entropy), Saved(x)


def _backward(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradient:
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.inputs.labels, dtype=x.inputs.temperature.dtype)
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
    logp, entropy = _token_support(
        Inputs(
            x.logits.reshape(-1, x.logits.shape[-1]),
            x.labels.reshape(-1),
            t.reshape(-1) if t.dim() else t,
            x.softcap,
            x.ignore_index,
            *sets,
        )
    )
    return logp.view(shape), entropy.view(shape)
