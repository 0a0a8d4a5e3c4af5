"""linear_token_logprobs by a device's BLAS, in tiles of logits: the kernels of its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .head import (
    ALL,
    Head,
    HeadGradients,
    Part,
    RowLabels,
    RowResults,
    Tile,
    Upstream,
    concatenate,
    empty_gradients,
    filled,
    kept_rows,
    overwrite,
    reached,
    row_chunks,
    row_results,
    statistics,
    take,
    tiles,
    write_products,
)
from .linear_rows import (
    BackwardInputs,
    Gradients,
    Inputs,
    Outputs,
    PartOutputs,
    checked_labels,
)
from .shards import Statistics


def forward(x: Inputs) -> Outputs:
    """Log-probs, entropies and statistics; rows that are ignored go through no product."""
    kept, legal, _ = checked_labels(x)
    # Ignored rows are left out before the first product: they would cost as much as any.
    rows = kept_rows(kept)
    head, labels = x.head.tile(rows, ALL), take(RowLabels(x.labels, legal, x.temperature), rows)

    def results(chunk: slice) -> RowResults:
        logits = tiles(head.tile(chunk, ALL), x.logits_dtype)
        return row_results(logits, take(labels, chunk), x.softcap)

    found = concatenate([results(chunk) for chunk in row_chunks(labels.labels)])
    logp, entropy, top, log_sum = (filled(rows, len(kept), field) for field in found)
    return Outputs(logp, entropy, torch.stack([top, log_sum]))


class PartRows(NamedTuple):
    """What the statistics of rows [n] need besides the logits."""

    labels: Tensor  # counted from the first token of this part
    temperature: Tensor  # [n] or []


def part(x: Inputs) -> PartOutputs:
    """The statistics of rows over a part of the vocabulary."""
    rows = kept_rows(x.labels != x.ignore_index)
    head = x.head.tile(rows, ALL)
    labels = take(PartRows(x.labels, x.temperature), rows)

    def results(chunk: slice) -> Statistics:
        logits, of_chunk = tiles(head.tile(chunk, ALL), x.logits_dtype), take(labels, chunk)
        return statistics(logits, of_chunk.labels, of_chunk.temperature, x.softcap)

    found = concatenate([results(chunk) for chunk in row_chunks(labels.labels)])
    fields = [filled(rows, len(x.labels), field) for field in found if field is not None]
    return PartOutputs._make(fields)


def backward(x: BackwardInputs) -> Gradients:
    """The gradients; rows that none reaches go through no product."""
    inputs = x.inputs
    labels, temperature = inputs.labels, inputs.temperature
    # A clipped token, and one of advantage 0, has no gradient: its row needs no product.
    live = (labels != inputs.ignore_index) & reached(x.grad_logp, x.grad_entropy)
    rows = kept_rows(live)
    top, log_sum = x.stats
    upstream = take(
        Upstream(x.grad_logp, x.grad_entropy, x.entropy, top, log_sum, labels, temperature), rows
    )

    def turn_into_gradient(tile: Tile) -> None:
        overwrite(tile, take(upstream, tile.rows), inputs.softcap)

    return gradients_of(inputs, rows, turn_into_gradient, x.wanted)


def gradients_of(
    inputs: Inputs, rows: Part, turn_into_gradient: Callable[[Tile], None], wanted: list[bool]
) -> Gradients:
    """The gradients that are wanted, from some rows alone.

    `turn_into_gradient` is called with each tile of these rows; it overwrites their logits.
    """
    head, count = inputs.head.tile(rows, ALL), len(inputs.labels)
    dtype, compute_dtype = head.head_weight[0].dtype, inputs.temperature.dtype
    gradients = empty_gradients(head, wanted, hidden_dtype=compute_dtype, weight_dtype=dtype)
    # The tiles come slice by slice, so that a slice's gradient is complete before the next.
    all_tiles = tiles(head, inputs.logits_dtype)
    for tokens, slice_tiles in groupby(all_tiles, key=lambda tile: tile.tokens):
        write_slice(
            slice_tiles,
            head.tile(ALL, tokens),
            gradients.tile(ALL, tokens),
            turn_into_gradient,
            compute_dtype,
            add_hidden=tokens.start > 0,
        )
    hidden = [
        None if grad is None else filled(rows, count, grad.to(dtype)) for grad in gradients.hidden
    ]
    found = gradients._replace(hidden=hidden).tensors()
    return Gradients([head.head_weight[0].new_empty(0) if grad is None else grad for grad in found])


def write_slice(
    slice_tiles: Iterable[Tile],
    head: Head,
    gradients: HeadGradients,
    turn_into_gradient: Callable[[Tile], None],
    compute_dtype: torch.dtype,
    *,
    add_hidden: bool,
) -> None:
    """Writes the gradients of head_weight and bias of a slice, and adds its share of hidden's.

    Args:
        slice_tiles: The logits of the slice.
        head: Of the slice.
        gradients: Of the slice; that of hidden in the compute dtype.
        turn_into_gradient: Overwrites the logits of a tile with their gradient.
        compute_dtype: That of sums over tiles.
        add_hidden: Whether the gradient of hidden holds those of other slices already.
    """
    sums = gradients
    if len(row_chunks(head.hidden[0])) > 1:  # a sum over tiles is to be rounded once
        sums = in_dtype(gradients, compute_dtype)
    for tile in slice_tiles:
        turn_into_gradient(tile)
        write_products(
            tile.logits,
            head.tile(tile.rows, ALL),
            sums.tile(tile.rows, ALL),
            add_hidden=add_hidden,
            add_weight=tile.rows.start > 0,
        )
    for grad, total in zip(gradients.tensors(), sums.tensors(), strict=True):
        if grad is not None and total is not None and total is not grad:
            grad.copy_(total)


def in_dtype(gradients: HeadGradients, dtype: torch.dtype) -> HeadGradients:
    """The gradients of head_weight and bias in another dtype; that of hidden as it is."""

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    return HeadGradients(
        gradients.hidden, [cast(x) for x in gradients.head_weight], cast(gradients.bias)
    )
