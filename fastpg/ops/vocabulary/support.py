"""Rows whose softmax is over a kept set of tokens, as top-k, top-p or min-p sampling leaves one.

The sets of all rows are in the CSR form: row n keeps token_ids[offsets[n]:offsets[n + 1]]. With
K_n that set, everything is as in token_logprobs.py but for the sums, which are over j in K_n:

    logp = z_y − log Σ_j e^{z_j},   −∞ without a gradient where y is not in K_n
    H = −Σ_j p_j log p_j,   p_j = e^{z_j} / Σ_j e^{z_j}

An entry is a token of a set, of some row. An empty set stands for the whole vocabulary: the ops of
token_logprobs.py and linear_rows.py serve such rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_device, check_tensor
from .head import ALL, Part, kept_rows
from .shards import finite_max
from .sparse_products import lengths, row_of_entry, segment_sum


class Support(NamedTuple):
    """The kept set of each row; `checked_support` makes it."""

    token_ids: Tensor  # int64 [E], rising within a row
    offsets: Tensor  # int64 [N + 1]


class Entries(NamedTuple):
    """The entries of some rows, in the CSR form of all rows: the others have none."""

    places: Part  # those that these entries have among all
    token_ids: Tensor  # int64 [E']
    rows: Tensor  # int64 [E']
    offsets: Tensor  # int64 [N + 1]


class RowOptions(NamedTuple):
    """What the softmax of N rows needs besides the logits of their entries."""

    labels: Tensor  # int64 [N]
    temperature: Tensor  # [N] or [], in the compute dtype
    softcap: float  # 0: none


class KeptRows(NamedTuple):
    """What is known of rows from their entries, in fp64."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    has_label: Tensor  # bool [N]: the label is in the set
    log_p: Tensor  # [E'], of each entry
    capped: Tensor  # [E'], the logit of each entry, after softcap


def checked_support(op: str, support: object, labels: Tensor, group: object) -> Support:
    """The sets, of rows with these labels; their values are checked when the op runs."""
    if group is not None:
        raise ValueError(f"{op}: support needs the whole vocabulary, and process_group shards it")
    if not isinstance(support, (tuple, list)) or len(support) != 2:
        kind = type(support).__name__
        raise TypeError(f"{op}: support must be a pair (token_ids, offsets), got {kind}")
    for name, x in zip(Support._fields, support, strict=True):
        check_tensor(op, f"support's {name}", x)
        check_device(op, f"support's {name}", x, labels)
        if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1:
            got = f"{x.dtype} {tuple(x.shape)}"
            raise TypeError(f"{op}: support's {name} must be int32 or int64 and flat, got {got}")
    token_ids, offsets = support
    if len(offsets) != labels.numel() + 1:
        count = f"{labels.numel()} rows"
        raise ValueError(
            f"{op}: support's offsets are {len(offsets)}, one more than {count} needed"
        )
    return Support(token_ids.long(), offsets.long())


def check_support_values(op: str, support: Support, vocab: int) -> None:
    """Raises for sets that are none. A GPU is waited for."""
    token_ids, offsets = support
    count = len(token_ids)
    rises = (offsets[1:] >= offsets[:-1]).all()
    if not (rises & (offsets[0] == 0) & (offsets[-1] == count)):
        needs = f"begin at 0, never fall, and end at the number of token_ids, {count}"
        got = f"{offsets[0].item()} to {offsets[-1].item()}"
        if not rises:
            row = int((offsets[1:] < offsets[:-1]).int().argmax())
            got = f"{offsets[row].item()} and then {offsets[row + 1].item()}"
        raise ValueError(f"{op}: support's offsets must {needs}, got {got}")
    outside = (token_ids < 0) | (token_ids >= vocab)
    falls = torch.zeros_like(outside)
    falls[1:] = token_ids[1:] <= token_ids[:-1]
    starts = offsets[:-1][lengths(offsets) > 0]
    falls[starts] = False  # the first of a set may be less than the last of another
    if (outside | falls).any():
        where = int((outside | falls).nonzero()[0, 0])
        what = f"support's token_ids holds {token_ids[where].item()} at {where}"
        if outside[where]:
            raise IndexError(f"{op}: {what}, outside [0, {vocab})")
        before = token_ids[where - 1].item()
        raise ValueError(f"{op}: {what} after {before}, must rise within a set")


def entries_of(support: Support, rows: Tensor) -> Entries:
    """The entries of the rows that a mask marks. A GPU is waited for."""
    token_ids, offsets = support
    row = row_of_entry(offsets, len(token_ids))
    if isinstance(kept_rows(rows), slice):  # all of them: no entry needs to be looked at
        return Entries(ALL, token_ids, row, offsets)
    places = kept_rows(rows[row])
    ends = torch.where(rows, lengths(offsets), 0).cumsum(0)
    part = torch.nn.functional.pad(ends, (1, 0))
    return Entries(places, token_ids[places], row[places], part)


def mask_of(support: Support, vocab: int) -> Tensor:
    """Marks what is kept, [N, V], as the references take it: all tokens, if a set is empty."""
    empty = lengths(support.offsets) == 0
    mask = empty[:, None].repeat(1, vocab)
    mask[row_of_entry(support.offsets, len(support.token_ids)), support.token_ids] = True
    return mask


def per_entry(x: Tensor, entries: Entries) -> Tensor:
    """A value of each row, [N] or [], for each entry of it."""
    return x if x.dim() == 0 else x[entries.rows]


def masked_logits(logits: Tensor, softcap: float, support: Support) -> Tensor:
    """The logits [N, V] after softcap, with -inf for what is not kept: for the specification."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~mask_of(support, logits.shape[1]), -torch.inf)


def kept_softmax(logits: Tensor, entries: Entries, x: RowOptions) -> KeptRows:
    """The softmax of each row over its entries, of logits [E'].

    It is in fp64: there are few entries, and the sum over a row is taken one after another.
    """
    capped = logits.double()
    if x.softcap:
        capped = x.softcap * torch.tanh(capped / x.softcap)
    top = torch.segment_reduce(
        capped, "max", lengths=lengths(entries.offsets), unsafe=True, initial=-math.inf
    )
    d = (capped - finite_max(top)[entries.rows]) / per_entry(x.temperature.double(), entries)
    e = d.exp()
    is_label = entries.token_ids == x.labels[entries.rows]
    has_label = segment_sum(is_label.double(), entries.offsets) > 0
    of_label = segment_sum(torch.where(is_label, d, 0.0), entries.offsets)
    # Where the label leads, it is kept out of the sum: 1 - p keeps its digits as p goes to 1.
    total = segment_sum(e, entries.offsets)
    others = segment_sum(torch.where(is_label, 0.0, e), entries.offsets)
    log_sum = torch.where(has_label & (of_label == 0), others.log1p(), total.log())
    log_sum = torch.where(total == 0, 0.0, log_sum)
    weighted = segment_sum(torch.where(e == 0, 0.0, e * d), entries.offsets)
    entropy = torch.where(total == 0, 0.0, log_sum - weighted / total).clamp(min=0.0)
    logp = torch.where(has_label, of_label, -math.inf) - log_sum
    return KeptRows(logp.clamp(max=0.0), entropy, has_label, d - log_sum[entries.rows], capped)


def kept_gradient(
    found: KeptRows, entries: Entries, x: RowOptions, grad_logp: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """The gradient [E'] of the logits of the entries, from that of log-probs and entropies [N]."""
    log_p, capped = found.log_p, found.capped
    p = log_p.exp()
    is_label = entries.token_ids == x.labels[entries.rows]
    g = torch.where(found.has_label, grad_logp.double(), 0.0)[entries.rows]
    grad = g * torch.where(is_label, -torch.expm1(log_p), -p)
    if grad_entropy is not None:
        weight = grad_entropy.double()[entries.rows] * p
        grad = grad - weight * (torch.where(p == 0, 0.0, log_p) + found.entropy[entries.rows])
    grad = torch.where(capped == -math.inf, 0.0, grad)
    if x.softcap:
        grad = grad * (1 - (capped / x.softcap) ** 2)
    return grad / per_entry(x.temperature.double(), entries)
