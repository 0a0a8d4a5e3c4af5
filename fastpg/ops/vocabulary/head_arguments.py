"""What both linear ops are given: checked, and as they take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import is_autocast_available

from ..._op import is_dtensor
from ..common.checks import (
    check_label_values,
    check_labels,
    check_shape,
    check_shape_of_tensor,
    check_temperature,
    check_tensor,
    compute_dtype,
    integer,
    label_temperature,
    positive,
)
from .head import Head
from .placeholders import can_be_read_in_parts, is_empty, is_of_zero3, is_outline, outline, whole
from .shards import LocalLabels, Shard, local_labels


class HeadInputs(NamedTuple):
    """The arguments of a linear op, checked, with the rows in one axis."""

    hidden: list[Tensor]  # [N, H_i] each
    head_weight: list[Tensor]  # [V, H_i] each, like hidden; or DTensors in shards of V
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


def in_shards(weights: list[Tensor]) -> bool:
    """Whether the vocabulary of all weights lies in shards on the same ranks in a row.

    That is so of DTensors in Shard(0), and of the outlines of parameters of ZeRO-3.
    """
    if all(is_dtensor(x) for x in weights):
        return _in_rows(weights)
    return all(is_outline(x) for x in weights)


def _in_rows(weights: list[Tensor]) -> bool:
    """Whether DTensors are in Shard(0) on one mesh of one axis."""
    from torch.distributed.tensor import Shard

    first = weights[0].device_mesh  # type: ignore[attr-defined]
    return first.ndim == 1 and all(
        weight.device_mesh == first  # type: ignore[attr-defined]
        and type(weight.placements[0]) is Shard  # type: ignore[attr-defined]
        and weight.placements[0].dim == 0  # type: ignore[attr-defined]
        for weight in weights
    )


def gathered(x: Tensor) -> Tensor:
    """The whole of a DTensor or of a parameter of ZeRO-3; any other tensor as it is.

    Each rank has the gradient of its own rows. Backward keeps their mean, as FSDP2 does; that of
    ZeRO-3 is left to DeepSpeed.
    """
    if is_of_zero3(x) and not torch.compiler.is_compiling():
        return whole(x)
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    mean = [Partial("avg")] * x.device_mesh.ndim  # type: ignore[attr-defined]
    return x.full_tensor(grad_placements=mean)  # type: ignore[attr-defined]


def of_head(
    op: str, name: str, x: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None
) -> Tensor:
    """A weight or bias, checked; a DTensor in the dtype of hidden, which FSDP2 would give it."""
    if group is None and is_dtensor(x):
        return x.to(dtype)
    check_tensor(op, name, x)
    if is_of_zero3(x) and is_empty(x) and torch.compiler.is_compiling():
        needs = "under torch.compile, call within deepspeed.zero.GatheredParameters"
        raise ValueError(f"{op}: {name} is a ZeRO-3 placeholder: {needs}")
    return x


def as_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A list of one tensor, or of as many as the user passes."""
    if isinstance(x, (list, tuple)):
        return list(x)
    # What is no tensor is refused later, by its name.
    return [x]  # type: ignore[list-item]


def has_several(labels: object, hidden: Tensor | Sequence[Tensor]) -> bool:
    """Whether there are K labels for each row: labels [..., K] beside hidden [..., H]."""
    first = hidden[0] if isinstance(hidden, (list, tuple)) and hidden else hidden
    # What is no tensor is refused later, by its name.
    if not isinstance(labels, Tensor) or not isinstance(first, Tensor):
        return False
    return labels.dim() == first.dim() > 0


def as_head(
    op: str,
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
    *,
    keep_shards: bool,
) -> Head:
    """What the user passes, as many hidden as weight, in the dtype that a linear layer takes."""
    hiddens, weights = as_list(hidden), as_list(weight)
    for x in hiddens:
        check_tensor(op, "hidden", x)
    if len(hiddens) != len(weights) or not weights:
        counts = f"got {len(hiddens)} and {len(weights)}"
        raise ValueError(f"{op}: hidden and weight must be a tensor each, or as many, {counts}")
    dtype = hiddens[0].dtype
    weights = [of_head(op, "weight", x, dtype, group) for x in weights]
    if bias is not None:
        bias = gathered(of_head(op, "bias", bias, dtype, group))
    # Autocast would make memory of outlines, which take none.
    keep_outlines = keep_shards and group is None and not casts(hiddens[0].device.type)
    if keep_outlines and can_be_read_in_parts(weights, dtype):
        weights = [outline(x) for x in weights]
    elif not (keep_shards and in_shards(weights)):
        weights = [gathered(x) for x in weights]
    return autocast(Head(hiddens, weights, bias))


def casts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(head: Head) -> Head:
    """What autocast would make of the operands of a linear layer."""
    device = head.hidden[0].device.type
    if not casts(device):
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
        check_shape_of_tensor(op, "weight", weight, first, tokens + width)
        check_dtype(op, first.dtype, hidden=hidden, weight=weight)
    # With a group an empty shard is found later, where all ranks learn of it together.
    if tokens[0] == 0 and group is None:
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
    if not isinstance(temperature, Tensor):
        positive(op, "temperature / logit_scale", temperature / scale, dtype)
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
    keep_shards: bool = False,
) -> HeadInputs:
    """Checks what the user passes, and brings the rows into one axis.

    The logit scale becomes a part of temperature and softcap: that costs and rounds nothing.
    A DTensor or a parameter of ZeRO-3 is gathered, unless keep_shards leaves it in shards.
    """
    check_tensor(op, "labels", labels)
    head = as_head(op, hidden, weight, bias, group, keep_shards=keep_shards)
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
