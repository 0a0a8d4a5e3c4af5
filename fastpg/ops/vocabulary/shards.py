"""Rows whose vocabulary is in parts: in shards on the ranks of a group, or in slices.

A part r has its maximum m_r, log sum s_r = log Σ e^{(z − m_r)/T} and entropy H_r. Of the row:

    m = max m_r     s = log Σ_r e^{s_r + (m_r − m)/T}     w_r = e^{s_r + (m_r − m)/T − s}
    H = Σ_r w_r (H_r − log w_r)

The sums are taken in the order of the parts: every rank gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.checks import check_label_values

NEVER = -(2**63)  # an ignore_index that no label is, however shifted


def finite(top: Tensor) -> Tensor:
    """The maximum to subtract: a row that is all -inf subtracts 0, else it would be NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def at_most_0(logp: Tensor) -> Tensor:
    """Of a label whose softcap was rounded otherwise than that of the same logit in its row."""
    return logp.clamp(max=0.0)


def merge(
    temperature: Tensor, top: Tensor, log_sum: Tensor, entropy: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The statistics of whole rows [...], in the order given, from those of R parts [R, ...]."""
    most = top.amax(0)
    log_mass = log_sum + (top - finite(most)) / temperature
    total = reduce(torch.add, log_mass.exp().unbind())
    merged = torch.where(total == 0, 0.0, total.log())
    if entropy is None:
        return most, merged
    log_share = log_mass - merged
    share = log_share.exp()
    terms = torch.where(share == 0, 0.0, share * (entropy - log_share))
    return most, merged, reduce(torch.add, terms.unbind()).clamp(min=0.0)


def of_all_ranks(
    op: str,
    group: dist.ProcessGroup,
    size: int,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    part: Callable[[Tensor], Tensor],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(logp, entropy if any, stats) of rows whose vocabulary lies on the ranks of a group in turn.

    size: tokens of this rank's shard; ranks may differ. labels: [...], of the whole vocabulary.
    part(local): label_logit, top, log_sum and perhaps entropy of the rows of this shard, stacked.
        A local label outside [0, size) is elsewhere, and label_logit then 0; NEVER is ignored.
    Also returns the local labels. Collective: every rank must call, with the same labels.
    """
    labels = labels.contiguous()  # whose strides the outputs would take over
    kept, legal, local = local_labels(op, group, size, labels, temperature, ignore_index)
    label_logits, top, log_sum, *entropy = over_ranks(part(local), group, temperature)
    logp = at_most_0((label_logits - finite(top)) / temperature - log_sum)
    spoilt = (torch.where(legal, x, math.nan) for x in (logp, *entropy, top, log_sum))
    *outputs, top, log_sum = (torch.where(kept, x, 0.0) for x in spoilt)
    return (*outputs, torch.stack([top, log_sum])), local


def local_labels(
    op: str, group, size: int, labels: Tensor, temperature: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows count, where their labels are tokens, and labels as those of this rank's shard."""
    begin, vocab = _position(op, group, size, labels.device)
    kept = labels != ignore_index
    legal = kept & (labels >= 0) & (labels < vocab)
    if not torch.compiler.is_compiling():  # there a bad label's row is NaN, and nothing raises
        check_label_values(op, labels, legal, kept, vocab, ignore_index, temperature)
    return kept, legal, torch.where(kept, labels - begin, NEVER)


def over_ranks(part: Tensor, group: dist.ProcessGroup, temperature: Tensor) -> tuple[Tensor, ...]:
    """label_logit, top, log_sum and perhaps entropy of whole rows, from those of each shard."""
    label_logits, *stats = _gather(part, group).unbind(1)
    return reduce(torch.add, label_logits.unbind()), *merge(temperature, *stats)


def logprobs_of_shards(op, group, logits, labels, temperature, softcap, ignore_index):
    """The outputs of op, which is of rows of logits, for rows in shards; and what backward is of:
    this shard, as a row of its own."""

    def part(local):
        anything = torch.where(local == NEVER, NEVER, 0)
        _, *entropy, stats = op(logits, anything, temperature, softcap, NEVER)
        found = label_logit(logits, local, temperature.dtype, softcap)
        return torch.stack([found, *stats, *entropy])

    rows = logits.shape[-1], labels, temperature, ignore_index
    outputs, local = of_all_ranks("token_logprobs", group, *rows, part)
    return outputs, (logits, local, temperature, softcap, NEVER)


def label_logit(logits, labels, dtype, softcap):
    """The capped logit of each label, 0 for a label that is nowhere in its row."""
    here = (labels >= 0) & (labels < logits.shape[-1])
    x = logits.gather(-1, torch.where(here, labels, 0)[..., None])[..., 0].to(dtype)
    return torch.where(here, softcap * torch.tanh(x / softcap) if softcap else x, 0.0)


def _position(op, group, size, device) -> tuple[Tensor, Tensor]:
    """Where this rank's shard begins, and the size of all of them: 0-d, nothing waits for them."""
    if not isinstance(group, (dist.ProcessGroup, int)):  # an int is what new_group gives outsiders
        kind = type(group).__name__
        raise TypeError(f"{op}: process_group must be a torch.distributed.ProcessGroup, got {kind}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: process_group does not hold this process, rank {dist.get_rank()}")
    sizes = _gather(torch.full((1,), size, device=device), group)[:, 0]
    looks = size == 0 or device.type == "cpu"  # elsewhere the others would have to wait for it
    if not torch.compiler.is_compiling() and looks and not sizes.all():
        raise ValueError(f"{op}: a shard must hold a token at least, got {sizes.tolist()}")
    ends = sizes.cumsum(0)
    return ends[rank] - size, ends[-1]


def add_over_ranks(x: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> Tensor:
    """The sum of x over the ranks, added up in dtype."""
    total = x.to(dtype, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of each rank: [R, *x.shape]."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(out.unbind()), x, group=group)
    return out
