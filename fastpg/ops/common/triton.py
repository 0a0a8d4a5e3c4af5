"""What the Triton kernels of several ops share.

Sums over tokens have two stages: blocks of a constant size give partial results in fp64, one
program merges them in their order. Neither stage depends on anything but the number of tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import log_ratio as specification
from .stats import Stats

MAX_LOG_RATIO = tl.constexpr(specification.MAX_LOG_RATIO)
INFINITY = tl.constexpr(math.inf)
BLOCK = tl.constexpr(1024)  # A program has so many tokens at a time.
CHUNK = tl.constexpr(256)  # A merge takes so many partial results at a time.

# Fused multiply-adds are off: versions of Triton choose them differently, and bits would change.
OPTIONS = {"enable_fp_fusion": False}


def jit(kernel: Callable, specialised: tuple[str, ...] = ()):
    """triton.jit that compiles nothing anew for other sizes, alignments or numbers.

    The alignment of the pointers named in `specialised` is the exception.
    """
    arguments = inspect.signature(kernel).parameters.values()
    # Triton otherwise compiles apart what is 1 and what 16 divides: once more for a new batch.
    plain = [a.name for a in arguments if "constexpr" not in str(a.annotation)]
    plain = [name for name in plain if name not in specialised]
    return triton.jit(do_not_specialize=plain)(kernel)


def field_of(kind: type[Stats], name: str) -> tl.constexpr:
    """The place of a statistic among the FIELDS of its kind."""
    return tl.constexpr(kind.FIELDS.index(name))


def blocks_of(x: torch.Tensor) -> int:
    """How many programs take all elements of a tensor."""
    return triton.cdiv(x.numel(), BLOCK.value)


@triton.jit
def log_ratio(logp: tl.tensor, other: tl.tensor):
    """logp - other; 0 where they are equal, as two -inf are. NaN passes through."""
    return tl.where(logp == other, 0.0, logp - other)


@triton.jit
def bounded(d: tl.tensor, bound: tl.tensor):
    """A log-ratio within +-bound; NaN passes through."""
    return tl.where(d > bound, bound, tl.where(d < -bound, -bound, d))


@triton.jit
def held_log_ratio(logp: tl.tensor, other: tl.tensor, bound: tl.tensor, beyond: tl.tensor):
    """logp - other at its bound, if it is beyond; its slope is then the factor `beyond`.

    It does not move with a log-prob of -inf.
    """
    size = tl.abs(logp - other)  # infinite if one of them is, NaN if both are
    slope = tl.where(size <= bound, 1.0, tl.where(size < INFINITY, beyond, 0.0))
    return bounded(log_ratio(logp, other), bound), slope


@triton.jit
def load_kept(x: tl.tensor, offset: tl.tensor, kept: tl.tensor):
    """The values at these offsets; 0, and nothing read, where a token is not kept."""
    return tl.load(x + offset, mask=kept, other=0)


@triton.jit
def load_mask(mask: tl.tensor, offset: tl.tensor, inside: tl.tensor):
    """Which of these tokens a bool tensor marks; none of those outside, which are not read."""
    return tl.load(mask + offset, mask=inside, other=0).to(tl.int1)


@triton.jit
def number(x: tl.tensor, like: tl.tensor):
    """A Python float, handed over as fp64, in the dtype of `like`. The interpreter keeps floats."""
    return (tl.full([], 0.0, tl.float64) + x).to(like.dtype)


@triton.jit
def block_offsets():
    """The tokens of this program, in int64."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def sequence_bounds(
    sequence: tl.tensor, length: tl.tensor, tokens: tl.tensor, cu_seqlens: tl.tensor
):
    """First token of a sequence and the one after its last; never outside the tokens there are."""
    if cu_seqlens is None:
        begin = sequence.to(tl.int64) * length
        end = begin + length
    else:
        # Nobody looks at the values of cu_seqlens on a GPU: wrong ones must not lead outside.
        begin = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), tokens)
    return begin, end


@triton.jit
def exp_excess(x: tl.tensor):
    """e^x, and e^x - 1 - x: near 0 the latter by its series, where the subtractions cancel."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 10
    e = tl.exp(x)
    p = x * (1.0 / TERMS) + 1.0  # This is Horner's scheme, from the last term on.
    for i in tl.static_range(TERMS - 3):
        p = p * x * (1.0 / (TERMS - 1 - i)) + 1.0
    return e, tl.where(tl.abs(x) < 0.5, p * (x * x) * 0.5, (e - 1.0) - x)


@triton.jit
def block_moments(x: tl.tensor, kept: tl.tensor, count: tl.tensor):
    """Mean of the kept x, and the sum of their squared distances from it, in fp64."""
    x = tl.where(kept, x.to(tl.float64), 0.0)
    mean = tl.sum(x, 0) / tl.maximum(count, 1.0)
    d = tl.where(kept, x - mean, 0.0)
    return mean, tl.sum(d * d, 0)


@triton.jit
def column(
    parts: tl.tensor, field: tl.tensor, start: tl.tensor, rows: tl.tensor, FIELDS: tl.constexpr
):
    """CHUNK values of a field of parts [rows, FIELDS]."""
    row = start + tl.arange(0, CHUNK)
    return tl.load(parts + row.to(tl.int64) * FIELDS + field, mask=row < rows, other=0.0)


@triton.jit
def merged_moments(
    parts: tl.tensor, rows: tl.tensor, count: tl.tensor, mean: tl.tensor, FIELDS: tl.constexpr
):
    """(n, mean, M2) of all the blocks; parts holds those of each, from the fields count and mean.

    M2 = sum of M2_i + n_i (mean_i - mean)^2 (Chan): nothing cancels.
    """
    # Each lane adds every CHUNK-th block, then the lanes are added: the order is always the same.
    n, total = tl.zeros([CHUNK], tl.float64), tl.zeros([CHUNK], tl.float64)
    for start in range(0, rows, CHUNK):
        n_i = column(parts, count, start, rows, FIELDS)
        n += n_i
        total += n_i * column(parts, mean, start, rows, FIELDS)
    n_all = tl.sum(n, 0)
    mean_all = tl.sum(total, 0) / tl.maximum(n_all, 1.0)
    m2 = tl.zeros([CHUNK], tl.float64)  # It needs the mean of all blocks: hence a second loop.
    for start in range(0, rows, CHUNK):
        d = column(parts, mean, start, rows, FIELDS) - mean_all
        n_i = column(parts, count, start, rows, FIELDS)
        m2 += column(parts, mean + 1, start, rows, FIELDS) + n_i * d * d
    return n_all, mean_all, tl.sum(m2, 0)
