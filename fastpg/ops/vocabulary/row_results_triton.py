"""What a row of logits in Triton comes to: its label's log-prob, its log sum and its entropy.

The label is kept out of the sum of the others, as with_label of csrc/vocabulary/online_softmax.h
does: as its probability goes to 1, a sum that held its 1 would round away what the others add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton import load_kept
from .rows_triton import (
    INFINITY,
    LN2,
    LOG2E,
    add_tile,
    capped,
    exponent,
    finite_max,
    inside_or_lowest,
    load_tile,
    merge_lanes,
)

# ln 2 in two parts. The first has few digits: its products with whole numbers are exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def without_label(
    top,
    total,
    weighted,
    x,
    label,
    length,
    softcap,
    scale,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The statistics [LANES] of the lanes without the label.

    Its lane is read again, a part in LANES of the row: all threads share its vectors. In the loop
    over the row the label would cost two instructions an element.
    """
    STRIDE: tl.constexpr = LANES * VECTOR  # how far neighbouring vectors of a lane lie apart
    own = label % STRIDE // VECTOR
    places = tl.arange(0, LANES)[:, None] * STRIDE + own * VECTOR + tl.arange(0, VECTOR)
    own_top = tl.full([LANES], -INFINITY, tl.float32)
    own_total = tl.zeros([LANES], tl.float32)
    own_weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, length, STRIDE * LANES):
        place = start + places
        inside = (place < length) & (place != label)
        c = inside_or_lowest(tl.load(x + place, inside), inside, softcap, SOFTCAP)
        own_top, own_total, own_weighted = add_tile(
            own_top, own_total, own_weighted, (c,), scale, ENTROPY
        )
    own_top, own_total, own_weighted = merge_lanes(
        own_top, own_total, own_weighted, scale, LANES, ENTROPY
    )
    is_own = tl.arange(0, LANES) == own
    top = tl.where(is_own, own_top, top)
    total = tl.where(is_own, own_total, total)
    return top, total, tl.where(is_own, own_weighted, weighted)


@triton.jit
def exp_of_gap(x, rounded_away):
    """e^(x + rounded_away) of x <= 0, to the last digits: tl.exp would round x log2(e) first."""
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)  # below it is 0 in fp32
    k = tl.floor(x * LOG2E + 0.5)
    return tl.exp((x - k * LN2_HIGH) - k * LN2_LOW + rounded_away) * tl.exp2(k)


@triton.jit
def log1p(x):
    """log(1 + x): what 1 + x rounds away is put right by a factor."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * tl.div_rn(x, u - 1.0))


@triton.jit
def join_label(c, top, total, weighted, inv_temperature, legal, ENTROPY: tl.constexpr):
    """Log-prob, maximum, log sum and entropy of a row, from the label's logit and the others.

    Without `legal` the log-prob and the log sum are NaN: the latter spoils the gradient too.
    """
    leads = c >= top
    row_top = tl.where(leads, c, top)
    # Where the label leads, the others are scaled by e^(their maximum - c), whose exponent is the
    # difference of two logits and what its rounding leaves out.
    some = top != -INFINITY
    gap = tl.where(some, top - c, -INFINITY)
    part = gap - top
    rounded_away = tl.where(some & leads, (top - (gap - part)) - (c + part), 0.0)
    factor = exp_of_gap(gap * inv_temperature, rounded_away * inv_temperature)
    others = tl.where(leads, total * factor, total)
    d = (c - finite_max(row_top)) * inv_temperature
    e = tl.exp2(exponent(d * LOG2E, True))
    row_total = others + e
    log_sum = tl.where(leads, log1p(others), tl.log(tl.where(row_total == 0, 1.0, row_total)))
    log_sum = tl.where(legal, log_sum, float("nan"))
    h = 0.0
    if ENTROPY:
        shift = exponent(gap * inv_temperature * LOG2E, True)
        weighted = tl.where(leads, factor * (weighted + shift * total), weighted)
        weighted += e * exponent(d * LOG2E, True)
        h = log_sum - tl.div_rn(weighted * LN2, row_total)
        h = tl.where(h < 0, 0.0, h)  # rounding must not make it negative
        h = tl.where(row_total != 0, h, 0.0)
    return d - log_sum, row_top, log_sum, h


@triton.jit
def read_row(
    x,
    label,
    here,
    legal,
    length,
    softcap,
    inv_temperature,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Reads a row of `length` logits.

    Returns the label's logit after softcap, the label's log-prob, the maximum of the row, its log
    sum and its entropy. The label's logit is read where `here`; without `legal` the row is NaN.
    """
    scale = inv_temperature * LOG2E
    c_label = capped(load_kept(x, label, here), softcap, SOFTCAP)
    TILE: tl.constexpr = VECTORS * VECTOR * LANES
    top = tl.full([LANES], -INFINITY, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole = length // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=STAGES):
        parts = load_tile(
            x + start, None, softcap, SOFTCAP, ALIGNED, VECTORS, LANES, VECTOR, EVICTION
        )
        top, total, weighted = add_tile(top, total, weighted, parts, scale, ENTROPY)
    for start in range(whole, length, TILE):  # one tile that is not full, or none
        parts = load_tile(
            x + start, length - start, softcap, SOFTCAP, ALIGNED, VECTORS, LANES, VECTOR, EVICTION
        )
        top, total, weighted = add_tile(top, total, weighted, parts, scale, ENTROPY)
    top, total, weighted = without_label(
        top,
        total,
        weighted,
        x,
        tl.where(here, label, 0).to(tl.int32),
        length,
        softcap,
        scale,
        ENTROPY=ENTROPY,
        SOFTCAP=SOFTCAP,
        LANES=LANES,
        VECTOR=VECTOR,
    )
    top, total, weighted = merge_lanes(top, total, weighted, scale, LANES, ENTROPY)
    value, row_top, log_sum, h = join_label(
        c_label, top, total, weighted, inv_temperature, legal, ENTROPY
    )
    return c_label, value, row_top, log_sum, h
