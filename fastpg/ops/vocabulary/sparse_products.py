"""Products with some rows of a matrix alone, as entries in the CSR form name them.

Row i has the entries offsets[i] ≤ e < offsets[i + 1]. Each names a row of a matrix, and within i
these rise:

    sampled_product   products_e = hidden_i · head_weight[token_ids_e],   e an entry of row i
    sparse_product    sums_i = Σ_e coefficients_e matrix[indices_e],      over the entries of row i

Both are sums in the compute dtype, in an order that depends on the row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import DTYPE_CODE
from ..._op import Op

# The reference gathers this many values at a time.
GATHERED = 2**24


class SampledInputs(NamedTuple):
    hidden: Tensor  # [N, H]
    head_weight: Tensor  # [V, H], like hidden
    token_ids: Tensor  # int64 [E]
    offsets: Tensor  # int64 [N + 1]


class SampledOutputs(NamedTuple):
    products: Tensor  # [E], in the compute dtype


class SparseInputs(NamedTuple):
    matrix: Tensor  # [M, H]
    coefficients: Tensor  # [E], in the compute dtype
    indices: Tensor  # int64 [E]
    offsets: Tensor  # int64 [N + 1]


class SparseOutputs(NamedTuple):
    sums: Tensor  # [N, H], like matrix


class Sizes(NamedTuple):
    """The integers that C++ takes first."""

    dtype: int  # of the matrix, a code of DTYPE_CODE
    count: int  # type: ignore[assignment]  # of rows with entries; it hides tuple.count
    width: int
    matrix_rows: int


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with x are added up."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def lengths(offsets: Tensor) -> Tensor:
    """How many entries each row has."""
    return offsets[1:] - offsets[:-1]


def row_of_entry(offsets: Tensor, count: int) -> Tensor:
    """The row [E] that each of `count` entries belongs to."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(lengths(offsets), output_size=count)


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """The sum over the entries of each row, of x [E] or [E, H]; 0 for a row without entries."""
    return torch.segment_reduce(x, "sum", lengths=lengths(offsets), axis=0, unsafe=True, initial=0)


def reference_sampled(x: SampledInputs) -> SampledOutputs:
    """The specification: gather, multiply, add, for a slice of the entries after another."""
    dtype, count = compute_dtype(x.hidden), len(x.token_ids)
    rows = row_of_entry(x.offsets, count)
    size = max(1, GATHERED // x.hidden.shape[1])
    products = x.hidden.new_empty(count, dtype=dtype)
    for start in range(0, count, size):
        part = slice(start, start + size)
        gathered = x.hidden[rows[part]].to(dtype) * x.head_weight[x.token_ids[part]].to(dtype)
        products[part] = gathered.sum(1)
    return SampledOutputs(products)


def reference_sparse(x: SparseInputs) -> SparseOutputs:
    """The specification: gather, multiply, add, for a slice of the columns after another."""
    dtype, width = compute_dtype(x.matrix), x.matrix.shape[1]
    size = max(1, GATHERED // max(1, len(x.indices)))
    sums = x.matrix.new_empty(len(x.offsets) - 1, width)
    for start in range(0, width, size):
        part = slice(start, start + size)
        gathered = x.coefficients[:, None] * x.matrix[:, part][x.indices].to(dtype)
        sums[:, part] = segment_sum(gathered, x.offsets)
    return SparseOutputs(sums)


def allocate_sampled(x: SampledInputs) -> SampledOutputs:
    """Makes empty products."""
    return SampledOutputs(x.hidden.new_empty(len(x.token_ids), dtype=compute_dtype(x.hidden)))


def allocate_sparse(x: SparseInputs) -> SparseOutputs:
    """Makes empty sums."""
    return SparseOutputs(x.matrix.new_empty(len(x.offsets) - 1, x.matrix.shape[1]))


def sampled_sizes(x: SampledInputs) -> Sizes:
    """Tells C++ the shapes."""
    count, width = x.hidden.shape
    return Sizes(DTYPE_CODE[x.hidden.dtype], count, width, len(x.head_weight))


def sparse_sizes(x: SparseInputs) -> Sizes:
    """Tells C++ the shapes."""
    matrix_rows, width = x.matrix.shape
    return Sizes(DTYPE_CODE[x.matrix.dtype], len(x.offsets) - 1, width, matrix_rows)


sampled_product_op = Op(
    "sampled_product",
    SampledInputs,
    SampledOutputs,
    page=__name__,
    reference=reference_sampled,
    allocate=allocate_sampled,
    sizes=sampled_sizes,
)
sparse_product_op = Op(
    "sparse_product",
    SparseInputs,
    SparseOutputs,
    page=__name__,
    reference=reference_sparse,
    allocate=allocate_sparse,
    sizes=sparse_sizes,
)
