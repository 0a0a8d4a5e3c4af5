// Products with some rows of a matrix alone, row by row of their results over the threads.
#include "vocabulary/sparse_products.h"

#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {
namespace {

// Row i belongs to strip i % kStrips, and a thread gets whole strips: tokens that are in many sets
// tend to be neighbours, and no thread should have them all.
constexpr int64_t kStrips = 64;

template <typename Body>
void for_each_row(int64_t count, int64_t work, const Body& body) {
  constexpr int64_t kGrain = 32768;  // products a thread should have at least
  const int64_t grain = kGrain * kStrips / larger<int64_t>(work, 1);
  parallel_for(kStrips, grain, [&](int64_t begin, int64_t end) { body(begin, end, count); });
}

void sampled_product(const SampledProductArguments& in) {
  with_float_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    using T = compute_t<X>;
    const auto& kernel = kernels<SparseProductsKernels<X>>();
    const X* hidden = static_cast<const X*>(in.hidden);
    const X* head_weight = static_cast<const X*>(in.head_weight);
    T* products = static_cast<T*>(in.products);
    const int64_t work = in.offsets[in.count] * in.width;
    for_each_row(in.count, work, [&](int64_t begin, int64_t end, int64_t count) {
      for (int64_t strip = begin; strip < end; ++strip)
        for (int64_t i = strip; i < count; i += kStrips) {
          const int64_t first = in.offsets[i];
          kernel.sampled_row(hidden + i * in.width, head_weight, in.token_ids + first,
                             in.offsets[i + 1] - first, in.width, products + first);
        }
    });
  });
}

void sparse_product(const SparseProductArguments& in) {
  with_float_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    using T = compute_t<X>;
    const auto& kernel = kernels<SparseProductsKernels<X>>();
    const X* matrix = static_cast<const X*>(in.matrix);
    const T* coefficients = static_cast<const T*>(in.coefficients);
    X* sums = static_cast<X*>(in.sums);
    const int64_t work = (in.offsets[in.count] + in.count) * in.width;
    for_each_row(in.count, work, [&](int64_t begin, int64_t end, int64_t count) {
      std::vector<T> scratch(in.width);
      for (int64_t strip = begin; strip < end; ++strip)
        for (int64_t i = strip; i < count; i += kStrips) {
          const int64_t first = in.offsets[i];
          kernel.sparse_row(coefficients + first, matrix, in.indices + first,
                            in.offsets[i + 1] - first, in.width, scratch.data(),
                            sums + i * in.width);
        }
    });
  });
}

FPG_BIND(sampled_product, sampled_product)
FPG_BIND(sparse_product, sparse_product)

}  // namespace
}  // namespace fpg
