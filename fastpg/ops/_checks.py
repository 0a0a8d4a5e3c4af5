"""The checks of tensors that lie token by token beside each other."""

from __future__ import annotations

from torch import Tensor


def check_float(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_beside(op: str, name: str, tensor: Tensor, beside: str, first: Tensor) -> None:
    """`tensor` must be floating point, of the shape and on the device of `first`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if tensor.shape != first.shape:
        raise ValueError(
            f"{op}: {name} {tuple(tensor.shape)} must have the shape of {beside} "
            f"{tuple(first.shape)}"
        )
    if tensor.device != first.device:
        raise ValueError(f"{op}: {name} on {tensor.device}, {beside} on {first.device}")
