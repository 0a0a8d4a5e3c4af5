"""Where rows of logits lie in memory, as the kernels are told.

A kernel finds the logits of a row adjacent, and the rows at two strides at most: `inner` rows lie
inner_stride apart, and groups of them outer_stride apart.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._library import DTYPE_CODE
from ..._op import Op


class RowSizes(NamedTuple):
    """The integers that C++ takes first; strides count elements."""

    dtype: int  # of the logits, a code of DTYPE_CODE
    count: int  # type: ignore[assignment]  # of rows; it hides tuple.count
    inner: int
    outer_stride: int
    inner_stride: int
    vocab: int
    temperature_per_row: bool  # else there is one for all


def row_sizes(logits: Tensor, labels: Tensor, temperature: Tensor) -> RowSizes:
    """The sizes of addressable logits [..., V]."""
    if logits.dim() > 3:
        logits = logits.flatten(0, -3)  # a view, else they were not addressable
    shape, strides = logits.shape, logits.stride()
    outer_stride, inner_stride, inner = 0, 0, 1
    if len(shape) > 1:
        inner, inner_stride = shape[-2], strides[-2]
    if len(shape) > 2:
        outer_stride = strides[0]
    return RowSizes(
        DTYPE_CODE[logits.dtype],
        labels.numel(),
        inner,
        outer_stride,
        inner_stride,
        shape[-1],
        temperature.dim() > 0,
    )


def addressable(logits: Tensor) -> Tensor:
    """The same logits, in a layout that kernels can be told; copied only if they must be."""
    strides = logits.stride()
    if strides[-1] == 1 and len(strides) <= 3:  # nearly every call ends here
        return logits
    if strides[-1] != 1 and logits.shape[-1] > 1:
        return logits.contiguous()
    if len(strides) > 3 and not _leading_axes_are_one(logits):
        return logits.contiguous()
    return logits


def _leading_axes_are_one(logits: Tensor) -> bool:
    """Whether all axes but the last two can be seen as one axis with one stride."""
    try:
        logits.view(-1, logits.shape[-2], logits.shape[-1])
    except RuntimeError:
        return False
    return True


def may_overwrite(op: str, argument: str, logits: Tensor) -> bool:
    """Whether the gradient goes over the logits, where an argument of this name is True.

    It does not where no gradient is wanted, nor in torch.compile, whose own matter this is, nor
    under hooks of saved tensors, as in a checkpoint: there torch does not notice who else needs
    the logits.

    Raises:
        ValueError: The logits are a leaf of the graph, or not contiguous.
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if not wanted or torch.compiler.is_compiling():
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    # A view of a leaf is as much in use as the leaf: the optimiser reads it later.
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or (base.is_leaf and base.requires_grad):
        raise ValueError(
            f"{op}: {argument}=True would overwrite logits that are a leaf of the graph"
        )
    if not logits.is_contiguous():
        shape, strides = tuple(logits.shape), logits.stride()
        raise ValueError(f"{op}: {argument}=True needs contiguous logits, got {shape} by {strides}")
    return True


class RowsOp(Op):
    """An op that reads rows of logits; its kernel in C++ gets them addressable."""

    def cpp_kernel(self, module: ModuleType, *, on_gpu: bool) -> Callable:
        kernel = super().cpp_kernel(module, on_gpu=on_gpu)
        place = list(self.inputs.types).index("logits")

        def on_addressable_rows(x: Any) -> Any:
            values = self.inputs.flatten(x)
            logits = values[place]
            prepared = addressable(logits)
            if prepared is logits:
                return kernel(x)
            return kernel(self.inputs.restore((*values[:place], prepared, *values[place + 1 :])))

        return on_addressable_rows
