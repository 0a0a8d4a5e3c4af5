"""Several labels of each row by a device's BLAS, in tiles of logits: the kernels of its page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .head import (
    ALL,
    RowLabels,
    Tile,
    Upstream,
    concatenate,
    filled,
    kept_rows,
    length,
    overwrite,
    reached,
    row_chunks,
    take,
)
from .head import tiles as tiles_of
from .linear_rows import Gradients, Inputs
from .linear_rows_blas import gradients_of
from .linear_several_labels import BackwardInputs, checked_labels
from .row_softmax import Inputs as RowInputs
from .row_statistics import row_statistics_op
from .several_labels import (
    Outputs,
    label_gradients,
    leading,
    per_label,
    times_slope,
    write_at,
)
from .shards import NEVER, Statistics, finite_max, label_logprob, merge


class LabelsOfTile(NamedTuple):
    """What one tile tells of the labels [n, K] of its rows."""

    here: Tensor  # bool: the label is in the tile
    logit: Tensor  # after softcap, if it is here
    leads: Tensor  # bool: it is here, and the highest of the tile
    highest: Tensor  # [n]: the highest logit of the tile, before softcap


class TileStatistics(NamedTuple):
    """What one tile tells of its rows [n], in the compute dtype."""

    top: Tensor
    log_sum: Tensor
    entropy: Tensor
    sum_p_squared: Tensor
    mean_logit: Tensor


class Results(NamedTuple):
    """The results for rows [n]."""

    logp: Tensor  # [n, K]
    entropy: Tensor  # [n]
    top: Tensor  # [n]
    log_sum: Tensor  # [n]
    sum_p_squared: Tensor  # [n]
    is_top1: Tensor  # bool [n, K]
    mean_logit: Tensor  # [n]


def in_tile(labels: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Which labels [n, K] are in a tile, and their columns; 0 for another."""
    here = (labels >= tile.tokens.start) & (labels < tile.tokens.stop)
    return here, torch.where(here, labels - tile.tokens.start, 0)


def read_tile(
    tile: Tile, labels: Tensor, temperature: Tensor, softcap: float
) -> tuple[LabelsOfTile, TileStatistics]:
    """Reads the logits of a tile; a label outside of its tokens is in another."""
    here, column = in_tile(labels, tile)
    found = tile.logits.gather(1, column).to(temperature.dtype)
    # The highest label that is here is kept out of the sum; if none is, any token stands in.
    lead = column.gather(1, leading(found, column, here))
    part = row_statistics_op(
        RowInputs(tile.logits, lead[:, 0], temperature, softcap, NEVER, with_entropy=True)
    )
    top, log_sum = part.stats
    is_lead, highest = here & (column == lead), top
    if softcap:  # another tanh has another last bit: a label that leads has the maximum's
        highest = tile.logits.amax(1).to(top.dtype)
        found = softcap * torch.tanh(found / softcap)
        has_maximum = is_lead & (part.logp == -log_sum)[:, None]
        found = torch.where(has_maximum, top[:, None], found)
    of_labels = LabelsOfTile(here, found, is_lead & part.is_top1[:, None], highest)
    statistics = part.entropy, part.sum_p_squared, part.mean_logit
    return of_labels, TileStatistics(top, log_sum, *statistics)


def results_of_labels(tiles: Iterable[Tile], rows: RowLabels, softcap: float) -> Results:
    """The results for rows [n] whose labels are [n, K]; NaN where one is illegal, as devices do."""
    t, labels = rows.temperature, rows.labels
    label_logit = torch.zeros_like(labels, dtype=t.dtype)
    is_top1 = torch.zeros_like(labels, dtype=torch.bool)
    top = torch.full_like(label_logit[:, 0], -math.inf)
    highest = torch.full_like(top, math.nan)  # before softcap, of the tiles so far
    each, sizes = [], []
    for tile in tiles:
        found, of_rows = read_tile(tile, labels, t, softcap)
        label_logit = torch.where(found.here, found.logit, label_logit)
        # Softcap may leave different logits equal: those before it decide.
        is_top1 = torch.where((found.highest <= highest)[:, None], is_top1, found.leads)
        highest = torch.fmax(highest, found.highest)
        top = torch.maximum(top, of_rows.top)
        each.append(of_rows)
        sizes.append(length(tile.tokens))
    parts = TileStatistics(*(torch.stack(field) for field in zip(*each, strict=True)))  # [R, n]
    whole = merged(parts, sizes, t)
    log_sum = torch.where(rows.legal, whole.log_sum, math.nan)
    of_labels = Statistics(label_logit, top[:, None], log_sum[:, None], None)
    logp = label_logprob(of_labels, per_label(t))
    return Results(
        torch.where(labels == NEVER, 0.0, logp),
        torch.where(rows.legal, whole.entropy, math.nan),
        top,
        log_sum,
        torch.where(rows.legal, whole.sum_p_squared, math.nan),
        is_top1 & ~log_sum.isnan()[:, None],
        torch.where(rows.legal, whole.mean_logit, math.nan),
    )


def merged(parts: TileStatistics, sizes: list[int], temperature: Tensor) -> TileStatistics:
    """The statistics of whole rows [n], from those of tiles [R, n] of these sizes."""
    rows = Statistics(parts.top[0], parts.top, parts.log_sum, parts.entropy)
    _, top, log_sum, entropy = merge(rows, parts.top[0], temperature)
    assert entropy is not None  # each tile has one
    below_top = (parts.top.double() - finite_max(top).double()) / temperature.double()
    share = (parts.log_sum.double() + below_top - log_sum.double()).exp()
    squares = reduce(torch.add, (share * share * parts.sum_p_squared).unbind())
    means = zip(parts.mean_logit, sizes, strict=True)
    mean = reduce(torch.add, [x * (size / sum(sizes)) for x, size in means])
    return TileStatistics(top, log_sum, entropy, squares.clamp(max=1.0).to(top.dtype), mean)


def forward(x: Inputs) -> Outputs:
    """Log-probs, entropies and statistics; rows without a label go through no product."""
    kept, legal, _ = checked_labels(x)
    live = kept.any(1)
    # Ignored rows are left out before the first product: they would cost as much as any.
    rows = kept_rows(live)
    labels = torch.where(kept, x.labels, NEVER)
    head = x.head.tile(rows, ALL)
    of_rows = take(RowLabels(labels, (legal | ~kept).all(1), x.temperature), rows)

    def results(chunk: slice) -> Results:
        logits = tiles_of(head.tile(chunk, ALL), x.logits_dtype)
        return results_of_labels(logits, take(of_rows, chunk), x.softcap)

    found = concatenate([results(chunk) for chunk in row_chunks(of_rows.labels)])
    logp, entropy, top, log_sum, *statistics = (filled(rows, len(live), y) for y in found)
    return Outputs(logp, entropy, torch.stack([top, log_sum]), *statistics)


class AtLabels(NamedTuple):
    """What the gradient of rows [n] is at their labels."""

    labels: Tensor  # [n, K]; NEVER: ignored
    gradient: Tensor  # [n, K], of z


def backward(x: BackwardInputs) -> Gradients:
    """The gradients; rows that none reaches go through no product."""
    inputs, t, softcap = x.inputs, x.inputs.temperature, x.inputs.softcap
    kept = inputs.labels != inputs.ignore_index
    g = torch.where(kept, x.grad_logp, 0.0)
    labels = torch.where(kept, inputs.labels, NEVER)
    live = kept.any(1) & reached((g != 0).any(1), x.grad_entropy)
    rows = kept_rows(live)
    total = g.sum(1, dtype=torch.float64).to(g.dtype)
    top, log_sum = x.stats
    nowhere = torch.full_like(labels[:, 0], -1)
    upstream = take(Upstream(total, x.grad_entropy, x.entropy, top, log_sum, nowhere, t), rows)
    gradient = label_gradients(labels, g, x.logp, x.grad_entropy, x.entropy)
    at_labels = take(AtLabels(labels, gradient), rows)

    def turn_into_gradient(tile: Tile) -> None:
        of_rows = take(upstream, tile.rows)
        of_labels = take(at_labels, tile.rows)
        here, column = in_tile(of_labels.labels, tile)
        gradient = times_slope(
            of_labels.gradient, tile.logits, column, of_rows.temperature, softcap
        )
        overwrite(tile, of_rows, softcap)
        write_at(tile.logits, here, column, gradient)

    return gradients_of(inputs, rows, turn_into_gradient, x.wanted)
