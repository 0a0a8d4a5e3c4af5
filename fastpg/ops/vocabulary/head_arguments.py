"""What both linear ops are given: checked, and as they take it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from ..common.checks import (
    check_label_values,
    check_labels,
    check_shape,
    check_temperature,
    check_tensor,
    compute_dtype,
    label_temperature,
    positive,
)
from .head import Factors
from .shards import Shard, local_labels


def check_whole(op: str, name: str, x: Tensor) -> None:
    """Not a part of a tensor of which other ranks hold the rest. Casts lose what tells it."""
    if hasattr(x, "full_tensor"):
        raise TypeError(f"{op}: {name} is a DTensor: pass {name}.full_tensor()")
    if hasattr(x, "ds_id") and x.numel() == 0:
        needs = "call within deepspeed.zero.GatheredParameters"
        raise ValueError(f"{op}: {name} is a ZeRO-3 placeholder: {needs}")


def factors(op: str, hidden, weight, bias) -> Factors:
    """What the user passes, as many hidden as weight, in the dtype that a linear layer takes."""
    hidden, weight = ([*x] if isinstance(x, (list, tuple)) else [x] for x in (hidden, weight))
    biases = [] if bias is None else [bias]
    for name, tensors in (("hidden", hidden), ("weight", weight), ("bias", biases)):
        for x in tensors:
            check_tensor(op, name, x)
            check_whole(op, name, x)
    if len(hidden) != len(weight) or not weight:
        counts = f"got {len(hidden)} and {len(weight)}"
        raise ValueError(f"{op}: hidden and weight must be a tensor each, or as many, {counts}")
    return Factors.of(autocast(*hidden, *weight, bias))


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of the operands of a linear layer."""
    device = tensors[0].device.type
    if not is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype is torch.float64 else x.to(dtype) for x in tensors]


def check_head(op: str, head: Factors, labels: Tensor, group) -> None:
    first, tokens = head.hidden[0], head.weight[0].shape[:1]
    for hidden, weight in zip(head.hidden, head.weight, strict=True):
        if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
            shapes = f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"{op}: hidden must be [..., H] and weight [V, H], {shapes}")
        width = hidden.shape[-1:]
        if width[0] == 0:
            raise ValueError(f"{op}: hidden must be [..., H], H > 0, got {tuple(hidden.shape)}")
        check_shape(op, "hidden", hidden, first, first.shape[:-1] + width)
        check_shape(op, "weight", weight, first, tokens + width)
        check_dtype(op, first.dtype, hidden=hidden, weight=weight)
    if tokens[0] == 0 and group is None:  # of an empty shard all ranks learn together
        raise ValueError(f"{op}: weight must hold at least one token, got {tuple(weight.shape)}")
    check_shape(op, "bias", head.bias, first, tokens)
    check_dtype(op, first.dtype, bias=head.bias)
    check_labels(op, labels, first)


def check_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype is not dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, must be of hidden's {dtype}")


def dtype_of_logits(op: str, wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    wider = wanted is torch.float32 and dtype is not torch.float64
    if wanted not in (None, dtype) and not wider:
        others = "" if dtype in (torch.float32, torch.float64) else " or torch.float32"
        raise TypeError(f"{op}: logits_dtype must be None, {dtype}{others}, got {wanted}")
    return wanted or dtype


def head_arguments(
    op: str, hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index,
    logits_dtype, group=None,
):  # fmt: skip
    """What the user passes, checked and as the ops take it, rows in one axis.

    The logit scale is part of temperature and softcap: that costs nothing and rounds nothing.
    """
    check_tensor(op, "labels", labels)
    head = factors(op, hidden, weight, bias)
    check_head(op, head, labels, group)
    if not isinstance(ignore_index, int):
        kind = type(ignore_index).__name__
        raise TypeError(f"{op}: ignore_index must be an integer, got {kind}")
    dtype = compute_dtype(op, hidden=head.hidden[0])
    scale = positive(op, "logit_scale", logit_scale, dtype)
    t = label_temperature(op, temperature, dtype, labels)
    if scale != 1 and t.dim() and t.device.type == "cpu" and not torch.compiler.is_compiling():
        check_temperature(op, t, labels != ignore_index)  # while it is what the user passed
    t = t / scale
    cap = 0.0 if softcap is None else positive(op, "softcap", softcap, dtype) / scale
    if cap:
        positive(op, "softcap / logit_scale", cap, dtype)
    logits_dtype = dtype_of_logits(op, logits_dtype, head.hidden[0].dtype)
    rows = [x.reshape(-1, x.shape[-1]) for x in head.hidden]
    labels, t = labels.long().reshape(-1), t.reshape(-1) if t.dim() else t
    return head._replace(hidden=rows), labels, t, cap, ignore_index, logits_dtype


def legal_labels(op: str, labels, vocab: int, temperature, ignore_index) -> tuple[Tensor, Tensor]:
    """Where rows count, and where their labels are tokens. On the CPU bad values raise."""
    kept = labels != ignore_index
    legal = kept & (labels >= 0) & (labels < vocab)
    check_label_values(op, labels, legal, kept, vocab, ignore_index, temperature)
    return kept, legal


def labels_of_shard(op, group, labels, vocab, temperature, ignore_index) -> tuple[Tensor, ...]:
    """What legal_labels says, and with a group labels as those of this rank's shard."""
    if group is None:
        return *legal_labels(op, labels, vocab, temperature, ignore_index), labels
    return local_labels(Shard(op, group, vocab, labels, temperature, ignore_index))
