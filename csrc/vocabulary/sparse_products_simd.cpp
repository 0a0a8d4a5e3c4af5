// One row of a sampled or a sparse product.
#include "simd/lanes.h"
#include "simd/select.h"
#include "vocabulary/sparse_products.h"

namespace fpg {
namespace {

constexpr int64_t kLanes = 64;  // four AVX-512 accumulators hide the latency of an addition

// The rows of the matrix lie anywhere in memory: the next one is asked for while this one is read.
template <typename X>
FPG_HD void prefetch_lanes(const X* x) {
  for (uint64_t i = 0; i < kLanes * sizeof(X); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(x) + i, 0, 2);
}

template <typename X>
FPG_HD const X* next_row(const X* matrix, const int64_t* indices, int64_t i, int64_t n,
                         int64_t width) {
  return matrix + indices[i + 1 < n ? i + 1 : i] * width;
}

template <typename X>
void sampled_row(const X* row, const X* matrix, const int64_t* indices, int64_t n, int64_t width,
                 compute_t<X>* out) {
  using T = compute_t<X>;
  for (int64_t i = 0; i < n; ++i) {
    const X* column = matrix + indices[i] * width;
    const X* next = next_row(matrix, indices, i, n, width);
    T lanes[kLanes] = {};
    int64_t done = 0;
    for (; done + kLanes <= width; done += kLanes) {
      prefetch_lanes(next + done);
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += load(row[done + k]) * load(column[done + k]);
    }
    for (int64_t k = 0; k < width - done; ++k)
      lanes[k] += load(row[done + k]) * load(column[done + k]);
    out[i] = fold_sum(lanes);
  }
}

// sum[h] += coefficients[0] row_0[h], then the next of kRows rows: the sum is read and written once
// for them. `left` tells how many rows there are from here on.
template <int kRows, typename X>
FPG_HD void add_some(const compute_t<X>* coefficients, const X* matrix, const int64_t* indices,
                     int64_t left, int64_t width, compute_t<X>* __restrict__ sum) {
  using T = compute_t<X>;
  const X* rows[kRows];
  const X* next[kRows];
  for (int j = 0; j < kRows; ++j) {
    rows[j] = matrix + indices[j] * width;
    next[j] = matrix + indices[j + kRows < left ? j + kRows : left - 1] * width;
  }
  int64_t done = 0;
  for (; done + kLanes <= width; done += kLanes) {
    for (int j = 0; j < kRows; ++j) prefetch_lanes(next[j] + done);
    for (int64_t k = done; k < done + kLanes; ++k) {
      T total = sum[k];
      for (int j = 0; j < kRows; ++j) total += coefficients[j] * load(rows[j][k]);
      sum[k] = total;
    }
  }
  for (; done < width; ++done)
    for (int j = 0; j < kRows; ++j) sum[done] += coefficients[j] * load(rows[j][done]);
}

template <typename X>
void add_rows(const compute_t<X>* coefficients, const X* matrix, const int64_t* indices, int64_t n,
              int64_t width, compute_t<X>* __restrict__ sum) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce)
    add_some<kAtOnce>(coefficients + i, matrix, indices + i, n - i, width, sum);
  for (; i < n; ++i) add_some<1>(coefficients + i, matrix, indices + i, n - i, width, sum);
}

template <typename X>
void round_row(const compute_t<X>* sum, int64_t width, X* __restrict__ out) {
  for (int64_t k = 0; k < width; ++k) store(&out[k], sum[k]);
}

}  // namespace

namespace FPG_ISA {

template <>
const SparseProductsKernels<bf16>& table() {
  static constexpr SparseProductsKernels<bf16> kernels = {sampled_row<bf16>, add_rows<bf16>,
                                                          round_row<bf16>};
  return kernels;
}
template <>
const SparseProductsKernels<fp16>& table() {
  static constexpr SparseProductsKernels<fp16> kernels = {sampled_row<fp16>, add_rows<fp16>,
                                                          round_row<fp16>};
  return kernels;
}
template <>
const SparseProductsKernels<float>& table() {
  static constexpr SparseProductsKernels<float> kernels = {sampled_row<float>, add_rows<float>,
                                                           round_row<float>};
  return kernels;
}
template <>
const SparseProductsKernels<double>& table() {
  static constexpr SparseProductsKernels<double> kernels = {sampled_row<double>, add_rows<double>,
                                                            round_row<double>};
  return kernels;
}

}  // namespace FPG_ISA
}  // namespace fpg
