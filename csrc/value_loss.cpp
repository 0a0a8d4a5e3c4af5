// The value loss of a batch of tokens: blocks over the threads, merged in block order.
#include "value_loss.h"

#include <vector>

#include "parallel.h"
#include "simd/kernels.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32;  // blocks a thread should have at least

template <typename T>
ValueTokens<T> from(const ValueTokens<T>& t, int64_t i) {
  return {t.values + i, t.returns + i, t.weight + i, t.old_values ? t.old_values + i : nullptr};
}

void merge_moments(double* total, const double* part, int mean) {
  const Moments all = merge(Moments{total[kValueCount], total[mean], total[mean + 1]},
                            Moments{part[kValueCount], part[mean], part[mean + 1]});
  total[mean] = all.mean;
  total[mean + 1] = all.m2;
}

void merge_block(double* total, const double* part) {
  merge_moments(total, part, kReturnMean);
  merge_moments(total, part, kResidualMean);
  for (int i = 0; i < kValueSums; ++i) total[i] += part[i];  // the count last: the moments need it
}

}  // namespace

template <typename T>
void value_loss(const ValueTokens<T>& tokens, int64_t count, T clip, const ValueOut<T>& out) {
  const ValueLossKernels<T>& kernel = kernels();
  const int64_t blocks = ceil_div(count, kTokenBlock);
  std::vector<double> parts(blocks * kValueFields);
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTokenBlock;
      kernel.value_block(from(tokens, first), smaller(kTokenBlock, count - first), clip,
                         out.coefficient + first, &parts[i * kValueFields]);
    }
  });
  for (int i = 0; i < kValueFields; ++i) out.stats[i] = 0;
  for (int64_t i = 0; i < blocks; ++i) merge_block(out.stats, &parts[i * kValueFields]);
  *out.loss = T(out.stats[kValueLoss]);
}

template void value_loss(const ValueTokens<float>&, int64_t, float, const ValueOut<float>&);
template void value_loss(const ValueTokens<double>&, int64_t, double, const ValueOut<double>&);

}  // namespace fpg
