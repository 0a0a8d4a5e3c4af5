"""The LM head in slices of the vocabulary: what both linear ops ask of it, and its products.

A slice's logits are made by BLAS and stay in one buffer; its statistics are those of
token_logprobs. Parts of a row merge, be they slices here or the shards of several processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks import check_device, check_labels, check_shape
from .token_logprobs import _logp_entropy

NEVER = -(2**63)  # an ignore_index that no label is, however shifted


# Tokens of a slice: one of a thousand rows stays in a CPU's last cache; a GPU wants large products.
# It does not depend on the number of rows, nor do therefore the bits that this is to answer for.
WIDTH = {"cpu": 4096, "cuda": 16384}


def logits_of_slices(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """begin, end and logits [N, end - begin] of each part of the vocabulary, in one buffer."""
    width, vocab = WIDTH[weight.device.type], len(weight)
    buffer = hidden.new_empty(len(hidden) * min(width, vocab), dtype=dtype)
    upcast = dtype is not hidden.dtype
    if upcast and not hidden.is_cuda:  # whose BLAS has no product of bf16 to fp32
        hidden = hidden.to(dtype)
    for begin in range(0, vocab, width):
        end = min(begin + width, vocab)
        logits = buffer[: len(hidden) * (end - begin)].view(len(hidden), end - begin)
        part = weight[begin:end].to(hidden.dtype).t()
        if upcast and hidden.is_cuda:
            torch.mm(hidden, part, out_dtype=dtype, out=logits)
            logits += 0 if bias is None else bias[begin:end]
        elif bias is None:
            torch.mm(hidden, part, out=logits)
        else:
            torch.addmm(bias[begin:end].to(dtype), hidden, part, out=logits)
        yield begin, end, logits


def finite(top: Tensor) -> Tensor:
    """The maximum to subtract: a row that is all -inf subtracts 0, else it would be NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def merge(top: Tensor, log_sum: Tensor, entropy: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    """The same statistics of the union of S parts of the vocabulary: [S, N] -> [N]."""
    most = top.amax(0)
    shift = (top - finite(most)) / temperature
    part = torch.exp(log_sum + shift)
    total = part.sum(0)
    merged = torch.where(total == 0, 0.0, total.log())
    # Entropy is log s - E d, and E d of a part is its own, moved by what its maximum is below.
    d = torch.where(part == 0, 0.0, part * (shift + log_sum - entropy)).sum(0)
    mixed = torch.where(total == 0, 0.0, merged - d / total).clamp(min=0.0)
    return most, merged, mixed


def statistics(hidden, weight, bias, labels, temperature, softcap, logits_dtype):
    """label_logit, top, log_sum, entropy: each [N], of the rows over this part of the vocabulary.

    label_logit is capped, and 0 where the label is in no part of it.
    """
    label_logit, parts = torch.zeros_like(labels, dtype=temperature.dtype), []
    anything = torch.zeros_like(labels)
    for begin, end, logits in logits_of_slices(hidden, weight, bias, logits_dtype):
        _, entropy, stats = _logp_entropy(logits, anything, temperature, softcap, NEVER)
        parts.append(torch.stack([*stats, entropy]))
        here = (labels >= begin) & (labels < end)
        at = torch.where(here, labels - begin, 0)[:, None]
        label_logit = torch.where(here, logits.gather(1, at)[:, 0], label_logit)
    if softcap:
        label_logit = softcap * torch.tanh(label_logit / softcap)
    return label_logit, *merge(*torch.stack(parts, 1), temperature)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, of bf16 into fp32 too: there a CPU rounds each product to bf16 first."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def kept_rows(kept: Tensor, *tensors: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """The indices of the rows that are kept (on a GPU waiting for it), and those rows of each."""
    rows = kept.nonzero()[:, 0]
    if len(rows) == len(kept):
        return rows, list(tensors)
    alone = (None, ())  # what is not there, or 0-d, is the same for all rows
    return rows, [x if x is None or x.shape in alone else x[rows] for x in tensors]


def filled(rows: Tensor, count: int, x: Tensor) -> Tensor:
    """[count, ...]: x at its rows, zeros elsewhere."""
    if len(rows) == count:
        return x
    return x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)


def check_head(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> None:
    if hasattr(weight, "full_tensor"):
        raise TypeError(f"{op}: weight is a DTensor: pass weight.full_tensor()")
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise ValueError(
            f"{op}: weight is a ZeRO-3 placeholder: call within deepspeed.zero.GatheredParameters"
        )
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
        shapes = f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{op}: hidden must be [..., H] and weight [V, H], {shapes}")
    if len(weight) == 0:
        raise ValueError(f"{op}: weight must hold at least one token, got {tuple(weight.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype is not hidden.dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, must be of hidden's {hidden.dtype}")
    check_device(op, "weight", weight, hidden)
    check_shape(op, "bias", bias, hidden, weight.shape[:1])
    check_labels(op, labels, hidden)


def dtype_of_logits(op: str, wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    wider = wanted is torch.float32 and dtype is not torch.float64
    if wanted not in (None, dtype) and not wider:
        raise TypeError(f"{op}: logits_dtype must be None, {dtype} or torch.float32, got {wanted}")
    return wanted or dtype


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of the operands of a linear layer."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype is torch.float64 else x.to(dtype) for x in tensors]
