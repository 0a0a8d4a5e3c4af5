"""policy_loss_from_logits on the GPU: a program reads a row, and again as it writes its gradient.

The second time the row is to come from the L2 cache. So there are only as many programs at a time
as have their rows in it, each with several tiles under way; each goes through its rows in turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..._flags import label_flag
from ..._record import contiguous
from ..common.triton import BLOCK as TOKENS
from ..common.triton import OPTIONS, blocks_of, jit, load_kept
from ..vocabulary import token_logprobs_triton
from ..vocabulary.rows_triton import (
    inverse_temperature,
    read_row,
    record_label,
    row_offset,
    write_gradient,
)
from . import policy_loss as tokens_page
from .policy_loss_from_logits import OP, Inputs, NoOutputs, Outputs, ScaleInputs, reference
from .policy_loss_triton import policy_loss
from .surrogates_triton import options_of, token_loss

# Tiles of 8 KB under way in a program, as bandwidth times latency asks for where it is alone on its
# multiprocessor.
STAGES = tl.constexpr(4)


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
    low, high, dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef = options
    bounds, taus, kl_coef, entropy_coef = options_of(
        logp,
        traced_options,
        low,
        high,
        dual_clip,
        tau_positive,
        tau_negative,
        kl_coef,
        entropy_coef,
    )
    kept = w != 0
    # Masked tokens are not read: their advantages and log-probs may be NaN.
    advantage = load_kept(advantages, row, kept)
    old = None if old_logp is None else load_kept(old_logp, row, kept)
    ref = None if ref_logp is None else load_kept(ref_logp, row, kept)
    _, _, _, slope = token_loss(
        logp, advantage, old, None, ref, bounds, taus, kl_coef, SURROGATE, KL
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

    out may be logits: all of a row is read, up to a barrier, before its gradient is begun.
    """
    options = low, high, dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        label, w = tl.load(labels + row), tl.load(weight + row)
        kept = (w != 0) & (label != ignore_index)
        legal = (label >= 0) & (label < vocab)
        if kept & ~legal:
            record_label(flag, row, label)
        inv_temperature = inverse_temperature(temperature + row * temperature_stride, kept)
        x = logits + row_offset(row, inner, outer_stride, inner_stride, VECTOR, ALIGNED)
        length, written = tl.where(kept, vocab, 0), row * vocab
        if ALIGNED:
            vocab, length = tl.multiple_of(vocab, VECTOR), tl.multiple_of(length, VECTOR)
            written = tl.multiple_of(written, VECTOR)
        y, value, top, log_sum, h = read_row(
            x, label, kept & legal, legal, length, softcap, inv_temperature,
            ENTROPY=ENTROPY, SOFTCAP=SOFTCAP, VECTORS=VECTORS, LANES=LANES, VECTOR=VECTOR,
            STAGES=STAGES, EVICTION="evict_last",
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
        live = (g_logp != 0) | (g_entropy != 0)  # else, what the row holds is no one's matter
        readable = tl.where(live, length, 0)
        readable = tl.multiple_of(readable, VECTOR) if ALIGNED else readable
        y, top = tl.where(live, y, 0.0), tl.where(live, top, 0.0)
        log_sum = tl.where(live, log_sum, 0.0)
        write_gradient(
            x, out + written, label, y, vocab, readable, top, log_sum, inv_temperature, g_logp,
            g_entropy, h, softcap, ENTROPY=ENTROPY, SOFTCAP=SOFTCAP, BLOCK=BLOCK, STAGES=STAGES,
            EVICTION="evict_first",
        )  # fmt: skip


def programs(x: torch.Tensor, rows: int, row_bytes: int) -> int:
    """One to four on each multiprocessor, as their rows fit the cache. The bits do not change."""
    if not x.is_cuda:
        return min(rows, 2)
    # A row is read twice: as many programs run at a time as have their rows in the L2 cache.
    device = torch.cuda.get_device_properties(x.device)
    count = device.multi_processor_count
    return min(rows, count * min(max(device.L2_cache_size // (row_bytes * count), 1), 4))


def constants(**features: Any) -> dict[str, int | bool]:
    """The compile-time arguments: those of the two kernels of token_logprobs."""
    backward = token_logprobs_triton.constants(forward=False, **features)
    # One program writes a whole row here, so it does not count the tiles of a slice.
    del backward["BLOCKS"]
    return backward | token_logprobs_triton.constants(forward=True, **features)


def policy_loss_from_logits(x: Inputs) -> Outputs:
    """Launches programs that go through the rows; then policy_loss, for the loss of its tokens."""
    if x.out.dtype is torch.float64 or x.out.numel() == 0:
        return reference(x)
    # The rows keep their strides, since a copy of the logits would cost what this op saves.
    rows, tokens = token_logprobs_triton.LogitRows(x.rows), contiguous(x.tokens)
    weight, with_entropy = tokens.weight, x.rows.with_entropy
    logp, kept_weight = torch.empty_like(weight), torch.empty_like(weight)
    entropy = torch.empty_like(weight) if with_entropy else None
    rows_kernel[(programs(x.out, rows.count, rows.vocab * x.out.itemsize),)](
        **rows.arguments,
        advantages=tokens.advantages,
        weight=weight,
        old_logp=tokens.old_logp,
        ref_logp=tokens.ref_logp,
        traced_options=x.traced_options,
        logp=logp,
        entropy=entropy,
        kept_weight=kept_weight,
        flag=label_flag(OP, x.out.device),
        out=x.out,
        **x.options._asdict(),
        SURROGATE=x.surrogate,
        KL=x.kl,
        **constants(**rows.features(entropy=with_entropy)),
    )
    outputs = policy_loss(
        tokens_page.Inputs(
            logp=logp,
            advantages=tokens.advantages,
            weight=kept_weight,
            old_logp=tokens.old_logp,
            ratio=None,
            ref_logp=tokens.ref_logp,
            entropy=entropy,
            surrogate=x.surrogate,
            kl=x.kl,
            options=x.options,
            traced_options=x.traced_options,
        )
    )
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
