// The value loss of a batch of tokens: blocks over the threads, merged in block order.
#include "loss/value_loss.h"

#include <vector>

#include "common/parallel.h"
#include "simd/kernels.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32;  // blocks a thread should have at least

template <typename T>
ValueTokens<T> from(const ValueTokens<T>& t, int64_t i) {
  return {t.values + i, t.returns + i, t.weight + i, t.old_values ? t.old_values + i : nullptr};
}

}  // namespace

template <typename T>
void value_loss(const ValueTokens<T>& tokens, int64_t count, T clip, const ValueOut<T>& out) {
  const ValueLossKernels<T>& kernel = kernels();
  const int64_t blocks = ceil_div(count, kTokenBlock);
  std::vector<ValueStats> parts(blocks);
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kTokenBlock;
      kernel.value_block(from(tokens, first), smaller(kTokenBlock, count - first), clip,
                         out.coefficient + first, parts[i].x);
    }
  });
  clear(*out.stats);
  for (const ValueStats& part : parts) merge(*out.stats, part);
  *out.loss = T(out.stats->x[kValueLoss]);
}

template void value_loss(const ValueTokens<float>&, int64_t, float, const ValueOut<float>&);
template void value_loss(const ValueTokens<double>&, int64_t, double, const ValueOut<double>&);

}  // namespace fpg
