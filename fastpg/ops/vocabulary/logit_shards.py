"""token_logprobs of logits whose vocabulary is in shards, one on each rank of a group."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable
from .shards import (
    NEVER,
    Shard,
    Statistics,
    label_logit,
    over_all_ranks,
    with_bits_of_maximum,
)
from .token_logprobs import (
    OP,
    Inputs,
    Saved,
    backward,
    backward_inplace,
    token_logprobs_op,
)


class ShardInputs(NamedTuple):
    rows: Inputs  # the logits of this rank's shard, and labels of the whole vocabulary
    group: dist.ProcessGroup


def _forward_of_shard(x: ShardInputs) -> tuple[tuple[Tensor, ...], Saved]:
    """The results for whole rows. To backward this shard is a row of its own."""
    rows = x.rows
    size = rows.logits.shape[-1]

    def of_shard(labels: Tensor) -> Inputs:
        return rows._replace(labels=labels, ignore_index=NEVER)

    def statistics(labels: Tensor) -> Statistics:
        # Where the label is on another rank, any other stands in for it: its log-prob is not used.
        here = (labels == NEVER) | ((labels >= 0) & (labels < size))
        part = token_logprobs_op(of_shard(torch.where(here, labels, 0)))
        found = label_logit(rows.logits, labels, rows.temperature.dtype, rows.softcap)
        found = with_bits_of_maximum(found, here & (labels != NEVER), part)
        entropy = part.entropy if rows.with_entropy else None
        return Statistics(found, part.stats[0], part.stats[1], entropy)

    shard = Shard(OP, x.group, size, rows.labels, rows.temperature, rows.ignore_index)
    whole, local = over_all_ranks(shard, statistics)
    saved = Saved(of_shard(local), whole.entropy, whole.stats)
    return ((whole.logp,) if whole.entropy is None else (whole.logp, whole.entropy)), saved


_differentiable = partial(
    Differentiable,
    OP,
    inputs=ShardInputs,
    saved=Saved,
    differentiable=("logits",),
    forward=_forward_of_shard,
)
_token_logprobs_of_shard = _differentiable(backward=backward)
_token_logprobs_of_shard_inplace = _differentiable(backward=backward_inplace)


def logprobs_of_shard(x: Inputs, group: dist.ProcessGroup, *, inplace: bool) -> tuple[Tensor, ...]:
    """(logp,), or (logp, entropy), from this rank's shard of the logits; a collective call."""
    of_shard = _token_logprobs_of_shard_inplace if inplace else _token_logprobs_of_shard
    return of_shard(ShardInputs(x, group))
