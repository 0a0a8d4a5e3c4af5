"""linear_token_logprobs of a head that data-parallel ranks hold in shards, as FSDP2 does.

Every rank has rows of its own, and needs the whole head for them. A slice of the vocabulary is
gathered at a time, the next one while the products of this one run, and let go of again: the whole
head is never on one rank. Backward gathers the slices again, and sends the gradient of each to the
ranks that own it, who keep the mean over the ranks: that of FSDP2.

All ranks walk through the same slices, those of a head that is whole, and the products are the
same: so are the bits of the log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable
from .head import (
    Head,
    HeadGradients,
    RowLabels,
    Tile,
    Upstream,
    empty_gradients,
    filled,
    kept_rows,
    label_results,
    length,
    overwrite,
    reached,
    take,
    tiles,
    token_slices,
)
from .head_arguments import HeadInputs, legal_labels
from .linear_rows import OP, Inputs, linear_token_logprobs_part_op
from .linear_rows_blas import write_slice
from .shards import NEVER, Statistics, merge


class ShardedInputs(NamedTuple):
    """HeadInputs whose head is in shards."""

    hidden: list[Tensor]  # [N_rank, H_i] each, this rank's rows
    shards: list[Tensor]  # [V_rank, H_i] each, this rank's part of each weight
    bias: Tensor | None  # [V]
    labels: Tensor  # int64 [N_rank]
    legal: Tensor  # bool [N_rank]: the label is a token of the vocabulary
    temperature: Tensor  # [N_rank] or []
    softcap: float
    ignore_index: int
    logits_dtype: torch.dtype
    sizes: list[int]  # V_rank of each rank
    group: dist.ProcessGroup


class Saved(NamedTuple):
    """What backward needs."""

    inputs: ShardedInputs
    entropy: Tensor
    stats: Tensor  # [2, N_rank]


class Gradients(NamedTuple):
    """What the public function gives back to autograd; None where no gradient is wanted."""

    hidden: list[Tensor | None]
    shards: list[Tensor | None]
    bias: Tensor | None


class HeadSlice(NamedTuple):
    """Some tokens of the head, gathered from the ranks that have them."""

    tokens: slice
    head_weight: list[Tensor]
    bias: Tensor | None


class Owned(NamedTuple):
    """A part of a slice, and the rank whose shard it lies in."""

    rank: int  # in the group
    in_slice: slice
    in_shard: slice


def owners(tokens: slice, sizes: list[int]) -> list[Owned]:
    """The parts of a slice, in order."""
    parts = []
    for rank, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        begin = end - size
        first, last = max(tokens.start, begin), min(tokens.stop, end)
        if first < last:
            in_slice = slice(first - tokens.start, last - tokens.start)
            parts.append(Owned(rank, in_slice, slice(first - begin, last - begin)))
    return parts


def gathered_slices(x: ShardedInputs) -> Iterator[HeadSlice]:
    """Every slice in turn, the next one under way; a collective call.

    A slice lies in memory that the one after the next overwrites.
    """
    all_tokens = token_slices(sum(x.sizes), x.shards[0].device)
    places = slice_memory(x, count=2)
    coming = _begin(x, all_tokens[0], places[0])
    for following, tokens in enumerate(all_tokens, start=1):
        weights, works = coming
        for work in works:
            work.wait()
        if following < len(all_tokens):
            coming = _begin(x, all_tokens[following], places[following % 2])
        yield HeadSlice(tokens, weights, None if x.bias is None else x.bias[tokens])


def slice_memory(
    x: ShardedInputs, *, count: int, dtype: torch.dtype | None = None
) -> list[list[Tensor]]:
    """Memory for so many slices of each weight, in its dtype or another.

    It is held from the first slice to the last: blocks of this size, freed and taken again in turn,
    would leave a CPU's heap in pieces, half as large again.
    """
    longest = max(map(length, token_slices(sum(x.sizes), x.shards[0].device)))
    return [
        [shard.new_empty(longest, shard.shape[1], dtype=dtype) for shard in x.shards]
        for _ in range(count)
    ]


def _begin(
    x: ShardedInputs, tokens: slice, place: list[Tensor]
) -> tuple[list[Tensor], list[dist.Work]]:
    """A slice of each weight, in this place, and the broadcasts that fill it."""
    weights = [memory[: length(tokens)] for memory in place]
    works = []
    for weight, shard in zip(weights, x.shards, strict=True):
        for part in owners(tokens, x.sizes):
            target = weight[part.in_slice]
            if part.rank == dist.get_rank(x.group):
                target.copy_(shard[part.in_shard])
            works.append(dist.broadcast(target, group=x.group, group_src=part.rank, async_op=True))
    return weights, works


def _forward(x: ShardedInputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    kept = x.labels != x.ignore_index
    rows = kept_rows(kept)
    hidden = [h[rows] for h in x.hidden]
    of_rows = take(RowLabels(x.labels, x.legal, x.temperature), rows)
    each = []
    for piece in gathered_slices(x):
        # A slice is a head of its own, which counts the labels from its first token.
        labels = of_rows.labels - piece.tokens.start
        head = hidden, piece.head_weight, piece.bias
        inputs = Inputs(*head, labels, of_rows.temperature, x.softcap, NEVER, x.logits_dtype)
        each.append(linear_token_logprobs_part_op(inputs))
    fields = [torch.stack(slices) for slices in zip(*each, strict=True)]
    parts = Statistics._make(fields)
    # A label has a logit in its own slice, and 0 in the others.
    found = merge(parts, parts.label_logit.sum(0), of_rows.temperature)
    logp, *others = (filled(rows, len(kept), field) for field in label_results(found, of_rows))
    entropy, top, log_sum = others
    return (logp, entropy), Saved(x, entropy, torch.stack([top, log_sum]))


def _backward(
    saved: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None, *, wanted: list[bool]
) -> Gradients:
    x = saved.inputs
    if grad_logp is None:
        grad_logp = torch.zeros_like(saved.entropy)
    rows = kept_rows((x.labels != x.ignore_index) & reached(grad_logp, grad_entropy))
    top, log_sum = saved.stats
    upstream = take(
        Upstream(grad_logp, grad_entropy, saved.entropy, top, log_sum, x.labels, x.temperature),
        rows,
    )
    hidden = [h[rows] for h in x.hidden]
    dtype, sum_dtype = x.hidden[0].dtype, x.temperature.dtype
    own = empty_gradients(
        Head(x.hidden, x.shards, x.bias), wanted, hidden_dtype=dtype, weight_dtype=dtype
    )
    sums = [
        h.new_zeros(h.shape, dtype=sum_dtype) if want else None
        for h, want in zip(hidden, wanted[: len(hidden)], strict=True)
    ]
    (place,) = slice_memory(x, count=1, dtype=sum_dtype)
    for piece in gathered_slices(x):
        weights = [
            None if grad is None else memory[: length(piece.tokens)]
            for grad, memory in zip(own.head_weight, place, strict=True)
        ]
        bias = None if own.bias is None else own.bias[piece.tokens]
        of_slice = upstream._replace(labels=upstream.labels - piece.tokens.start)
        _write_slice(piece, x, hidden, of_slice, HeadGradients(sums, weights, bias))
        for grad, shard in zip(weights, own.head_weight, strict=True):
            if grad is not None and shard is not None:
                _send_to_owners(grad, shard, piece.tokens, x)
    return Gradients(
        [None if grad is None else filled(rows, len(x.labels), grad.to(dtype)) for grad in sums],
        own.head_weight,
        own.bias,
    )


def _write_slice(
    piece: HeadSlice,
    x: ShardedInputs,
    hidden: list[Tensor],
    upstream: Upstream,
    gradients: HeadGradients,
) -> None:
    """Writes the gradients of a slice, whose labels count from its first token."""

    def turn_into_gradient(tile: Tile) -> None:
        overwrite(tile, take(upstream, tile.rows), x.softcap)

    head = Head(hidden, piece.head_weight, piece.bias)
    write_slice(
        tiles(head, x.logits_dtype),
        head,
        gradients,
        turn_into_gradient,
        upstream.temperature.dtype,
        add_hidden=piece.tokens.start > 0,
    )


def _send_to_owners(grad: Tensor, shard: Tensor, tokens: slice, x: ShardedInputs) -> None:
    """Writes the mean over the ranks of a slice's gradient to the shards; a collective call."""
    for part in owners(tokens, x.sizes):
        mine = grad[part.in_slice]
        dist.reduce(mine, group=x.group, group_dst=part.rank)
        if part.rank == dist.get_rank(x.group):
            shard[part.in_shard] = mine.div_(dist.get_world_size(x.group))


_sharded = Differentiable(
    OP,
    inputs=ShardedInputs,
    saved=Saved,
    differentiable=("hidden", "shards", "bias"),
    forward=_forward,
    backward=_backward,
    selective=True,
)


def logprobs(x: HeadInputs) -> tuple[Tensor, Tensor]:
    """The log-prob and the entropy [N] of each row; all data-parallel ranks must call."""
    weight = x.head_weight[0]
    vocab, group = len(weight), weight.device_mesh.get_group()  # type: ignore[attr-defined]
    _, legal, _ = legal_labels(OP, x.labels, vocab, x.temperature, x.ignore_index)
    inputs = ShardedInputs(
        hidden=x.hidden,
        shards=[shard.to_local() for shard in x.head_weight],  # type: ignore[attr-defined]
        bias=x.bias,
        labels=x.labels,
        legal=legal,
        temperature=x.temperature,
        softcap=x.softcap,
        ignore_index=x.ignore_index,
        logits_dtype=x.logits_dtype,
        sizes=shard_sizes(vocab, dist.get_world_size(group)),
        group=group,
    )
    logp, entropy = _sharded(inputs)
    return logp, entropy


def shard_sizes(vocab: int, ranks: int) -> list[int]:
    """How many tokens each rank has of a DTensor: torch.chunk gives the last ones less, or none."""
    most = -(-vocab // ranks)
    return [max(0, min(most, vocab - rank * most)) for rank in range(ranks)]
