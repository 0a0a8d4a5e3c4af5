// The arguments of fastpg/ops/vocabulary/sparse_products.py, and the loops over one row.
#pragma once

#include "common/elementary.h"
#include "common/fields.h"
#include "common/stream.h"

namespace fpg {

// Row i has the entries offsets[i] <= e < offsets[i + 1], whose ids or indices rise.
struct SampledProductArguments {
  int dtype;                          // of hidden and head_weight
  int64_t count, width, matrix_rows;  // of hidden, and the rows of head_weight
  const void* hidden;
  const void* head_weight;
  const int64_t* token_ids;
  const int64_t* offsets;
  void* products;  // [entries], in the compute type
  Stream stream;

  FPG_FIELDS(dtype, count, width, matrix_rows, hidden, head_weight, token_ids, offsets, products,
             stream)
};

struct SparseProductArguments {
  int dtype;                          // of matrix and sums
  int64_t count, width, matrix_rows;  // of sums, and the rows of matrix
  const void* matrix;
  const void* coefficients;  // [entries], in the compute type
  const int64_t* indices;
  const int64_t* offsets;
  void* sums;  // [count, width]
  Stream stream;

  FPG_FIELDS(dtype, count, width, matrix_rows, matrix, coefficients, indices, offsets, sums, stream)
};

// The loops of sparse_products_simd.cpp, which is compiled for each instruction set.
template <typename X>
struct SparseProductsKernels {
  using T = compute_t<X>;
  // out[e] = sum_h row[h] matrix[indices[e], h]
  void (*sampled_row)(const X* row, const X* matrix, const int64_t* indices, int64_t n,
                      int64_t width, T* out);
  // sum[h] += sum_e coefficients[e] matrix[indices[e], h]
  void (*add_rows)(const T* coefficients, const X* matrix, const int64_t* indices, int64_t n,
                   int64_t width, T* sum);
  void (*round_row)(const T* sum, int64_t width, X* out);
};

}  // namespace fpg
