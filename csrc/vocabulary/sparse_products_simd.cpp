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

template <typename X>
void add_rows(const compute_t<X>* coefficients, const X* matrix, const int64_t* indices, int64_t n,
              int64_t width, compute_t<X>* __restrict__ sum) {
  using T = compute_t<X>;
  for (int64_t i = 0; i < n; ++i) {
    const T coefficient = coefficients[i];
    const X* row = matrix + indices[i] * width;
    const X* next = next_row(matrix, indices, i, n, width);
    int64_t done = 0;
    for (; done + kLanes <= width; done += kLanes) {
      prefetch_lanes(next + done);
      for (int64_t k = 0; k < kLanes; ++k) sum[done + k] += coefficient * load(row[done + k]);
    }
    for (; done < width; ++done) sum[done] += coefficient * load(row[done]);
  }
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
