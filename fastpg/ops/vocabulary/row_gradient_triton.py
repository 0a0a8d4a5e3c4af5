"""The gradient of a row of logits in Triton, from the statistics of the row."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows_triton import INFINITY, LN2, LOG2E, capped, exponent, finite_max, widened, words


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
def gradients(c, numbers, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr):
    """The gradients of logits that are not the label's, from the `numbers` of their row."""
    origin, scale, log2_sum, a, b, softcap = numbers
    c = capped(c, softcap, SOFTCAP)
    log2_p = exponent((c - origin) * scale - log2_sum, ENTROPY)
    d = tl.exp2(log2_p) * (a + b * log2_p if ENTROPY else a)
    return d * softcap_slope(c, softcap, SOFTCAP) if SOFTCAP else d


@triton.jit
def write_tile(
    x,
    dx,
    left,
    numbers,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Writes the gradients of the BLOCK logits of a tile, or of so many as are left."""
    offsets = tl.arange(0, BLOCK)
    inside = None if left is None else offsets < left
    if ALIGNED and x.dtype.element_ty == tl.bfloat16:
        pair = tl.arange(0, BLOCK // 2)
        both = None if left is None else pair * 2 < left
        lower, upper = widened(tl.load(words(x) + pair, both, eviction_policy=EVICTION))
        lower = gradients(lower, numbers, ENTROPY, SOFTCAP)
        d = tl.interleave(lower, gradients(upper, numbers, ENTROPY, SOFTCAP))
    else:
        c = tl.load(x + offsets, inside, eviction_policy=EVICTION)
        d = gradients(c, numbers, ENTROPY, SOFTCAP)
    tl.store(dx + offsets, d.to(dx.dtype.element_ty), inside, eviction_policy=EVICTION)


@triton.jit
def write_gradient(
    x,
    dx,
    place,
    y,
    length,
    live,
    top,
    log_sum,
    inv_temperature,
    g_logp,
    g_entropy,
    h,
    softcap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Writes the gradient of `length` logits: zeros, and x is not read, if the row is not `live`.

    Args:
        x: The address of the logits.
        dx: The address of the gradient; it may be x.
        place: The label's place in x; outside of it, if the label is elsewhere.
        y: The label's logit after softcap.
        length: How many logits there are.
        live: Whether a gradient reaches the row.
        top: The row's maximum.
        log_sum: The row's log sum.
        inv_temperature: 1 / T.
        g_logp: dL/dlogp.
        g_entropy: dL/dentropy.
        h: The row's entropy, in nats.
        softcap: The softcap; not read without SOFTCAP.
    """
    whole = tl.where(live, length // BLOCK * BLOCK, 0)
    read = tl.where(live, length, 0)
    origin, log2_sum = finite_max(top), log_sum * LOG2E
    slope = inv_temperature
    # But for the label, dL/dx_j = -slope p_j (g_logp + g_entropy (log p_j + H)), and that is
    # p_j (a + b log2 p_j).
    a = -slope * (g_logp + g_entropy * h)
    b = -slope * (g_entropy * LN2)
    scale = slope * LOG2E
    numbers = origin, scale, log2_sum, a, b, softcap
    tl.debug_barrier()  # dx may be x: all threads have read the label's logit, before any writes
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        write_tile(x + start, dx + start, None, numbers, ENTROPY, SOFTCAP, ALIGNED, BLOCK, EVICTION)
    for start in range(whole, read, BLOCK):  # one tile that is not full, or none
        left = length - start
        write_tile(x + start, dx + start, left, numbers, ENTROPY, SOFTCAP, ALIGNED, BLOCK, EVICTION)
    for start in range(0, tl.where(live, 0, length), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dx.dtype.element_ty)
        tl.store(dx + offsets, zeros, mask=offsets < length, eviction_policy=EVICTION)
    log2_y = exponent((y - origin) * scale - log2_sum, True)
    slope *= softcap_slope(y, softcap, SOFTCAP)
    d_label = label_gradient(y, log2_y, slope, g_logp, g_entropy, h)
    # The label's gradient goes over what a thread wrote there: after all threads have written.
    tl.debug_barrier()
    here = live & (place >= 0) & (place < length)
    tl.store(dx + place, d_label.to(dx.dtype.element_ty), mask=here)
