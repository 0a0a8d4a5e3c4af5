"""token_logprobs on the GPU: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._flags import label_flag
from ..._library import REFERENCES
from .rows_triton import (
    capped,
    inverse_temperature,
    read_row,
    record,
    row_offset,
    write_gradient,
)

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
    if kept & ~legal:
        record(flag, row, label)
    inv_temperature = inverse_temperature(temperature + row * temperature_stride, kept)
    x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED)
    length = tl.where(kept, vocab, 0)
    length = tl.multiple_of(length, VECTOR) if ALIGNED else length
    _, value, top, log_sum, h = read_row(
        x, label, kept & legal, legal, length, softcap, inv_temperature,
        ENTROPY, SOFTCAP, VECTORS, LANES, VECTOR, STAGES=None, EVICTION="",
    )  # fmt: skip
    tl.store(logp + row, tl.where(kept, value, 0.0))
    tl.store(stats + row, tl.where(kept, top, 0.0))
    tl.store(stats + rows.to(tl.int64) + row, tl.where(kept, log_sum, 0.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(kept, h, 0.0))


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
    top = tl.load(stats + row, mask=live, other=0.0)
    log_sum = tl.load(stats + rows.to(tl.int64) + row, mask=live, other=0.0)
    inv_temperature = inverse_temperature(temperature + row * temperature_stride, live)
    h = tl.load(entropy + row, mask=live, other=0.0) if ENTROPY else 0.0
    here = live & (label >= begin) & (label < begin + length)
    at = tl.where(here, label - begin, -1).to(tl.int32)
    y = capped(tl.load(x + at, mask=here, other=0.0), softcap, SOFTCAP)
    write_gradient(
        x, dx, at, y, length, readable, top, log_sum, inv_temperature, g_logp, g_entropy, h,
        softcap, ENTROPY, SOFTCAP, BLOCK, STAGES=None, EVICTION="",
    )  # fmt: skip


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
