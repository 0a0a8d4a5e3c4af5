"""policy_loss_from_logits on the GPU, by the kernels of the two ops."""

from __future__ import annotations

import triton.language as tl

from . import policy_loss_triton as of_tokens
from . import token_logprobs_triton as of_rows
from ._triton import BLOCK, OPTIONS, blocks_of, jit, on_device


def policy_loss_from_logits(out, *args):
    rows, (advantages, weight, old_logp, ref_logp) = args[:5], args[5:9]
    surrogate, kl, numbers, device_options, with_entropy = args[9:]
    if with_entropy:
        logp, entropy, stats = of_rows.token_logprobs_entropy(*rows)
    else:
        (logp, stats), entropy = of_rows.token_logprobs(*rows), None
    loss, by_logp, counted = of_tokens.policy_loss(
        logp, advantages, weight, old_logp, None, ref_logp, entropy, surrogate, kl, numbers,
        device_options,
    )  # fmt: skip
    by_entropy = None
    if with_entropy:
        coef = numbers[-1] if device_options is None else device_options[-1].to(weight.dtype)
        by_entropy = -coef * weight
    of_rows.token_logprobs_backward_out(out, by_logp, by_entropy, entropy, stats, *rows)
    return loss, counted


PROGRAMS = 1024  # a few on each multiprocessor: most often all that they do is look at the factor


@jit
def scale_kernel(gradient, by, count: tl.int64):
    """gradient *= by, with nothing read or written where by is 1."""
    factor = tl.load(by)
    length = tl.where(factor == 1.0, 0, count)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(gradient + at, mask=at < length)
        tl.store(gradient + at, (x * factor).to(gradient.dtype.element_ty), mask=at < length)


@on_device
def policy_loss_from_logits_scale(gradient, by):
    programs = min(PROGRAMS, blocks_of(gradient))
    if programs:
        scale_kernel[(programs,)](gradient, by, gradient.numel(), **OPTIONS)
