"""A head whose parameters are of ZeRO-3: DeepSpeed takes their memory away between uses.

Such a parameter is empty, of shape [0], until it is gathered. It has shape `ds_shape`, and each
rank of `ds_process_group` a part of its flat values in `ds_tensor`. It is gathered for forward and
again for backward; between them the graph keeps the parameter in place of the memory. All ranks
must call alike, and go backward alike.

The gradient of the whole goes to the parameter, and DeepSpeed's hooks there add it up over the
ranks. torch asks a parameter for its shape when it is used, and again when its gradient comes: an
empty one then holds a stand-in of the whole shape that takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def is_of_zero3(x: object) -> bool:
    """Whether DeepSpeed holds the values of this parameter."""
    return hasattr(x, "ds_id")


def is_empty(x: Tensor) -> bool:
    """Whether a parameter of ZeRO-3 has not its shape now."""
    return x.numel() == 0


def has_values(x: Tensor) -> bool:
    """Whether a parameter of ZeRO-3 is gathered now, and not just about to be."""
    return x.ds_status.name == "AVAILABLE"  # type: ignore[attr-defined]


def can_be_read_in_parts(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the ranks of one group hold the values of these tensors in order, in this dtype.

    Not so of parameters that are gathered now, and where parts are quantized, on another device, or
    kept a second time on each node.
    """
    return all(
        is_of_zero3(x)
        and not has_values(x)
        and _has_plain_parts(x)
        and x.dtype is dtype
        and x.ds_process_group is weights[0].ds_process_group  # type: ignore[attr-defined]
        for x in weights
    )


def _has_plain_parts(x: Tensor) -> bool:
    part = x.ds_tensor  # type: ignore[attr-defined]
    as_is = part.dtype is x.dtype and part.device == x.device and part.numel() == part.ds_numel
    return as_is and getattr(x, "ds_secondary_tensor", None) is None


def values_of(x: Tensor) -> Tensor:
    """The values of a parameter of ZeRO-3; if it is not gathered now, a collective call."""
    if has_values(x):
        return x.detach()
    with import_module("deepspeed").zero.GatheredParameters([x]):
        return x.detach()  # DeepSpeed lets go of this memory, and does not overwrite it


class _GradientTo(torch.autograd.Function):
    """Values of a parameter, whose gradient goes to the parameter itself, empty as it may be."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        ctx.parameter = parameter
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if is_empty(ctx.parameter):
            # The stand-in has to last until torch has added the gradient to the parameter's.
            give_back = stand_in(ctx.parameter)
            torch.autograd.Variable._execution_engine.queue_callback(give_back)
        return grad, None


def whole(x: Tensor) -> Tensor:
    """A parameter of ZeRO-3 as any other tensor, of which `whole_of` is it; a collective call."""
    result = _with_gradient_to(x, values_of(x))
    result.whole_of = x  # type: ignore[attr-defined]
    return result


def outline(x: Tensor) -> Tensor:
    """A tensor of the shape of an empty parameter, without memory; its `outline_of` is it."""
    result = _with_gradient_to(x, _without_memory(x))
    result.outline_of = x  # type: ignore[attr-defined]
    return result


def _without_memory(x: Tensor) -> Tensor:
    return x.data.new_empty(()).expand(x.ds_shape)  # type: ignore[attr-defined]


def _with_gradient_to(x: Tensor, values: Tensor) -> Tensor:
    """Values of a parameter, whose gradient goes to it."""
    if not (is_empty(x) and x.requires_grad and torch.is_grad_enabled()):
        return _GradientTo.apply(x, values)
    give_back = stand_in(x)
    try:
        return _GradientTo.apply(x, values)
    finally:
        give_back()


def is_outline(x: Tensor) -> bool:
    """Whether this is an outline."""
    return hasattr(x, "outline_of")


def stand_in(x: Tensor) -> Callable[[], None]:
    """Gives an empty parameter its shape; returns what takes it away again."""
    empty: Tensor = x.data
    stands_in = _without_memory(x)
    x.data = stands_in

    def give_back() -> None:
        # DeepSpeed may have given it other memory in the meantime, which stays.
        if x.data_ptr() == stands_in.data_ptr():
            x.data = empty

    return give_back


def gathered_again(tensors: Sequence[Tensor | None]) -> AbstractContextManager:
    """Within it, the graph keeps no memory of what `whole` made; backward gathers it again.

    Args:
        tensors: What the op is given. What else is saved is kept as ever.
    """
    parameters = {
        x.data_ptr(): x.whole_of for x in tensors if x is not None and hasattr(x, "whole_of")
    }
    if not parameters:
        return nullcontext()

    def pack(saved: Tensor) -> tuple[Tensor | None, Tensor | None]:
        parameter = parameters.get(saved.data_ptr())
        if parameter is None or parameter.ds_shape != saved.shape:
            return saved, None
        return None, parameter

    def unpack(kept: tuple[Tensor | None, Tensor | None]) -> Tensor:
        saved, parameter = kept
        return values_of(parameter) if saved is None else saved  # type: ignore[arg-type]

    return saved_tensors_hooks(pack, unpack)
