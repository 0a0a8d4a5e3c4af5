"""linear_token_logprobs of a head that data-parallel ranks hold in shards: FSDP2's, and ZeRO-3's.

Every rank has rows of its own, and needs the whole head for them. A slice of the vocabulary is
gathered at a time, the next one while the products of this one run, and let go of again: the whole
head is never on one rank. Backward gathers the slices again. Under FSDP2 it sends the gradient of
each to the ranks that own it, who keep the mean over the ranks; under ZeRO-3 each rank keeps the
gradient of all, which DeepSpeed wants to add up itself.

A rank's part is a range of the flat values: it may begin within a row. All ranks walk through the
same slices, those of a head that is whole, and the products are the same: so are the bits of the
log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

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
from .head_ranks import all_or_none
from .linear_rows import OP, Inputs, linear_token_logprobs_part_op
from .linear_rows_blas import write_slice
from .placeholders import is_outline
from .shards import NEVER, Statistics, merge


class ShardedInputs(NamedTuple):
    """HeadInputs whose head is in shards."""

    hidden: list[Tensor]  # [N_rank, H_i] each, this rank's rows
    weights: list[Tensor]  # what has the gradient: shards [V_rank, H_i], or outlines [V, H_i]
    parts: list[Tensor]  # flat, this rank's part of the values of each
    bias: Tensor | None  # [V]
    labels: Tensor  # int64 [N_rank]
    legal: Tensor  # bool [N_rank]: the label is a token of the vocabulary
    temperature: Tensor  # [N_rank] or []
    softcap: float
    ignore_index: int
    logits_dtype: torch.dtype
    sizes: list[list[int]]  # for each weight how many of its values each rank has
    keeps_all: bool  # Each rank keeps the whole gradient of the weights, not its part of the mean.
    vocab: int
    group: dist.ProcessGroup

    @property
    def slices(self) -> list[slice]:
        """The tokens of each slice."""
        return token_slices(self.vocab, self.labels.device)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: ShardedInputs
    entropy: Tensor
    stats: Tensor  # [2, N_rank]


class Gradients(NamedTuple):
    """What the public function gives back to autograd; None where no gradient is wanted."""

    hidden: list[Tensor | None]
    weights: list[Tensor | None]
    bias: Tensor | None


class HeadSlice(NamedTuple):
    """Some tokens of the head, gathered from the ranks that have them."""

    tokens: slice
    head_weight: list[Tensor]
    bias: Tensor | None


class Owned(NamedTuple):
    """A part of a slice, and the rank that has it."""

    rank: int  # in the group
    in_slice: slice
    in_part: slice


def owners(values: slice, sizes: list[int]) -> list[Owned]:
    """The parts of a slice of flat values, in order."""
    parts = []
    for rank, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        begin = end - size
        first, last = max(values.start, begin), min(values.stop, end)
        if first < last:
            in_slice = slice(first - values.start, last - values.start)
            parts.append(Owned(rank, in_slice, slice(first - begin, last - begin)))
    return parts


def gathered_slices(x: ShardedInputs) -> Iterator[HeadSlice]:
    """Every slice in turn, the next one under way; a collective call.

    A slice lies in memory that the one after the next overwrites.
    """
    all_tokens = x.slices
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
    longest = max(map(length, x.slices))
    return [
        [
            part.new_empty(longest, h.shape[1], dtype=dtype)
            for part, h in zip(x.parts, x.hidden, strict=True)
        ]
        for _ in range(count)
    ]


def _begin(
    x: ShardedInputs, tokens: slice, place: list[Tensor]
) -> tuple[list[Tensor], list[dist.Work]]:
    """A slice of each weight, in this place, and the broadcasts that fill it."""
    weights = [memory[: length(tokens)] for memory in place]
    works = []
    for weight, part, sizes in zip(weights, x.parts, x.sizes, strict=True):
        for owned in owners(values_of(tokens, weight), sizes):
            target = weight.view(-1)[owned.in_slice]
            if owned.rank == dist.get_rank(x.group):
                target.copy_(part[owned.in_part])
            works.append(dist.broadcast(target, group=x.group, group_src=owned.rank, async_op=True))
    return weights, works


def values_of(tokens: slice, weight: Tensor) -> slice:
    """Where the rows of these tokens are among the flat values of a weight."""
    width = weight.shape[1]
    return slice(tokens.start * width, tokens.stop * width)


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
    results = label_results(found, of_rows)
    logp, entropy, top, log_sum = (filled(rows, len(kept), field) for field in results)
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
        Head(x.hidden, x.weights, x.bias), wanted, hidden_dtype=dtype, weight_dtype=dtype
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
        _keep_slice(x, piece.tokens, weights, own.head_weight)
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


def _keep_slice(
    x: ShardedInputs,
    tokens: slice,
    gradients: list[Tensor | None],
    kept: list[Tensor | None],
) -> None:
    """Writes the gradients of a slice of the weights to what the ranks keep of them."""
    for grad, mine, sizes in zip(gradients, kept, x.sizes, strict=True):
        if grad is None or mine is None:
            continue
        if x.keeps_all:
            mine[tokens] = grad
        else:
            _send_to_owners(grad, mine, values_of(tokens, grad), sizes, x.group)


def _send_to_owners(
    grad: Tensor, own: Tensor, values: slice, sizes: list[int], group: dist.ProcessGroup
) -> None:
    """Writes the mean over the ranks of a slice's gradient to the shards; a collective call."""
    for owned in owners(values, sizes):
        part = grad.view(-1)[owned.in_slice]
        dist.reduce(part, group=group, group_dst=owned.rank)
        if owned.rank == dist.get_rank(group):
            own.view(-1)[owned.in_part] = part.div_(dist.get_world_size(group))


_sharded = Differentiable(
    OP,
    inputs=ShardedInputs,
    saved=Saved,
    differentiable=("hidden", "weights", "bias"),
    forward=_forward,
    backward=_backward,
    selective=True,
)


def logprobs(x: HeadInputs) -> tuple[Tensor, Tensor]:
    """The log-prob and the entropy [N] of each row; all data-parallel ranks must call."""
    weights, vocab = x.head_weight, len(x.head_weight[0])
    spread = parts_of_zero3(weights) if is_outline(weights[0]) else parts_of_dtensors(weights)
    with all_or_none(OP, [spread.group], x.labels.device):
        check_parts(spread)
        _, legal, _ = legal_labels(OP, x.labels, vocab, x.temperature, x.ignore_index)
    inputs = ShardedInputs(
        hidden=x.hidden,
        weights=spread.weights,
        parts=spread.parts,
        bias=x.bias,
        labels=x.labels,
        legal=legal,
        temperature=x.temperature,
        softcap=x.softcap,
        ignore_index=x.ignore_index,
        logits_dtype=x.logits_dtype,
        sizes=spread.sizes,
        keeps_all=spread.keeps_all,
        vocab=vocab,
        group=spread.group,
    )
    logp, entropy = _sharded(inputs)
    return logp, entropy


class Spread(NamedTuple):
    """How weights lie on the ranks of a group; the fields of ShardedInputs."""

    weights: list[Tensor]
    parts: list[Tensor]
    sizes: list[list[int]]
    keeps_all: bool
    group: dist.ProcessGroup


def parts_of_dtensors(weights: list[Tensor]) -> Spread:
    """Weights in Shard(0)."""
    group = weights[0].device_mesh.get_group()  # type: ignore[attr-defined]
    tokens = shard_sizes(len(weights[0]), dist.get_world_size(group))
    shards = [weight.to_local() for weight in weights]  # type: ignore[attr-defined]
    sizes = [[count * weight.shape[1] for count in tokens] for weight in weights]
    parts = [shard.detach().reshape(-1) for shard in shards]
    return Spread(shards, parts, sizes, keeps_all=False, group=group)


def parts_of_zero3(weights: list[Tensor]) -> Spread:
    """Outlines of parameters; the last rank's part may end in values that are not of them."""
    parameters: list[Any] = [weight.outline_of for weight in weights]  # type: ignore[attr-defined]
    group = parameters[0].ds_process_group
    parts = [parameter.ds_tensor for parameter in parameters]
    sizes = [[part.numel()] * dist.get_world_size(group) for part in parts]
    return Spread(weights, parts, sizes, keeps_all=True, group=group)


def check_parts(x: Spread) -> None:
    """Raises unless this rank has as much of each weight as the others take it to have."""
    rank = dist.get_rank(x.group)
    for part, sizes in zip(x.parts, x.sizes, strict=True):
        if part.numel() != sizes[rank]:
            counts = f"{sizes[rank]} values of it, got {part.numel()}"
            raise ValueError(f"{OP}: weight must be in even shards, rank {rank} must have {counts}")


def shard_sizes(vocab: int, ranks: int) -> list[int]:
    """How many tokens each rank has of a DTensor: torch.chunk gives the last ones less, or none."""
    most = -(-vocab // ranks)
    return [max(0, min(most, vocab - rank * most)) for rank in range(ranks)]
