"""The LM head in tiles: the products of both linear ops.

A tile is some rows by a slice of the vocabulary. BLAS makes its logits in one buffer, which the
next tile overwrites; its statistics are those of token_logprobs. Parts of a row merge, be they
slices here or the shards of several processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import (
    NEVER,
    Statistics,
    label_logprob,
    merge,
    over_ranks,
    with_bits_of_maximum,
)
from .token_logprobs import (
    BackwardInputs,
    BackwardOutInputs,
    Inputs,
    token_logprobs_backward_out_op,
    token_logprobs_op,
)

# A tile has about WIDTH tokens of the vocabulary, and at most ROWS rows. On a CPU such a tile stays
# in the last-level cache for a thousand rows; on a GPU larger products are faster. The width is
# fixed, so that a row's bits do not depend on the number of rows.
WIDTH = {"cpu": 4096, "cuda": 16384}
ROWS = {"cpu": 4096, "cuda": 8192}

# A CPU's product of fewer rows in fp32 takes another code path, and rounds differently.
LEAST_ROWS = 4

ALL = slice(None)
Part = slice | Tensor  # some rows of a tensor: a slice, or their int64 indices

RecordT = TypeVar("RecordT", bound=tuple)


class Head(NamedTuple):
    """What makes the logits: Σ_i hidden[i] @ head_weight[i].T + bias."""

    hidden: list[Tensor]  # [..., H_i] each; in tiles [N, H_i]
    head_weight: list[Tensor]  # [V, H_i] each
    bias: Tensor | None  # [V]

    def tensors(self) -> list[Tensor | None]:
        """Every hidden, every head_weight and the bias."""
        return [*self.hidden, *self.head_weight, self.bias]

    def tile(self, rows: Part, tokens: slice) -> Head:
        """The head of some rows and some tokens."""
        return Head(
            [x[rows] for x in self.hidden],
            [x[tokens] for x in self.head_weight],
            None if self.bias is None else self.bias[tokens],
        )


class HeadGradients(NamedTuple):
    """Memory for the gradients of a head; None where no gradient is wanted."""

    hidden: list[Tensor | None]
    head_weight: list[Tensor | None]
    bias: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        """The gradients in the order of Head.tensors()."""
        return [*self.hidden, *self.head_weight, self.bias]

    def tile(self, rows: Part, tokens: slice) -> HeadGradients:
        """The gradients of some rows and some tokens."""
        return HeadGradients(
            [None if x is None else x[rows] for x in self.hidden],
            [None if x is None else x[tokens] for x in self.head_weight],
            None if self.bias is None else self.bias[tokens],
        )


def empty_gradients(
    head: Head, wanted: list[bool], *, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> HeadGradients:
    """Memory for the gradients that are wanted, in the order of Head.tensors(); hidden's is 0."""
    terms = len(head.hidden)
    hidden = [
        x.new_zeros(x.shape, dtype=hidden_dtype) if want else None
        for x, want in zip(head.hidden, wanted[:terms], strict=True)
    ]
    weights = [
        x.new_empty(x.shape, dtype=weight_dtype) if x is not None and want else None
        for x, want in zip(head.tensors()[terms:], wanted[terms:], strict=True)
    ]
    return HeadGradients(hidden, weights[:-1], weights[-1])


def take(record: RecordT, part: Part) -> RecordT:
    """Some rows of each tensor of a record. None stays, and a 0-d tensor holds for all rows."""
    fields = [x if x is None or x.dim() == 0 else x[part] for x in record]
    return record._make(fields)  # type: ignore[attr-defined]  # a NamedTuple


def concatenate(records: list[RecordT]) -> RecordT:
    """One record of all rows, from records of chunks of them."""
    fields = [torch.cat(tensors) for tensors in zip(*records, strict=True)]
    return records[0]._make(fields)  # type: ignore[attr-defined]  # a NamedTuple


def length(part: slice) -> int:
    """How many rows or tokens a slice has."""
    return part.stop - part.start


def chunks(count: int, most: int, multiple: int = 1) -> list[slice]:
    """Cuts 0..count into slices of about one size, `most` or less.

    Each begins at a multiple of `multiple`; no slice is cut again if it is cut by itself.
    """
    units, most_units = -(-max(count, 1) // multiple), max(most // multiple, 1)
    many = -(-units // most_units)
    bounds = [units * i // many * multiple for i in range(many)]
    return [slice(*ends) for ends in pairwise([*bounds, count])]


def row_chunks(x: Tensor) -> list[slice]:
    """The rows of each tile, for rows x [N, ...]."""
    return chunks(len(x), ROWS[x.device.type])


def token_slices(vocab: int, device: torch.device) -> list[slice]:
    """The tokens of each tile. They are aligned, and never so few that BLAS rounds differently."""
    return chunks(vocab, WIDTH[device.type], multiple=16)


class Tile(NamedTuple):
    """The logits of some rows and some tokens."""

    rows: slice
    tokens: slice
    logits: Tensor


def tiles(head: Head, dtype: torch.dtype, memory: Tensor | None = None) -> Iterator[Tile]:
    """The logits, one tile after another: all rows of a slice of the vocabulary, then the next's.

    Args:
        head: What makes the logits.
        dtype: That of the logits.
        memory: [max(N, LEAST_ROWS) * V] of dtype, with N <= ROWS: each tile gets a place of its
            own in it. None: each tile overwrites the one before.
    """
    count, head = len(head.hidden[0]), padded(head)
    weight = head.head_weight[0]
    all_rows, all_tokens = row_chunks(head.hidden[0]), token_slices(len(weight), weight.device)
    height, width = max(map(length, all_rows)), max(map(length, all_tokens))
    place = memory
    if place is None:
        place = weight.new_empty(height * width, dtype=dtype)
    for tokens in all_tokens:
        start = 0 if memory is None else tokens.start * height
        for rows in all_rows:
            shape = length(rows), length(tokens)
            logits = place[start : start + math.prod(shape)].view(shape)
            write_logits(logits, head.tile(rows, tokens))
            yield Tile(slice(rows.start, min(rows.stop, count)), tokens, logits[:count])


def padded(head: Head) -> Head:
    """The head with rows of zeros up to LEAST_ROWS, on a CPU."""
    missing = LEAST_ROWS - len(head.hidden[0])
    if head.head_weight[0].is_cuda or not 0 < missing < LEAST_ROWS:
        return head
    hidden = [torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in head.hidden]
    return head._replace(hidden=hidden)


def write_logits(logits: Tensor, head: Head) -> None:
    """Writes the logits of one tile."""
    hidden, head_weight, bias = head
    if not logits.is_cuda:  # a CPU's BLAS has no product of bf16 to fp32
        hidden = [x.to(logits.dtype) for x in hidden]
        head_weight = [x.to(logits.dtype) for x in head_weight]
    # addmm adds the bias in the same pass, where the operands have the dtype of the logits.
    bias_is_first = bias is not None and hidden[0].dtype is logits.dtype
    if bias is not None and bias_is_first:
        torch.addmm(bias.to(logits.dtype), hidden[0], head_weight[0].t(), out=logits)
    else:
        product(logits, hidden[0], head_weight[0].t(), add=False)
    for h, w in zip(hidden[1:], head_weight[1:], strict=True):
        product(logits, h, w.t(), add=True)
    if bias is not None and not bias_is_first:
        logits += bias


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Writes out = a @ b, or out += a @ b.

    `out` may be fp32 and the operands bf16; a CPU then rounds a @ b to bf16.
    """
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not out.is_cuda:
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    elif add:  # older versions of addmm do not take an fp32 out beside bf16 operands
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def statistics(
    tiles: Iterable[Tile],
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    then: Callable[[Tile, Tensor], None] | None = None,
) -> Statistics:
    """The statistics of rows [N] over the tokens of the tiles, each of which has all the rows.

    `then` is called with each tile, when its statistics are taken, and with the maxima of its rows.
    It may overwrite the logits.
    """
    label_logit = torch.zeros_like(labels, dtype=temperature.dtype)
    each = []
    for tile in tiles:
        tokens, logits = tile.tokens, tile.logits
        # Where the label is in another tile, any other stands in for it: its log-prob is not used.
        here = (labels >= tokens.start) & (labels < tokens.stop)
        column = torch.where(here, labels - tokens.start, 0)
        part = token_logprobs_op(
            Inputs(logits, column, temperature, softcap, NEVER, with_entropy=True)
        )
        top, log_sum = part.stats
        each.append(torch.stack([top, log_sum, part.entropy]))
        found = logits.gather(1, column[:, None])[:, 0].to(top.dtype)
        if softcap:
            found = softcap * torch.tanh(found / softcap)
            found = with_bits_of_maximum(found, here, part)
        label_logit = torch.where(here, found, label_logit)
        if then is not None:
            then(tile, top)
    top, log_sum, entropy = torch.stack(each, 1)
    return merge(Statistics(label_logit, top, log_sum, entropy), label_logit, temperature)


class RowLabels(NamedTuple):
    """What the log-probs of rows [n] need besides the logits."""

    labels: Tensor  # counted from the first token of this head
    legal: Tensor  # whether the label is a token of the whole vocabulary
    temperature: Tensor  # [n] or []


class RowResults(NamedTuple):
    """The results for rows [n]."""

    logp: Tensor
    entropy: Tensor
    top: Tensor
    log_sum: Tensor


def row_results(
    tiles: Iterable[Tile],
    rows: RowLabels,
    softcap: float,
    group: dist.ProcessGroup | None = None,
) -> RowResults:
    """Log-probs, entropies and statistics.

    With a group the tiles and the labels are those of this rank's shard.
    """
    found = statistics(tiles, rows.labels, rows.temperature, softcap)
    if group is not None:
        found = over_ranks(found, group, rows.temperature)
    return label_results(found, rows)


def label_results(found: Statistics, rows: RowLabels) -> RowResults:
    """The results, from the statistics of whole rows; NaN where a label is illegal."""
    found = found._replace(log_sum=torch.where(rows.legal, found.log_sum, math.nan))
    logp = label_logprob(found, rows.temperature)
    assert found.entropy is not None  # `statistics` makes it
    entropy = torch.where(rows.legal, found.entropy, math.nan)
    return RowResults(logp, entropy, found.top, found.log_sum)


class Upstream(NamedTuple):
    """What the gradient of rows [n] needs besides the logits."""

    grad_logp: Tensor
    grad_entropy: Tensor | None
    entropy: Tensor
    top: Tensor
    log_sum: Tensor
    labels: Tensor  # counted from the first token of this head
    temperature: Tensor  # [n] or []


def overwrite(tile: Tile, upstream: Upstream, softcap: float) -> None:
    """Turns a tile's logits into their gradient, in place; a softcap of 0 is none."""
    logits, labels = tile.logits, upstream.labels - tile.tokens.start
    inputs = Inputs(logits, labels, upstream.temperature, softcap, NEVER, with_entropy=True)
    backward = BackwardInputs(
        inputs,
        upstream.grad_logp,
        upstream.grad_entropy,
        upstream.entropy,
        torch.stack([upstream.top, upstream.log_sum]),
    )
    token_logprobs_backward_out_op(BackwardOutInputs(backward, logits))


def write_products(
    logit_gradient: Tensor,
    head: Head,
    gradients: HeadGradients,
    *,
    add_hidden: bool,
    add_weight: bool,
) -> None:
    """Writes the gradients of a tile's head, from that of its logits.

    Args:
        logit_gradient: What `overwrite` left in the place of the logits.
        head: Of the tile.
        gradients: Of the tile; that of hidden in the compute dtype.
        add_hidden: Whether the gradient of hidden holds those of other tiles already.
        add_weight: The same for the gradients of head_weight and bias.
    """
    g = logit_gradient.to(head.head_weight[0].dtype)
    for grad_hidden, weight in zip(gradients.hidden, head.head_weight, strict=True):
        if grad_hidden is not None:
            product(grad_hidden, g, weight, add=add_hidden)
    for grad_weight, hidden in zip(gradients.head_weight, head.hidden, strict=True):
        if grad_weight is not None:
            product(grad_weight, g.t(), hidden, add=add_weight)
    if gradients.bias is not None:
        part = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        gradients.bias.copy_(gradients.bias + part if add_weight else part)


def reached(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Marks the rows that have a gradient: a clipped token, or one of advantage 0, has none."""
    live = grad_logp != 0
    return live if grad_entropy is None else live | (grad_entropy != 0)


def kept_rows(kept: Tensor) -> Part:
    """The indices of the rows that are kept, or ALL if all are. A GPU is waited for."""
    rows = kept.nonzero()[:, 0]
    return ALL if len(rows) == len(kept) else rows


def filled(rows: Part, count: int, x: Tensor) -> Tensor:
    """A tensor [count, ...] with x at its rows, and zeros elsewhere."""
    if isinstance(rows, slice):  # ALL
        return x
    return x.new_zeros((count, *x.shape[1:])).index_copy_(0, rows, x)
