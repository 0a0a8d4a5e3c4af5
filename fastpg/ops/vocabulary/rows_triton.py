"""A row of logits in Triton: its statistics by lanes. `row_results_triton` has what they come to,
and `row_gradient_triton` the gradient.

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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(math.inf)


@triton.jit
def exponent(y, ENTROPY: tl.constexpr):
    """y; for an entropy bounded below, so that 2^y y is 0, not 0 * inf, where 2^y vanishes.

    A NaN stays. Without an entropy the bound would be for nothing: 2^-inf is 0.
    """
    return tl.maximum(y, -1000.0, propagate_nan=tl.PropagateNan.ALL) if ENTROPY else y


@triton.jit
def finite_max(top):
    """The maximum to subtract: an all -inf row subtracts 0, else it would be NaN."""
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def fold(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums [ROWS] of x [ROWS, COLUMNS], in pairs: a + b is b + a, whatever the layout."""
    # Each turn halves the columns: it adds neighbours, which a reshape to pairs puts on one axis.
    if COLUMNS == 1:
        x = tl.reshape(x, [ROWS])
    for i in tl.static_range(16):
        if (COLUMNS >> i) > 1:
            x = tl.sum(tl.reshape(x, [ROWS * COLUMNS >> (i + 1), 2]), 1)
    return x


@triton.jit
def tanh(x):
    """An odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    # The coefficients are those of tanhf in Cephes, for |x| < 0.625, the square of which is 0.39.
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    elsewhere = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)
    return tl.where(z < 0.390625, p * z * x + x, elsewhere)


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
def words(x):
    """A pointer to bf16 as one to words of two bf16 each."""
    return x.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def widened(pairs):
    """The lower and the upper bf16 of words in fp32: a bf16 is the upper half of an fp32.

    So each takes one operation; a conversion takes one and a half.
    """
    lower = (pairs << 16).to(tl.float32, bitcast=True)
    return lower, (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def inside_or_lowest(x, inside, softcap, SOFTCAP: tl.constexpr):
    """The logits after softcap; -inf, if they are not `inside`. None: all are."""
    c = capped(x, softcap, SOFTCAP)
    return c if inside is None else tl.where(inside, c, -INFINITY)


@triton.jit
def load_vectors(
    x,
    left,
    softcap,
    SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The parts of a tile whose vectors are aligned: each vector of a lane is loaded at once.

    Two parts hold a vector of bf16, for the lower and for the upper half of its words.
    """
    PAIRS: tl.constexpr = VECTOR // 2
    parts = ()
    lane = tl.arange(0, LANES)[:, None]
    for vector in tl.static_range(VECTORS):
        if x.dtype.element_ty == tl.bfloat16:
            # An offset counts words, of two logits each.
            offsets = (vector * LANES + lane) * PAIRS + tl.arange(0, PAIRS)
            inside = None if left is None else offsets * 2 < left
            pairs = tl.load(words(x) + offsets, inside, eviction_policy=EVICTION)
            lower, upper = widened(pairs)
            parts += (inside_or_lowest(lower, inside, softcap, SOFTCAP),)
            parts += (inside_or_lowest(upper, inside, softcap, SOFTCAP),)
        else:
            offsets = (vector * LANES + lane) * VECTOR + tl.arange(0, VECTOR)
            inside = None if left is None else offsets < left
            c = tl.load(x + offsets, inside, eviction_policy=EVICTION)
            parts += (inside_or_lowest(c, inside, softcap, SOFTCAP),)
    return parts


@triton.jit
def load_singly(
    x,
    left,
    softcap,
    SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The parts of a tile that may begin anywhere: one logit of each lane is loaded at once.

    They are in the order in which `sum_parts` adds the same logits as it does those of vectors.
    """
    parts = ()
    lane = tl.arange(0, LANES)[:, None] * VECTOR
    HALVES: tl.constexpr = 2 if (x.dtype.element_ty == tl.bfloat16 and VECTOR > 1) else 1
    for i in tl.static_range(VECTORS * VECTOR):
        # The half of a word runs fastest, then the vector, then the column.
        vector = i // HALVES % VECTORS
        column = i // (HALVES * VECTORS) * HALVES + i % HALVES
        offsets = vector * LANES * VECTOR + column + lane
        inside = None if left is None else offsets < left
        c = tl.load(x + offsets, inside, eviction_policy=EVICTION)
        parts += (inside_or_lowest(c, inside, softcap, SOFTCAP),)
    return parts


@triton.jit
def load_tile(
    x,
    left,
    softcap,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The logits of a tile after softcap: a tuple of parts, each [LANES, columns].

    Each lane owns VECTORS vectors of VECTOR neighbouring logits. A part holds one of its vectors,
    or less, for all lanes. In a single tensor [VECTORS, LANES, VECTOR] Triton 3.6 would give the
    vectors of a lane to several threads, which then had to exchange numbers in the loop.

    left: How many logits there are, and -inf beyond; None: a whole tile.
    """
    if ALIGNED:
        return load_vectors(x, left, softcap, SOFTCAP, VECTORS, LANES, VECTOR, EVICTION)
    else:
        return load_singly(x, left, softcap, SOFTCAP, VECTORS, LANES, VECTOR, EVICTION)


@triton.jit
def sum_parts(parts):
    """The sum of each lane's numbers [LANES], in pairs: neighbouring parts first, then columns."""
    for _ in tl.static_range(8):
        if len(parts) > 1:
            sums = ()
            for i in tl.static_range(len(parts) // 2):
                sums += (parts[2 * i] + parts[2 * i + 1],)
            parts = sums
    LANES: tl.constexpr = parts[0].shape[0]
    COLUMNS: tl.constexpr = parts[0].shape[1]
    return fold(parts[0], LANES, COLUMNS)


@triton.jit
def add_tile(top, total, weighted, parts, scale, ENTROPY: tl.constexpr):
    """Adds the parts of a tile to the statistics [LANES] of the lanes.

    `total` and `weighted` are RowStats::sum and weighted of C++, the latter in units of log2.
    """
    # One maximum serves the whole tile, so that the lane rescales its sums once.
    most = parts[0]
    for i in tl.static_range(1, len(parts)):
        most = tl.maximum(most, parts[i])
    new_top = tl.maximum(top, tl.max(most, 1))
    origin = finite_max(new_top)
    exponentials, products = (), ()
    for i in tl.static_range(len(parts)):
        y = exponent((parts[i] - origin[:, None]) * scale, ENTROPY)
        e = tl.exp2(y)
        exponentials += (e,)
        if ENTROPY:
            products += (e * y,)
    shift = exponent((top - origin) * scale, ENTROPY)
    factor = tl.exp2(shift)
    if ENTROPY:
        # e^(d + s) (d + s) is e^s (e^d d + s e^d): both sums go below the new maximum at once.
        weighted = factor * (weighted + shift * total) + sum_parts(products)
    return new_top, factor * total + sum_parts(exponentials), weighted


@triton.jit
def merge_lanes(top, total, weighted, scale, LANES: tl.constexpr, ENTROPY: tl.constexpr):
    """The statistics of the row, from those of its lanes."""
    row_top = tl.max(top, 0)
    shift = exponent((top - finite_max(row_top)) * scale, ENTROPY)
    factor = tl.exp2(shift)
    if ENTROPY:
        weighted = factor * (weighted + shift * total)
    weighted = fold(weighted, 1, LANES)
    total = fold(factor * total, 1, LANES)
    return row_top, tl.sum(total, 0), tl.sum(weighted, 0)  # each of one element


@triton.jit
def record_label(flag, row, label):
    """Counts a bad label, and keeps the first one for fastpg.check()."""
    # Only the program that counts first writes, so that row and label belong together.
    if tl.atomic_add(flag, 1, sem="relaxed") == 0:
        tl.store(flag + 1, row)
        tl.store(flag + 2, label)
