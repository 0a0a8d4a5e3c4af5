"""The LM head in tiles, some rows by a slice of the vocabulary: the products of both linear ops.

A tile's logits are made by BLAS and stay in one buffer; its statistics are those of
token_logprobs. Parts of a row merge, be they slices here or the shards of several processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .shards import NEVER, Statistics, label_logprob, merge, over_ranks
from .token_logprobs import (
    BackwardInputs,
    BackwardOutInputs,
    Inputs,
    token_logprobs_backward_out_op,
    token_logprobs_op,
)

# A tile's tokens, about: of a thousand rows they stay in a CPU's last cache; a GPU wants large
# products. They do not depend on the number of rows, nor do therefore the bits that this is to
# answer for. And its rows, at most.
WIDTH = {"cpu": 4096, "cuda": 16384}
ROWS = {"cpu": 4096, "cuda": 8192}

# With fewer, a CPU's product in fp32 takes another way, and rounds otherwise.
LEAST_ROWS = 4

ALL = slice(None)


class Factors(NamedTuple):
    """Of logits Σ hidden_i @ weight_iᵀ + bias; or what these are to get, None: nothing."""

    hidden: list[Tensor | None]  # [N, H_i]
    weight: list[Tensor | None]  # [V, H_i]
    bias: Tensor | None  # [V]

    @classmethod
    def of(cls, flat: list[Tensor | None]) -> Factors:
        terms = len(flat) // 2
        return cls([*flat[:terms]], [*flat[terms:-1]], flat[-1])

    def flat(self) -> list[Tensor | None]:
        return [*self.hidden, *self.weight, self.bias]

    def tile(self, rows: slice, tokens: slice) -> Factors:
        weight, bias = parts(tokens, *self.weight), parts(tokens, self.bias)
        return Factors(parts(rows, *self.hidden), weight, *bias)

    def memory(self, of_hidden: torch.dtype, of_weight: torch.dtype, wanted: list[bool]) -> Factors:
        """For the gradients that are wanted, in the order of flat(); of hidden zeros."""
        makers = [(Tensor.new_zeros, of_hidden)] * len(self.hidden)
        makers += [(Tensor.new_empty, of_weight)] * (len(self.weight) + 1)
        each = zip(self.flat(), makers, wanted, strict=True)
        return Factors.of([make(x, x.shape, dtype=t) if w else None for x, (make, t), w in each])


def parts(which: slice | Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Some rows of each tensor, but for None and for a 0-d one, which is the same for all rows."""
    return [x if x is None or x.dim() == 0 else x[which] for x in tensors]


def length(part: slice) -> int:
    return part.stop - part.start


def chunks(count: int, most: int, multiple: int = 1) -> list[slice]:
    """0..count in parts of one size, `most` or less, but that each begins at a multiple."""
    many = -(-max(count, 1) // most)
    bounds = {count * i // many // multiple * multiple for i in range(many)}
    return [slice(*ends) for ends in pairwise([*sorted(bounds), count])]


def chunks_of(rows: Tensor) -> list[slice]:
    """The rows of tiles."""
    return chunks(len(rows), ROWS[rows.device.type])


def slices_of(weight: Tensor) -> list[slice]:
    """Aligned. None is of a few tokens, whose product BLAS would round in another way."""
    return chunks(len(weight), WIDTH[weight.device.type], multiple=16)


def by_chunks(function: Callable[[slice], tuple[Tensor, ...]], rows: Tensor) -> list[Tensor]:
    """The outputs of function(a chunk of rows), put together."""
    each = [function(chunk) for chunk in chunks_of(rows)]
    return [torch.cat(outputs) for outputs in zip(*each, strict=True)]


Tile = tuple[slice, slice, Tensor]  # its rows, its tokens, their logits


def tiles(head: Factors, dtype: torch.dtype, memory: Tensor | None = None) -> Iterator[Tile]:
    """The logits, one tile after another in the same place: all rows of a slice, then the next's.

    memory: [max(N, LEAST_ROWS) * V] of dtype, N <= ROWS, in which each gets a place of its own.
    """
    head, given, weight = padded(head), len(head.hidden[0]), head.weight[0]
    of_rows = chunks_of(head.hidden[0])
    of_tokens = slices_of(weight)
    height, width = (max(map(length, ranges)) for ranges in (of_rows, of_tokens))
    place = weight.new_empty(height * width, dtype=dtype) if memory is None else memory
    for tokens in of_tokens:
        at = 0 if memory is None else tokens.start * height
        for rows in of_rows:
            shape = length(rows), length(tokens)
            logits = place[at : at + math.prod(shape)].view(shape)
            write_logits(logits, head.tile(rows, tokens))
            yield slice(rows.start, min(rows.stop, given)), tokens, logits[:given]


def padded(head: Factors) -> Factors:
    """With LEAST_ROWS."""
    missing = LEAST_ROWS - len(head.hidden[0])
    if head.weight[0].is_cuda or not 0 < missing < LEAST_ROWS:
        return head
    rows = [torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in head.hidden]
    return head._replace(hidden=rows)


def write_logits(logits: Tensor, head: Factors) -> None:
    hidden, weight, bias = head
    if not logits.is_cuda:  # a CPU's BLAS has no product of bf16 to fp32
        hidden, weight = ([x.to(logits.dtype) for x in terms] for terms in (hidden, weight))
    if with_bias := bias is not None and hidden[0].dtype is logits.dtype:
        torch.addmm(bias.to(logits.dtype), hidden[0], weight[0].t(), out=logits)
    for i, (h, w) in enumerate(zip(hidden, weight, strict=True)):
        if i > 0 or not with_bias:
            product(logits, h, w.t(), add=i > 0)
    if bias is not None and not with_bias:
        logits += bias


def statistics(
    tiles: Iterable[Tile], labels: Tensor, temperature: Tensor, softcap: float
) -> tuple[Tensor, ...]:
    """label_logit, top, log_sum, entropy: each [N], of the rows over this part of the vocabulary.

    label_logit is capped, and that of 0 where the label is in no slice.
    """
    label_logit, each = torch.zeros_like(labels, dtype=temperature.dtype), []
    anything = torch.zeros_like(labels)
    for _, tokens, logits in tiles:
        _, entropy, stats = token_logprobs_op(
            Inputs(logits, anything, temperature, softcap, NEVER, True)
        )
        each.append(torch.stack([*stats, entropy]))
        here = (labels >= tokens.start) & (labels < tokens.stop)
        at = torch.where(here, labels - tokens.start, 0)[:, None]
        label_logit = torch.where(here, logits.gather(1, at)[:, 0], label_logit)
    if softcap:
        label_logit = softcap * torch.tanh(label_logit / softcap)
    top, log_sum, entropy = torch.stack(each, 1)
    return merge(Statistics(label_logit, top, log_sum, entropy), label_logit, temperature)


def logp_and_statistics(tiles, labels, legal, temperature, softcap, group=None):
    """logp, entropy, top, log_sum [N]; NaN where no label is, which a device cannot raise about.

    With a group tiles and labels are those of this rank's shard.
    """
    of_row = statistics(tiles, labels, temperature, softcap)
    if group is not None:
        of_row = over_ranks(of_row, group, temperature)
    of_row = of_row._replace(log_sum=torch.where(legal, of_row.log_sum, math.nan))
    logp = label_logprob(of_row, temperature)
    return logp, torch.where(legal, of_row.entropy, math.nan), of_row.top, of_row.log_sum


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b; of bf16 into fp32 too, where a CPU rounds a @ b to bf16."""
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not out.is_cuda:
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    elif add:  # older versions of addmm do not take an fp32 out beside bf16 operands
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def write_gradients(
    logits: Tensor, upstream, rows, head: Factors, into: Factors, *, add: tuple[bool, bool]
) -> None:
    """Turns a tile's logits into their gradient g, in place, and that into the head's gradients.

    upstream: grad_logp, grad_entropy, entropy, stats; rows: labels, temperature, softcap, with
        labels counted from the tile's first token.
    head, into: of the tile; into.hidden in the type that is computed in.
    add: whether `hidden`, and `weight` and `bias`, hold the gradients of other tiles already.
    """
    inputs = Inputs(logits, *rows, NEVER, True)
    token_logprobs_backward_out_op(BackwardOutInputs(BackwardInputs(inputs, *upstream), logits))
    g = logits.to(head.weight[0].dtype)
    for dhidden, weight in zip(into.hidden, head.weight, strict=True):
        if dhidden is not None:
            product(dhidden, g, weight, add=add[0])
    for dweight, hidden in zip(into.weight, head.hidden, strict=True):
        if dweight is not None:
            product(dweight, g.t(), hidden, add=add[1])
    if into.bias is not None:
        part = g.sum(0, dtype=rows[1].dtype)
        into.bias.copy_(into.bias + part if add[1] else part)


def reached(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """The rows that have a gradient: not those of a clipped token, or of an advantage of 0."""
    live = grad_logp != 0
    return live if grad_entropy is None else live | (grad_entropy != 0)


def kept_rows(kept: Tensor) -> slice | Tensor:
    """The indices of the rows that are kept (on a GPU waiting for it); ALL where that is all."""
    rows = kept.nonzero()[:, 0]
    return ALL if len(rows) == len(kept) else rows


def filled(rows: slice | Tensor, count: int, x: Tensor) -> Tensor:
    """[count, ...]: x at its rows, zeros elsewhere."""
    return x if rows is ALL else x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)
