"""Row statistics on the GPU, besides the results of token_logprobs: one read of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._flags import label_flag
from ..common.triton import load_kept
from .row_results_triton import join_label, without_label
from .row_softmax import OP, Inputs
from .row_statistics import Outputs, allocate, reference
from .rows_triton import (
    INFINITY,
    LOG2E,
    add_tile,
    capped,
    exponent,
    finite_max,
    fold,
    inverse_temperature,
    load_tile,
    merge_lanes,
    record_label,
    row_offset,
    sum_parts,
)
from .token_logprobs_triton import LogitRows, constants, rows_jit

# Where logits after softcap are closer than this part of it, those before softcap decide.
UNCLEAR = tl.constexpr(1e-5)


@triton.jit
def add_sums(before, top, squares, logits, lowest, parts, scale, ENTROPY: tl.constexpr):
    """Adds the parts of a tile to the sums of the lanes: of e^2d, of logits, and how many are -inf.

    The maximum of a lane was `before`, and is `top`. The logits that are -inf are only counted:
    some are beyond the end of the row.
    """
    origin = finite_max(top)
    products, finite, counts = (), (), ()
    for i in tl.static_range(len(parts)):
        e = tl.exp2(exponent((parts[i] - origin[:, None]) * scale, ENTROPY))
        products += (e * e,)
        is_lowest = parts[i] == -INFINITY
        finite += (tl.where(is_lowest, 0.0, parts[i]),)
        counts += (tl.where(is_lowest, 1.0, 0.0),)
    factor = tl.exp2(exponent((before - origin) * scale, ENTROPY))
    squares = factor * factor * squares + sum_parts(products)
    return squares, logits + sum_parts(finite), lowest + sum_parts(counts)


@triton.jit
def merge_sums(top, squares, logits, lowest, padding, scale, LANES: tl.constexpr):
    """The row's sum of e^2d, below its maximum, and of its logits, from the sums of its lanes."""
    factor = tl.exp2(exponent((top - finite_max(tl.max(top, 0))) * scale, True))
    square = tl.sum(fold(factor * factor * squares, 1, LANES), 0)
    logit = tl.sum(fold(logits, 1, LANES), 0)
    # More -inf than there is padding are logits of the row, and then so is their sum.
    return square, tl.where(tl.sum(lowest, 0) > padding, -INFINITY, logit)


@triton.jit
def row_means(square, logit, log_sum, vocab, inv_temperature):
    """The sum of p squared and the mean of z, from what `merge_sums` makes; NaN if the row is."""
    # The sum of e^2d over the square of the sum of e^d, whose logarithm is log_sum.
    p_squared = square * tl.exp2(log_sum * LOG2E * -2.0)
    p_squared = tl.where(p_squared > 1.0, 1.0, p_squared)  # rounding makes it larger
    mean = tl.div_rn(logit, vocab.to(tl.float32)) * inv_temperature
    return p_squared, tl.where(log_sum != log_sum, log_sum, mean)


@triton.jit
def leads_row(x, label, y, c, others, length, softcap, BLOCK: tl.constexpr):
    """Whether the label's logit is the highest, of equal ones the first.

    y, c: The label's logit before and after softcap; others: the maximum of the others after it.
    """
    # Softcap flattens large logits: two that differ before it may be equal after it.
    clear = c > others + softcap * UNCLEAR
    near = (c >= others - softcap * UNCLEAR) & (c != -INFINITY)
    beaten = 0
    # A row whose label clearly leads, or clearly does not, is not read again.
    for start in range(0, tl.where(near & ~clear, length, 0), BLOCK):
        place = start + tl.arange(0, BLOCK)
        other = tl.load(x + place, place < length, other=-INFINITY).to(tl.float32)
        beats = (other > y) | ((other == y) & (place < label))
        beaten += tl.sum(beats.to(tl.int32), 0)
    return clear | (near & (beaten == 0))


@triton.jit
def read_lanes(
    x,
    length,
    softcap,
    scale,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Reads a row: the statistics of its lanes, and the sums that `add_sums` makes."""
    TILE: tl.constexpr = VECTORS * VECTOR * LANES
    top = tl.full([LANES], -INFINITY, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    logits = tl.zeros([LANES], tl.float32)
    lowest = tl.zeros([LANES], tl.float32)
    whole = length // TILE * TILE
    for start in range(0, whole, TILE):
        parts = load_tile(x + start, None, softcap, SOFTCAP, ALIGNED, VECTORS, LANES, VECTOR, "")
        before = top
        top, total, weighted = add_tile(top, total, weighted, parts, scale, ENTROPY)
        squares, logits, lowest = add_sums(
            before, top, squares, logits, lowest, parts, scale, ENTROPY
        )
    for start in range(whole, length, TILE):  # one tile that is not full, or none
        left = length - start
        parts = load_tile(x + start, left, softcap, SOFTCAP, ALIGNED, VECTORS, LANES, VECTOR, "")
        before = top
        top, total, weighted = add_tile(top, total, weighted, parts, scale, ENTROPY)
        squares, logits, lowest = add_sums(
            before, top, squares, logits, lowest, parts, scale, ENTROPY
        )
    return top, total, weighted, squares, logits, lowest


@rows_jit
def statistics_kernel(
    logits,
    labels,
    temperature,
    logp,
    entropy,
    stats,
    sum_p_squared,
    is_top1,
    mean_logit,
    flag,
    rows: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab: tl.int64,
    temperature_stride: tl.int32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program per row, as in token_logprobs. An ignored row has length 0: it is not read."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    kept = label != ignore_index
    legal = (label >= 0) & (label < vocab)
    if kept & ~legal:
        record_label(flag, row, label)
    here = kept & legal
    inv_temperature = inverse_temperature(temperature + row * temperature_stride, kept)
    scale = inv_temperature * LOG2E
    x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED)
    length = tl.where(kept, vocab, 0)
    length = tl.multiple_of(length, VECTOR) if ALIGNED else length
    y = load_kept(x, label, here).to(tl.float32)
    c = capped(y, softcap, SOFTCAP)

    top, total, weighted, squares, sum_logits, lowest = read_lanes(
        x, length, softcap, scale, ENTROPY, SOFTCAP, ALIGNED, VECTORS, LANES, VECTOR
    )
    TILE: tl.constexpr = VECTORS * VECTOR * LANES
    # What lies beyond the end of the row was loaded as -inf, up to a whole tile.
    padding = tl.cdiv(length, TILE) * TILE - length
    square, logit = merge_sums(top, squares, sum_logits, lowest, padding, scale, LANES)
    place = tl.where(here, label, 0).to(tl.int32)
    top, total, weighted = without_label(
        top, total, weighted, x, place, length, softcap, scale, ENTROPY, SOFTCAP, LANES, VECTOR
    )
    top, total, weighted = merge_lanes(top, total, weighted, scale, LANES, ENTROPY)
    value, row_top, log_sum, h = join_label(
        c, top, total, weighted, inv_temperature, legal, ENTROPY
    )
    tl.store(logp + row, tl.where(kept, value, 0.0))
    tl.store(stats + row, tl.where(kept, row_top, 0.0))
    tl.store(stats + rows.to(tl.int64) + row, tl.where(kept, log_sum, 0.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(kept, h, 0.0))
    p_squared, mean = row_means(square, logit, log_sum, vocab, inv_temperature)
    tl.store(sum_p_squared + row, tl.where(kept, p_squared, 0.0))
    tl.store(mean_logit + row, tl.where(kept, mean, 0.0))
    leads = leads_row(x, place, y, c, top, length, softcap, TILE) & (log_sum == log_sum)
    tl.store(is_top1 + row, (kept & leads).to(tl.int8))


def token_logprobs_statistics(x: Inputs) -> Outputs:
    """Launches a program for each row."""
    if x.logits.dtype is torch.float64:
        return reference(x)
    rows, outputs = LogitRows(x), allocate(x)
    if rows.count:
        statistics_kernel[(rows.count,)](
            **rows.arguments,
            logp=outputs.logp,
            entropy=outputs.entropy,
            stats=outputs.stats,
            sum_p_squared=outputs.sum_p_squared,
            is_top1=outputs.is_top1.view(torch.int8),
            mean_logit=outputs.mean_logit,
            flag=label_flag(OP, x.logits.device),
            **constants(forward=True, **rows.features(entropy=x.with_entropy)),
        )
    return outputs
