"""What the vocabulary ops ask of labels, temperatures and soft caps."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import scalar
from ._checks import check_device, check_shape

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_labels(op: str, labels: Tensor, rows: Tensor) -> None:
    """labels [...] for rows [..., V] or [..., H]. Their values are checked by the kernels."""
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{op}: labels must be integers, got {labels.dtype}")
    check_shape(op, "labels", labels, rows, rows.shape[:-1])


def positive(op: str, name: str, value: float, dtype: torch.dtype) -> float:
    """value, by which the kernels divide, or multiply with its inverse, in dtype."""
    most = torch.finfo(dtype).max
    if not 1 / most < value < most:
        needs = f"and its inverse must be finite and > 0 in {dtype}"
        raise ValueError(f"{op}: {name} {needs}, got {value}")
    return value


def label_temperature(
    op: str, temperature: float | Tensor, dtype: torch.dtype, labels: Tensor
) -> Tensor:
    """0-d, or one per label. Always a tensor, so that a new value compiles nothing anew."""
    if not isinstance(temperature, Tensor):
        return scalar(positive(op, "temperature", temperature, dtype), dtype, labels.device)
    check_device(op, "temperature", temperature, labels)
    try:
        return temperature.detach().to(dtype).expand(labels.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: temperature {tuple(temperature.shape)} does not broadcast to labels "
            f"{tuple(labels.shape)}"
        ) from None
