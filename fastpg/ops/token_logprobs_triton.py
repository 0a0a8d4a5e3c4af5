"""token_logprobs on the GPU: one read of the logits forward, one read and one write backward.

The maths is that of csrc/online_softmax.h: z = c / T with c the logits after softcap, exponentials
in units of log2, a row as (max c, sum of e^d, sum of e^d d). A lane keeps the statistics of what it
alone reads, so the loop over the row has no barrier; the lanes merge once, at its end.

Sums are folded in pairs (`fold`), an order that no memory layout changes, and nothing is contracted
to a fused multiply-add (FP_FUSION): the bits of a row depend on its values, V and its dtype alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._flags import label_flag
from .._library import REFERENCES

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(math.inf)

# Which products the compiler can fuse with a sum depends on which thread holds what, and that on
# the alignment of the rows: a row must not change its bits when it moves.
FP_FUSION = False


class Tiles(NamedTuple):
    """How one program walks along a row."""

    warps: int
    vectors: int  # of 16 bytes that a thread has in flight: forward
    blocks: int  # tiles of one vector per thread that a program writes: backward


# (compute capability from, bytes of a row from): the first that fits. The number of rows does not
# count, and nothing is tuned at run time: either would show in the bits.
TABLE = {
    # 32 bytes a thread, five programs at 48 registers: 40 KB in flight on a multiprocessor, where
    # latency times bandwidth asks for 12 (A100), 25 (H200), 38 (B200). Four vectors take 80
    # registers: half the programs, as much in flight, and a spill on sm_100 if rows are unaligned.
    (0, 16384): Tiles(warps=8, vectors=2, blocks=32),
    # A tile of 16 KB would be mostly empty; a short row ends in its merge of lanes, so few of them.
    (0, 0): Tiles(warps=4, vectors=1, blocks=8),
}


def tiles(capability: int, row_bytes: int) -> Tiles:
    return next(t for (c, size), t in TABLE.items() if capability >= c and row_bytes >= size)


@triton.jit
def bounded(y):
    """So that 2^y y is 0, not 0 * inf, where 2^y vanishes. A NaN stays."""
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
    """1 / T; a temperature that is no finite positive number spoils its row."""
    t = tl.load(temperature, mask=mask, other=1.0)
    return tl.where((t > 0) & (t < INFINITY), tl.div_rn(1.0, t), float("nan"))


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """c in fp32."""
    x = x.to(tl.float32)
    return softcap * tanh(x * tl.div_rn(1.0, softcap)) if SOFTCAP else x


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a row begins; `inner` rows lie inner_stride apart, groups of them outer_stride."""
    offset = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    return tl.multiple_of(offset, VECTOR) if ALIGNED else offset


@triton.jit
def tile_offsets(VECTORS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """[VECTORS, LANES, VECTOR]: neighbouring lanes read neighbouring vectors."""
    vectors = tl.arange(0, VECTORS)[:, None, None] * (LANES * VECTOR)
    return vectors + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)


@triton.jit
def add_tile(top, total, weighted, c, scale, LANES: tl.constexpr, WIDTH: tl.constexpr,
             ENTROPY: tl.constexpr):  # fmt: skip
    """RowStats of each lane [LANES], in units of log2, after a tile c [vectors, LANES, vector]."""
    new_top = tl.maximum(top, tl.max(tl.max(c, 2), 0))
    origin = finite_max(new_top)
    y = bounded((c - origin[None, :, None]) * scale)
    e = tl.exp2(y)
    shift = bounded((top - origin) * scale)
    factor = tl.exp2(shift)
    if ENTROPY:
        ey = fold(tl.permute(e * y, 1, 0, 2), LANES, WIDTH)
        weighted = factor * (weighted + shift * total) + ey
    e = fold(tl.permute(e, 1, 0, 2), LANES, WIDTH)
    return new_top, factor * total + e, weighted


@triton.jit
def merge_lanes(top, total, weighted, scale, LANES: tl.constexpr):
    """RowStats of the row, from those of its lanes."""
    row_top = tl.max(top, 0)
    shift = bounded((top - finite_max(row_top)) * scale)
    factor = tl.exp2(shift)
    weighted = fold(factor * (weighted + shift * total), 1, LANES)
    total = fold(factor * total, 1, LANES)
    return row_top, tl.sum(total, 0), tl.sum(weighted, 0)  # sums of one


@triton.jit
def record(flag, row, label):
    """Counts a bad label; the first one is kept for fastpg.check()."""
    if tl.atomic_add(flag, 1, sem="relaxed") == 0:
        tl.store(flag + 1, row)
        tl.store(flag + 2, label)


# Only logits and out are specialised, on the alignment of their address: nothing compiles anew for
# other shapes, strides or numbers.
FORWARD_PLAIN = [
    *("labels", "temperature", "logp", "entropy", "stats", "flag", "rows", "inner"),
    *("outer_stride", "inner_stride", "vocab", "temperature_stride", "softcap", "ignore_index"),
]


@triton.jit(do_not_specialize=FORWARD_PLAIN)
def forward_kernel(
    logits, labels, temperature, logp, entropy, stats, flag,
    rows: tl.int32, inner: tl.int32, outer_stride: tl.int64, inner_stride: tl.int64,
    vocab: tl.int64, temperature_stride: tl.int32, softcap: tl.float32, ignore_index: tl.int64,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per row. An ignored row has length 0: it is not read."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    kept = label != ignore_index
    legal = (label >= 0) & (label < vocab)
    length = tl.where(kept, vocab, 0)
    inv_temperature = inverse_temperature(temperature + row * temperature_stride, kept)
    scale = inv_temperature * LOG2E
    x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED)
    c_label = capped(tl.load(x + label, mask=kept & legal, other=0.0), softcap, SOFTCAP)

    WIDTH: tl.constexpr = VECTORS * VECTOR
    TILE: tl.constexpr = WIDTH * LANES
    offsets = tile_offsets(VECTORS, LANES, VECTOR)
    top = tl.full([LANES], -INFINITY, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    length = tl.multiple_of(length, VECTOR) if ALIGNED else length
    whole = length // TILE * TILE
    for start in range(0, whole, TILE):
        c = capped(tl.load(x + start + offsets), softcap, SOFTCAP)
        top, total, weighted = add_tile(top, total, weighted, c, scale, LANES, WIDTH, ENTROPY)
    for start in range(whole, length, TILE):  # what is left, if anything is
        inside = offsets < length - start
        c = capped(tl.load(x + start + offsets, mask=inside, other=0.0), softcap, SOFTCAP)
        c = tl.where(inside, c, -INFINITY)
        top, total, weighted = add_tile(top, total, weighted, c, scale, LANES, WIDTH, ENTROPY)

    row_top, total_sum, weighted_sum = merge_lanes(top, total, weighted, scale, LANES)
    log_sum = tl.log(tl.where(total_sum == 0, 1.0, total_sum))
    if kept & ~legal:
        record(flag, row, label)
    log_sum = tl.where(legal, log_sum, float("nan"))  # spoils the gradient of the row too
    value = (c_label - finite_max(row_top)) * inv_temperature - log_sum
    tl.store(logp + row, tl.where(kept, value, 0.0))
    tl.store(stats + row, tl.where(kept, row_top, 0.0))
    tl.store(stats + rows.to(tl.int64) + row, tl.where(kept, log_sum, 0.0))
    if ENTROPY:
        value = log_sum - tl.div_rn(weighted_sum * LN2, total_sum)
        value = tl.where(value < 0, 0.0, value)  # rounding must not make it negative
        tl.store(entropy + row, tl.where(kept & (total_sum != 0), value, 0.0))


@triton.jit
def softcap_slope(c, softcap, SOFTCAP: tl.constexpr):
    """dc/dx of a capped logit."""
    t = c * tl.div_rn(1.0, softcap) if SOFTCAP else 0.0
    return 1.0 - t * t


@triton.jit
def label_gradient(c, log2_p, slope, g_logp, g_entropy, entropy):
    """dL/dx at the label: 1 - p as -expm1(log p) keeps its digits as p -> 1."""
    through_entropy = tl.exp2(log2_p) * (g_entropy * (log2_p * LN2 + entropy))
    d = (-expm1(log2_p * LN2) * g_logp - through_entropy) * slope
    return tl.where(c == -INFINITY, 0.0, d)


BACKWARD_PLAIN = [
    *("grad_logp", "grad_entropy", "entropy", "stats", "labels", "temperature", "rows", "inner"),
    *("outer_stride", "inner_stride", "vocab", "temperature_stride", "softcap", "ignore_index"),
    "slices",
]


@triton.jit(do_not_specialize=BACKWARD_PLAIN)
def backward_kernel(
    grad_logp, grad_entropy, entropy, stats, logits, labels, temperature, out,
    rows: tl.int32, inner: tl.int32, outer_stride: tl.int64, inner_stride: tl.int64,
    vocab: tl.int64, temperature_stride: tl.int32, softcap: tl.float32, ignore_index: tl.int64,
    slices: tl.int32,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per slice of a row. A row that no gradient reaches is written, not read.

    out may be logits: a thread reads what it writes before it does so, the label's logit too.
    """
    row = tl.program_id(0) // slices
    begin = (tl.program_id(0) % slices).to(tl.int64) * (BLOCK * BLOCKS)
    length = tl.minimum(vocab - begin, BLOCK * BLOCKS).to(tl.int32)
    label = tl.load(labels + row)
    g_logp, g_entropy = tl.load(grad_logp + row), 0.0
    reached = g_logp != 0.0
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + row)
        reached = reached | (g_entropy != 0.0)
    live = reached & (label != ignore_index)
    readable, written = tl.where(live, length, 0), row.to(tl.int64) * vocab
    if ALIGNED:
        length, readable = tl.multiple_of(length, VECTOR), tl.multiple_of(readable, VECTOR)
        written = tl.multiple_of(written, VECTOR)
    dx = out + written + begin
    x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED) + begin

    # Of a row that is not live everything here is 0, and so is what is written.
    g_logp, g_entropy = tl.where(live, g_logp, 0.0), tl.where(live, g_entropy, 0.0)
    origin = finite_max(tl.load(stats + row, mask=live, other=0.0))
    log2_sum = tl.load(stats + rows.to(tl.int64) + row, mask=live, other=0.0) * LOG2E
    slope = inverse_temperature(temperature + row * temperature_stride, live)
    h = tl.load(entropy + row, mask=live, other=0.0) if ENTROPY else 0.0
    # dL/dz_j = -p_j (g_logp + g_entropy (log p_j + H)) = p_j (a + b log2 p_j) but for the label.
    a, b, scale = -slope * (g_logp + g_entropy * h), -slope * (g_entropy * LN2), slope * LOG2E

    here = live & (label >= begin) & (label < begin + length)
    at = tl.where(here, label - begin, -1).to(tl.int32)
    y = capped(tl.load(x + at, mask=here, other=0.0), softcap, SOFTCAP)
    log2_y = bounded((y - origin) * scale - log2_sum)
    slope *= softcap_slope(y, softcap, SOFTCAP)
    d_label = label_gradient(y, log2_y, slope, g_logp, g_entropy, h)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        c = capped(tl.load(x + offsets, mask=offsets < readable, other=0.0), softcap, SOFTCAP)
        log2_p = bounded((c - origin) * scale - log2_sum)
        d = tl.exp2(log2_p) * (a + b * log2_p if ENTROPY else a)
        d = d * softcap_slope(c, softcap, SOFTCAP) if SOFTCAP else d
        d = tl.where(offsets == at, d_label, d)
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=offsets < length)


def options(
    forward: bool, entropy: bool, softcap: bool, aligned: bool, dtype: torch.dtype, vocab: int,
    capability: int,
) -> dict:  # fmt: skip
    """The compile-time arguments, for a launch and for compilation ahead of time alike."""
    warps, vectors, blocks = tiles(capability, vocab * dtype.itemsize)
    lanes, vector = 32 * warps, 16 // dtype.itemsize
    if forward:
        shape = {"VECTORS": vectors, "LANES": lanes}
    else:
        shape = {"BLOCK": 2 * lanes * vector, "BLOCKS": blocks // 2}
    flags = {"ENTROPY": entropy, "SOFTCAP": softcap, "ALIGNED": aligned, "VECTOR": vector}
    return flags | shape | {"num_warps": warps, "enable_fp_fusion": FP_FUSION}


class Rows:
    """Logits, labels and temperatures as the kernels take them, copied only where they must be."""

    def __init__(self, logits, labels, temperature, softcap, ignore_index):
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            logits = logits.contiguous()
        if logits.dim() > 3:
            logits = logits.flatten(0, -3)
        outer, inner = (0, 0, *logits.stride()[:-1])[-2:]
        shape = labels.numel(), (1, *logits.shape)[-2], outer, inner
        self.tensors = logits, labels.contiguous(), temperature.contiguous()
        self.vocab, self.softcap, self.dtype = logits.shape[-1], softcap, logits.dtype
        self.scalars = *shape, self.vocab, int(temperature.dim() > 0), softcap, ignore_index
        steps = (n * logits.itemsize for n in (outer, inner, self.vocab))
        self.aligned = all(address % 16 == 0 for address in (logits.data_ptr(), *steps))
        self.capability = (
            torch.cuda.get_device_capability(logits.device)[0] if logits.is_cuda else 9
        )

    def options(self, *, forward: bool, entropy: bool) -> dict:
        flags = forward, entropy, self.softcap > 0, self.aligned
        return options(*flags, self.dtype, self.vocab, self.capability)


def fp64_by_reference(launcher):
    """fp64 is for checks of gradients; no kernel here computes in it."""

    def launch(*args):
        if args[-5].dtype is torch.float64:  # logits
            return REFERENCES[getattr(torch.ops.fastpg, launcher.__name__).default](*args)
        with torch.cuda.device_of(args[-5]):
            return launcher(*args)

    return launch


def forward(entropy, *args):
    """logp [...], entropy [...], stats [2, ...] in fp32; without the entropy, logp in its place."""
    rows, labels = Rows(*args), args[1]
    logp = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    entropies = torch.empty_like(logp) if entropy else logp
    stats = logp.new_empty((2, *labels.shape))
    if labels.numel():
        forward_kernel[(labels.numel(),)](
            *rows.tensors, logp, entropies, stats, label_flag("token_logprobs", labels.device),
            *rows.scalars, **rows.options(forward=True, entropy=entropy),
        )  # fmt: skip
    return logp, entropies, stats


@fp64_by_reference
def token_logprobs(*args):
    return forward(False, *args)[::2]


@fp64_by_reference
def token_logprobs_entropy(*args):
    return forward(True, *args)


@fp64_by_reference
def token_logprobs_backward_out(out, grad_logp, grad_entropy, entropy, stats, *args):
    rows, with_entropy = Rows(*args), grad_entropy is not None
    grad_logp = grad_logp.contiguous()
    per_row = (grad_entropy.contiguous(), entropy) if with_entropy else (grad_logp, grad_logp)
    compiled = rows.options(forward=False, entropy=with_entropy)
    slices = triton.cdiv(rows.vocab, compiled["BLOCK"] * compiled["BLOCKS"])
    if out.numel():
        backward_kernel[(rows.scalars[0] * slices,)](
            grad_logp, *per_row, stats, *rows.tensors, out, *rows.scalars, slices, **compiled
        )


def token_logprobs_backward(*args):
    out = torch.empty_like(args[4], memory_format=torch.contiguous_format)
    token_logprobs_backward_out(out, *args)
    return out
