"""Rows whose vocabulary is in parts: in shards on the ranks of a group, or in slices.

A part r has its maximum m_r, log sum s_r = log Σ e^{(z − m_r)/T} and entropy H_r. Of the row:

    m = max m_r     s = log Σ_r e^{s_r + (m_r − m)/T}     w_r = e^{s_r + (m_r − m)/T − s}
    H = Σ_r w_r (H_r − log w_r)

Where a token's probability goes to 1, its part has s_r = log(1 + x) with a small x, which is kept:
the sum is taken above 1, as log1p(x + the other parts), and in fp64: in fp32 a margin of 80 between
two parts would be rounded by 4e-6.

The sums are taken in the order of the parts: every rank gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.checks import check_label_values

if TYPE_CHECKING:
    from .token_logprobs import Outputs

NEVER = -(2**63)  # an ignore_index that no label is, however shifted


class Statistics(NamedTuple):
    """What is known of rows from a part of the vocabulary, or from all of it; each is [...].

    c are the logits after softcap.
    """

    label_logit: Tensor  # c of the label; 0 where the label is in another part
    top: Tensor  # m, the maximum of c
    log_sum: Tensor  # s
    entropy: Tensor | None  # H; None if it is not wanted


def finite_max(top: Tensor) -> Tensor:
    """The maximum to subtract: a row that is all -inf subtracts 0, else it would be NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def label_logprob(rows: Statistics, temperature: Tensor) -> Tensor:
    """The log-prob of each label, from the statistics of whole rows.

    It is clamped to 0: rounding in softcap can make the label's logit slightly larger than the
    maximum of its row.
    """
    z = (rows.label_logit - finite_max(rows.top)) / temperature
    return (z - rows.log_sum).clamp(max=0.0)


def label_logit(logits: Tensor, labels: Tensor, dtype: torch.dtype, softcap: float) -> Tensor:
    """The logit of each label after softcap; 0 for a label that is nowhere in its row."""
    here = (labels >= 0) & (labels < logits.shape[-1])
    x = logits.gather(-1, torch.where(here, labels, 0)[..., None])[..., 0].to(dtype)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    return torch.where(here, x, 0.0)


def with_bits_of_maximum(found: Tensor, here: Tensor, part: Outputs) -> Tensor:
    """The label's logit; where the label is `here` and leads, it is the part's maximum to the bit.

    Another tanh than the kernel's has another last bit under softcap, and as p goes to 1, 1 - p is
    made of such bits. The log-prob of a label that leads is minus the log sum.
    """
    top, log_sum = part.stats
    return torch.where(here & (part.logp == -log_sum), top, found)


def merge(parts: Statistics, label_logit: Tensor, temperature: Tensor) -> Statistics:
    """The statistics of whole rows [...], from those of R parts [R, ...], in their order."""
    dtype, top = parts.top.dtype, parts.top.amax(0)
    below_top = (parts.top.double() - finite_max(top).double()) / temperature.double()
    log_mass = parts.log_sum.double() + below_top
    part = torch.arange(len(log_mass), device=top.device).view(-1, *[1] * top.dim())
    holds_top = part == parts.top.argmax(0)
    terms = torch.where(holds_top, log_mass.expm1(), log_mass.exp())
    above_one = reduce(torch.add, terms.unbind())
    log_sum = torch.where(above_one == -1, 0.0, above_one.log1p())  # -1: the row is all -inf
    if parts.entropy is None:
        return Statistics(label_logit, top, log_sum.to(dtype), None)
    log_share = log_mass - log_sum
    share = log_share.exp()
    terms = torch.where(share == 0, 0.0, share * (parts.entropy.double() - log_share))
    entropy = reduce(torch.add, terms.unbind()).clamp(min=0.0)
    return Statistics(label_logit, top, log_sum.to(dtype), entropy.to(dtype))


class Shard(NamedTuple):
    """Rows whose vocabulary lies on the ranks of a group in turn."""

    op: str  # the public name of the op, for messages
    group: dist.ProcessGroup
    size: int  # how many tokens this rank has; ranks may differ
    labels: Tensor  # int64 [...], of the whole vocabulary
    temperature: Tensor  # [...] or []
    ignore_index: int


class LocalLabels(NamedTuple):
    """What a rank knows of the label of each row."""

    kept: Tensor  # it is not ignored
    legal: Tensor  # it is a token of the whole vocabulary
    labels: Tensor  # counted from the rank's first token; NEVER where the row is ignored


def local_labels(shard: Shard) -> LocalLabels:
    """Checks the labels; a collective call."""
    labels = shard.labels
    begin, vocab = _position(shard, labels.device)
    kept = labels != shard.ignore_index
    legal = kept & (labels >= 0) & (labels < vocab)
    # A graph cannot raise: there the row of a bad label is NaN.
    if not torch.compiler.is_compiling():
        check_label_values(
            shard.op, labels, legal, kept, vocab, shard.ignore_index, shard.temperature
        )
    return LocalLabels(kept, legal, torch.where(kept, labels - begin, NEVER))


def over_ranks(part: Statistics, group: dist.ProcessGroup, temperature: Tensor) -> Statistics:
    """The statistics of whole rows, from those of this rank's part; a collective call."""
    fields = [x for x in part if x is not None]
    # Each of these is of all ranks.
    label_logit, top, log_sum, *entropy = _gather(torch.stack(fields), group).unbind(1)
    parts = Statistics(label_logit, top, log_sum, entropy[0] if entropy else None)
    return merge(parts, reduce(torch.add, label_logit.unbind()), temperature)


class WholeRows(NamedTuple):
    """The results for rows, as token_logprobs has them."""

    logp: Tensor
    entropy: Tensor | None
    stats: Tensor  # [2, ...]: (max, log sum)


def over_all_ranks(
    shard: Shard, statistics: Callable[[Tensor], Statistics]
) -> tuple[WholeRows, Tensor]:
    """Results for whole rows, and the local labels; a collective call.

    Args:
        shard: The rows. Every rank must call with the same labels.
        statistics: Takes local labels; returns the statistics of this shard's part of the rows. A
            local label outside [0, size) is elsewhere, one that is NEVER is ignored.
    """
    shard = shard._replace(labels=shard.labels.contiguous())  # the results take its strides over
    kept, legal, local = local_labels(shard)
    rows = over_ranks(statistics(local), shard.group, shard.temperature)

    def checked(x: Tensor) -> Tensor:
        return torch.where(kept, torch.where(legal, x, math.nan), 0.0)

    logp = checked(label_logprob(rows, shard.temperature))
    entropy = None if rows.entropy is None else checked(rows.entropy)
    stats = torch.stack([checked(rows.top), checked(rows.log_sum)])
    return WholeRows(logp, entropy, stats), local


def _position(shard: Shard, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where this rank's shard begins, and the size of all of them: 0-d, nothing waits for them."""
    op, group, size = shard.op, shard.group, shard.size
    if not isinstance(group, (dist.ProcessGroup, int)):  # an int is what new_group gives outsiders
        kind = type(group).__name__
        raise TypeError(f"{op}: process_group must be a torch.distributed.ProcessGroup, got {kind}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: process_group does not hold this process, rank {dist.get_rank()}")
    sizes = _gather(torch.full((1,), size, device=device), group)[:, 0]
    # On a GPU a rank that has tokens does not look at the sizes of others: it would have to wait.
    looks = size == 0 or device.type == "cpu"
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
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(out.unbind()), x, group=group)
    return out
