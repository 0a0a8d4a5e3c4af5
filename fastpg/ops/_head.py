"""The LM head in slices of the vocabulary: what both linear ops ask of it, and its products.

A slice's logits are made by BLAS and stay in one buffer; its statistics are those of
token_logprobs. Parts of a row merge, be they slices here or the shards of several processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ._checks import (
    check_device,
    check_label_values,
    check_labels,
    check_shape,
    check_temperature,
    check_tensors,
    compute_dtype,
    label_temperature,
    positive,
)
from ._shards import NEVER, finite, local_labels, merge, over_ranks
from .token_logprobs import _backward_out, _logp_entropy

# Tokens of a slice: one of a thousand rows stays in a CPU's last cache; a GPU wants large products.
# It does not depend on the number of rows, nor do therefore the bits that this is to answer for.
WIDTH = {"cpu": 4096, "cuda": 16384}

# With fewer, a CPU's product in fp32 takes another way, and rounds otherwise.
LEAST_ROWS = 4


Slice = tuple[int, int, Tensor]  # begin, end, logits [N, end - begin], contiguous


def logits_of_slices(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    memory: Tensor | None = None,
) -> Iterator[Slice]:
    """The logits of each part of the vocabulary: one after another in the same place.

    memory: [max(N, LEAST_ROWS) * V] of dtype, in which each gets a place of its own.
    """  # fmt: skip
    given, width, vocab = len(hidden), WIDTH[weight.device.type], len(weight)
    if 0 < given < LEAST_ROWS and not hidden.is_cuda:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, LEAST_ROWS - given))
    count = len(hidden)
    place = hidden.new_empty(count * min(width, vocab), dtype=dtype) if memory is None else memory
    upcast = dtype is not hidden.dtype
    if upcast and not hidden.is_cuda:  # whose BLAS has no product of bf16 to fp32
        hidden = hidden.to(dtype)
    for begin in range(0, vocab, width):
        end = min(begin + width, vocab)
        at = 0 if memory is None else count * begin
        logits = place[at : at + count * (end - begin)].view(count, end - begin)
        part = weight[begin:end].to(hidden.dtype).t()
        if upcast and hidden.is_cuda:
            torch.mm(hidden, part, out_dtype=dtype, out=logits)
            logits += 0 if bias is None else bias[begin:end]
        elif bias is None:
            torch.mm(hidden, part, out=logits)
        else:
            torch.addmm(bias[begin:end].to(dtype), hidden, part, out=logits)
        yield begin, end, logits[:given]


def statistics(
    slices: Iterable[Slice], labels: Tensor, temperature: Tensor, softcap: float
) -> tuple[Tensor, ...]:
    """label_logit, top, log_sum, entropy: each [N], of the rows over this part of the vocabulary.

    label_logit is capped, and that of 0 where the label is in no slice.
    """
    label_logit, parts = torch.zeros_like(labels, dtype=temperature.dtype), []
    anything = torch.zeros_like(labels)
    for begin, end, logits in slices:
        _, entropy, stats = _logp_entropy(logits, anything, temperature, softcap, NEVER)
        parts.append(torch.stack([*stats, entropy]))
        here = (labels >= begin) & (labels < end)
        at = torch.where(here, labels - begin, 0)[:, None]
        label_logit = torch.where(here, logits.gather(1, at)[:, 0], label_logit)
    if softcap:
        label_logit = softcap * torch.tanh(label_logit / softcap)
    return label_logit, *merge(temperature, *torch.stack(parts, 1))


def logp_and_statistics(slices, labels, legal, temperature, softcap, group=None):
    """logp, entropy, top, log_sum [N]; NaN where no label is, which a device cannot raise about.

    With a group slices and labels are those of this rank's shard.
    """
    of_row = statistics(slices, labels, temperature, softcap)
    if group is not None:
        of_row = over_ranks(torch.stack(of_row), group, temperature)
    label_logit, top, log_sum, entropy = of_row
    log_sum = torch.where(legal, log_sum, math.nan)
    logp = (label_logit - finite(top)) / temperature - log_sum
    return logp, torch.where(legal, entropy, math.nan), top, log_sum


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b; of bf16 into fp32 too, where a CPU rounds a @ b to bf16."""
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not out.is_cuda:
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    elif add:  # older versions of addmm do not take an fp32 out beside bf16 operands
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def write_gradients(slices, upstream, rows, weight, into, *, add: bool = False) -> None:
    """Turns logits into their gradient g, in place, and that into the gradients of the head.

    upstream: grad_logp, grad_entropy, entropy, stats; rows: hidden, labels, temperature, softcap.
    into: dhidden in the type that is computed in, dweight, dbias; None for what is not wanted.
    With `add` dweight and dbias hold those of other rows already.
    """
    hidden, labels, temperature, softcap = rows
    dhidden, dweight, dbias = into
    for begin, end, x in slices:
        _backward_out(x, *upstream, x, labels - begin, temperature, softcap, NEVER)
        g = x.to(hidden.dtype)
        if dhidden is not None:
            product(dhidden, g, weight[begin:end], add=begin > 0)
        if dweight is not None:
            product(dweight[begin:end], g.t(), hidden, add=add)
        if dbias is not None:
            part = g.sum(0, dtype=temperature.dtype)
            dbias[begin:end] = dbias[begin:end] + part if add else part


def reached(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """The rows that have a gradient: not those of a clipped token, or of an advantage of 0."""
    live = grad_logp != 0
    return live if grad_entropy is None else live | (grad_entropy != 0)


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


def check_whole(op: str, **tensors: Tensor | None) -> None:
    """Not a part of a tensor of which other ranks hold the rest. Casts lose what tells it."""
    for name, x in tensors.items():
        if hasattr(x, "full_tensor"):
            raise TypeError(f"{op}: {name} is a DTensor: pass {name}.full_tensor()")
        if hasattr(x, "ds_id") and x.numel() == 0:
            needs = "call within deepspeed.zero.GatheredParameters"
            raise ValueError(f"{op}: {name} is a ZeRO-3 placeholder: {needs}")


def check_head(op, hidden, weight, labels, bias, group) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
        shapes = f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{op}: hidden must be [..., H] and weight [V, H], {shapes}")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{op}: hidden must be [..., H], H > 0, got {tuple(hidden.shape)}")
    if len(weight) == 0 and group is None:  # of an empty shard all ranks learn together
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
        others = "" if dtype in (torch.float32, torch.float64) else " or torch.float32"
        raise TypeError(f"{op}: logits_dtype must be None, {dtype}{others}, got {wanted}")
    return wanted or dtype


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of the operands of a linear layer."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype is torch.float64 else x.to(dtype) for x in tensors]


def head_arguments(
    op: str, hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index,
    logits_dtype, group=None,
):  # fmt: skip
    """What the user passes, checked and as the ops take it, rows in one axis.

    The logit scale is part of temperature and softcap: that costs nothing and rounds nothing.
    """
    check_tensors(op, hidden=hidden, weight=weight, labels=labels)
    if bias is not None:
        check_tensors(op, bias=bias)
    check_whole(op, hidden=hidden, weight=weight, bias=bias)
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(op, hidden, weight, labels, bias, group)
    if not isinstance(ignore_index, int):
        kind = type(ignore_index).__name__
        raise TypeError(f"{op}: ignore_index must be an integer, got {kind}")
    dtype = compute_dtype(op, hidden=hidden)
    scale = positive(op, "logit_scale", logit_scale, dtype)
    t = label_temperature(op, temperature, dtype, labels)
    if scale != 1 and t.dim() and t.device.type == "cpu" and not torch.compiler.is_compiling():
        check_temperature(op, t, labels != ignore_index)  # while it is what the user passed
    t = t / scale
    cap = 0.0 if softcap is None else positive(op, "softcap", softcap, dtype) / scale
    logits_dtype = dtype_of_logits(op, logits_dtype, hidden.dtype)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.long().reshape(-1)
    t = t.reshape(-1) if t.dim() else t
    return hidden, weight, bias, labels, t, cap, ignore_index, logits_dtype


def legal_labels(op: str, labels, weight, temperature, ignore_index) -> tuple[Tensor, Tensor]:
    """Where rows count, and where their labels are tokens. On the CPU bad values raise."""
    kept = labels != ignore_index
    legal = kept & (labels >= 0) & (labels < len(weight))
    check_label_values(op, labels, legal, kept, len(weight), ignore_index, temperature)
    return kept, legal


def labels_of_shard(op, group, labels, weight, temperature, ignore_index) -> tuple[Tensor, ...]:
    """What legal_labels says, and with a group labels as those of this rank's shard."""
    if group is None:
        return *legal_labels(op, labels, weight, temperature, ignore_index), labels
    return local_labels(op, group, len(weight), labels, temperature, ignore_index)
