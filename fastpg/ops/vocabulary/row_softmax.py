"""The softmax of rows of logits: formulas, records, and the specification in plain PyTorch.

    z    = softcap(x) / temperature,   softcap(x) = softcap · tanh(x / softcap)
    logp = z_y − logsumexp(z) = (z_y − max z) − log Σ_j exp(z_j − max z)
    H    = −Σ_j p_j log p_j = log Σ_j e^{d_j} − Σ_j e^{d_j} d_j / Σ_j e^{d_j},   d = z − max z

Where the label has the maximum, logp is −log1p(Σ_{j≠y} e^{d_j}): in a sum with its 1 the others
would be rounded away as p_y → 1, and 1 − p_y with them.

    ∂logp/∂z_j = 1[j = y] − p_j          ∂H/∂z_j = −p_j (log p_j + H)

`token_logprobs.py` has the ops that run it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..common.checks import check_choice, check_label_values
from .shards import finite_max

OP = "token_logprobs"


class Inputs(NamedTuple):
    """Rows of logits, and the label and the temperature of each."""

    logits: Tensor  # [..., V], any strides
    labels: Tensor  # int64 [...]; ignore_index: the row is not read
    temperature: Tensor  # [...] or [], in the compute dtype: fp32, or fp64 for fp64 logits
    softcap: float  # 0: none
    ignore_index: int
    with_entropy: bool


class Outputs(NamedTuple):
    logp: Tensor  # [...], in the compute dtype
    entropy: Tensor  # [...]; without elements, if it is not wanted
    stats: Tensor  # [2, ...]: max c, with c the logits after softcap, and log Σ e^d of each row


RowStatistic = Literal["sum_p_squared", "is_top1", "mean_logit"]


def checked_statistics(op: str, names: Collection[str]) -> Collection[str]:
    """The names of the statistics that are asked for."""
    # A tensor is a collection too, and has a truth value of its own.
    if isinstance(names, (str, Tensor)) or not isinstance(names, Collection):
        raise TypeError(f"{op}: row_statistics must be a sequence of names, got {names!r}")
    for name in names:
        check_choice(op, "row_statistics", name, get_args(RowStatistic))
    return names


class TokenLogprobs(NamedTuple):
    """What the public functions return with row_statistics; what was not asked for is None."""

    logp: Tensor  # [...], as all the others
    entropy: Tensor | None = None
    sum_p_squared: Tensor | None = None
    is_top1: Tensor | None = None  # bool
    mean_logit: Tensor | None = None


class BackwardInputs(NamedTuple):
    inputs: Inputs  # logits may be a slice of the rows: a label outside of it is nowhere
    grad_logp: Tensor  # [...]
    grad_entropy: Tensor | None  # [...]; None: 0
    entropy: Tensor | None  # [...], of the whole row; None if there is no grad_entropy
    stats: Tensor  # [2, ...], of the whole row


class Gradient(NamedTuple):
    grad_logits: Tensor  # like logits, contiguous


class BackwardOutInputs(NamedTuple):
    backward: BackwardInputs
    out: Tensor  # for the gradient: like logits, contiguous. It may be the logits themselves.


class NoOutputs(NamedTuple):
    """An op that only writes to one of its inputs has no outputs."""


class ScaledRows(NamedTuple):
    """The rows of the reference; one that is ignored counts as zeros."""

    kept: Tensor  # [...]: it is not ignored
    capped: Tensor  # [..., V]: c, the logits after softcap
    top: Tensor  # [...]: the maximum of c
    d: Tensor  # [..., V]: z - max z


def scaled(x: Inputs, top: Tensor | None = None) -> ScaledRows:
    """Brings rows to d = z - max z, where `top`, if it is given, is their maximum."""
    kept = x.labels != x.ignore_index
    capped = torch.where(kept[..., None], x.logits.to(x.temperature.dtype), 0.0)
    if x.softcap:
        capped = x.softcap * torch.tanh(capped / x.softcap)
    if top is None:
        top = capped.amax(-1)
    d = (capped - finite_max(top)[..., None]) / x.temperature[..., None]
    return ScaledRows(kept, capped, top, d)


def reference(x: Inputs) -> Outputs:
    """The specification: the formulas at the top of this page, in fp64."""
    vocab, dtype = x.logits.shape[-1], x.temperature.dtype
    kept, _, top, d = scaled(x._replace(temperature=x.temperature.double()))
    legal = kept & (x.labels >= 0) & (x.labels < vocab)
    check_label_values(OP, x.labels, legal, kept, vocab, x.ignore_index, x.temperature)
    label = torch.where(legal, x.labels, 0)[..., None]
    d_label, e = d.gather(-1, label)[..., 0], d.exp()
    others, total = e.scatter(-1, label, 0.0).sum(-1), e.sum(-1)
    log_sum = torch.where(d_label == 0, others.log1p(), total.log())
    log_sum = torch.where(total == 0, 0.0, log_sum)
    log_sum = torch.where(legal, log_sum, math.nan)  # spoils what a device cannot raise about
    logp = torch.where(kept, d_label - log_sum, 0.0).to(dtype)
    stats = torch.where(kept, torch.stack([top, log_sum]), 0.0).to(dtype)
    if not x.with_entropy:
        return Outputs(logp, logp.new_empty(0), stats)
    weighted = (e * torch.where(e == 0, 0.0, d)).sum(-1)
    entropy = torch.where(total == 0, 0.0, log_sum - weighted / total).clamp(min=0.0)
    return Outputs(logp, torch.where(kept, entropy, 0.0).to(dtype), stats)


def reference_backward(x: BackwardInputs) -> Gradient:
    """The second pair of formulas at the top of this page."""
    inputs = x.inputs
    labels, softcap = inputs.labels, inputs.softcap
    top, log_sum = x.stats
    kept, capped, _, d = scaled(inputs, top)
    logp = d - log_sum[..., None]
    p = logp.exp()
    g = torch.where(kept, x.grad_logp, 0.0)[..., None]
    is_label = torch.arange(capped.shape[-1], device=labels.device) == labels[..., None]
    # 1 - p_y as -expm1(logp_y) keeps its digits as p_y -> 1.
    grad = g * torch.where(is_label, -torch.expm1(logp), -p)
    if x.grad_entropy is not None and x.entropy is not None:
        g = torch.where(kept, x.grad_entropy, 0.0)[..., None]
        grad = grad - g * p * (torch.where(p == 0, 0.0, logp) + x.entropy[..., None])
    grad = torch.where(capped == -math.inf, 0.0, grad)
    if softcap:
        grad = grad * (1 - (capped / softcap) ** 2)
    grad = torch.where(kept[..., None], grad / inputs.temperature[..., None], 0.0)
    return Gradient(grad.to(inputs.logits.dtype).contiguous())


def reference_backward_out(x: BackwardOutInputs) -> NoOutputs:
    """Writes the gradient to `out`."""
    x.out.copy_(reference_backward(x.backward).grad_logits)
    return NoOutputs()
