"""K labels of each row of logits: their log-probs, and the row's entropy and statistics.

    logp_k = z_{y_k} − logsumexp(z)        ∂/∂z_j Σ_k g_k logp_k = Σ_{k: y_k = j} g_k − p_j Σ_k g_k

A log-prob is that of the same label alone. At most one label can have a probability near 1: the
one with the highest logit of the K is kept out of the sum, as row_softmax.py does with the one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import row_statistics
from .row_softmax import Inputs as RowInputs


class Inputs(NamedTuple):
    rows: RowInputs  # but labels are [..., K]; ignore_index: a log-prob of 0
    with_statistics: bool


class Outputs(NamedTuple):
    """In the compute dtype, but is_top1; statistics that are not wanted have no elements."""

    logp: Tensor  # [..., K]
    entropy: Tensor  # [...]; 0 where each label is ignored, as the statistics are
    stats: Tensor  # [2, ...], those of token_logprobs
    sum_p_squared: Tensor  # [...]
    is_top1: Tensor  # bool [..., K]
    mean_logit: Tensor  # [...]


def per_label(temperature: Tensor) -> Tensor:
    """The temperature of each row [...], or of all [], beside labels [..., K]."""
    return temperature[..., None] if temperature.dim() else temperature


def leading(score: Tensor, kept: Tensor) -> Tensor:
    """The place [..., 1] of the kept label with the highest score [..., K]; 0 if none is kept."""
    best, place = score.masked_fill(~kept, -math.inf).max(-1, keepdim=True)
    return torch.where(best == -math.inf, kept.int().argmax(-1, keepdim=True), place)


def reference(x: Inputs) -> Outputs:
    """The specification: a call with each label alone."""
    labels = x.rows.labels
    each = [row_statistics.reference(x.rows._replace(labels=label)) for label in labels.unbind(-1)]
    logp, is_top1 = (torch.stack([getattr(a, n) for a in each], -1) for n in ("logp", "is_top1"))
    lead = leading(logp, labels != x.rows.ignore_index)[..., 0]

    def of_lead(name: str) -> Tensor:
        stacked = torch.stack([getattr(one, name) for one in each], -1)
        return stacked.gather(-1, lead.expand(stacked.shape[:-1])[..., None])[..., 0]

    entropy, stats = of_lead("entropy"), of_lead("stats")
    if not x.with_statistics:
        empty = logp.new_empty(0)
        return Outputs(logp, entropy, stats, empty, empty.bool(), empty.clone())
    return Outputs(logp, entropy, stats, of_lead("sum_p_squared"), is_top1, of_lead("mean_logit"))


def allocate(x: Inputs) -> Outputs:
    """Makes empty results."""
    labels, like = x.rows.labels, x.rows.temperature
    shape = labels.shape[:-1]
    wanted = shape if x.with_statistics else (0,)
    return Outputs(
        like.new_empty(labels.shape),
        like.new_empty(shape),
        like.new_empty((2, *shape)),
        like.new_empty(wanted),
        like.new_empty(labels.shape if x.with_statistics else 0, dtype=torch.bool),
        like.new_empty(wanted),
    )
