"""A row of logits in Triton: its statistics and its gradient.

The maths is that of csrc/vocabulary/online_softmax.h: z = c / T with c the logits after softcap,
exponentials in units of log2, a row as (max c, sum of e^d, sum of e^d d). A lane keeps the
statistics of what it alone reads, so the loop over the row has no barrier; the lanes merge once, at
its end.

Sums are folded in pairs (`fold`), an order that no memory layout changes, and the launchers forbid
fused multiply-adds: the bits of a row depend on its values, V and its dtype alone.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..common.triton import load_kept

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(math.inf)


@triton.jit
def bounded_exponent(y):
    """Bounds y below, so that 2^y y is 0, not 0 * inf, where 2^y vanishes. A NaN stays."""
    return tl.maximum(y, -1000.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_max(top):
    """The maximum to subtract: an all -inf row subtracts 0, else it would be NaN."""
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def fold(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums [ROWS] of x [ROWS, COLUMNS], in pairs: a + b is b + a, whatever the layout."""
    for i in tl.static_range(16):
        if (COLUMNS >> i) > 1:
            x = tl.sum(tl.reshape(x, [ROWS * COLUMNS >> (i + 1), 2]), 1)
    return x


@triton.jit
def tanh(x):
    """An odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    elsewhere = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)
    return tl.where(z < 0.390625, p * z * x + x, elsewhere)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0: its series near 0, where the subtraction would cancel."""
    p = 1.0 / 40320
    p = p * x + 1.0 / 5040
    p = p * x + 1.0 / 720
    p = p * x + 1.0 / 120
    p = p * x + 1.0 / 24
    p = p * x + 1.0 / 6
    p = p * x + 0.5
    return tl.where(x > -0.5, p * (x * x) + x, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def inverse_temperature(temperature, mask):
    """1 / T. A temperature that is no finite positive number spoils its row."""
    t = tl.load(temperature, mask=mask, other=1.0)
    return tl.where((t > 0) & (t < INFINITY), tl.div_rn(1.0, t), float("nan"))


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """The logit after softcap, in fp32."""
    x = x.to(tl.float32)
    return softcap * tanh(x * tl.div_rn(1.0, softcap)) if SOFTCAP else x


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a row begins: `inner` rows lie inner_stride apart, groups of them outer_stride."""
    offset = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    return tl.multiple_of(offset, VECTOR) if ALIGNED else offset


@triton.jit
def tile_offsets(VECTORS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets [VECTORS, LANES, VECTOR] of a tile: neighbouring lanes read neighbouring vectors."""
    vectors = tl.arange(0, VECTORS)[:, None, None] * (LANES * VECTOR)
    return vectors + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)


@triton.jit
def add_tile(
    top, total, weighted, c, scale, LANES: tl.constexpr, WIDTH: tl.constexpr, ENTROPY: tl.constexpr
):
    """Adds a tile c [vectors, LANES, vector] to the statistics [LANES] of the lanes.

    `total` and `weighted` are RowStats::sum and weighted of C++, the latter in units of log2.
    """
    new_top = tl.maximum(top, tl.max(tl.max(c, 2), 0))
    origin = finite_max(new_top)
    y = bounded_exponent((c - origin[None, :, None]) * scale)
    e = tl.exp2(y)
    shift = bounded_exponent((top - origin) * scale)
    factor = tl.exp2(shift)
    if ENTROPY:
        ey = fold(tl.permute(e * y, 1, 0, 2), LANES, WIDTH)
        weighted = factor * (weighted + shift * total) + ey
    e = fold(tl.permute(e, 1, 0, 2), LANES, WIDTH)
    return new_top, factor * total + e, weighted


@triton.jit
def merge_lanes(top, total, weighted, scale, LANES: tl.constexpr):
    """The statistics of the row, from those of its lanes."""
    row_top = tl.max(top, 0)
    shift = bounded_exponent((top - finite_max(row_top)) * scale)
    factor = tl.exp2(shift)
    weighted = fold(factor * (weighted + shift * total), 1, LANES)
    total = fold(factor * total, 1, LANES)
    return row_top, tl.sum(total, 0), tl.sum(weighted, 0)  # each of one element


@triton.jit
def record_label(flag, row, label):
    """Counts a bad label, and keeps the first one for fastpg.check()."""
    if tl.atomic_add(flag, 1, sem="relaxed") == 0:
        tl.store(flag + 1, row)
        tl.store(flag + 2, label)


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
    WIDTH: tl.constexpr = VECTORS * VECTOR
    TILE: tl.constexpr = WIDTH * LANES
    offsets = tile_offsets(VECTORS, LANES, VECTOR)
    top = tl.full([LANES], -INFINITY, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole = length // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=STAGES):
        c = tl.load(x + start + offsets, eviction_policy=EVICTION)
        c = capped(c, softcap, SOFTCAP)
        top, total, weighted = add_tile(top, total, weighted, c, scale, LANES, WIDTH, ENTROPY)
    for start in range(whole, length, TILE):  # one tile that is not full, or none
        inside = offsets < length - start
        c = capped(tl.load(x + start + offsets, mask=inside, other=0.0), softcap, SOFTCAP)
        c = tl.where(inside, c, -INFINITY)
        top, total, weighted = add_tile(top, total, weighted, c, scale, LANES, WIDTH, ENTROPY)
    row_top, total_sum, weighted_sum = merge_lanes(top, total, weighted, scale, LANES)
    log_sum = tl.log(tl.where(total_sum == 0, 1.0, total_sum))
    log_sum = tl.where(legal, log_sum, float("nan"))  # spoils the gradient of the row too
    value = (c_label - finite_max(row_top)) * inv_temperature - log_sum
    h = 0.0
    if ENTROPY:
        h = log_sum - tl.div_rn(weighted_sum * LN2, total_sum)
        h = tl.where(h < 0, 0.0, h)  # rounding must not make it negative
        h = tl.where(total_sum != 0, h, 0.0)
    return c_label, value, row_top, log_sum, h


@triton.jit
def softcap_slope(c, softcap, SOFTCAP: tl.constexpr):
    """The derivative of a logit after softcap by the logit."""
    t = c * tl.div_rn(1.0, softcap) if SOFTCAP else 0.0
    return 1.0 - t * t


@triton.jit
def label_gradient(c, log2_p, slope, g_logp, g_entropy, entropy):
    """The gradient at the label, where -expm1(log p) keeps the digits of 1 - p as p -> 1."""
    through_entropy = tl.exp2(log2_p) * (g_entropy * (log2_p * LN2 + entropy))
    d = (-expm1(log2_p * LN2) * g_logp - through_entropy) * slope
    return tl.where(c == -INFINITY, 0.0, d)


@triton.jit
def write_gradient(
    x,
    dx,
    place,
    y,
    length,
    readable,
    top,
    log_sum,
    inv_temperature,
    g_logp,
    g_entropy,
    h,
    softcap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Writes the gradient of `length` logits.

    place, y: The label's place in x, < 0 if it is elsewhere, and its logit after softcap.
    readable: Equal to length; or 0 if no gradient reaches the row, and then all other numbers that
        are given of it are 0.
    """
    origin, log2_sum = finite_max(top), log_sum * LOG2E
    slope = inv_temperature
    # But for the label, dL/dx_j = -slope p_j (g_logp + g_entropy (log p_j + H)), and that is
    # p_j (a + b log2 p_j).
    a = -slope * (g_logp + g_entropy * h)
    b = -slope * (g_entropy * LN2)
    scale = slope * LOG2E
    log2_y = bounded_exponent((y - origin) * scale - log2_sum)
    slope *= softcap_slope(y, softcap, SOFTCAP)
    d_label = label_gradient(y, log2_y, slope, g_logp, g_entropy, h)
    for start in tl.range(0, length, BLOCK, num_stages=STAGES):
        offsets = start + tl.arange(0, BLOCK)
        c = tl.load(x + offsets, mask=offsets < readable, other=0.0, eviction_policy=EVICTION)
        c = capped(c, softcap, SOFTCAP)
        log2_p = bounded_exponent((c - origin) * scale - log2_sum)
        d = tl.exp2(log2_p) * (a + b * log2_p if ENTROPY else a)
        d = d * softcap_slope(c, softcap, SOFTCAP) if SOFTCAP else d
        d = tl.where(offsets == place, d_label, d).to(dx.dtype.element_ty)
        tl.store(dx + offsets, d, mask=offsets < length, eviction_policy=EVICTION)
