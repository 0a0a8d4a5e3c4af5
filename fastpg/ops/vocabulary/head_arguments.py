"""What both linear ops are given: checked, and as they take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import is_autocast_available

from ..common.checks import (
    check_label_values,
    check_labels,
    check_shape,
    check_temperature,
    check_tensor,
    compute_dtype,
    integer,
    label_temperature,
    positive,
)
from .head import Head
from .shards import LocalLabels, Shard, local_labels


class HeadInputs(NamedTuple):
    """The arguments of a linear op, checked, with the rows in one axis."""

    hidden: list[Tensor]  # [N, H_i] each
    head_weight: list[Tensor]  # [V, H_i] each, like hidden
    bias: Tensor | None  # [V], like hidden
    labels: Tensor  # int64 [N]
    temperature: Tensor  # [N] or [], in the compute dtype
    softcap: float  # 0: none
    ignore_index: int
    logits_dtype: torch.dtype
    group: dist.ProcessGroup | None  # the vocabulary is in shards on its ranks; None: it is whole

    @property
    def head(self) -> Head:
        """What makes the logits."""
        return Head(self.hidden, self.head_weight, self.bias)


def check_whole(op: str, name: str, x: Tensor) -> None:
    """Raises for a tensor of which other ranks hold a part.

    It must be called before any cast, since casts drop what tells such a tensor.
    """
    if name != "hidden" and hasattr(x, "full_tensor"):
        average = f'{name}.full_tensor(grad_placements=[Partial("avg")])'
        raise TypeError(
            f"{op}: {name} is a DTensor: pass {average}, whose gradient is the mean over the ranks "
            f"as in FSDP; or call within the forward of the module whose FSDP group owns the head; "
            f"or, for a sharded vocabulary, pass {name}.to_local() and process_group"
        )
    if hasattr(x, "ds_id") and x.numel() == 0:
        needs = "call within deepspeed.zero.GatheredParameters"
        raise ValueError(f"{op}: {name} is a ZeRO-3 placeholder: {needs}")


def as_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A list of one tensor, or of as many as the user passes."""
    if isinstance(x, (list, tuple)):
        return list(x)
    return [x]  # type: ignore[list-item]  # what is no tensor is refused by its name


def has_several(labels: object, hidden: Tensor | Sequence[Tensor]) -> bool:
    """Whether there are K labels for each row: labels [..., K] beside hidden [..., H]."""
    first = hidden[0] if isinstance(hidden, (list, tuple)) and hidden else hidden
    if not isinstance(labels, Tensor) or not isinstance(first, Tensor):
        return False  # and they are refused by their names
    return labels.dim() == first.dim() > 0


def as_head(
    op: str,
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
) -> Head:
    """What the user passes, as many hidden as weight, in the dtype that a linear layer takes."""
    hiddens, weights = as_list(hidden), as_list(weight)
    biases = [] if bias is None else [bias]
    for name, tensors in (("hidden", hiddens), ("weight", weights), ("bias", biases)):
        for x in tensors:
            check_whole(op, name, x)
            check_tensor(op, name, x)
    if len(hiddens) != len(weights) or not weights:
        counts = f"got {len(hiddens)} and {len(weights)}"
        raise ValueError(f"{op}: hidden and weight must be a tensor each, or as many, {counts}")
    return autocast(Head(hiddens, weights, bias))


def autocast(head: Head) -> Head:
    """What autocast would make of the operands of a linear layer."""
    device = head.hidden[0].device.type
    if not is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return head
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype is torch.float64 else x.to(dtype)

    return Head(
        [cast(x) for x in head.hidden],
        [cast(x) for x in head.head_weight],
        None if head.bias is None else cast(head.bias),
    )


def check_head(op: str, head: Head, labels: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raises unless shapes, dtypes and devices fit."""
    first, tokens = head.hidden[0], head.head_weight[0].shape[:1]
    for hidden, weight in zip(head.hidden, head.head_weight, strict=True):
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
        shape = tuple(head.head_weight[0].shape)
        raise ValueError(f"{op}: weight must hold at least one token, got {shape}")
    check_shape(op, "bias", head.bias, first, tokens)
    check_dtype(op, first.dtype, bias=head.bias)
    check_labels(op, labels, first)


def check_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raises for a tensor that has not the dtype of hidden."""
    for name, x in tensors.items():
        if x is not None and x.dtype is not dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, must be of hidden's {dtype}")


def dtype_of_logits(op: str, wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logits, from the one that the user wants and that of hidden."""
    wider = wanted is torch.float32 and dtype is not torch.float64
    if wanted not in (None, dtype) and not wider:
        others = "" if dtype in (torch.float32, torch.float64) else " or torch.float32"
        raise TypeError(f"{op}: logits_dtype must be None, {dtype}{others}, got {wanted}")
    return wanted or dtype


def scaled_temperature(
    op: str,
    temperature: float | Tensor,
    scale: float,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """temperature / scale, [...] or []."""
    t = label_temperature(op, temperature, dtype, labels)
    if scale != 1 and t.dim() and t.device.type == "cpu" and not torch.compiler.is_compiling():
        check_temperature(op, t, labels != ignore_index)  # while it is what the user passed
    return t / scale


def head_inputs(
    op: str,
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    logits_dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
) -> HeadInputs:
    """Checks what the user passes, and brings the rows into one axis.

    The logit scale becomes a part of temperature and softcap: that costs and rounds nothing.
    """
    check_tensor(op, "labels", labels)
    head = as_head(op, hidden, weight, bias)
    check_head(op, head, labels, group)
    ignore_index = integer(op, "ignore_index", ignore_index)
    dtype = compute_dtype(op, hidden=head.hidden[0])
    scale = positive(op, "logit_scale", logit_scale, dtype)
    t = scaled_temperature(op, temperature, scale, labels, ignore_index, dtype)
    cap = 0.0 if softcap is None else positive(op, "softcap", softcap, dtype) / scale
    if cap:
        positive(op, "softcap / logit_scale", cap, dtype)
    return HeadInputs(
        hidden=[x.reshape(-1, x.shape[-1]) for x in head.hidden],
        head_weight=head.head_weight,
        bias=head.bias,
        labels=labels.long().reshape(-1),
        temperature=t.reshape(-1) if t.dim() else t,
        softcap=cap,
        ignore_index=ignore_index,
        logits_dtype=dtype_of_logits(op, logits_dtype, head.hidden[0].dtype),
        group=group,
    )


def legal_labels(
    op: str, labels: Tensor, vocab: int, temperature: Tensor, ignore_index: int
) -> LocalLabels:
    """Checks the labels of a whole vocabulary. On the CPU bad values raise."""
    kept = labels != ignore_index
    legal = kept & (labels >= 0) & (labels < vocab)
    check_label_values(op, labels, legal, kept, vocab, ignore_index, temperature)
    return LocalLabels(kept, legal, labels)


def labels_of_shard(op: str, x: HeadInputs) -> LocalLabels:
    """Checks the labels, and with a group counts them from the first token of this rank."""
    vocab = len(x.head_weight[0])
    if x.group is None:
        return legal_labels(op, x.labels, vocab, x.temperature, x.ignore_index)
    return local_labels(Shard(op, x.group, vocab, x.labels, x.temperature, x.ignore_index))
