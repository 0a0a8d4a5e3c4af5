"""policy_loss_from_logits on the GPU: a program reads a row, and again as it writes its gradient.

The second time the row is to come from the L2 cache. So there are only as many programs at a time
as have their rows in it, each with several tiles under way; each goes through its rows in turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._flags import label_flag
from ..._record import contiguous
from ..common.triton import BLOCK as TOKENS
from ..common.triton import OPTIONS, blocks_of, jit, load_kept
from ..vocabulary import token_logprobs_triton
from ..vocabulary.row_gradient_triton import write_gradient
from ..vocabulary.row_results_triton import read_row
from ..vocabulary.rows_triton import inverse_temperature, record_label, row_offset
from ..vocabulary.token_logprobs_triton import Tiles
from .policy_loss_from_logits import (
    OP,
    Inputs,
    NoOutputs,
    Outputs,
    ScaleInputs,
    by_two_ops,
    loss_inputs,
    reference,
)
from .policy_loss_triton import policy_loss
from .surrogates_triton import options_of, token_loss

# Tiles under way in a program, the one that it computes with among them.
STAGES = tl.constexpr(4)

# Bytes of a row from -> tiles: the first that fits. The larger rows leave a program alone on its
# multiprocessor, which then has 48 KB under way; latency times bandwidth asks for 25 (H200).
TABLE = {
    131072: Tiles(warps=16, vectors=2, blocks=2),
    16384: Tiles(warps=8, vectors=2, blocks=2),
    0: Tiles(warps=4, vectors=1, blocks=2),
}
VECTOR_BYTES = 16
MOST_PROGRAMS = 4  # on a multiprocessor: more would hide nothing more
CACHE_SHARE = 0.8
MOST_REGISTERS = 128  # 16 warps have no more; told so, ptxas does not spill to keep to 64

# The registers that each compiled kernel took: its first launch tells.
registers_of: dict[tuple, int] = {}


@triton.jit
def derivatives(
    logp: tl.tensor,
    w: tl.tensor,
    row: tl.tensor,
    advantages: tl.tensor,
    old_logp: tl.tensor,
    ref_logp: tl.tensor,
    traced_options: tl.tensor,
    options: tl.tuple,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
):
    """dL/dlogp and dL/dentropy of the token of a row. A token of weight 0 is masked."""
    bounds, taus, kl_coef, entropy_coef, log_ratios = options_of(logp, traced_options, options)
    kept = w != 0
    # Masked tokens are not read: their advantages and log-probs may be NaN.
    advantage = load_kept(advantages, row, kept)
    old = None if old_logp is None else load_kept(old_logp, row, kept)
    ref = None if ref_logp is None else load_kept(ref_logp, row, kept)
    _, _, _, slope = token_loss(
        logp, advantage, old, None, ref, bounds, taus, kl_coef, log_ratios, SURROGATE, KL
    )
    return w * slope, -entropy_coef * w


@partial(jit, specialised=("logits", "out"))
def rows_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    temperature: tl.tensor,
    advantages: tl.tensor,
    weight: tl.tensor,
    old_logp: tl.tensor,
    ref_logp: tl.tensor,
    traced_options: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    kept_weight: tl.tensor,
    flag: tl.tensor,
    out: tl.tensor,
    rows: tl.int32,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab: tl.int64,
    temperature_stride: tl.int32,
    softcap: tl.float32,
    ignore_index: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    tau_positive: tl.float64,
    tau_negative: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    max_log_ratio: tl.float64,
    beyond: tl.float64,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-prob, entropy, weight (0 at what is masked) and dL/dlogits of every row.

    out may be logits: a thread has read what it writes.
    """
    options = (  # in the order of LossOptions
        low, high, dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef, max_log_ratio,
        beyond,
    )  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        label, w = tl.load(labels + row), tl.load(weight + row)
        kept = (w != 0) & (label != ignore_index)
        legal = (label >= 0) & (label < vocab)
        if kept & ~legal:
            record_label(flag, row, label)
        inv_temperature = inverse_temperature(temperature + row * temperature_stride, kept)
        x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED)
        width, written = vocab.to(tl.int32), row * vocab
        if ALIGNED:
            # tl.multiple_of would say so of an argument, but no mask that is made of it would know.
            width, written = width // VECTOR * VECTOR, tl.multiple_of(written, VECTOR)
        length = tl.where(kept, width, 0)
        y, value, top, log_sum, h = read_row(
            x=x, label=label, here=kept & legal, legal=legal, length=length, softcap=softcap,
            inv_temperature=inv_temperature, ENTROPY=ENTROPY, SOFTCAP=SOFTCAP, ALIGNED=ALIGNED,
            VECTORS=VECTORS, LANES=LANES, VECTOR=VECTOR, STAGES=STAGES, EVICTION="evict_last",
        )  # fmt: skip
        w, value, h = tl.where(kept, w, 0.0), tl.where(kept, value, 0.0), tl.where(kept, h, 0.0)
        tl.store(kept_weight + row, w)
        tl.store(logp + row, value)
        if ENTROPY:
            tl.store(entropy + row, h)
        g_logp, g_entropy = derivatives(
            value, w, row, advantages, old_logp, ref_logp, traced_options, options, SURROGATE, KL
        )
        g_entropy = g_entropy if ENTROPY else 0.0
        live = (g_logp != 0) | (g_entropy != 0)  # The numbers of any other row are 0 from here on.
        y, top = tl.where(live, y, 0.0), tl.where(live, top, 0.0)
        log_sum = tl.where(live, log_sum, 0.0)
        write_gradient(
            x=x, dx=out + written, place=tl.where(legal, label, -1).to(tl.int32), y=y, length=width,
            live=live, top=top, log_sum=log_sum, inv_temperature=inv_temperature, g_logp=g_logp,
            g_entropy=g_entropy, h=h, softcap=softcap, ENTROPY=ENTROPY, SOFTCAP=SOFTCAP,
            ALIGNED=ALIGNED, BLOCK=BLOCK, STAGES=STAGES, EVICTION="evict_first",
        )  # fmt: skip


class Device(NamedTuple):
    """What of a GPU decides how many programs run: properties that torch knows by these names."""

    multi_processor_count: int
    L2_cache_size: int
    regs_per_multiprocessor: int
    max_threads_per_multi_processor: int


INTERPRETER = Device(1, 1 << 40, 1 << 16, 2048)  # any that all rows fit


def device_of(x: torch.Tensor) -> Device:
    """The GPU that a tensor is on."""
    if not x.is_cuda:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(x.device)
    return Device._make([getattr(properties, name) for name in Device._fields])


def programs(device: Device, row_bytes: int, warps: int, registers: int) -> int:
    """How many programs a multiprocessor runs at a time. 0: take the two ops, which are faster.

    A row is read twice, and the second time costs nothing only if it comes from the L2 cache. So
    all rows under way must fit CACHE_SHARE of it; the rest is for gradients on their way to memory.

    The model, predicted and not measured, counts passes over the logits at the bandwidth of a copy:
    2.2 to 2.5 on an H100 or H200 if the rows fit, by the instructions of the two sweeps and the
    cycles of a row that nothing hides; 3.1 to 3.2 if they do not. The two ops take 3.0 to 3.1,
    since many programs at a time hide everything. So if not one row fits a multiprocessor's share,
    they are faster. Rows that are no whole vectors cannot be loaded asynchronously, which takes
    2.5 (H100), 3.1 (H200) or 4.6 passes (B200): the two ops serve these everywhere.

    Args:
        device: The GPU.
        row_bytes: The bytes of a row of logits.
        warps: The warps of a program.
        registers: The registers of a thread, which tell how many programs there is room for.
    """
    if row_bytes % VECTOR_BYTES:
        return 0
    share = CACHE_SHARE * device.L2_cache_size / device.multi_processor_count
    in_cache = int(share // row_bytes)
    threads = 32 * warps
    # The hardware allocates registers by eights.
    by_registers = device.regs_per_multiprocessor // (-(-registers // 8) * 8 * threads)
    by_threads = device.max_threads_per_multi_processor // threads
    return min(in_cache, max(min(by_registers, by_threads), 1), MOST_PROGRAMS)


def constants(*, dtype: torch.dtype, vocab: int, **features: Any) -> dict[str, int | bool]:
    """The compile-time arguments: those of the two kernels of token_logprobs, with other tiles."""
    row_bytes = vocab * dtype.itemsize
    shape = next(tiles for size, tiles in TABLE.items() if row_bytes >= size)
    features |= {"dtype": dtype, "vocab": vocab, "shape": shape}
    backward = token_logprobs_triton.constants(forward=False, **features)
    # One program writes a whole row here, so it does not count the tiles of a slice.
    del backward["BLOCKS"]
    forward = token_logprobs_triton.constants(forward=True, **features)
    return backward | forward | {"maxnreg": MOST_REGISTERS}


def policy_loss_from_logits(x: Inputs) -> Outputs:
    """Launches programs that go through the rows, or the two ops where they are faster."""
    if x.out.dtype is torch.float64 or x.out.numel() == 0:
        return reference(x)
    # The rows keep their strides, since a copy of the logits would cost what this op saves.
    x, rows = x._replace(tokens=contiguous(x.tokens)), token_logprobs_triton.LogitRows(x.rows)
    constant = constants(**rows.features(entropy=x.rows.with_entropy))
    absent = [tensor is None for tensor in (x.tokens.old_logp, x.tokens.ref_logp, x.traced_options)]
    compiled = x.out.device, x.surrogate, x.kl, *absent, *constant.values()
    device, warps = device_of(x.out), int(constant["num_warps"])
    registers = registers_of.get(compiled, MOST_REGISTERS)
    count = programs(device, rows.vocab * x.out.itemsize, warps, registers)
    if count == 0:
        backward_out = token_logprobs_triton.token_logprobs_backward_out
        return by_two_ops(x, token_logprobs_triton.token_logprobs, policy_loss, backward_out)
    logp, kept_weight = torch.empty_like(x.tokens.weight), torch.empty_like(x.tokens.weight)
    entropy = torch.empty_like(logp) if x.rows.with_entropy else None
    kernel = rows_kernel[(min(rows.count, count * device.multi_processor_count),)](
        **rows.arguments,
        **x.tokens._asdict(),
        traced_options=x.traced_options,
        logp=logp,
        entropy=entropy,
        kept_weight=kept_weight,
        flag=label_flag(OP, x.out.device),
        out=x.out,
        **x.options._asdict(),
        SURROGATE=x.surrogate,
        KL=x.kl,
        **constant,
    )
    if x.out.is_cuda:
        registers_of[compiled] = kernel.n_regs
    outputs = policy_loss(loss_inputs(x, logp, kept_weight, entropy))
    return Outputs(outputs.loss, outputs.stats)


PROGRAMS = 1024  # a few on each multiprocessor: most often all that they do is look at the factor


@jit
def scale_kernel(gradient: tl.tensor, factor: tl.tensor, count: tl.int64):
    """Multiplies the gradient, with nothing read or written where the factor is 1."""
    by_factor = tl.load(factor)
    length = tl.where(by_factor == 1.0, 0, count)
    for start in range(tl.program_id(0) * TOKENS, length, tl.num_programs(0) * TOKENS):
        offset = start + tl.arange(0, TOKENS)
        x = tl.load(gradient + offset, mask=offset < length)
        scaled = (x * by_factor).to(gradient.dtype.element_ty)
        tl.store(gradient + offset, scaled, mask=offset < length)


def policy_loss_from_logits_scale(x: ScaleInputs) -> NoOutputs:
    """Launches a limited number of programs, which share the elements."""
    count = min(PROGRAMS, blocks_of(x.gradient))
    if count:
        scale_kernel[(count,)](x.gradient, x.factor, x.gradient.numel(), **OPTIONS)
    return NoOutputs()
