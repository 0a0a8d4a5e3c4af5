"""policy_loss_from_logits on the GPU: a program reads a row, and again as it writes its gradient.

The second time the row is to come from the L2 cache. So there are only as many programs at a time
as have their rows in it, each with several tiles under way; each goes through its rows in turn.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ..._flags import label_flag
from ..._library import REFERENCES, contiguous
from ..common.triton import BLOCK as TOKENS
from ..common.triton import OPTIONS, blocks_of, jit, on_device
from ..vocabulary import token_logprobs_triton
from ..vocabulary.rows_triton import (
    inverse_temperature,
    read_row,
    record_label,
    row_offset,
    write_gradient,
)
from ..vocabulary.token_logprobs import Inputs
from . import policy_loss as policy_page
from .policy_loss_triton import policy_loss
from .surrogates import LossOptions
from .surrogates_triton import options_of, token_loss

# Tiles of 8 KB under way in a program, as bandwidth times latency asks for where it is alone on its
# multiprocessor.
STAGES = tl.constexpr(4)


@triton.jit
def derivatives(
    logp, w, row, kept, advantages, old_logp, ref_logp, device_options, low, high, dual_clip,
    tau_positive, tau_negative, kl_coef, entropy_coef, SURROGATE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """dL/dlogp and dL/dentropy of the token of a row."""
    bounds, taus, kl_coef, entropy_coef = options_of(
        logp, device_options, low, high, dual_clip, tau_positive, tau_negative, kl_coef,
        entropy_coef,
    )  # fmt: skip
    advantage = tl.load(advantages + row, mask=kept, other=0.0)
    old = None if old_logp is None else tl.load(old_logp + row, mask=kept, other=0.0)
    ref = None if ref_logp is None else tl.load(ref_logp + row, mask=kept, other=0.0)
    of_token = token_loss(logp, advantage, old, None, ref, bounds, taus, kl_coef, SURROGATE, KL)
    return w * of_token[3], -entropy_coef * w


@partial(jit, specialised=("logits", "out"))
def rows_kernel(
    logits, labels, temperature, advantages, weight, old_logp, ref_logp, device_options,
    logp, entropy, kept_weight, flag, out,
    rows: tl.int32, inner: tl.int32, outer_stride: tl.int64, inner_stride: tl.int64,
    vocab: tl.int64, temperature_stride: tl.int32, softcap: tl.float32, ignore_index: tl.int64,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, tau_positive: tl.float64,
    tau_negative: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    SURROGATE: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, VECTORS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob, entropy, weight (0 at what is masked) and dL/dlogits of every row.

    out may be logits: all of a row is read, up to a barrier, before its gradient is begun.
    """
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
            ENTROPY, SOFTCAP, VECTORS, LANES, VECTOR, STAGES, "evict_last",
        )  # fmt: skip
        w, value, h = tl.where(kept, w, 0.0), tl.where(kept, value, 0.0), tl.where(kept, h, 0.0)
        tl.store(kept_weight + row, w)
        tl.store(logp + row, value)
        if ENTROPY:
            tl.store(entropy + row, h)
        g_logp, g_entropy = derivatives(
            value, w, row, kept, advantages, old_logp, ref_logp, device_options, low, high,
            dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef, SURROGATE, KL,
        )  # fmt: skip
        g_entropy = g_entropy if ENTROPY else 0.0
        live = (g_logp != 0) | (g_entropy != 0)  # else, what the row holds is no one's matter
        readable = tl.where(live, length, 0)
        readable = tl.multiple_of(readable, VECTOR) if ALIGNED else readable
        write_gradient(
            x, out + written, label, tl.where(live, y, 0.0), vocab, readable,
            tl.where(live, top, 0.0), tl.where(live, log_sum, 0.0), inv_temperature, g_logp,
            g_entropy, h, softcap, ENTROPY, SOFTCAP, BLOCK, STAGES, "evict_first",
        )  # fmt: skip


def programs(x: torch.Tensor, rows: int, row_bytes: int) -> int:
    """One to four on each multiprocessor, as their rows fit the cache. The bits do not change."""
    if not x.is_cuda:
        return min(rows, 2)
    device = torch.cuda.get_device_properties(x.device)
    count = device.multi_processor_count
    return min(rows, count * min(max(device.L2_cache_size // (row_bytes * count), 1), 4))


def constants(**features) -> dict[str, int | bool]:
    """The compile-time arguments: those of the two kernels of token_logprobs."""
    backward = token_logprobs_triton.constants(forward=False, **features)
    del backward["BLOCKS"]
    return backward | token_logprobs_triton.constants(forward=True, **features)


@on_device
def policy_loss_from_logits(out, *args):
    if out.dtype is torch.float64 or out.numel() == 0:
        return REFERENCES[torch.ops.fastpg.policy_loss_from_logits.default](out, *args)
    rows = token_logprobs_triton.LogitRows(Inputs(*args[:5], with_entropy=args[-1]))
    advantages, weight, old_logp, ref_logp = contiguous(*args[5:9])
    surrogate, kl, numbers, device_options, with_entropy = args[9:]
    logp, kept_weight = torch.empty_like(weight), torch.empty_like(weight)
    entropy = torch.empty_like(weight) if with_entropy else None
    count = weight.numel()
    rows_kernel[(programs(out, count, rows.vocab * out.itemsize),)](
        **rows.arguments,
        advantages=advantages,
        weight=weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
        device_options=device_options,
        logp=logp,
        entropy=entropy,
        kept_weight=kept_weight,
        flag=label_flag("policy_loss_from_logits", out.device),
        out=out,
        **LossOptions(*numbers)._asdict(),
        SURROGATE=surrogate,
        KL=kl,
        **constants(**rows.features(entropy=with_entropy)),
    )
    loss, _, stats = policy_loss(
        policy_page.Inputs(
            logp, advantages, kept_weight, old_logp, None, ref_logp, entropy, surrogate, kl,
            LossOptions(*numbers), device_options,
        )
    )  # fmt: skip
    return loss, stats


PROGRAMS = 1024  # a few on each multiprocessor: most often all that they do is look at the factor


@jit
def scale_kernel(gradient, by, count: tl.int64):
    """gradient *= by, with nothing read or written where by is 1."""
    factor = tl.load(by)
    length = tl.where(factor == 1.0, 0, count)
    for start in range(tl.program_id(0) * TOKENS, length, tl.num_programs(0) * TOKENS):
        at = start + tl.arange(0, TOKENS)
        x = tl.load(gradient + at, mask=at < length)
        tl.store(gradient + at, (x * factor).to(gradient.dtype.element_ty), mask=at < length)


@on_device
def policy_loss_from_logits_scale(gradient, by):
    count = min(PROGRAMS, blocks_of(gradient))
    if count:
        scale_kernel[(count,)](gradient, by, gradient.numel(), **OPTIONS)
