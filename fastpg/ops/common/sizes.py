"""The integers that the kernels in C++ take before the tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..._library import DTYPE_CODE


class ElementSizes(NamedTuple):
    """For ops that treat every element alike."""

    dtype: int  # a code of DTYPE_CODE
    # mypy sees tuple's method `count` here, which nobody calls; C++ names the field so too.
    count: int  # type: ignore[assignment]


class SequenceSizes(NamedTuple):
    """For ops on sequences, padded or packed."""

    dtype: int  # a code of DTYPE_CODE
    sequence_count: int
    length: int  # of each sequence; of all of them together, where they are packed


def element_sizes(x: Tensor) -> ElementSizes:
    """The sizes of an op on the elements of x."""
    return ElementSizes(DTYPE_CODE[x.dtype], x.numel())


def sequence_sizes(tokens: Tensor, cu_seqlens: Tensor | None, dtype: Tensor) -> SequenceSizes:
    """The sizes of an op on tokens [B, T], or [N] with cu_seqlens, in the dtype of a tensor."""
    if cu_seqlens is None:
        count, length = tokens.shape
    else:
        count, length = cu_seqlens.shape[0] - 1, tokens.shape[0]
    return SequenceSizes(DTYPE_CODE[dtype.dtype], count, length)
