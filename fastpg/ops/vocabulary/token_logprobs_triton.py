"""token_logprobs on the GPU: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._flags import label_flag
from ..common.triton import jit, load_kept
from .logit_rows import addressable
from .row_gradient_triton import write_gradient
from .row_results_triton import read_row
from .rows_triton import capped, inverse_temperature, record_label, row_offset
from .token_logprobs import (
    OP,
    BackwardInputs,
    BackwardOutInputs,
    Gradient,
    Inputs,
    NoOutputs,
    Outputs,
    allocate,
    allocate_gradient,
    reference,
    reference_backward,
    reference_backward_out,
    sizes,
)

# FMA contraction depends on the thread layout, hence on the alignment of the rows. It is disabled,
# so that a row's bits do not depend on its address.
FP_FUSION = False


class Tiles(NamedTuple):
    """How one program walks along a row."""

    warps: int
    vectors: int  # In forward a thread has so many in flight, of 16 bytes or of 4 single logits.
    blocks: int  # In backward a program writes so many tiles, of one vector per thread.


# (compute capability from, bytes of a row from): the first that fits. The number of rows does not
# count, and nothing is tuned at run time: either would show in the bits.
TABLE = {
    # 32 bytes a thread, four programs or more at 63 registers or less: 32 KB in flight on a
    # multiprocessor, where latency times bandwidth asks for 12 (A100), 25 (H200), 38 (B200).
    (0, 16384): Tiles(warps=8, vectors=2, blocks=32),
    # A tile of 16 KB would be mostly empty; a short row ends in its merge of lanes, so few of them.
    (0, 0): Tiles(warps=4, vectors=1, blocks=8),
}


def tiles(capability: int, row_bytes: int) -> Tiles:
    """The entry of the table for a GPU and a row."""
    return next(t for (c, size), t in TABLE.items() if capability >= c and row_bytes >= size)


# The alignment of the addresses of logits and out is compiled in; nothing else compiles anew.
rows_jit = partial(jit, specialised=("logits", "out"))


@rows_jit
def forward_kernel(
    logits,
    labels,
    temperature,
    logp,
    entropy,
    stats,
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
    """One program per row. An ignored row has length 0: it is not read."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    kept = label != ignore_index
    legal = (label >= 0) & (label < vocab)
    if kept & ~legal:
        record_label(flag, row, label)
    inv_temperature = inverse_temperature(temperature + row * temperature_stride, kept)
    x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED)
    length = tl.where(kept, vocab, 0)
    length = tl.multiple_of(length, VECTOR) if ALIGNED else length
    _, value, top, log_sum, h = read_row(
        x=x,
        label=label,
        here=kept & legal,
        legal=legal,
        length=length,
        softcap=softcap,
        inv_temperature=inv_temperature,
        ENTROPY=ENTROPY,
        SOFTCAP=SOFTCAP,
        ALIGNED=ALIGNED,
        VECTORS=VECTORS,
        LANES=LANES,
        VECTOR=VECTOR,
        STAGES=None,
        EVICTION="",
    )
    tl.store(logp + row, tl.where(kept, value, 0.0))
    tl.store(stats + row, tl.where(kept, top, 0.0))
    tl.store(stats + rows.to(tl.int64) + row, tl.where(kept, log_sum, 0.0))
    if ENTROPY:
        tl.store(entropy + row, tl.where(kept, h, 0.0))


@triton.jit
def incoming_gradients(
    grad_logp: tl.tensor, grad_entropy: tl.tensor, row: tl.tensor, ENTROPY: tl.constexpr
):
    """The gradients of a row's outputs, and whether one of them is other than 0."""
    g_logp, g_entropy = tl.load(grad_logp + row), 0.0
    reached = g_logp != 0.0
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + row)
        reached = reached | (g_entropy != 0.0)
    return g_logp, g_entropy, reached


@triton.jit
def label_in_slice(
    x: tl.tensor,
    label: tl.tensor,
    begin: tl.tensor,
    length: tl.tensor,
    live: tl.tensor,
    softcap: tl.tensor,
    SOFTCAP: tl.constexpr,
):
    """The label's place in a slice of its row, -1 if it is in another; and its capped logit."""
    here = live & (label >= begin) & (label < begin + length)
    place = tl.where(here, label - begin, -1).to(tl.int32)
    return place, capped(load_kept(x, place, here), softcap, SOFTCAP)


@rows_jit
def backward_kernel(
    grad_logp,
    grad_entropy,
    entropy,
    stats,
    logits,
    labels,
    temperature,
    out,
    rows: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab: tl.int64,
    temperature_stride: tl.int32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    slices: tl.int32,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per slice of a row. A row that no gradient reaches is written, not read.

    out may be logits: a thread reads what it writes before it does so.
    """
    row = tl.program_id(0) // slices
    begin = (tl.program_id(0) % slices).to(tl.int64) * (BLOCK * BLOCKS)
    length = tl.minimum(vocab - begin, BLOCK * BLOCKS).to(tl.int32)
    label = tl.load(labels + row)
    g_logp, g_entropy, reached = incoming_gradients(grad_logp, grad_entropy, row, ENTROPY)
    live = reached & (label != ignore_index)
    written = row.to(tl.int64) * vocab
    if ALIGNED:
        length, written = length // VECTOR * VECTOR, tl.multiple_of(written, VECTOR)
    dx = out + written + begin
    x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED) + begin

    # If the row is not live, everything here is 0, and so is what is written.
    g_logp, g_entropy = tl.where(live, g_logp, 0.0), tl.where(live, g_entropy, 0.0)
    top = load_kept(stats, row, live)
    log_sum = load_kept(stats, rows.to(tl.int64) + row, live)
    inv_temperature = inverse_temperature(temperature + row * temperature_stride, live)
    h = load_kept(entropy, row, live) if ENTROPY else 0.0
    place, y = label_in_slice(x, label, begin, length, live, softcap, SOFTCAP)
    write_gradient(
        x=x,
        dx=dx,
        place=place,
        y=y,
        length=length,
        live=live,
        top=top,
        log_sum=log_sum,
        inv_temperature=inv_temperature,
        g_logp=g_logp,
        g_entropy=g_entropy,
        h=h,
        softcap=softcap,
        ENTROPY=ENTROPY,
        SOFTCAP=SOFTCAP,
        ALIGNED=ALIGNED,
        BLOCK=BLOCK,
        STAGES=None,
        EVICTION="",
    )


def constants(
    *,
    forward: bool,
    entropy: bool,
    softcap: bool,
    aligned: bool,
    dtype: torch.dtype,
    vocab: int,
    capability: int,
    shape: Tiles | None = None,
) -> dict[str, int | bool]:
    """The compile-time arguments, for a launch and for compilation ahead of time alike."""
    shape = shape or tiles(capability, vocab * dtype.itemsize)
    lanes, vector = 32 * shape.warps, 16 // dtype.itemsize
    vectors = shape.vectors
    if vocab % vector:  # then no vector is aligned in each row: a lane owns single logits
        vectors, vector, aligned = 4 * vectors, 1, False
    found: dict[str, int | bool] = {
        "ENTROPY": entropy,
        "SOFTCAP": softcap,
        "ALIGNED": aligned,
        "VECTOR": vector,
        "num_warps": shape.warps,
        "enable_fp_fusion": FP_FUSION,
    }
    if forward:
        return found | {"VECTORS": vectors, "LANES": lanes}
    return found | {"BLOCK": 2 * lanes * (16 // dtype.itemsize), "BLOCKS": shape.blocks // 2}


class LogitRows:
    """Rows of logits as the kernels take them, copied only where they must be.

    Attributes:
        count: How many rows there are.
        vocab: How many logits a row has.
        arguments: What every kernel takes of the rows, by name.
    """

    def __init__(self, x: Inputs) -> None:
        x = x._replace(logits=addressable(x.logits))
        lie = sizes(x)
        self.logits, self.softcap = x.logits, x.softcap
        self.count, self.vocab = lie.count, lie.vocab
        self.arguments: dict[str, Tensor | int | float] = {
            "logits": x.logits,
            "labels": x.labels.contiguous(),
            "temperature": x.temperature.contiguous(),
            "rows": lie.count,
            "inner": lie.inner,
            "outer_stride": lie.outer_stride,
            "inner_stride": lie.inner_stride,
            "vocab": lie.vocab,
            "temperature_stride": int(lie.temperature_per_row),
            "softcap": x.softcap,
            "ignore_index": x.ignore_index,
        }
        steps = [n * x.logits.itemsize for n in (lie.outer_stride, lie.inner_stride, lie.vocab)]
        self.aligned = all(step % 16 == 0 for step in [x.logits.data_ptr(), *steps])

    def features(self, *, entropy: bool) -> dict:
        """What the compile-time arguments depend on."""
        capability = 9  # any: the interpreter has none
        if self.logits.is_cuda:
            capability = torch.cuda.get_device_capability(self.logits.device)[0]
        return {
            "entropy": entropy,
            "softcap": self.softcap > 0,
            "aligned": self.aligned,
            "dtype": self.logits.dtype,
            "vocab": self.vocab,
            "capability": capability,
        }


# fp64 is for checks of gradients. No kernel here computes in it: the reference does.


def token_logprobs(x: Inputs) -> Outputs:
    """Launches a program for each row."""
    if x.logits.dtype is torch.float64:
        return reference(x)
    rows, outputs = LogitRows(x), allocate(x)
    if rows.count:
        forward_kernel[(rows.count,)](
            **rows.arguments,
            logp=outputs.logp,
            entropy=outputs.entropy,
            stats=outputs.stats,
            flag=label_flag(OP, x.logits.device),
            **constants(forward=True, **rows.features(entropy=x.with_entropy)),
        )
    return outputs


def token_logprobs_backward(x: BackwardInputs) -> Gradient:
    """Launches a program for each slice of a row."""
    if x.inputs.logits.dtype is torch.float64:
        return reference_backward(x)
    gradient = allocate_gradient(x)
    write(x, gradient.grad_logits)
    return gradient


def token_logprobs_backward_out(x: BackwardOutInputs) -> NoOutputs:
    """Launches a program for each slice of a row."""
    if x.out.dtype is torch.float64:
        return reference_backward_out(x)
    write(x.backward, x.out)
    return NoOutputs()


def write(x: BackwardInputs, out: Tensor) -> None:
    """Writes the gradient to `out`, which may be the logits."""
    if out.numel() == 0:
        return
    rows, grad_logp = LogitRows(x.inputs), x.grad_logp.contiguous()
    with_entropy = x.grad_entropy is not None
    constant = constants(forward=False, **rows.features(entropy=with_entropy))
    slices = triton.cdiv(rows.vocab, constant["BLOCK"] * constant["BLOCKS"])
    backward_kernel[(rows.count * slices,)](
        grad_logp=grad_logp,
        # Without an entropy these two are not read: any pointer serves.
        grad_entropy=x.grad_entropy.contiguous() if with_entropy else grad_logp,
        entropy=x.entropy if with_entropy else grad_logp,
        stats=x.stats,
        **rows.arguments,
        out=out,
        slices=slices,
        **constant,
    )
